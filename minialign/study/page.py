"""The study's page: the table, the findings, and Table 7 where reward models were trained.

Beside CHAIR_i stands recall, as whoever says less hallucinates less.
"""

from pathlib import Path

from minialign.evaluation.metrics import Interval, in_words
from minialign.evaluation.report import escape, results_table, write_page
from minialign.study.findings import OURS, shown_difference

TITLE = "minialign: the comparison on the embedded world"
# Of all that study.json holds.
SHOWN = (
    "chair_i", "chair_s", "recall", "pope_adversarial", "colour_errors", "position_errors",
    "length",
)  # fmt: skip


def write_study(
    path: Path, config: dict, rows: list[dict], findings: list[dict], rewards: list[dict]
) -> None:
    """Write the page; `rows`, `findings` and `rewards` are those of study.json."""
    by_figure = {}
    for name in SHOWN:
        by_figure[name] = {row["row"]: row["metrics"][name] for row in rows}
    trained = [row for row in rows if row["row"] != "base"]
    learned = ", ".join(f"{row['row']} {row['pairs']:,} in {row['steps']:,}" for row in trained)
    body = f"""<h2>Results</h2>
<p class="note">CHAIR and errors: lower is better. Recall and POPE: higher. Length: words.</p>
{results_table(by_figure, corner="row")}
<p class="note">Pairs or responses that were learned from, and steps, all seeds together:
{escape(learned)}.</p>
<h2>Findings</h2>{findings_table(findings)}{rewards_table(rewards)}"""
    write_page(path, TITLE, config, body)


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
