"""The findings: what the paper says of two rows of the comparison, and what our paired intervals
say to it.

A finding is a range in which the difference of two rows should lie, counted so that more is better:
above zero where the one beats the other; within a margin of zero where both are on par; above its
lower end where the one matches the other or beats it, below its upper end where it does not beat
it. It is reproduced if the whole 95 % interval lies in the range, not reproduced if all of it lies
outside, else undecided. The margins were fixed before the rows were run.
"""

from math import inf

import numpy as np

from minialign.evaluation.metrics import interval

# Range of the difference, in margins.
BEATS, MATCHES, ON_PAR, NO_BETTER = (0.0, inf), (-1.0, inf), (-1.0, 1.0), (-inf, 1.0)
# Figure -> (its name in the table, the direction in which it is better, margin).
FIGURES = {
    "adversarial POPE": ("pope_adversarial", +1, 0.02),
    "recall": ("recall", +1, 0.02),
    "CHAIR_i": ("chair_i", -1, 0.01),
}
# (claim, row, the row it is compared with, range), each on every figure.
CLAIMS = [
    ("bdhs beats supervised control", "bdhs", "sft", BEATS),
    ("guided beats unguided", "bdhs", "unguided", BEATS),
    ("attention mask beats pixel noise", "bdhs", "noise", BEATS),
    ("offline DPO on corrupted pairs beats the base", "corrupted", "base", BEATS),
    ("offline DPO beats online DPO alone", "corrupted", "online-dpo", BEATS),
    ("mixed DPO beats online DPO alone", "mixed-dpo", "online-dpo", BEATS),
    ("mixed DPO matches or beats offline DPO", "mixed-dpo", "corrupted", MATCHES),
    ("bdhs matches or beats corrupted pairs", "bdhs", "corrupted", MATCHES),
    ("plain DPO beats teacher-forced distortion", "corrupted", "distorted", BEATS),
    ("online bdhs beats offline bdhs", "online-bdhs", "bdhs", BEATS),
    ("the stronger annotator beats the model itself", "online-dpo", "self-judge", BEATS),
    ("IPO is on par with DPO", "ipo", "bdhs", ON_PAR),
    ("SLiC is on par with DPO", "slic", "bdhs", ON_PAR),
    ("RLOO does not beat online DPO on the same truth", "rloo", "online-dpo", NO_BETTER),
    ("PPO does not beat online DPO on the same truth", "ppo", "online-dpo", NO_BETTER),
    ("RLOO on constructed pairs does not beat DPO on them", "rloo-reward", "corrupted", NO_BETTER),
    ("PPO on constructed pairs does not beat DPO on them", "ppo-reward", "corrupted", NO_BETTER),
]
# id -> (figure, row, the row it is compared with, range)
FINDINGS = {
    "bdhs lowers adversarial POPE error": ("adversarial POPE", "bdhs", "base", BEATS),
    "bdhs misses fewer objects": ("recall", "bdhs", "base", BEATS),
    "bdhs lowers CHAIR_i": ("CHAIR_i", "bdhs", "base", BEATS),
}
FINDINGS |= {
    f"{claim} on {figure}": (figure, row, other, bounds)
    for claim, row, other, bounds in CLAIMS
    for figure in FIGURES
}


def judge(metrics: dict[str, dict[str, np.ndarray]]) -> list[dict]:
    """Every finding whose rows were run: {"id", "status", "evidence"}; `metrics` holds every row's
    bootstrap.
    """
    findings = []
    for name, (figure, row, other, bounds) in FINDINGS.items():
        if row not in metrics or other not in metrics:
            continue
        metric, direction, margin = FIGURES[figure]
        difference = interval(metrics[row][metric] - metrics[other][metric])
        status = status_of(difference, direction, margin, bounds)
        if difference["value"] is None:
            shown = "not measured"
        else:
            shown = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)
        if bounds != BEATS:
            shown += f", margin {margin}"
        evidence = f"{metric} {row} - {other}: {shown}"
        findings.append({"id": name, "status": status, "evidence": evidence})
    return findings


def status_of(difference: dict, direction: int, margin: float, bounds: tuple[float, float]) -> str:
    """Where a difference's interval lies: in the range, outside of it, or across its ends."""
    if difference["value"] is None:
        return "undecided"
    least, most = bounds[0] * margin, bounds[1] * margin
    low, high = sorted((direction * difference["low"], direction * difference["high"]))
    if least < low and high < most:
        return "reproduced"
    if high < least or most < low:
        return "not reproduced"
    return "undecided"
