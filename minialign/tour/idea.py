"""The whole idea as one drawing: an SVG image without a script, for light and dark pages."""

import re

from minialign.evaluation.report import escape
from minialign.sampling.bdhs import split_sentences
from minialign.tour.drawing import data_uri, under_mask
from minialign.tour.facts import Round, Tour
from minialign.toy.benchmark import false_words
from minialign.toy.world import Scene

WIDTH, HEIGHT = 900, 480
SIDE = 170  # of a picture
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1d1f21; } .head { font-weight: bold; }
.ground { fill: #fdfdfb; stroke: #d9dad6; } .soft { fill: #5f6468; font-size: 13px; }
.kept { fill: #1b64a8; } .false { fill: #c2261d; font-weight: bold; text-decoration: underline; }
.bar { fill: #bd4a12; } path { fill: none;
stroke: #5f6468; stroke-width: 2; }
@media (prefers-color-scheme: dark) { text { fill: #e3e4e1; } .soft { fill: #9da2a6; }
.ground { fill: #17191b; stroke: #383c40; } .kept { fill: #7db8ec; } .false { fill: #ff8177; }
.bar { fill: #f0965f; } path { stroke: #9da2a6; } }
"""


def idea(tour: Tour) -> str:
    """The drawing: a picture, its patches hidden, a sentence cut, what the model makes up, and what
    it says of the whole picture before and after DPO.
    """
    subject, first = tour.subject, tour.rounds[0]
    # Of the sentences that went wrong, the one of which most was kept.
    wrong = [bool(false_words(subject.scene, sampled(first, i))) for i in range(len(first.cuts))]
    best = max(range(len(wrong)), key=lambda i: (wrong[i], len(first.cuts[i].kept)))
    cut = first.cuts[best]
    start, end = split_sentences(subject.record.chosen)[best]
    visible = f"{int(first.visible.sum())} of {len(first.visible)} patches left"
    moved = max(tour.moved, key=lambda each: each.after[0] - each.before[0])

    parts = [
        line(20, 36, "1  A picture, a good answer", "head"),
        picture(subject.scene, None, 20, 52),
        line(20, 250, subject.record.chosen[start:end], "kept"),
        line(20, 270, "y+, chosen", "soft"),
        line(320, 36, "2  Hide patches, cut a sentence", "head"),
        picture(subject.scene, first.visible, 320, 52),
        line(320, 250, f"{cut.kept} …", "kept"),
        line(320, 270, visible, "soft"),
        line(610, 36, "3  Let the model go on", "head"),
        line(610, 72, "its likeliest next words", "soft"),
        *wrapped(subject.scene, sampled(first, best), 610, 250, 34),
        line(610, 270, "y-, rejected: made up out of habit", "soft"),
    ]
    for i, (word, share) in enumerate(first.likely[best]):
        top = 100 + 40 * i
        parts.append(line(610, top, f"{word} {share:.2f}"))
        place = f'x="610" y="{top + 6}" width="{share * 240:.0f}" height="7"'
        parts.append(f'<rect class="bar" {place}/>')

    parts += [
        '<path d="M20 290H880"/>',
        line(20, 322, "4  DPO: y+ rather than y-. Then ask about the whole picture", "head"),
        '<path d="M438 396h28m-8 -7l8 7l-8 7"/>',
    ]
    for x, when, answer, share in (
        (20, "before", tour.answer, moved.before[0]),
        (480, "after", tour.answer_after, moved.after[0]),
    ):
        count = len(false_words(subject.scene, answer))
        behind = f"Behind “The {moved.place}”: “{moved.picture_word}” {share:.2f}"
        parts.append(line(x, 350, f"{when}: {count} false words. {behind}", "soft"))
        parts += wrapped(subject.scene, answer, x, 376, 50)
    body = "\n".join(parts)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    about = "A model completes a sentence with most of the picture hidden; DPO learns from that"
    frame = f'x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{about}">
<style>{STYLE}</style>
<rect class="ground" {frame}/>
{body}
</svg>
"""


def sampled(first: Round, branch: int) -> str:
    """A completed sentence."""
    return f"{first.cuts[branch].kept} {first.texts[branch]}".strip()


def line(x: int, y: int, words: str, kind: str = "") -> str:
    """One line."""
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'


def picture(scene: Scene, visible, x: int, y: int) -> str:
    """The picture under a mask."""
    place = f'x="{x}" y="{y}" width="{SIDE}" height="{SIDE}"'
    return f'<image {place} href="{data_uri(under_mask(scene, visible))}"/>'


def wrapped(scene: Scene, words: str, x: int, y: int, width: int) -> list[str]:
    """Lines of at most `width` letters, with false words marked."""
    wrong = {start for start, _ in false_words(scene, words)}
    lines, length = [[]], 0
    for word in re.finditer(r"\S+", words):
        if lines[-1] and length + len(word[0]) > width:
            lines.append([])
            length = 0
        length += len(word[0]) + 1
        kind = ' class="false"' if word.start() in wrong else ""
        lines[-1].append(f"<tspan{kind}>{escape(word[0])}</tspan>")
    return [
        f'<text x="{x}" y="{y + 22 * i}">{" ".join(line)}</text>' for i, line in enumerate(lines)
    ]
