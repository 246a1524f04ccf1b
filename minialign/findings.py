"""The findings: what the paper says of two rows of the comparison, and what our paired intervals say to it.

A finding is a range in which the difference of two rows should lie, counted so that more is better: above zero where
the one beats the other; within `MARGIN` of zero where both are on par; above its lower end where the one matches the
other or beats it. It is reproduced if the whole 95 % interval lies in the range, not reproduced if all of it lies
outside, else undecided. The margin was fixed before the rows were run.
"""

from math import inf

import numpy as np

from minialign.metrics import interval

MARGIN = 0.02
BEATS, MATCHES, ON_PAR = (0.0, inf), (-MARGIN, inf), (-MARGIN, MARGIN)
# figure -> (its name in the table, the direction in which it is better)
FIGURES = {"adversarial POPE": ("pope_adversarial", +1), "recall": ("recall", +1), "CHAIR_i": ("chair_i", -1)}
# (claim, row, the row it is compared with, range)
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
    ("IPO is on par with DPO", "ipo", "bdhs", ON_PAR),
    ("SLiC is on par with DPO", "slic", "bdhs", ON_PAR),
]
# id -> (figure, row, the row it is compared with, range)
FINDINGS = {
    "bdhs lowers adversarial POPE error": ("adversarial POPE", "bdhs", "base", BEATS),
    "bdhs misses fewer objects": ("recall", "bdhs", "base", BEATS),
    "bdhs lowers CHAIR_i": ("CHAIR_i", "bdhs", "base", BEATS),
} | {f"{claim} on {figure}": (figure, *rest) for claim, *rest in CLAIMS for figure in FIGURES}


def judge(metrics: dict[str, dict[str, np.ndarray]]) -> list[dict]:
    """Every finding whose rows were run: {"id", "status", "evidence"}; `metrics` holds every row's bootstrap."""
    findings = []
    for name, (figure, row, other, (least, most)) in FINDINGS.items():
        if row not in metrics or other not in metrics:
            continue
        metric, direction = FIGURES[figure]
        difference = interval(metrics[row][metric] - metrics[other][metric])
        if difference["value"] is None:
            status, shown = "undecided", "not measured"
        else:
            low, high = sorted((direction * difference["low"], direction * difference["high"]))
            inside, outside = least < low and high < most, high < least or most < low
            status = "reproduced" if inside else "not reproduced" if outside else "undecided"
            shown = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)
        margin = f", margin {MARGIN}" if MARGIN in (-least, most) else ""
        findings.append({"id": name, "status": status, "evidence": f"{metric} {row} - {other}: {shown}{margin}"})
    return findings
