"""One self-contained HTML page per run: results, training curves, sampled pairs, configuration.

Nothing is loaded from outside. All that comes from data sets, models or settings is escaped: it
stays text."""

import base64
import difflib
import html
import io
import itertools
import json
import math
import numbers
import re
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minialign.files import write_whole

PICTURE_SIDE = 288  # pixels, the longer side of an embedded picture
CHART_POINTS = 200  # points per curve; longer curves are averaged over equal runs of logged values
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = (
    360,
    220,
    56,
    350,
    10,
    184,
)  # chart and its frame, in SVG units
WORD = re.compile(
    r"\w+(?:['’-]\w+)*|[^\w\s]"
)  # punctuation apart, so "dog." against "dog" marks the dot
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # no place in UTF-8 HTML
# Which way is better, by a metric's first or last word; a yes-rate is neither.
LOWER, HIGHER = "lower is better", "higher is better"
BETTER = {"chair": LOWER, "errors": LOWER, "recall": HIGHER, "pope": HIGHER, "yes": ""}
# a second lock behind the escaping: the browser itself refuses scripts and fetches
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# title, label of the vertical axis, keys of metrics.jsonl, values the vertical axis always spans
CHARTS = [
    ("Loss", "loss", ["loss"], []),
    (
        "Rewards of the pairs",
        "reward",
        ["rewards/chosen", "rewards/rejected", "rewards/margins"],
        [0.0],
    ),
    (
        "Log-probabilities of the responses",
        "log-probability",
        ["logps/chosen", "logps/rejected"],
        [],
    ),
    ("Reward accuracy", "share of pairs", ["rewards/accuracies"], [0.0, 1.0]),
    (
        "Rewards of the policy's answers",
        "reward",
        ["objective/scores", "objective/rlhf_reward"],
        [],
    ),
    ("KL of the policy's answers", "nats per answer", ["objective/kl"], [0.0]),
    ("Entropy of the policy's answers", "nats per answer", ["objective/entropy"], [0.0]),
]
STYLE = """
:root { color-scheme: light dark; --bg: #fdfdfb; --ink: #1d1f21; --soft: #5f6468; --rule: #d9dad6;
  --ins: #dcebf7; --del: #fae3d8; --c0: #1b64a8; --c1: #bd4a12; --c2: #4d6b2f; }
@media (prefers-color-scheme: dark) { :root { --bg: #17191b; --ink: #e3e4e1; --soft: #9da2a6; --rule: #383c40;
  --ins: #1d3a55; --del: #552c1a; --c0: #7db8ec; --c1: #f0965f; --c2: #a5c882; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--bg); color: var(--ink);
  font: 1rem/1.55 Charter, Georgia, "Liberation Serif", serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; } h3, figure, dd { margin: 0; } p { margin: .4rem 0; }
.note, .legend, dl { font-size: .875rem; } .note, .legend, small, dt { color: var(--soft); }
small { display: block; font-size: .8rem; font-weight: normal; line-height: 1.35; }
table { border-collapse: collapse; width: 100%; border: solid var(--ink); border-width: 1px 0;
  font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .4rem 0 .4rem .8rem; vertical-align: top; text-align: right; }
th:first-child { text-align: left; padding-left: 0; } td small { white-space: nowrap; }
tbody tr { border-top: 1px solid var(--rule); } tbody tr:first-child { border-color: var(--ink); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 2rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; } .key { width: 26px; height: 8px; margin: 1px 5px; }
.chart { width: 100%; height: auto; } text { font: 11px "Liberation Sans", sans-serif; fill: var(--soft); }
path { fill: none; } .axis { stroke: var(--soft); } .zero { stroke: var(--rule); }
.line { stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); stroke-dasharray: 6 4; }
.s2 { stroke: var(--c2); stroke-dasharray: 1 4; stroke-width: 2; }
.pair { display: grid; grid-template-columns: minmax(0, 18rem) minmax(0, 1fr); gap: .6rem 1.6rem;
  padding: 1.4rem 0; align-items: start; } .pair + .pair { border-top: 1px solid var(--rule); }
img { max-width: 100%; height: auto; } .text { margin: 0 0 .7rem; white-space: pre-wrap; }
dl, dl div { display: flex; flex-wrap: wrap; gap: 0 .35rem; } dl { column-gap: 1rem; margin: .2rem 0 .5rem; }
ins, del { text-underline-offset: .2em; } ins { background: var(--ins); text-decoration: underline; }
del { background: var(--del); text-decoration: underline wavy 1px; }
pre { white-space: pre-wrap; font: .8rem/1.5 ui-monospace, monospace; }
@media (max-width: 40rem) { .pair { grid-template-columns: minmax(0, 1fr); } .many thead { display: none; }
  .many :is(tbody, tr, th, td) { display: block; text-align: left; padding: .15rem 0; }
  .many tr:first-child { border: 0; } .many td small { display: inline; margin-left: .4rem; }
  .many td::before { content: attr(data-column); color: var(--soft); display: inline-block; width: 9.5rem; } }
"""


@dataclass(frozen=True)
class ReportPair:
    """A preference pair as the page shows it; `image` is the crop that the image encoder saw."""

    id: str
    image: Image.Image
    visible: (
        list[bool] | None
    )  # row-major, one per image token, square grid; None = all visible or unknown
    prompt: str
    chosen: str
    rejected: str
    iterations: int | None
    similarity: float | None
    guided: bool | None


def write_report(
    path: Path, title: str, config: dict, pairs: list[ReportPair], metrics: list[dict], result: dict
) -> None:
    """Write the page to `path`, whole or not at all.

    `metrics`: rows of metrics.jsonl; keys may be missing, values NaN. `result`: {column: {name:
    {value, low, high}}}."""
    settings = json.dumps(config, indent=2, ensure_ascii=False, default=str)
    body = f"""<h2>Results</h2>{results_table(result)}
<h2>Training</h2>{training_curves(metrics)}
<h2>Sampled pairs</h2>{pair_list(pairs)}
<h2>Configuration</h2><details><summary>All settings</summary><pre>{escape(settings)}</pre></details>"""
    write_page(path, title, config, body)


def write_page(path: Path, title: str, config: dict, body: str, style: str = "") -> None:
    """Write a page with title, date and first settings above `body`, which must be escaped where it
    needs to be."""
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style></head>
<body><h1>{escape(title)}</h1>
<p class="note">{escape(summary(config))}</p>
{body}
</body></html>
"""
    write_whole(Path(path), page)


def escape(value: object) -> str:
    """Text that is safe between tags and inside quoted attributes."""
    return html.escape(UNPRINTABLE.sub("\ufffd", str(value)), quote=True)


def number(value: object) -> float | None:
    """`value` as a float, or None if it is no finite number."""
    return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None


def show(value: object, form: str = ".4g") -> str:
    """A number with a true minus sign, or a dash where there is none."""
    value = number(value)
    return "–" if value is None else format(value, form).replace("-", "−")


def summary(config: dict) -> str:
    """The date and the first few settings that are set."""
    settings = [f"{key} {value}" for key, value in config.items() if value is not None][:8]
    return " · ".join([time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), *settings])


def results_table(result: dict, corner: str = "metric", brackets: str = "95 % interval") -> str:
    """One row per metric, one column per entry of `result`, the interval under each value."""
    names = dict.fromkeys(name for column in result.values() for name in column)
    if not names:
        return '<p class="note">No results were recorded.</p>'
    rows = ["".join(f'<th scope="col">{escape(column)}</th>' for column in [corner, *result])]
    for name in names:
        cells = {column: values.get(name) or {} for column, values in result.items()}
        hint = BETTER.get(name.split("_")[-1], BETTER.get(name.split("_")[0], ""))
        row = f'<th scope="row">{escape(name)}<small>{hint}</small></th>'
        for column, cell in cells.items():
            form = (
                ".1f" if abs(number(cell.get("value")) or 0.0) >= 10 else ".3f"
            )  # lengths, and shares
            low, high = (show(cell.get(key), form) for key in ("low", "high"))
            interval = "" if low == high == "–" else f"<small>[{low}, {high}]</small>"
            row += (
                f'<td data-column="{escape(column)}">{show(cell.get("value"), form)}{interval}</td>'
            )
        rows.append(row)
    head, *body = (f"<tr>{row}</tr>\n" for row in rows)
    many = ' class="many"' if len(result) > 2 else ""  # too wide for a phone: stacked there
    note = f'<p class="note">In brackets: {brackets}. A dash: not measured.</p>'
    return (
        f"<table{many}>\n<thead>{head}</thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>\n{note}"
    )


def training_curves(metrics: list[dict]) -> str:
    """The charts of what was logged, or one sentence when nothing was."""
    if not metrics:
        return '<p class="note">No training metrics were recorded.</p>'
    size = math.ceil(len(metrics) / CHART_POINTS)
    note = (
        f'<p class="note">Each point is the mean of {size} logged values.</p>\n' if size > 1 else ""
    )
    logged = {key for row in metrics for key in row}
    charts = "\n".join(
        chart(metrics, size, *spec) for spec in CHARTS if logged.intersection(spec[2])
    )
    return f'{note}<div class="charts">\n{charts}\n</div>'


def series(
    metrics: list[dict], key: str, size: int
) -> tuple[list[tuple[float, float | None]], int]:
    """(step, value), the mean of `size` rows, None (a gap) if none is finite; and how many values
    are not finite."""
    points, means = [(row["step"], number(row[key])) for row in metrics if key in row], []
    for run in (points[start : start + size] for start in range(0, len(points), size)):
        values = [value for _, value in run if value is not None]
        means.append((run[-1][0], sum(values) / len(values) if values else None))
    return means, [value for _, value in points].count(None)


def chart(
    metrics: list[dict], size: int, title: str, label: str, keys: list[str], span: list[float]
) -> str:
    """An SVG line chart of some keys against the step; dashes as well as colours tell lines
    apart."""
    lines = {key: series(metrics, key, size) for key in keys}
    points = [point for line, _ in lines.values() for point in line]
    values = [value for _, value in points if value is not None]
    lost = sum(count for _, count in lines.values())
    note = f'<p class="note">Left out because not finite: {lost}.</p>' if lost else ""
    if not values:
        return f'<figure><h3>{title}</h3><p class="note">No values to draw.</p>{note}</figure>'
    low, high = min(values + span), max(values + span)
    first, last = (pick(step for step, _ in points) for pick in (min, max))

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * ((value - low) / (high - low) if high > low else 0.5)

    marks, legend = axes(x, y, (first, last), (low, high), label), ""
    for index, (key, (line, _)) in enumerate(lines.items()):
        path = ""
        for known, run in itertools.groupby(line, key=lambda point: point[1] is not None):
            if known:
                dots = [f"{x(step):.1f} {y(value):.1f}" for step, value in run]
                path += (
                    "M" + "L".join(dots) + ("m-3 0h6" if len(dots) == 1 else "")
                )  # lone: a short stroke
        marks += f'<path class="line s{index}" d="{path}"/>'
        stroke = f'<path class="line s{index}" d="M1 4H25"/>'
        legend += f'<span><svg class="key" viewBox="0 0 26 8" aria-hidden="true">{stroke}</svg>{key}</span>'
    about = f'role="img" aria-label="{title} against the step, from {show(low)} to {show(high)}"'
    drawing = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" {about}>{marks}</svg>'
    return f'<figure><h3>{title}</h3><div class="legend">{legend}</div>{drawing}{note}</figure>'


def axes(x, y, steps: tuple[float, float], values: tuple[float, float], label: str) -> str:
    """Both axes with the extremes as ticks, and a faint line at zero where zero lies between
    them."""
    marks, ticks = f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>', set(values)
    if values[0] < 0 < values[1]:
        marks += f'<path class="zero" d="M{LEFT + 1} {y(0):.1f}H{RIGHT}"/>'
        ticks |= (
            {0} if min(y(0) - TOP, BOTTOM - y(0)) > 12 else set()
        )  # its label must not touch the others
    texts = [(LEFT - 6, y(value) + 4, "end", show(value), "") for value in sorted(ticks)]
    ends = {steps[0]: "middle"} if steps[0] == steps[1] else {steps[0]: "start", steps[1]: "end"}
    texts += [
        (x(step), BOTTOM + 15, anchor, show(step, ".10g"), "") for step, anchor in ends.items()
    ]
    middle = (TOP + BOTTOM) / 2
    texts += [(11, middle, "middle", label, f'transform="rotate(-90 11 {middle})"')]
    texts += [((LEFT + RIGHT) / 2, HEIGHT - 5, "middle", "step", "")]
    for left, top, anchor, text, turn in texts:
        marks += f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}" {turn}>{text}</text>'
    return marks


def pair_list(pairs: list[ReportPair]) -> str:
    """The pairs one after another, with a line that explains the marks."""
    note = "Masked patches are dimmed. Words that differ are <ins>underlined</ins> in the chosen response, "
    note += "<del>underlined with a wave</del> in the rejected one."
    note = note if pairs else "No pairs were stored, and answers of the policy itself are not kept."
    return f'<p class="note">{note}</p>\n' + "\n".join(map(pair_block, pairs))


def pair_block(pair: ReportPair) -> str:
    """Picture, facts, prompt and both responses of one pair."""
    grid = "–" if pair.visible is None else f"{sum(pair.visible)} of {len(pair.visible)}"
    guided = {None: "–", True: "yes", False: "no"}[pair.guided]
    facts = [("iterations", show(pair.iterations)), ("similarity", show(pair.similarity, ".3f"))]
    facts += [("guided", guided), ("visible patches", grid)]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    chosen, rejected = word_diff(pair.chosen, pair.rejected)
    texts = [("prompt", escape(pair.prompt)), ("chosen", chosen), ("rejected", rejected)]
    blocks = "\n".join(f'<small>{name}</small><p class="text">{text}</p>' for name, text in texts)
    shown_picture(pair).save(buffer := io.BytesIO(), "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    alt = escape(f"Picture of pair {pair.id}, visible patches: {grid}")
    return f"""<article class="pair">
<img src="{source}" alt="{alt}">
<div><h3>{escape(pair.id)}</h3><dl>{items}</dl>
{blocks}</div>
</article>"""


def shown_picture(pair: ReportPair) -> Image.Image:
    """The picture at page size, its masked patches moved 75 % of the way to neutral grey."""
    image = pair.image.convert("RGB")
    factor = max(1, PICTURE_SIDE // max(image.size))  # whole, so that every pixel keeps its shape
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))  # does nothing to a picture that fits
    if pair.visible is None:
        return image
    side = math.isqrt(len(pair.visible))
    if side == 0 or side * side != len(pair.visible):
        raise ValueError(
            f"pair {pair.id!r}: {len(pair.visible)} visibility flags do not form a square grid"
        )
    masked = Image.frombytes("L", (side, side), bytes(0 if flag else 255 for flag in pair.visible))
    dimmed = Image.blend(image, Image.new("RGB", image.size, (128, 128, 128)), 0.75)
    return Image.composite(dimmed, image, masked.resize(image.size, Image.Resampling.NEAREST))


def word_diff(chosen: str, rejected: str) -> tuple[str, str]:
    """Both texts escaped, with the words that differ inside <ins> (chosen) and <del> (rejected)."""
    left, right = list(WORD.finditer(chosen)), list(WORD.finditer(rejected))
    matcher = difflib.SequenceMatcher(
        None, [m[0] for m in left], [m[0] for m in right], autojunk=False
    )
    # One alignment serves both sides: aligning the other way round need not give the same words.
    changes = [change for change in matcher.get_opcodes() if change[0] != "equal"]
    sides = []
    for text, words, column, tag in ((chosen, left, 1, "ins"), (rejected, right, 3, "del")):
        out, done = "", 0
        for run in filter(None, (words[slice(*change[column : column + 2])] for change in changes)):
            start, end = run[0].start(), run[-1].end()
            out += f"{escape(text[done:start])}<{tag}>{escape(text[start:end])}</{tag}>"
            done = end
        sides.append(out + escape(text[done:]))
    return sides[0], sides[1]
