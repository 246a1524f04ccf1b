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
from itertools import islice, pairwise
from pathlib import Path

from PIL import Image

from minialign.data.records import Record
from minialign.evaluation import charts
from minialign.evaluation.charts import show
from minialign.evaluation.metrics import Counts, Interval, form_of, in_words
from minialign.files import write_whole

Span = tuple[int, int]  # where a part of a text begins and ends
PICTURE_SIDE = 288  # pixels, the longer side of an embedded picture
COMPARED = 1000  # words of a response that are compared with the other one's
# Punctuation apart, so that "dog." against "dog" marks the dot.
WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
# A second lock behind the escaping: the browser itself refuses scripts and fetches.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --bg: #fdfdfb; --ink: #1d1f21; --soft: #5f6468;
  --rule: #d9dad6; --ins: #dcebf7; --del: #fae3d8; --false: #b3261e;
  --c0: #1b64a8; --c1: #bd4a12; --c2: #4d6b2f; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #17191b; --ink: #e3e4e1; --soft: #9da2a6; --rule: #383c40; --ins: #1d3a55;
    --del: #552c1a; --false: #ff8177;
    --c0: #7db8ec; --c1: #f0965f; --c2: #a5c882; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--bg);
  color: var(--ink); font: 1rem/1.55 Charter, Georgia, serif; }
h1, h3, figure { margin: 0; } h1 { font-size: 1.6rem; } h3 { font-size: 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; border-top: 1px solid var(--rule); }
.note, .legend { font-size: .875rem; } .note, .legend, small { color: var(--soft); }
small { display: block; font-weight: normal; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .4rem 0 .4rem .8rem; vertical-align: top; text-align: right;
  border-top: 1px solid var(--rule); }
th:first-child { text-align: left; } td small { white-space: nowrap; }
.pair { display: flex; flex-wrap: wrap; gap: .6rem 1.6rem; padding: 1.4rem 0;
  align-items: flex-start; border-top: 1px solid var(--rule); }
.pair div { flex: 1 1 18rem; overflow-wrap: anywhere; } img { max-width: 100%; }
.text { margin: 0 0 .7rem; white-space: pre-wrap; }
ins { background: var(--ins); text-decoration: underline; }
del { background: var(--del); text-decoration: underline wavy 1px; }
.false { color: var(--false); font-weight: bold; }
.cut::before { content: "│"; color: var(--soft); margin: 0 .1em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .8rem/1.5 monospace; }
"""


@dataclass(frozen=True)
class ReportPair:
    """A preference pair as the page shows it."""

    record: Record
    image: Image.Image  # the crop that the image encoder saw
    visible: list[bool] | None  # row by row, one per image token; None: all visible, or unknown
    tokens: str  # how many image tokens were visible, and of how many, in words
    cuts: tuple[list[int], list[int]] = ([], [])  # where sentences of chosen and rejected were cut
    false: tuple[list[Span], list[Span]] = ([], [])  # what the picture is known to contradict


@dataclass(frozen=True)
class Answer:
    """What a model has said of a picture."""

    image: Image.Image
    prompt: str
    text: str
    false: list[Span]  # what is not true of the picture, where that is known


@dataclass(frozen=True)
class Evaluation:
    """What a benchmark has found: counts per image, and the first answers."""

    counts: list[Counts]
    answers: list[Answer]


@dataclass(frozen=True)
class StepAnswers:
    """Some answers of the policy to one prompt, in training."""

    title: str
    answers: list[tuple[str, Answer]]  # each with what came of it: a verdict, or a reward


def write_report(
    path: Path,
    title: str,
    config: dict,
    pairs: list[ReportPair],
    metrics: list[dict],
    result: dict[str, dict[str, Interval]],
    answers: dict[str, list[Answer]] | None = None,
    sampled: list[StepAnswers] | None = None,
) -> None:
    """Write the page to `path`, whole or not at all.

    metrics: the rows of metrics.jsonl, in which keys may be missing. result: {column: {name:
    figure}}. answers: {column: to the same prompts}. sampled: in training, by the policy.
    """
    settings = escape(json.dumps(config, indent=2, ensure_ascii=False, default=str))
    body = f"""<h2>Results</h2>{results_table(result)}
{answer_list(answers or {})}
<h2>Training</h2>{charts.training_curves(metrics)}
{sampled_list(sampled or [])}
{pair_list(pairs)}
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
<style>{STYLE}{charts.STYLE}</style></head>
<body><h1>{escape(title)}</h1>
<p class="note">{escape(summary)}</p>
{body}
</body></html>
"""
    write_whole(path, page)


def escape(text: str) -> str:
    """Text that is safe between tags and inside quoted attributes."""
    return html.escape(text, quote=True)


# ---------------------------------------------------------------- results


def results_table(result: dict[str, dict[str, Interval]]) -> str:
    """One row per metric, one column per entry of `result`, the interval under each value."""
    names = dict.fromkeys(name for column in result.values() for name in column)
    if not names:
        return '<p class="note">No results were recorded.</p>'
    head = "".join(f"<th>{escape(name)}</th>" for name in ("metric", *result))
    rows = ""
    for name in names:
        key = "" if in_words(name) == name else f"<small>{escape(name)}</small>"
        cells = "".join(f"<td>{figure_cell(column.get(name))}</td>" for column in result.values())
        rows += f"<tr><th>{escape(in_words(name))}{key}</th>{cells}</tr>\n"
    return f"""<div class="wide"><table>
<tr>{head}</tr>
{rows}</table></div>
<p class="note">In brackets: 95 % interval. A dash: not measured.</p>"""


def figure_cell(figure: Interval | None) -> str:
    """A figure and its interval, or a dash."""
    if figure is None or figure["value"] is None:
        return "–"
    form = form_of(figure["value"])
    low, high = show(figure["low"], form), show(figure["high"], form)
    return f"{show(figure['value'], form)}<small>[{low}, {high}]</small>"


# ---------------------------------------------------------------- answers and pairs

FALSE = '<span class="false">Red and bold</span>: the picture shows it otherwise'


def answer_list(answers: dict[str, list[Answer]]) -> str:
    """The answers to the same prompts, those of every column together."""
    blocks = ""
    for row in zip(*answers.values(), strict=True):
        blocks += answer_block("", list(zip(answers, row, strict=True)))
    note = f'<p class="note">{FALSE}.</p>\n'
    return f"<h2>Before and after</h2>{note}{blocks}" if blocks else ""


def sampled_list(sampled: list[StepAnswers]) -> str:
    """What the policy itself said in training, and what came of it."""
    if not sampled:
        return ""
    known = f" {FALSE}." if any(each.false for s in sampled for _, each in s.answers) else ""
    note = f"Samples of a few steps, and what they were worth.{known}"
    if any("advantage" in name for each in sampled for name, _ in each.answers):
        note += """ The reward is the score less beta times the log-ratio to the reference (Eq. 2);
the advantage is what it has beyond the mean of the others."""
    blocks = "".join(answer_block(each.title, each.answers) for each in sampled)
    return f'<h2>What the policy said</h2><p class="note">{note}</p>\n{blocks}'


def answer_block(title: str, answers: list[tuple[str, Answer]]) -> str:
    """A picture, a prompt, and answers under their names."""
    first = answers[0][1]
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    blocks = f'<small>prompt</small><p class="text">{escape(first.prompt)}</p>\n'
    for name, answer in answers:
        text = tagged(answer.text, {"false": answer.false})
        blocks += f'<small>{escape(name)}</small><p class="text">{text}</p>\n'
    image = image_element(at_page_size(first.image), "The picture asked about")
    return f'<article class="pair">\n{image}\n<div>{heading}{blocks}</div>\n</article>'


def pair_list(pairs: list[ReportPair]) -> str:
    """The pairs one after another, with lines that explain the marks."""
    if not pairs:
        return ""
    note = """Masked patches are dimmed. Words that differ are <ins>underlined</ins> in the
chosen response, <del>underlined with a wave</del> in the rejected one."""
    if any(any(pair.cuts) for pair in pairs):
        note += """ <span class="cut"></span> BDHS has cut a sentence here: what is before it was
kept, what is behind it the model made up with most of the picture hidden; a Yes or No before it may
have been swapped."""
    if any(any(pair.false) for pair in pairs):
        note += f""" {FALSE}. The chosen response may be wrong, too: its author has not always
looked, as it is with data sets. DPO learns from the difference, and the rejected one is wrong more
often."""
    blocks = "\n".join(pair_block(pair) for pair in pairs)
    return f'<h2>Pairs</h2><p class="note">{note}</p>\n{blocks}'


def pair_block(pair: ReportPair) -> str:
    """Picture, facts, prompt and both responses of one pair."""
    record, bdhs = pair.record, pair.record.bdhs
    guided = {None: "–", True: "yes", False: "no"}[bdhs.get("guided")]
    similarity = show(bdhs.get("similarity"), ".3f")
    facts = f"""iterations {show(bdhs.get("iterations"))} · similarity {similarity} ·
guided {guided} · visible image tokens {pair.tokens}"""

    texts = [record.chosen, record.rejected]
    different = word_diff(*texts)
    blocks = f'<small>prompt</small><p class="text">{escape(record.turns[-1][1])}</p>\n'
    for i, (name, tag) in enumerate((("chosen, y+", "ins"), ("rejected, y−", "del"))):
        text = tagged(texts[i], {tag: different[i], "false": pair.false[i]}, pair.cuts[i])
        blocks += f'<small>{name}</small><p class="text">{text}</p>\n'

    alt = f"Picture of pair {record.id}, visible image tokens: {pair.tokens}"
    return f"""<article class="pair">
{image_element(shown_picture(pair.image, pair.visible), alt)}
<div><h3>{escape(record.id)}</h3><p class="note">{facts}</p>
{blocks}</div>
</article>"""


def image_element(image: Image.Image, alt: str) -> str:
    """A picture inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def at_page_size(image: Image.Image) -> Image.Image:
    """The picture, its longer side as the page has room for."""
    image = image.convert("RGB")
    factor = max(1, PICTURE_SIDE // max(image.size))  # whole, so that every pixel keeps its shape
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))  # does nothing to a picture that fits
    return image


def shown_picture(image: Image.Image, visible: list[bool] | None) -> Image.Image:
    """The picture at page size, its masked patches moved 75 % of the way to neutral grey."""
    image = at_page_size(image)
    if visible is None:
        return image
    side = math.isqrt(len(visible))
    hidden = bytes(0 if shown else 255 for shown in visible)
    mask = Image.frombytes("L", (side, side), hidden)
    dimmed = Image.blend(image, Image.new("RGB", image.size, (128, 128, 128)), 0.75)
    return Image.composite(dimmed, image, mask.resize(image.size, Image.Resampling.NEAREST))


def word_diff(chosen: str, rejected: str) -> tuple[list[Span], list[Span]]:
    """The runs of words that differ: of the chosen response, and of the rejected one.

    Only of the first `COMPARED` words: to align them takes the square of their number.
    """
    left = list(islice(WORD.finditer(chosen), COMPARED))
    right = list(islice(WORD.finditer(rejected), COMPARED))
    words, other_words = [match[0] for match in left], [match[0] for match in right]
    # One alignment serves both sides: aligning the other way round need not give the same words.
    matcher = difflib.SequenceMatcher(None, words, other_words, autojunk=False)
    spans: tuple[list[Span], list[Span]] = ([], [])
    for kind, start, end, other_start, other_end in matcher.get_opcodes():
        if kind == "equal":
            continue
        if start < end:
            spans[0].append((left[start].start(), left[end - 1].end()))
        if other_start < other_end:
            spans[1].append((right[other_start].start(), right[other_end - 1].end()))
    return spans


def tagged(text: str, spans: dict[str, list[Span]], cuts: list[int] | None = None) -> str:
    """The text escaped, with the spans of each name in its element, and a mark at each cut.

    `ins` and `del` are elements; any other name is a class. Spans of one name do not overlap, those
    of two may.
    """
    edges = {0, len(text), *(cuts or [])}
    edges |= {edge for found in spans.values() for span in found for edge in span}
    out = ""
    for start, end in pairwise(sorted(edges)):
        piece = escape(text[start:end])
        for name, found in spans.items():
            if any(begin <= start and end <= stop for begin, stop in found):
                element = name if name in ("ins", "del") else f'span class="{name}"'
                piece = f"<{element}>{piece}</{element.split()[0]}>"
        mark = '<span class="cut"></span>' if start in (cuts or []) else ""
        out += mark + piece
    return out
