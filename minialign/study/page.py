"""What a study has found, as tables, and the page that shows them.

CHAIR_i never stands alone: a model that says less hallucinates less, but its recall falls, too.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from minialign.evaluation.metrics import Interval, cell_text, form_of
from minialign.evaluation.report import escape, write_page
from minialign.study.findings import METRICS, OURS, shown_difference

TITLE = "minialign: the comparison on the embedded world"
# Of the figures of study.json: those with intervals and a range over seeds; those of the main
# table; direct questions.
RANGED = ("chair_i", "chair_s", "recall", "pope_adversarial")
SHOWN = (*RANGED, "colour_errors", "position_errors", "length")
ASKED = ("ask", "ask_cell", "ask_colour", "ask_position", "ask_count", "ask_setting")
HEADS = {
    "chair_i": "CHAIR_i",
    "chair_s": "CHAIR_s",
    "recall": "recall",
    "pope_adversarial": "POPE adversarial",
    "colour_errors": "colour errors",
    "position_errors": "place errors",
    "length": "words",
    "ask": "all",
    "ask_cell": "what is in a place",
    "ask_colour": "colour",
    "ask_position": "place",
    "ask_count": "number",
    "ask_setting": "setting",
}
VERDICTS = {"reproduced": "yes", "not reproduced": "no", "undecided": "open"}


@dataclass(frozen=True)
class Table:
    """A table of texts: what it is of, what a reader needs to know, heads, and lines of cells."""

    title: str
    note: str
    heads: list[str]
    lines: list[list[str]]


def tables(study: dict) -> dict[str, Table]:
    """Those of a study.json that have lines, by name."""
    found = {
        "rows": rows_table(study["rows"]),
        "asked": asked_table(study["rows"]),
        "ranges": ranges_table(study["rows"]),
        "findings": findings_table(study["findings"], study["rows"]),
        "rewards": rewards_table(study["rewards"]),
    }
    return {name: table for name, table in found.items() if table.lines}


def heads(first: list[str], names: tuple[str, ...]) -> list[str]:
    """Heads of a table: `first`, then those of figures."""
    return [*first, *(HEADS[name] for name in names)]


def plain(figure: Interval) -> str:
    """A figure without its interval."""
    if figure["value"] is None:
        return "not measured"
    return f"{figure['value']:{form_of(figure['value'])}}"


def rows_table(rows: list[dict]) -> Table:
    """The main figures with their intervals, others without; what a seed learned from."""
    lines = []
    for row in rows:
        cells = [row["row"]]
        for name in SHOWN:
            show = cell_text if name in RANGED else plain
            cells.append(show(row["metrics"][name]))
        trained = row["row"] != "base"
        cells += [str(row["seeds"]), f"{row['pairs'] / row['seeds']:,.0f}"] if trained else ["", ""]
        lines.append(cells)
    note = "CHAIR and errors: lower is better. Recall and POPE: higher. In brackets: 95 % interval."
    return Table("Results", note, [*heads(["row"], SHOWN), "seeds", "pairs or responses"], lines)


def asked_table(rows: list[dict]) -> Table:
    """Direct questions of each kind."""
    lines = [[row["row"], *(cell_text(row["metrics"][name]) for name in ASKED)] for row in rows]
    note = "The share that is answered right, of all and of each kind."
    return Table("Direct questions", note, heads(["row"], ASKED), lines)


def ranges_table(rows: list[dict]) -> Table:
    """The least and the most that a row's seeds came to, one by one."""
    lines = []
    for row in rows:
        if row["seeds"] > 1:
            ranges = [range_text(row["by_seed"][name]) for name in RANGED]
            lines.append([row["row"], str(row["seeds"]), *ranges])
    note = "The least and the most of the seeds, each by itself. A row whose seeds differ much "
    note += "more than its images do has more of them."
    return Table("The range over seeds", note, heads(["row", "seeds"], RANGED), lines)


def range_text(values: list[float | None]) -> str:
    """The least and the most of the values that were measured."""
    known = [value for value in values if value is not None]
    return f"{min(known):.3f}-{max(known):.3f}" if known else "not measured"


def findings_table(findings: list[dict], rows: list[dict]) -> Table:
    """A line per claim: the paper's differences, ours, and whether the signs agree."""
    # A row that learned from no pair is the base still: its differences are none of the method's.
    nothing = {row["row"] for row in rows if row["row"] != "base" and not row["pairs"]}
    claims: dict[str, dict[str, dict]] = {}
    for finding in findings:
        claims.setdefault(finding["claim"], {})[finding["metric"]] = finding

    lines = []
    for claim, found in claims.items():
        compared, paper = found["recall"]["rows"], found["recall"]["table"]
        if paper != OURS:
            points = f"{found['pope_adversarial']['paper']:+.2f}, {found['recall']['paper']:+.2f}"
            paper = f"{points} ({paper})"
        star = " (*)" if nothing & set(compared.split(" - ")) else ""
        cells = [claim, compared, paper]
        for metric in METRICS:
            status = found[metric]["status"]
            verdict = "" if status == "ours" else f"{VERDICTS[status]}{star}, "
            cells.append(verdict + shown_difference(found[metric]["difference"]))
        lines.append(cells)
    note = "yes: our whole interval lies on the side of zero on which the paper's difference does; "
    note += "no: on the other; open: on both. (*): a row learned from no pair."
    names = heads(["claim", "rows", "the paper: POPE, recall"], METRICS)
    return Table("Findings", note, names, lines)


def rewards_table(rewards: list[dict]) -> Table:
    """Table 7: a line per reward model, a column per kind of held-out pairs."""
    lines: dict[str, list[str]] = {}
    for each in rewards:
        values = each["accuracy"]
        cell = f"{sum(values) / len(values):.2f} ({min(values):.2f}-{max(values):.2f})"
        lines.setdefault(each["learned_from"], []).append(cell)
    kinds = dict.fromkeys(f"asked about {each['asked_about']}" for each in rewards)
    note = "The share of held-out pairs of which the chosen response gets the higher reward; the "
    note += "mean of the seeds, the least and the most."
    cells = [[name, *found] for name, found in lines.items()]
    return Table("Reward models (Table 7)", note, ["learned from", *kinds], cells)


def write_study(path: Path, study: dict) -> None:
    """Write the page of a study.json."""
    settings = {name: value for name, value in study["made"].items() if name != "date"}
    body = "".join(html_table(table) for table in tables(study).values())
    write_page(path, TITLE, settings, body)


def text_table(table: Table) -> str:
    """A table for a terminal, its columns aligned."""
    lines = [table.heads, *table.lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = f"{table.title}\n"
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text += "  ".join(cells).rstrip() + "\n"
    return text


def html_table(table: Table) -> str:
    """A table with its title and note; intervals stand small, under their figures."""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.heads)
    lines = f"<tr>{head}</tr>\n"
    for first, *others in table.lines:
        cells = [re.sub(r" (\[.*\])$", r"<small>\1</small>", escape(cell)) for cell in others]
        lines += f"<tr><th>{escape(first)}</th><td>{'</td><td>'.join(cells)}</td></tr>\n"
    return f"""<h2>{escape(table.title)}</h2>
<p class="note">{escape(table.note)}</p>
<div class="wide"><table>
{lines}</table></div>
"""
