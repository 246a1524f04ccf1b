"""The study's page: recall against CHAIR_i, one point per row with its intervals, then the table
and the findings.

Beside CHAIR_i stands recall, as whoever says less hallucinates less: good is the upper left.
"""

import math
from pathlib import Path

from minialign.evaluation.report import escape, results_table, show, write_page

# of all that study.json holds
SHOWN = (
    "chair_i",
    "chair_s",
    "recall",
    "pope_adversarial",
    "colour_errors",
    "position_errors",
    "length",
)
Cell = dict[str, float | None]  # value, low, high
Box = tuple[float, float, float, float]  # left, top, right, bottom
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = (
    720,
    460,
    62,
    708,
    10,
    416,
)  # chart and its frame, in SVG units
LETTER, LINE = 5.9, 13  # the size of a letter of a label
STYLE = """
figure { overflow-x: auto; } .chart { min-width: 34rem; }
.whisker { stroke: var(--c0); stroke-width: .8; opacity: .55; } .point { fill: var(--c0); }
.base .point { fill: var(--bg); stroke: var(--c0); stroke-width: 1.5; }
.leader { stroke: var(--ink); stroke-width: .7; }
.name { fill: var(--ink); paint-order: stroke; stroke: var(--bg); stroke-width: 3px; stroke-linejoin: round; }
.findings :is(th, td) { text-align: left; } .findings td:nth-child(2) { white-space: nowrap; }
"""


def write_study(
    path: Path, config: dict, rows: list[dict], findings: list[dict], rewards: list[dict]
) -> None:
    """Write the page; `rows`, `findings` and `rewards` are those of study.json."""
    table = {row["row"]: row["metrics"] for row in rows}
    by_figure = {name: {row: figures[name] for row, figures in table.items()} for name in SHOWN}
    learned = ", ".join(
        f"{row['row']} {row['pairs']:,} in {row['steps']:,}" for row in rows if row["row"] != "base"
    )
    body = f"""<h2>Recall against CHAIR_i</h2>{scatter(table)}
<h2>Results</h2><p class="note">CHAIR and errors: lower is better. Recall and POPE: higher. Length: words.</p>
{results_table(by_figure, corner="row")}
<p class="note">Pairs or responses that were learned from, and steps, all seeds together: {escape(learned)}.</p>
<h2>Findings</h2>{findings_table(findings)}{rewards_table(rewards)}"""
    write_page(path, "minialign: the comparison on the embedded world", config, body, STYLE)


def findings_table(findings: list[dict]) -> str:
    """One line per finding."""
    columns = ("id", "status", "evidence")
    head = "".join(f'<th scope="col">{name}</th>' for name in ("finding", *columns[1:]))
    lines = ""
    for finding in findings:
        cells = "".join(
            f'<td data-column="{name}">{escape(finding[name])}</td>' for name in columns[1:]
        )
        lines += f'<tr><th scope="row">{escape(finding["id"])}</th>{cells}</tr>\n'
    return f'<table class="many findings">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table>'


def rewards_table(rewards: list[dict]) -> str:
    """Table 7: one line per reward model, one column per kind of held-out pairs; the mean and range
    of the seeds."""
    if not rewards:
        return ""
    table: dict[str, dict[str, Cell]] = {}
    for each in rewards:
        values = each["accuracy"]
        cell = {"value": sum(values) / len(values), "low": min(values), "high": max(values)}
        table.setdefault(f"asked about {each['asked_about']}", {})[
            f"learned from {each['learned_from']}"
        ] = cell
    note = '<p class="note">The share of held-out pairs of which the chosen response gets the higher reward.</p>'
    brackets = "the least and the most of the seeds"
    return f"<h2>Reward models (Table 7)</h2>{note}{results_table(table, 'accuracy', brackets)}"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers around low and high, some five steps apart."""
    rough = max(high - low, 1e-3) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(number * step, 9) for number in range(first, max(last, first + 1) + 1)]


def scatter(table: dict[str, dict[str, Cell]]) -> str:
    """The chart as SVG; rows of which one of the two figures was not measured are named below
    it."""
    pairs = {row: (figures["chair_i"], figures["recall"]) for row, figures in table.items()}
    drawn = {
        row: pair for row, pair in pairs.items() if all(cell["value"] is not None for cell in pair)
    }
    lost = ", ".join(row for row in pairs if row not in drawn)
    note = f'<p class="note">Not measured: {escape(lost)}.</p>' if lost else ""
    if not drawn:
        return note
    cells = zip(*drawn.values(), strict=True)  # all of CHAIR_i, then all of recall
    across, up = (
        ticks(min(cell["low"] for cell in each), max(cell["high"] for cell in each))
        for each in cells
    )

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - across[0]) / (across[-1] - across[0])

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - up[0]) / (up[-1] - up[0])

    marks, points, taken = axes(x, y, across, up), {}, []
    for row, (chair, recall) in drawn.items():
        left, top = points[row] = x(chair["value"]), y(recall["value"])
        start, end, low, high = (
            x(chair["low"]),
            x(chair["high"]),
            y(recall["low"]),
            y(recall["high"]),
        )
        taken += [
            (left - 4, top - 4, left + 4, top + 4),
            (start, top - 1, end, top + 1),
            (left - 1, high, left + 1, low),
        ]
        said = f"{row}: CHAIR_i {shown(chair)}, recall {shown(recall)}"
        marks += f'<g class="{"base" if row == "base" else "row"}"><title>{escape(said)}</title>'
        marks += f'<path class="whisker" d="M{start:.1f} {top:.1f}H{end:.1f}M{left:.1f} {low:.1f}V{high:.1f}"/>'
        marks += f'<circle class="point" cx="{left:.1f}" cy="{top:.1f}" r="3.5"/></g>'
    about = 'role="img" aria-label="Recall against CHAIR_i, one point per row; the figures are in the table"'
    drawing = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" {about}>{marks}{labels(points, taken)}</svg>'
    return f'<figure>{drawing}<p class="note">Thin lines: 95 % intervals.</p>{note}</figure>'


def shown(cell: Cell) -> str:
    """A value and its interval."""
    value, low, high = (show(cell[name], ".3f") for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def axes(x, y, across: list[float], up: list[float]) -> str:
    """Both axes with their ticks and names."""
    marks = f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>'
    texts = [(x(value), BOTTOM + 16, "middle", show(value), "") for value in across]
    texts += [(LEFT - 7, y(value) + 4, "end", show(value), "") for value in up]
    texts += [((LEFT + RIGHT) / 2, HEIGHT - 8, "middle", "CHAIR_i (lower is better)", "")]
    middle = (TOP + BOTTOM) / 2
    texts += [
        (14, middle, "middle", "recall (higher is better)", f' transform="rotate(-90 14 {middle})"')
    ]
    for left, top, anchor, text, turn in texts:
        marks += f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}"{turn}>{text}</text>'
    return marks


def labels(points: dict[str, tuple[float, float]], taken: list[Box]) -> str:
    """The rows' names, each at the nearest free place, with a line to its point; points and
    intervals are `taken`."""
    marks = ""
    for row, (left, top) in points.items():
        box = place(left, top, len(row) * LETTER, taken)
        taken = [*taken, box]
        beside = (
            not box[0] <= left <= box[2]
        )  # the line ends in the middle of the side that faces the point
        end_x = min(max(left, box[0]), box[2]) if beside else (box[0] + box[2]) / 2
        end = end_x, (box[1] + box[3]) / 2 if beside else min(max(top, box[1]), box[3])
        if math.dist(end, (left, top)) > 14:
            marks += f'<path class="leader" d="M{left:.1f} {top:.1f}L{end[0]:.1f} {end[1]:.1f}"/>'
        marks += f'<text class="name" x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{escape(row)}</text>'
    return marks


def place(left: float, top: float, width: float, taken: list[Box]) -> Box:
    """The first box of that width, on ever wider rings round a point, that is in the frame and
    meets none `taken`."""
    for radius in range(7, WIDTH, 4):
        for angle in range(-45, 315, 15):
            across, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            middle, centre = left + across * (radius + width / 2), top + down * (radius + LINE / 2)
            box = middle - width / 2, centre - LINE / 2, middle + width / 2, centre + LINE / 2
            inside = LEFT + 4 < box[0] and box[2] < WIDTH and 0 < box[1] and box[3] < BOTTOM
            if inside and not any(
                box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
            ):
                return box
    return box  # nowhere is free
