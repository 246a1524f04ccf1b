"""The findings: which way is better, margins, what is undecided, and evidence that says what was
compared.
"""

import numpy as np
import pytest

from minialign.evaluation.metrics import interval
from minialign.study.__main__ import ROWS
from minialign.study.findings import BEATS, FIGURES, FINDINGS, MATCHES, NO_BETTER, ON_PAR, judge

MARGINS = {"adversarial POPE": 0.02, "recall": 0.02, "CHAIR_i": 0.01}
METRICS = ("pope_adversarial", "recall", "chair_i")


def bootstrapped(value: float, low: float, high: float) -> np.ndarray:
    """1 + 1000 numbers: the value, then evenly spread ones, so that 95 % of them lie between low
    and high.
    """
    spread = (high - low) / 0.95
    middle = (low + high) / 2
    return np.concatenate([[value], np.linspace(middle - spread / 2, middle + spread / 2, 1000)])


def verdicts(**rows) -> dict[str, str]:
    """id -> status, from rows of {metric: array}."""
    return {finding["id"]: finding["status"] for finding in judge(rows)}


def row(pope, recall, chair) -> dict[str, np.ndarray]:
    return dict(
        zip(METRICS, (bootstrapped(*values) for values in (pope, recall, chair)), strict=True)
    )


ZERO = row((0, 0, 0), (0, 0, 0), (0, 0, 0))
IDS = ("bdhs lowers adversarial POPE error", "bdhs misses fewer objects", "bdhs lowers CHAIR_i")


def test_an_interval_is_the_middle_95_percent():
    found = interval(
        np.concatenate([[7.0], np.random.default_rng(0).permutation(np.arange(1001.0))])
    )
    assert found == {"value": 7.0, "low": 25.0, "high": 975.0}  # the value itself is no resample
    assert interval(bootstrapped(0.2, 0.1, 0.4)) == {"value": 0.2, "low": 0.1, "high": 0.4}


def test_directions():
    """POPE accuracy and recall should rise, CHAIR_i should fall."""
    better = row((0.1, 0.05, 0.2), (0.1, 0.001, 0.2), (-0.1, -0.2, -0.05))
    worse = row((-0.1, -0.2, -0.05), (-0.1, -0.2, -0.001), (0.1, 0.05, 0.2))
    unclear = row((0.1, -0.001, 0.2), (0.1, -0.1, 0.3), (-0.1, -0.2, 0.001))
    assert verdicts(base=ZERO, bdhs=better) == dict.fromkeys(IDS, "reproduced")
    assert verdicts(base=ZERO, bdhs=worse) == dict.fromkeys(IDS, "not reproduced")
    assert verdicts(base=ZERO, bdhs=unclear) == dict.fromkeys(IDS, "undecided")
    assert verdicts(base=better, bdhs=ZERO) == dict.fromkeys(IDS, "not reproduced")


def test_an_interval_that_touches_zero_decides_nothing():
    touching = row((0.1, 0.0, 0.2), (-0.1, -0.2, 0.0), (-0.1, -0.2, 0.0))
    assert verdicts(base=ZERO, bdhs=touching) == dict.fromkeys(IDS, "undecided")


def test_only_rows_that_were_run_are_judged():
    assert judge({"base": ZERO}) == [] and judge({"sft": ZERO, "noise": ZERO, "base": ZERO}) == []
    assert verdicts(base=ZERO, bdhs=ZERO).keys() == set(IDS)
    everything = verdicts(**dict.fromkeys(("base", *ROWS), ZERO))
    assert everything.keys() == FINDINGS.keys()
    compared = [(first, second) for _, first, second, _ in FINDINGS.values()]
    assert all(first in ROWS and second in (*ROWS, "base") for first, second in compared)
    assert {row for pair in compared for row in pair} == {"base", *ROWS}
    assert len(FINDINGS) == 18 * len(FIGURES)  # each on every figure


def test_not_to_beat_is_to_stay_below_the_margin():
    """POPE and recall 0.02, CHAIR_i 0.01: better by less than that, or worse, is reproduced."""
    ids = [name for name, (_, first, _, _) in FINDINGS.items() if first == "rloo-reward"]
    little = row((0, -0.5, 0.019), (0, -0.1, 0.019), (0, -0.009, 0.5))
    much = row((0.3, 0.021, 0.5), (0.3, 0.021, 0.5), (-0.2, -0.3, -0.011))
    both = row((0.02, 0, 0.04), (0.02, 0, 0.04), (-0.01, -0.02, 0))
    for shown, status in ((little, "reproduced"), (much, "not reproduced"), (both, "undecided")):
        found = verdicts(**{"corrupted": ZERO, "rloo-reward": shown})
        assert found == dict.fromkeys(ids, status) and len(ids) == 3
    assert NO_BETTER[1] == 1


def test_evidence_says_what_was_compared():
    better = row((0.1234, 0.05, 0.2), (0, 0, 0), (0, 0, 0))
    finding = judge({"base": ZERO, "bdhs": better})[0]
    assert finding == {
        "id": IDS[0],
        "status": "reproduced",
        "evidence": "pope_adversarial bdhs - base: +0.123 [+0.050, +0.200]",
    }


# ---------------------------------------------------------------- margins

INSIDE, ABOVE, BELOW = (0.0, -0.019, 0.019), (0.05, 0.021, 0.08), (-0.05, -0.08, -0.021)
ACROSS, FAR_ACROSS, LOW_ACROSS = (0.01, -0.01, 0.03), (0.0, -0.03, 0.03), (-0.02, -0.03, -0.01)


@pytest.mark.parametrize(
    "gain, matches, on_par",
    [
        (INSIDE, "reproduced", "reproduced"),
        (ABOVE, "reproduced", "not reproduced"),
        (BELOW, "not reproduced", "not reproduced"),
        (ACROSS, "reproduced", "undecided"),
        (FAR_ACROSS, "undecided", "undecided"),
        (LOW_ACROSS, "undecided", "undecided"),
    ],
)
def test_margins(gain, matches, on_par):
    """bdhs against corrupted, and IPO against bdhs: a gain is upwards, in CHAIR_i downwards."""
    value, low, high = gain
    better = row(
        gain, gain, (-value / 2, -high / 2, -low / 2)
    )  # CHAIR_i's margin is half of theirs
    found = verdicts(bdhs=better, corrupted=ZERO)
    assert found == dict.fromkeys(
        (f"bdhs matches or beats corrupted pairs on {name}" for name in FIGURES), matches
    )
    found = verdicts(ipo=better, bdhs=ZERO)
    assert found == dict.fromkeys((f"IPO is on par with DPO on {name}" for name in FIGURES), on_par)


def test_ranges():
    assert {name: margin for name, (_, _, margin) in FIGURES.items()} == MARGINS
    assert ON_PAR == (-1, 1) and MATCHES[0] == -1 and BEATS[0] == 0
    assert MATCHES[1] == BEATS[1] == float("inf")  # who beats another matches it, too


def test_evidence_states_the_margin_where_there_is_one():
    evidence = {f["id"]: f["evidence"] for f in judge({"ipo": ZERO, "bdhs": ZERO, "sft": ZERO})}
    assert (
        evidence["IPO is on par with DPO on recall"]
        == "recall ipo - bdhs: +0.000 [+0.000, +0.000], margin 0.02"
    )
    assert (
        evidence["bdhs beats supervised control on recall"]
        == "recall bdhs - sft: +0.000 [+0.000, +0.000]"
    )


def test_what_was_not_measured_is_undecided():
    nothing = dict.fromkeys(METRICS, np.full(1001, np.nan))
    found = judge({"base": ZERO, "bdhs": nothing})
    assert {f["status"] for f in found} == {"undecided"} and all(
        "not measured" in f["evidence"] for f in found
    )
