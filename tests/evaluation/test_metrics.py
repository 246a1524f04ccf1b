"""Figures from counts by hand: pooled over runs and images, with paired intervals."""

import json
import random

import numpy as np
import pytest
from study_counts import POPE, some_runs

from minialign.evaluation.metrics import SETTINGS_OF_POPE, bootstrap, with_intervals
from minialign.study.findings import judge


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
    assert {tuple(f["difference"].values()) for f in found} == {(0, 0, 0)}
    assert {f["status"] for f in found} == {"undecided", "ours"}


def test_rows_are_paired_by_image():
    """One more object found in every image of four objects: the difference is 1/4 in every
    resample.
    """
    rng = random.Random(7)
    base = [
        [POPE | {"images": 1, "objects": 4, "found": rng.randrange(4)} for _ in range(15)]
        for _ in range(2)
    ]
    more = [[image | {"found": image["found"] + 1} for image in run] for run in base]
    difference = bootstrap(more)["recall"] - bootstrap(base)["recall"]
    assert np.abs(difference - 0.25).max() < 1e-12
    assert bootstrap(base)["recall"].std() > 0.01  # unpaired, the interval would be wide
    found = judge({"base": bootstrap(base), "bdhs": bootstrap(more)})
    assert {f["metric"]: f["status"] for f in found}["recall"] == "reproduced"


def test_rows_of_unequal_seeds_are_paired_by_image():
    """One more object found in every image, by all of five seeds instead of three: the images are
    the same ones in every resample, so that the difference is 1/4 in each; and one evaluation says
    what copies of it say.
    """
    rng = random.Random(9)
    base = [POPE | {"images": 1, "objects": 4, "found": rng.randrange(4)} for _ in range(15)]
    more = [image | {"found": image["found"] + 1} for image in base]
    difference = bootstrap([more] * 5)["recall"] - bootstrap([base] * 3)["recall"]
    assert np.abs(difference - 0.25).max() < 1e-12
    assert np.array_equal(bootstrap([base])["recall"], bootstrap([base] * 3)["recall"])


def test_a_row_may_lack_a_count_that_another_has():
    """No false yes anywhere: the name does not occur, and resampling must not depend on it."""
    counts = some_runs(8, 2, 9)
    without = [
        [{k: v for k, v in image.items() if k != "wrong_place"} for image in run] for run in counts
    ]
    first, second = bootstrap(counts), bootstrap(without)
    assert np.array_equal(first["recall"], second["recall"]) and not second["position_errors"].any()


# ---------------------------------------------------------------- intervals


def counts_of(hallucinating: int, mentioned: int = 1, length: int = 5) -> dict:
    return {
        "images": 1,
        "length": length,
        "objects": 2,
        "mentioned": mentioned,
        "hallucinated": hallucinating,
        "hallucinating": hallucinating,
        "found": 1,
        **POPE,
    }


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_intervals_are_about_the_binomials(share):
    widths = []
    for images in (100, 400, 1600):
        counts = [counts_of(int(i < share * images)) for i in range(images)]
        random.Random(0).shuffle(counts)
        figure = with_intervals([counts])["chair_s"]
        assert figure["value"] == pytest.approx(share, abs=1e-5)
        assert figure["low"] < figure["value"] < figure["high"]
        widths.append(figure["high"] - figure["low"])
        assert widths[-1] == pytest.approx(
            2 * 1.96 * (share * (1 - share) / images) ** 0.5, rel=0.15
        )
    assert widths[0] > widths[1] > widths[2]


def test_intervals_are_deterministic_and_paired():
    """Two rows on the same images are resampled alike: what holds of every image holds of every
    resample.
    """
    rng = random.Random(0)
    lengths = [rng.randrange(5, 50) for _ in range(80)]
    shorter, longer = ([[counts_of(0, length=n + extra) for n in lengths]] for extra in (0, 3))
    difference = bootstrap(longer)["length"] - bootstrap(shorter)["length"]
    assert difference.shape == (1001,) and np.abs(difference - 3).max() < 1e-9
    assert with_intervals(shorter) == with_intervals(shorter)
    assert with_intervals(shorter)["length"]["high"] > with_intervals(shorter)["length"]["low"] + 1


def test_runs_are_pooled():
    """Three equal runs say no more than one; runs that disagree widen the interval; the value is
    their mean.
    """
    rng = random.Random(1)
    run = [counts_of(rng.random() < 0.4) for _ in range(200)]
    one, three = with_intervals([run])["chair_s"], with_intervals([run] * 3)["chair_s"]
    width = one["high"] - one["low"]
    assert three["value"] == one["value"] and three["high"] - three["low"] == pytest.approx(
        width, rel=0.15
    )
    apart = with_intervals([run, [counts_of(0)] * 200, [counts_of(1)] * 200])["chair_s"]
    assert apart["value"] == pytest.approx((one["value"] + 1) / 3, abs=1e-4)
    assert apart["high"] - apart["low"] > 2 * width
