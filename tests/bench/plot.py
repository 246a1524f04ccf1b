"""A line chart as an SVG file of its own, in the colours of the report, light or dark as the
reader's system is."""

import math
from pathlib import Path

from minialign.evaluation.report import STYLE, escape, show
from minialign.files import write_whole

# The chart and its frame, in SVG units.
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 546, 34, 252
Line = list[tuple[float, float]]  # x, y


def write_plot(path: Path, across: str, up: str, lines: dict[str, Line]) -> None:
    """Draw each line with its points; both axes begin at zero, so that growth is seen as it is."""
    points = [point for line in lines.values() for point in line]
    columns, values = ticks(max(x for x, _ in points)), ticks(max(y for _, y in points))

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value / columns[-1]

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / values[-1]

    # The axes, with their numbers and names.
    marks = [f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>']
    for value in columns:
        marks.append(text(x(value), BOTTOM + 16, "middle", show(value, ".10g")))
    for value in values:
        marks.append(text(LEFT - 7, y(value) + 4, "end", show(value)))
    middle = (TOP + BOTTOM) / 2
    marks.append(text((LEFT + RIGHT) / 2, HEIGHT - 10, "middle", across))
    marks.append(text(14, middle, "middle", up, f' transform="rotate(-90 14 {middle})"'))

    # The lines, and above the frame what each of them is.
    for index, (name, line) in enumerate(lines.items()):
        dots = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line)
        marks.append(f'<path class="line s{index}" d="M{dots}"/>')
        for a, b in line:
            place = f'cx="{x(a):.1f}" cy="{y(b):.1f}"'
            marks.append(f'<circle {place} r="2.6" fill="var(--c{index})"/>')
        left = LEFT + 10 + 240 * index
        marks.append(f'<path class="line s{index}" d="M{left} 16H{left + 26}"/>')
        marks.append(text(left + 33, 20, "start", name))

    about = f'role="img" aria-label="{escape(up)} against {escape(across)}"'
    ground = '<rect width="100%" height="100%" fill="var(--bg)"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {about}>'
    write_whole(path, f"{head}<style>{STYLE}</style>{ground}{''.join(marks)}</svg>\n")


def ticks(high: float) -> list[float]:
    """Round numbers from zero to `high` or above, some five steps apart."""
    rough = high / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [round(number * step, 9) for number in range(math.ceil(high / step - 1e-6) + 1)]


def text(left: float, top: float, anchor: str, words: str, turn: str = "") -> str:
    """A piece of text."""
    return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'
