"""A line chart as an SVG file of its own, in the colours of the report, light or dark as the
reader's system is."""

from pathlib import Path

from minialign.evaluation.report import STYLE, escape, show
from minialign.files import write_whole
from minialign.study.page import ticks

# The chart and its frame, in SVG units.
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 546, 34, 252
Line = list[tuple[float, float]]  # x, y


def write_plot(path: Path, across: str, up: str, lines: dict[str, Line]) -> None:
    """Draw each line with its points; both axes begin at zero, so that growth is seen as it is."""
    columns, values = (
        ticks(0, max(point[i] for line in lines.values() for point in line)) for i in (0, 1)
    )

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value / columns[-1]

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / values[-1]

    marks = f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>'
    marks += "".join(
        text(x(value), BOTTOM + 16, "middle", show(value, ".10g")) for value in columns
    )
    marks += "".join(text(LEFT - 7, y(value) + 4, "end", show(value)) for value in values)
    marks += text((LEFT + RIGHT) / 2, HEIGHT - 10, "middle", across)
    middle = (TOP + BOTTOM) / 2
    marks += text(14, middle, "middle", up, f' transform="rotate(-90 14 {middle})"')
    for index, (name, line) in enumerate(lines.items()):
        dots = [f"{x(a):.1f} {y(b):.1f}" for a, b in line]
        marks += f'<path class="line s{index}" d="M{"L".join(dots)}"/>'
        marks += "".join(
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6" fill="var(--c{index})"/>'
            for a, b in line
        )
        left = LEFT + 10 + 240 * index
        marks += f'<path class="line s{index}" d="M{left} 16H{left + 26}"/>' + text(
            left + 33, 20, "start", name
        )
    about = f'role="img" aria-label="{escape(up)} against {escape(across)}"'
    ground = '<rect width="100%" height="100%" fill="var(--bg)"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {about}>'
    write_whole(path, f"{svg}<style>{STYLE}</style>{ground}{marks}</svg>\n")


def text(left: float, top: float, anchor: str, words: str, turn: str = "") -> str:
    """A piece of text."""
    return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'
