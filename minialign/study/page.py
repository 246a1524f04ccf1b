"""The study's page: the figures, their range over seeds, the findings, and Table 7 where reward
models were trained.

Beside CHAIR_i stands recall, as whoever says less hallucinates less.
"""

from pathlib import Path

from minialign.evaluation.metrics import Interval, in_words
from minialign.evaluation.report import escape, results_table, write_page
from minialign.study.findings import OURS, shown_difference

TITLE = "minialign: the comparison on the embedded world"
# Of all that study.json holds: the table's, those whose range over seeds is shown, and direct
# questions.
SHOWN = (
    "chair_i", "chair_s", "recall", "pope_adversarial", "colour_errors", "position_errors",
    "length",
)  # fmt: skip
RANGED = ("chair_i", "chair_s", "recall", "pope_adversarial")
ASKED = ("ask", "ask_cell", "ask_colour", "ask_position", "ask_count", "ask_setting")


def write_study(
    path: Path, made: dict, rows: list[dict], findings: list[dict], rewards: list[dict]
) -> None:
    """Write the page; `made`, `rows`, `findings` and `rewards` are those of study.json."""
    settings = {name: value for name, value in made.items() if name != "date"}
    trained = [row for row in rows if row["row"] != "base"]
    learned = ", ".join(f"{row['row']} {row['pairs']:,} in {row['steps']:,}" for row in trained)
    body = f"""<h2>Results</h2>
<p class="note">CHAIR and errors: lower is better. Recall and POPE: higher. Length: words.</p>
{results_table(columns(rows, SHOWN), corner="row")}
<p class="note">Pairs or responses that were learned from, and steps, all seeds together:
{escape(learned)}.</p>
{asked_table(rows)}{ranges_table(rows)}<h2>Findings</h2>{findings_table(findings)}
{rewards_table(rewards)}"""
    write_page(path, TITLE, settings, body)


def columns(rows: list[dict], names: tuple[str, ...]) -> dict[str, dict[str, Interval]]:
    """{figure: {row: value and interval}}, of the figures that rows have."""
    table: dict[str, dict[str, Interval]] = {}
    for name in names:
        column = {row["row"]: row["metrics"][name] for row in rows if name in row["metrics"]}
        if column:
            table[name] = column
    return table


def asked_table(rows: list[dict]) -> str:
    """The share of direct questions that are answered right, where they were asked."""
    table = columns(rows, ASKED)
    if not table:
        return ""
    return f"""<h2>Direct questions</h2>
<p class="note">The share that is answered right, of all and of each kind.</p>
{results_table(table, corner="row")}"""


def ranges_table(rows: list[dict]) -> str:
    """The least and the most that a row's seeds came to, one by one."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in ("row", "seeds", *RANGED))
    lines = ""
    for row in rows:
        if row["seeds"] < 2:
            continue
        cells = f"<th>{escape(row['row'])}</th><td>{row['seeds']}</td>"
        for name in RANGED:
            cells += f"<td><small>{range_text(row['by_seed'][name])}</small></td>"
        lines += f"<tr>{cells}</tr>\n"
    if not lines:
        return ""
    return f"""<h2>Range over seeds</h2>
<p class="note">The least and the most of the seeds, each by itself. A row whose seeds differ more
than its images do has more of them.</p>
<div class="wide"><table>
<tr>{heads}</tr>
{lines}</table></div>
"""


def range_text(values: list[float | None]) -> str:
    """The least and the most of the values that were measured."""
    known = [value for value in values if value is not None]
    return f"{min(known):.3f}-{max(known):.3f}" if known else "–"


def findings_table(findings: list[dict]) -> str:
    """One line per claim and metric: the paper's difference, ours, and whether the signs agree."""
    lines = "<tr><th>claim</th><td>metric</td><td>paper, points</td><td>here</td><td></td></tr>\n"
    for finding in findings:
        paper = finding["table"]
        if finding["paper"] is not None:
            paper = f"{finding['paper']:+.2f}, {paper}"
        elif finding["table"] != OURS:
            paper = "not reported"
        cells = f"<th>{escape(finding['claim'])}<small>{escape(finding['rows'])}</small></th>"
        words = (in_words(finding["metric"]), paper, shown_difference(finding["difference"]))
        for text in (*words, finding["status"]):
            cells += f"<td>{escape(text)}</td>"
        lines += f"<tr>{cells}</tr>\n"
    return f'<div class="wide"><table class="texts">\n{lines}</table></div>\n'


def rewards_table(rewards: list[dict]) -> str:
    """Table 7: one line per reward model, one column per kind of held-out pairs; the mean and range
    of the seeds.
    """
    if not rewards:
        return ""
    table: dict[str, dict[str, Interval]] = {}
    for each in rewards:
        values = each["accuracy"]
        column = table.setdefault(f"asked about {each['asked_about']}", {})
        column[f"learned from {each['learned_from']}"] = {
            "value": sum(values) / len(values),
            "low": min(values),
            "high": max(values),
        }
    return f"""<h2>Reward models (Table 7)</h2>
<p class="note">The share of held-out pairs of which the chosen response gets the higher reward.</p>
{results_table(table, "accuracy", "the least and the most of the seeds")}"""
