"""The findings: each metric against the paper's own sign; what is undecided, or has no verdict."""

import numpy as np
import pytest

from minialign.evaluation.metrics import interval
from minialign.study.__main__ import ROWS
from minialign.study.findings import CLAIMS, METRICS, OURS, judge, shown_difference, status_of


def bootstrapped(value: float, low: float, high: float) -> np.ndarray:
    """1 + 1000 numbers: the value, then evenly spread ones, so that 95 % of them lie between low
    and high.
    """
    spread = (high - low) / 0.95
    middle = (low + high) / 2
    return np.concatenate([[value], np.linspace(middle - spread / 2, middle + spread / 2, 1000)])


def row(*values: tuple[float, float, float]) -> dict[str, np.ndarray]:
    return dict(zip(METRICS, (bootstrapped(*each) for each in values), strict=True))


def verdicts(**rows) -> dict[tuple[str, str], str]:
    """(rows, metric) -> status, from rows of {metric: array}."""
    return {(found["rows"], found["metric"]): found["status"] for found in judge(rows)}


ZERO = row((0, 0, 0), (0, 0, 0), (0, 0, 0))
UP, DOWN, ACROSS = (0.1, 0.05, 0.2), (-0.1, -0.2, -0.05), (0.01, -0.01, 0.03)


def test_an_interval_is_the_middle_95_percent():
    found = interval(
        np.concatenate([[7.0], np.random.default_rng(0).permutation(np.arange(1001.0))])
    )
    assert found == {"value": 7.0, "low": 25.0, "high": 975.0}  # the value itself is no resample
    assert interval(bootstrapped(0.2, 0.1, 0.4)) == {"value": 0.2, "low": 0.1, "high": 0.4}


def test_each_metric_has_the_papers_own_sign():
    """Guided against unguided is ahead on POPE and behind in recall, there: so here."""
    found = verdicts(unguided=ZERO, bdhs=row(UP, DOWN, UP))
    assert list(found.values()) == ["reproduced", "reproduced", "ours"]
    found = verdicts(unguided=ZERO, bdhs=row(DOWN, UP, UP))
    assert list(found.values()) == ["not reproduced", "not reproduced", "ours"]
    found = verdicts(unguided=ZERO, bdhs=row(ACROSS, ACROSS, UP))
    assert list(found.values()) == ["undecided", "undecided", "ours"]


@pytest.mark.parametrize(
    ("difference", "paper", "status"),
    [
        (UP, 0.05, "reproduced"),
        (UP, -0.05, "not reproduced"),
        (DOWN, -3.67, "reproduced"),
        (DOWN, 3.67, "not reproduced"),
        (ACROSS, 1.0, "undecided"),
        ((0.1, 0.0, 0.2), 1.0, "undecided"),  # it touches zero
        ((-0.1, -0.2, 0.0), -1.0, "undecided"),
        (UP, None, "ours"),
        ((None, None, None), 1.0, "undecided"),
        ((None, None, None), None, "ours"),
    ],
)
def test_status(difference, paper, status):
    found = dict(zip(("value", "low", "high"), difference, strict=True))
    assert status_of(found, paper) == status


def test_the_papers_differences_are_those_of_its_tables():
    """LLaVA-1.6-7B's POPE and recall: of the tables that list them, subtracted here anew."""
    table = {
        "base": (86.40, 68.13),
        "corrupted": (88.18, 71.80),
        "distorted": (88.33, 69.39),
        "noise": (88.60, 75.16),
        "bdhs": (88.75, 75.58),
        "online-bdhs": (88.83, 74.09),
        "unguided": (88.70, 77.04),
    }
    compared = 0
    for claim in CLAIMS:
        if claim.row in table and claim.other in table:
            pope, recall = np.subtract(table[claim.row], table[claim.other])
            assert (claim.pope, claim.recall) == pytest.approx((pope, recall), abs=0.006), claim
            compared += 1
    assert compared == 7
    full, online, mixed = (88.09, 73.48), (86.49, 68.45), (88.03, 74.53)
    ipo, slic = (87.62, 69.81), (88.28, 74.32)
    by_rows = {(claim.row, claim.other): (claim.pope, claim.recall) for claim in CLAIMS}
    for rows, first, second in (
        (("corrupted", "online-dpo"), full, online),
        (("mixed-dpo", "online-dpo"), mixed, online),
        (("mixed-dpo", "corrupted"), mixed, full),
        (("ipo", "bdhs"), ipo, full),
        (("slic", "bdhs"), slic, full),
    ):
        assert by_rows[rows] == pytest.approx(tuple(np.subtract(first, second)), abs=0.016), rows


def test_only_rows_that_were_run_are_judged():
    assert judge({"base": ZERO}) == [] and judge({"sft": ZERO, "noise": ZERO, "base": ZERO}) == []
    assert len(judge({"base": ZERO, "bdhs": ZERO})) == 3
    everything = verdicts(**dict.fromkeys(("base", *ROWS), ZERO))
    assert len(everything) == len(CLAIMS) * len(METRICS)
    assert {row for claim in CLAIMS for row in (claim.row, claim.other)} == {"base", *ROWS}


def test_what_the_paper_has_no_figure_for_has_no_verdict():
    """Our own controls, and CHAIR."""
    for found in judge(dict.fromkeys(("base", *ROWS), row(UP, UP, UP))):
        own = found["table"] == OURS or found["metric"] == "chair_i"
        assert (found["status"] == "ours") == own and (found["paper"] is None) == own


def test_evidence_says_what_was_compared():
    better = row((0.1234, 0.05, 0.2), (0, 0, 0), (0, 0, 0))
    found = judge({"base": ZERO, "bdhs": better})[0]
    assert found == {
        "claim": "BDHS against the base",
        "rows": "bdhs - base",
        "table": "Table 6",
        "metric": "pope_adversarial",
        "paper": 2.35,
        "difference": {"value": 0.1234, "low": 0.05, "high": 0.2},
        "status": "reproduced",
    }
    assert shown_difference(found["difference"]) == "+0.123 [+0.050, +0.200]"


def test_what_was_not_measured_is_undecided():
    nothing = dict.fromkeys(METRICS, np.full(1001, np.nan))
    found = judge({"base": ZERO, "bdhs": nothing})
    assert [each["status"] for each in found] == ["undecided", "undecided", "ours"]
    assert {shown_difference(each["difference"]) for each in found} == {"not measured"}
