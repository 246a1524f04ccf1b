"""One self-contained HTML page per run: results, training curves, sampled pairs, configuration.

Nothing is loaded from outside. All that comes from data sets, models or settings is escaped: it
stays text.
"""

import base64
import difflib
import html
import io
import json
import math
import re
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from minialign.evaluation.metrics import Interval
from minialign.files import write_whole

Curve = list[tuple[float, float]]  # (step, value)
PICTURE_SIDE = 288  # pixels, the longer side of an embedded picture
CHART_POINTS = 200  # points per curve; longer curves are averaged over equal runs of logged values
COMPARED = 1000  # words of a response that are compared with the other one's
WIDTH, HEIGHT = 360, 220  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 56, 350, 10, 184  # its frame
# Punctuation apart, so that "dog." against "dog" marks the dot.
WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
# Which way is better, by a metric's first or last word; a yes-rate is neither.
LOWER, HIGHER = "lower is better", "higher is better"
BETTER = {"chair": LOWER, "errors": LOWER, "recall": HIGHER, "pope": HIGHER, "yes": ""}
# A second lock behind the escaping: the browser itself refuses scripts and fetches.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/margins"]
# Title, keys of metrics.jsonl, values that the vertical axis always spans.
CHARTS = [
    ("Loss", ["loss"], []),
    ("Rewards of the pairs", REWARDS, [0.0]),
    ("Log-probabilities of the responses", ["logps/chosen", "logps/rejected"], []),
    ("Reward accuracy, a share of the pairs", ["rewards/accuracies"], [0.0, 1.0]),
    ("Rewards of the policy's answers", ["objective/scores", "objective/rlhf_reward"], []),
    ("KL of the policy's answers, nats per answer", ["objective/kl"], [0.0]),
    ("Entropy of the policy's answers, nats per answer", ["objective/entropy"], [0.0]),
]
STYLE = """
:root { color-scheme: light dark; --bg: #fdfdfb; --ink: #1d1f21; --soft: #5f6468;
  --rule: #d9dad6; --ins: #dcebf7; --del: #fae3d8; --c0: #1b64a8; --c1: #bd4a12; --c2: #4d6b2f; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #17191b; --ink: #e3e4e1; --soft: #9da2a6; --rule: #383c40; --ins: #1d3a55;
    --del: #552c1a; --c0: #7db8ec; --c1: #f0965f; --c2: #a5c882; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--bg);
  color: var(--ink); font: 1rem/1.55 Charter, Georgia, serif; }
h1, h3, figure { margin: 0; } h1 { font-size: 1.6rem; } h3 { font-size: 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; border-top: 1px solid var(--rule); }
.note, .legend { font-size: .875rem; } .note, .legend, small { color: var(--soft); }
small { display: block; font-weight: normal; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .4rem 0 .4rem .8rem; vertical-align: top; text-align: right;
  border-top: 1px solid var(--rule); }
th:first-child, .texts td { text-align: left; } td small { white-space: nowrap; }
.charts { display: grid; gap: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.legend span { margin-right: 1rem; border-bottom: 2px solid var(--c0); }
.legend span:nth-child(2) { border-bottom: 2px dashed var(--c1); }
.legend span:nth-child(3) { border-bottom: 2px dotted var(--c2); }
svg { width: 100%; } path { fill: none; } text { font: 11px sans-serif; fill: var(--soft); }
.axis { stroke: var(--soft); } .zero { stroke: var(--rule); }
.line { stroke-width: 1.6; stroke-linecap: round; } .s0 { stroke: var(--c0); }
.s1 { stroke: var(--c1); stroke-dasharray: 6 4; } .s2 { stroke: var(--c2); stroke-dasharray: 1 4; }
.pair { display: flex; flex-wrap: wrap; gap: .6rem 1.6rem; padding: 1.4rem 0;
  align-items: flex-start; border-top: 1px solid var(--rule); }
.pair div { flex: 1 1 18rem; overflow-wrap: anywhere; } img { max-width: 100%; }
.text { margin: 0 0 .7rem; white-space: pre-wrap; }
ins { background: var(--ins); text-decoration: underline; }
del { background: var(--del); text-decoration: underline wavy 1px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .8rem/1.5 monospace; }
"""


@dataclass(frozen=True)
class ReportPair:
    """A preference pair as the page shows it."""

    id: str
    image: Image.Image  # the crop that the image encoder saw
    visible: list[bool] | None  # row by row, one per image token; None: all visible, or unknown
    prompt: str
    chosen: str
    rejected: str
    iterations: int | None
    similarity: float | None
    guided: bool | None


def write_report(
    path: Path,
    title: str,
    config: dict,
    pairs: list[ReportPair],
    metrics: list[dict],
    result: dict[str, dict[str, Interval]],
) -> None:
    """Write the page to `path`, whole or not at all.

    metrics: the rows of metrics.jsonl, in which keys may be missing. result: {column: {name:
    figure}}.
    """
    settings = escape(json.dumps(config, indent=2, ensure_ascii=False, default=str))
    body = f"""<h2>Results</h2>{results_table(result)}
<h2>Training</h2>{training_curves(metrics)}
<h2>Sampled pairs</h2>{pair_list(pairs)}
<h2>Configuration</h2><details><summary>All settings</summary><pre>{settings}</pre></details>"""
    write_page(path, title, config, body)


def write_page(path: Path, title: str, config: dict, body: str) -> None:
    """Write a page with title, date and first settings above `body`, which must be escaped where it
    needs to be.
    """
    settings = [f"{key} {value}" for key, value in config.items() if value is not None]
    summary = " · ".join([time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), *settings[:8]])
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1>
<p class="note">{escape(summary)}</p>
{body}
</body></html>
"""
    write_whole(path, page)


def escape(text: str) -> str:
    """Text that is safe between tags and inside quoted attributes."""
    return html.escape(text, quote=True)


def show(value: float | None, form: str = ".4g") -> str:
    """A number with a true minus sign, or a dash where there is none."""
    return "–" if value is None else format(value, form).replace("-", "−")


# ---------------------------------------------------------------- results


def results_table(
    result: dict[str, dict[str, Interval]],
    corner: str = "metric",
    brackets: str = "95 % interval",
) -> str:
    """One row per metric, one column per entry of `result`, the interval under each value."""
    names = dict.fromkeys(name for column in result.values() for name in column)
    if not names:
        return '<p class="note">No results were recorded.</p>'
    head = "".join(f"<th>{escape(name)}</th>" for name in (corner, *result))
    rows = ""
    for name in names:
        hint = BETTER.get(name.split("_")[-1], BETTER.get(name.split("_")[0], ""))
        cells = "".join(f"<td>{figure_cell(column.get(name))}</td>" for column in result.values())
        rows += f"<tr><th>{escape(name)}<small>{hint}</small></th>{cells}</tr>\n"
    return f"""<div class="wide"><table>
<tr>{head}</tr>
{rows}</table></div>
<p class="note">In brackets: {brackets}. A dash: not measured.</p>"""


def figure_cell(figure: Interval | None) -> str:
    """A figure and its interval, or a dash."""
    if figure is None or figure["value"] is None:
        return "–"
    form = ".1f" if figure["value"] >= 10 else ".3f"  # lengths, and shares
    low, high = show(figure["low"], form), show(figure["high"], form)
    return f"{show(figure['value'], form)}<small>[{low}, {high}]</small>"


# ---------------------------------------------------------------- curves


def training_curves(metrics: list[dict]) -> str:
    """The charts of what was logged, or one sentence when nothing was."""
    if not metrics:
        return '<p class="note">No training metrics were recorded.</p>'
    size = math.ceil(len(metrics) / CHART_POINTS)
    note = ""
    if size > 1:
        note = f'<p class="note">Each point is the mean of {size} logged values.</p>\n'
    charts = []
    for title, keys, span in CHARTS:
        curves = {key: curve(metrics, key, size) for key in keys}
        if any(curves.values()):
            charts.append(chart(title, curves, span))
    return note + '<div class="charts">\n' + "\n".join(charts) + "\n</div>"


def curve(metrics: list[dict], key: str, size: int) -> Curve:
    """A metric against the step, as the means of `size` logged values each; what is not finite is
    left out.
    """
    rows = [row for row in metrics if math.isfinite(row.get(key, math.nan))]
    points = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        points.append((part[-1]["step"], sum(row[key] for row in part) / len(part)))
    return points


def chart(title: str, curves: dict[str, Curve], span: list[float]) -> str:
    """An SVG line chart against the step; dashes as well as colours tell lines apart."""
    points = [point for line in curves.values() for point in line]
    steps = [step for step, _ in points]
    values = [value for _, value in points] + span
    first, last, low, high = min(steps), max(steps), min(values), max(values)

    marks, legend = axes(first, last, low, high), ""
    for index, (key, line) in enumerate(curves.items()):
        places = []
        for step, value in line:
            x, y = between(step, first, last, LEFT, RIGHT), between(value, low, high, BOTTOM, TOP)
            places.append(f"{x:.1f} {y:.1f}")
        if places:
            # The stroke of no length at the end makes a dot of a lone point.
            marks += f'<path class="line s{index}" d="M{"L".join(places)}h0"/>'
        legend += f"<span>{key}</span>"
    about = f"{title}, against the step, from {show(low)} to {show(high)}"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}"'
    return f"""<figure><h3>{title}</h3><div class="legend">{legend}</div>
<svg {size}>{marks}</svg></figure>"""


def between(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where a value lies on an axis on which `low` is at `start` and `high` at `end`."""
    share = (value - low) / (high - low) if high > low else 0.5
    return start + (end - start) * share


def axes(first: float, last: float, low: float, high: float) -> str:
    """Both axes with the extremes as ticks, and a faint line at zero where zero lies between
    them.
    """
    marks = f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>'
    zero = between(0, low, high, BOTTOM, TOP)
    ticks = {low, high}
    if low < 0 < high:
        marks += f'<path class="zero" d="M{LEFT + 1} {zero:.1f}H{RIGHT}"/>'
        if TOP + 12 < zero < BOTTOM - 12:  # else its label would touch another
            ticks.add(0)
    for value in sorted(ticks):
        marks += label(LEFT - 6, between(value, low, high, BOTTOM, TOP) + 4, "end", show(value))
    for step in sorted({first, last}):
        marks += label(between(step, first, last, LEFT, RIGHT), BOTTOM + 15, "middle", str(step))
    return marks + label((LEFT + RIGHT) / 2, HEIGHT - 5, "middle", "step")


def label(x: float, y: float, anchor: str, text: str) -> str:
    """A text of a chart."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


# ---------------------------------------------------------------- pairs


def pair_list(pairs: list[ReportPair]) -> str:
    """The pairs one after another, with a line that explains the marks."""
    if not pairs:
        note = "No pairs were stored, and answers of the policy itself are not kept."
    else:
        note = """Masked patches are dimmed. Words that differ are <ins>underlined</ins> in the
chosen response, <del>underlined with a wave</del> in the rejected one."""
    return f'<p class="note">{note}</p>\n' + "\n".join(pair_block(pair) for pair in pairs)


def pair_block(pair: ReportPair) -> str:
    """Picture, facts, prompt and both responses of one pair."""
    patches = "–"
    if pair.visible is not None:
        patches = f"{sum(pair.visible)} of {len(pair.visible)}"
    guided = {None: "–", True: "yes", False: "no"}[pair.guided]
    similarity = show(pair.similarity, ".3f")
    facts = f"""iterations {show(pair.iterations)} · similarity {similarity} · guided {guided} ·
visible patches {patches}"""

    chosen, rejected = word_diff(pair.chosen, pair.rejected)
    texts = {"prompt": escape(pair.prompt), "chosen": chosen, "rejected": rejected}
    blocks = ""
    for name, text in texts.items():
        blocks += f'<small>{name}</small><p class="text">{text}</p>\n'

    buffer = io.BytesIO()
    shown_picture(pair).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    alt = escape(f"Picture of pair {pair.id}, visible patches: {patches}")
    return f"""<article class="pair">
<img src="data:image/png;base64,{data}" alt="{alt}">
<div><h3>{escape(pair.id)}</h3><p class="note">{facts}</p>
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
    hidden = bytes(0 if visible else 255 for visible in pair.visible)
    mask = Image.frombytes("L", (side, side), hidden)
    dimmed = Image.blend(image, Image.new("RGB", image.size, (128, 128, 128)), 0.75)
    return Image.composite(dimmed, image, mask.resize(image.size, Image.Resampling.NEAREST))


def word_diff(chosen: str, rejected: str) -> tuple[str, str]:
    """Both texts escaped, with the words that differ inside <ins> (chosen) and <del> (rejected).

    Only the first `COMPARED` words: to align them takes the square of their number.
    """
    left = list(islice(WORD.finditer(chosen), COMPARED))
    right = list(islice(WORD.finditer(rejected), COMPARED))
    words, other_words = [match[0] for match in left], [match[0] for match in right]
    # One alignment serves both sides: aligning the other way round need not give the same words.
    matcher = difflib.SequenceMatcher(None, words, other_words, autojunk=False)
    runs, other_runs = [], []
    for kind, start, end, other_start, other_end in matcher.get_opcodes():
        if kind != "equal":
            runs.append(left[start:end])
            other_runs.append(right[other_start:other_end])
    return marked(chosen, runs, "ins"), marked(rejected, other_runs, "del")


def marked(text: str, runs: list[list[re.Match]], tag: str) -> str:
    """The text escaped, with each run of words inside a tag."""
    out, done = "", 0
    for run in runs:
        if run:
            start, end = run[0].start(), run[-1].end()
            out += f"{escape(text[done:start])}<{tag}>{escape(text[start:end])}</{tag}>"
            done = end
    return out + escape(text[done:])
