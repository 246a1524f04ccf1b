"""Training curves as SVG, without a script: each line's values and, over them, their moving mean;
the values themselves where one points.
"""

import math

Curve = list[tuple[float, float]]  # (step, value)
POINTS = 200  # of a curve; longer ones are averaged over equal runs of logged values
SMOOTHED = 20  # a curve of fewer points is shown as it is; the mean is over a tenth of the others
STRIPS = 40  # places of a chart where one may point
WIDTH, HEIGHT = 360, 220  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 56, 350, 10, 184  # its frame
EQUAL = 1e-5  # nats; policy and reference that differ by less are the same model, up to rounding
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
.charts { display: grid; gap: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.legend span { margin-right: 1rem; border-bottom: 2px solid var(--c0); }
.legend span:nth-child(2) { border-bottom: 2px dashed var(--c1); }
.legend span:nth-child(3) { border-bottom: 2px dotted var(--c2); }
svg { width: 100%; } path { fill: none; } text { font: 11px sans-serif; fill: var(--soft); }
.axis { stroke: var(--soft); } .grid { stroke: var(--rule); } .strip { fill: transparent; }
.strip:hover { fill: var(--soft); fill-opacity: .25; }
.line { stroke-width: 1.6; stroke-linecap: round; } .raw { stroke-width: .8; opacity: .4; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.line.s1 { stroke-dasharray: 6 4; } .line.s2 { stroke-dasharray: 1 4; }
"""


def show(value: float | None, form: str = ".4g") -> str:
    """A number with a true minus sign, or a dash where there is none."""
    return "–" if value is None else format(value, form).replace("-", "−")


def training_curves(metrics: list[dict]) -> str:
    """The charts of what was logged, or one sentence when nothing was."""
    if not metrics:
        return '<p class="note">No training metrics were recorded.</p>'
    size = math.ceil(len(metrics) / POINTS)
    notes = "Thin: what was logged; thick: its moving mean. Point at a chart for its values."
    if size > 1:
        notes += f" Each point is the mean of {size} logged values."
    charts = []
    for title, keys, span in CHARTS:
        curves = {key: curve(metrics, key, size) for key in keys}
        if any(curves.values()):
            charts.append(chart(title, curves, span))
    return f'<p class="note">{notes}</p>\n<div class="charts">\n' + "\n".join(charts) + "\n</div>"


def curve(metrics: list[dict], key: str, size: int) -> Curve:
    """A metric against the step, as the means of `size` logged values each.

    Left out is what is not finite, and the accuracy of a step in which the policy still was the
    reference, so that all rewards were 0 and it told nothing.
    """
    rows = [row for row in metrics if math.isfinite(row.get(key, math.nan))]
    if key == "rewards/accuracies":
        names = ("rewards/chosen", "rewards/rejected")
        rows = [row for row in rows if any(abs(row.get(name, 1)) > EQUAL for name in names)]
    points = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        points.append((part[-1]["step"], sum(row[key] for row in part) / len(part)))
    return points


def moving_mean(line: Curve) -> Curve:
    """The mean over a tenth of the points around each; at an end over fewer, as many to the left as
    to the right.
    """
    reach = len(line) // 20
    smooth = []
    for i, (step, _) in enumerate(line):
        half = min(reach, i, len(line) - 1 - i)
        near = [value for _, value in line[i - half : i + half + 1]]
        smooth.append((step, sum(near) / len(near)))
    return smooth


def chart(title: str, curves: dict[str, Curve], span: list[float]) -> str:
    """An SVG line chart against the step; dashes as well as colours tell lines apart."""
    points = [point for line in curves.values() for point in line]
    steps = [step for step, _ in points]
    values = [value for _, value in points] + span
    first, last, low, high = min(steps), max(steps), min(values), max(values)

    def path(line: Curve, kind: str) -> str:
        """The stroke of no length at its end makes a dot of a lone point."""
        places = []
        for step, value in line:
            x, y = between(step, first, last, LEFT, RIGHT), between(value, low, high, BOTTOM, TOP)
            places.append(f"{x:.1f} {y:.1f}")
        return f'<path class="{kind}" d="M{"L".join(places)}h0"/>'

    marks, legend = axes(first, last, low, high), ""
    for index, (key, line) in enumerate(curves.items()):
        if len(line) >= SMOOTHED:
            marks += path(line, f"raw s{index}")
            marks += path(moving_mean(line), f"line s{index}")
        elif line:
            marks += path(line, f"line s{index}")
        legend += f"<span>{key}</span>"
    marks += strips(curves, first, last)
    about = f"{title}, against the step, from {show(low)} to {show(high)}"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}"'
    return f"""<figure><h3>{title}</h3><div class="legend">{legend}</div>
<svg {size}>{marks}</svg></figure>"""


def strips(curves: dict[str, Curve], first: float, last: float) -> str:
    """Upright strips, invisible until one points at them, that name the values of a step."""
    at: dict[float, list[str]] = {}
    for key, line in curves.items():
        for step, value in line:
            at.setdefault(step, [f"step {step}"]).append(f"{key} {show(value)}")
    steps = sorted(at)
    steps = steps[:: math.ceil(len(steps) / STRIPS)]
    width = (RIGHT - LEFT) / len(steps)
    marks = ""
    for step in steps:
        x = between(step, first, last, LEFT, RIGHT) - width / 2
        place = f'x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{BOTTOM - TOP}"'
        marks += f'<rect class="strip" {place}><title>{", ".join(at[step])}</title></rect>'
    return marks


def between(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where a value lies on an axis on which `low` is at `start` and `high` at `end`."""
    share = (value - low) / (high - low) if high > low else 0.5
    return start + (end - start) * share


def ticks(low: float, high: float) -> list[float]:
    """Round values from low to high, two to six of them; or the only one there is."""
    if high <= low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(s for s in (size, 2 * size, 5 * size, 10 * size) if (high - low) / s < 6)
    found = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [number * step for number in found]


def axes(first: float, last: float, low: float, high: float) -> str:
    """Both axes, with ticks and a faint line at each of the vertical one's."""
    marks = f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>'
    for value in ticks(low, high):
        y = between(value, low, high, BOTTOM, TOP)
        marks += f'<path class="grid" d="M{LEFT + 1} {y:.1f}H{RIGHT}"/>'
        marks += label(LEFT - 6, y + 4, "end", show(value))
    for step in ticks(first, last):
        if step == int(step):
            x = between(step, first, last, LEFT, RIGHT)
            marks += label(x, BOTTOM + 15, "middle", str(int(step)))
    return marks + label((LEFT + RIGHT) / 2, HEIGHT - 5, "middle", "step")


def label(x: float, y: float, anchor: str, text: str) -> str:
    """A text of a chart."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
