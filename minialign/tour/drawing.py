"""The tour's figures: pictures under a mask, texts with what is false in them, bars, a token tree
and its attention matrix.

Everything is HTML or SVG text without a script; names of tokens appear where one points or taps.
"""

import base64
import io

from PIL import Image
from torch import Tensor

from minialign.evaluation.report import escape, shown_picture, tagged
from minialign.model.masks import TRUNK, TokenTree, dense_mask
from minialign.toy.benchmark import false_words
from minialign.toy.world import Scene, picture

COLUMN, ROW, PATCH = 92, 17, 9  # of the tree's drawing, in SVG units
CELL = 'width="1" height="1"'  # of the matrix
WORDS = {
    "image": "visible patch",
    "hidden": "hidden patch",
    "prompt": "prompt",
    "chosen": "y+",
    # As many as the tour draws sentences.
    "branch0": "branch 1",
    "branch1": "branch 2",
    "branch2": "branch 3",
}
STYLE = """
:root { --image: #2a8c82; --prompt: #7d8288; --chosen: #1b64a8; --hidden: #d3d4d0; --false: #c2261d;
  --branch0: #bd4a12; --branch1: #7a3fa0; --branch2: #4d6b2f; }
@media (prefers-color-scheme: dark) { :root { --image: #4cc0b3; --prompt: #9da2a6;
  --chosen: #7db8ec; --hidden: #3b3f43; --false: #ff8177; --branch0: #f0965f; --branch1: #c79be6;
  --branch2: #a5c882; } }
section { margin-top: 2.6rem; border-top: 1px solid var(--rule); } section > h2 { border: 0;
  margin: 1rem 0 .6rem; } figure { margin: 1rem 0; } figcaption, .code { color: var(--soft);
  font-size: .875rem; } .code { overflow-wrap: anywhere; } code { font-size: .9em; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; } .row > * { flex: 1 1 15rem; margin: 0; }
.row img { width: 12rem; display: block; margin-bottom: .4rem; } ol, ul { padding-left: 1.2rem; }
.round { border-left: 3px solid var(--rule); padding-left: 1rem; } .round > img { width: 8rem; }
.kept { color: var(--chosen); } .new { color: var(--branch0); font-weight: bold; }
table .bar { width: 5rem; } .bar { height: .6em; width: 4rem; background: var(--rule); }
.words span { padding: 0 .15em; border-radius: 3px; white-space: nowrap; }
rect.image, circle.image { fill: var(--image); } rect.hidden { fill: var(--hidden); }
rect.prompt, circle.prompt { fill: var(--prompt); } rect.chosen, circle.chosen { fill:
  var(--chosen); } rect.branch0, circle.branch0 { fill: var(--branch0); } rect.branch1,
circle.branch1 { fill: var(--branch1); } rect.branch2, circle.branch2 { fill: var(--branch2); }
.tree { max-width: 26rem; } .tree path { stroke: var(--soft); } .tree text { fill: var(--ink);
  font-size: 12px; } .matrix { max-width: 46rem; } .matrix text { font-size: 2.6px;
  fill: var(--ink); } .matrix g { outline: none; } .matrix .tip { display: none; }
.matrix g:hover > .tip, .matrix g:focus > .tip, .matrix g:focus-within > .tip { display: block; }
.matrix g[tabindex] { cursor: pointer; } .matrix g[tabindex]:hover rect,
.matrix g[tabindex]:focus rect { stroke: var(--ink); stroke-width: .4; }
.key span { white-space: nowrap; margin-right: 1rem; } .key svg { width: .8em; height: .8em; }
"""


def data_uri(image: Image.Image) -> str:
    """A picture inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def under_mask(scene: Scene, visible: Tensor | None) -> Image.Image:
    """The picture, large; the patches that a mask (image tokens,) hides are dimmed."""
    shown = None if visible is None else visible.tolist()
    large = picture(scene, scale=3)
    return shown_picture(large, shown)


def image_tag(scene: Scene, visible: Tensor | None, alt: str) -> str:
    """That as an element."""
    return f'<img src="{data_uri(under_mask(scene, visible))}" alt="{escape(alt)}">'


def with_false_words(scene: Scene, text: str) -> str:
    """The text, with what is not true of the picture marked."""
    return tagged(text, {"false": false_words(scene, text)})


def bar(share: float, kind: str) -> str:
    """A share of 1."""
    rect = f'<rect class="{kind}" width="{100 * share:.1f}" height="10"/>'
    return f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none">{rect}</svg>'


def kinds_of(tree: TokenTree, chosen_at: int) -> list[str]:
    """What each column of a tree's only row is: hidden, image, prompt, chosen or a branch; y+
    begins at position `chosen_at`.
    """
    kinds = []
    for column, branch in enumerate(tree.branch[0].tolist()):
        if tree.feature[0, column] >= 0:
            kinds.append("image" if tree.visible[0, column] else "hidden")
        elif branch == TRUNK:
            kinds.append("prompt" if tree.positions[0, column] < chosen_at else "chosen")
        else:
            kinds.append(f"branch{branch - 1}")
    return kinds


def key_of(names: dict[str, str]) -> str:
    """What the colours mean: kind -> words."""
    keys = ""
    for kind, words in names.items():
        patch = f'<svg viewBox="0 0 10 10"><rect class="{kind}" width="10" height="10"/></svg>'
        keys += f"<span>{patch} {escape(words)}</span> "
    return f'<p class="note key">{keys}</p>'


def tree_drawing(tree: TokenTree, labels: list[str], kinds: list[str]) -> str:
    """The tree, downwards by RoPE position: the trunk at the left, each branch beside its fork."""
    positions, branches = tree.positions[0].tolist(), tree.branch[0].tolist()
    features = tree.feature[0].tolist()
    image = [column for column, feature in enumerate(features) if feature >= 0]
    side = round(len(image) ** 0.5)

    def y(position: int) -> float:
        """Patches take one row of the drawing, `side` patches high."""
        before = max(0, min(position - positions[image[0]], len(image)))
        row = ROW * (position - before + 1)
        return row + (PATCH * side + 4 if position > positions[image[-1]] else 0)

    marks = ""
    for number, column in enumerate(image):
        x, down = (
            8 + PATCH * (number % side),
            y(positions[image[0]]) - 10 + PATCH * (number // side),
        )
        name = f"<title>{escape(labels[column])}</title>"
        place = f'x="{x}" y="{down:.0f}" width="{PATCH - 1}" height="{PATCH - 1}"'
        marks += f'<rect class="{kinds[column]}" {place}>{name}</rect>'
    for column, branch in enumerate(branches):
        if features[column] >= 0:
            continue
        x, down = 10 + COLUMN * branch, y(positions[column]) - 4
        begins = branch != TRUNK and branches[column - 1] != branch
        if begins:  # a line from the last token that the branch sees of the trunk
            above = y(positions[column] - 1) - 4
            marks += f'<path d="M10 {above:.0f}C10 {down:.0f} {x - 40} {down:.0f} {x} {down:.0f}"/>'
        marks += f'<circle class="{kinds[column]}" cx="{x}" cy="{down:.0f}" r="4"/>'
        marks += f'<text x="{x + 8}" y="{down + 4:.0f}">{escape(labels[column])}</text>'
    height = max(y(position) for position in positions) + 6
    size = f'viewBox="0 0 {COLUMN * (max(branches) + 1)} {height:.0f}"'
    return f'<svg class="tree" {size} role="img" aria-label="The token tree">{marks}</svg>'


def matrix_drawing(tree: TokenTree, labels: list[str], kinds: list[str]) -> str:
    """The tree's attention: a row for each query, a column for each key; a cell is filled, in its
    key's colour, where the query may attend. Its names appear where one points or taps.
    """
    allowed = dense_mask(tree, tree)[0, 0]  # (T, T)
    count, marks = len(labels), ""
    for column, kind in enumerate(kinds):  # a margin in the tokens' colours, and hidden columns
        marks += f'<rect class="{kind}" x="{column + 3}" y="0" width="1" height="2"/>'
        marks += f'<rect class="{kind}" x="0" y="{column + 3}" width="2" height="1"/>'
        if kind == "hidden":
            tip = f'<text class="tip" x="{count + 3}" y="9" text-anchor="end">'
            words = f"key {escape(labels[column])}: hidden from every query"
            place = f'x="{column + 3}" y="{column + 3}" width="1" height="{count - column}"'
            rect = f'<rect class="hidden" {place}/>'
            marks += f'<g tabindex="-1">{rect}{tip}{words}</text></g>'
    for query in range(count):
        cells = ""
        for key in allowed[query].nonzero()[:, 0].tolist():
            rect = f'<rect class="{kinds[key]}" x="{key + 3}" y="{query + 3}" {CELL}/>'
            tip = f'<text class="tip" x="{count + 3}" y="9" text-anchor="end">'
            cells += f'<g tabindex="-1">{rect}{tip}key {escape(labels[key])}</text></g>'
        place = f'x="{count + 3}" y="5.5" text-anchor="end"'
        who = escape(f"query {labels[query]} ({WORDS[kinds[query]]})")
        marks += f'<g>{cells}<text class="tip" {place}>{who}</text></g>\n'
    size = f'viewBox="0 0 {count + 3} {count + 3}"'
    return f'<svg class="matrix" {size} role="img" aria-label="Attention">{marks}</svg>'
