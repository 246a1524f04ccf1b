"""The study's arithmetic by hand: pooled counts, paired intervals."""

import json
import random

import numpy as np
import pytest
from study_counts import POPE, some_runs

from minialign.evaluation.metrics import SETTINGS_OF_POPE, bootstrap
from minialign.study.findings import judge

RECALL = "bdhs misses fewer objects"


@pytest.mark.parametrize("seed,runs,images", [(0, 1, 1), (1, 1, 7), (2, 3, 5), (3, 4, 12)])
def test_pooled_metrics_equal_sums_by_hand(seed, runs, images):
    counts = some_runs(seed, runs, images)

    def total(name: str) -> int:
        return sum(image.get(name, 0) for run in counts for image in run)

    def per(a: float, b: float) -> float:
        return a / b if b else 0.0

    expected = {
        "chair_i": per(total("hallucinated"), total("mentioned")),
        "chair_s": per(total("hallucinating"), total("images")),
        "recall": per(total("found"), total("objects")),
        "length": per(total("length"), runs * images),
    }
    for name in SETTINGS_OF_POPE:
        tp, fp, fn, tn = (total(f"{name}_{part}") for part in ("tp", "fp", "fn", "tn"))
        expected[f"pope_{name}"] = per(tp + tn, tp + fp + fn + tn)
        expected[f"pope_{name}_f1"] = per(2 * tp, 2 * tp + fp + fn)
    found = bootstrap(counts, 50)
    for name, value in expected.items():
        assert found[name].shape == (51,) and found[name][0] == pytest.approx(value, abs=1e-12), (
            name
        )


def test_two_runs_of_two_images_by_hand():
    """Every resample takes images for all runs alike, and runs for all images alike."""
    found, objects = [[1, 5], [2, 0]], [3, 7]
    runs = [
        [POPE | {"found": f, "objects": o} for f, o in zip(run, objects, strict=True)]
        for run in found
    ]
    recall = bootstrap(runs, 400)["recall"]
    assert recall[0] == (1 + 5 + 2 + 0) / 20
    drawn = [(2, 0), (1, 1), (0, 2)]  # how often each of two is drawn
    possible = {
        sum(i[b] * r[a] * found[a][b] for a in (0, 1) for b in (0, 1))
        / (2 * sum(i[b] * objects[b] for b in (0, 1)))
        for i in drawn
        for r in drawn
    }
    assert len(possible) == 9 and set(recall.round(12)) == {round(value, 12) for value in possible}


def test_one_image_of_one_run_has_no_spread():
    for name, values in bootstrap(some_runs(5, 1, 1), 30).items():
        assert np.array_equal(values, np.full_like(values, values[0]), equal_nan=True), name


def test_the_same_counts_twice_differ_by_exactly_nothing():
    counts = some_runs(6, 3, 20)
    first, second = bootstrap(counts), bootstrap(json.loads(json.dumps(counts)))
    for name in first:
        assert np.array_equal(first[name] - second[name], np.zeros(1001)) and first[name].std() > 0
    found = judge({"base": first, "bdhs": second})
    assert {(f["status"], f["evidence"].split(": ")[1]) for f in found} == {
        ("undecided", "+0.000 [+0.000, +0.000]")
    }


def test_rows_are_paired_by_image():
    """One more object found in every image of four objects: the difference is 1/4 in every
    resample."""
    rng = random.Random(7)
    base = [
        [POPE | {"images": 1, "objects": 4, "found": rng.randrange(4)} for _ in range(15)]
        for _ in range(2)
    ]
    more = [[image | {"found": image["found"] + 1} for image in run] for run in base]
    difference = bootstrap(more)["recall"] - bootstrap(base)["recall"]
    assert np.abs(difference - 0.25).max() < 1e-12
    assert bootstrap(base)["recall"].std() > 0.01  # unpaired, the interval would be wide
    found = {
        f["id"]: f["status"] for f in judge({"base": bootstrap(base), "bdhs": bootstrap(more)})
    }
    assert found[RECALL] == "reproduced"


def test_a_row_may_lack_a_count_that_another_has():
    """No false yes anywhere: the name does not occur, and resampling must not depend on it."""
    counts = some_runs(8, 2, 9)
    without = [
        [{k: v for k, v in image.items() if k != "wrong_place"} for image in run] for run in counts
    ]
    first, second = bootstrap(counts), bootstrap(without)
    assert np.array_equal(first["recall"], second["recall"]) and not second["position_errors"].any()
