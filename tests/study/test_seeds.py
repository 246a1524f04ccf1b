"""Figures seed by seed, and when a row gets more seeds: on counts whose deviations are known."""

import random
import warnings

import pytest
from study_counts import POPE, some_runs

from minialign.evaluation.metrics import bootstrap
from minialign.study.seeds import by_seed, seeds_dominate


def runs_of(recalls: list[float], images: int = 400) -> list[list[dict]]:
    """Runs on the same images, ten objects each; the share that is found differs from image to
    image by +-0.4, and its mean from run to run.
    """
    rng = random.Random(0)
    apart = [rng.choice((-4, 4)) for _ in range(images)]
    constant = POPE | {"images": 1, "objects": 10, "mentioned": 10, "hallucinated": 1}
    constant |= {"adversarial_tp": 3, "adversarial_fn": 1}
    return [[constant | {"found": 10 * recall + more} for more in apart] for recall in recalls]


def test_every_figure_of_every_seed():
    runs = some_runs(3, 3, 20)
    found = by_seed(runs)
    for name, values in found.items():
        alone = [bootstrap([run], 5)[name][0] for run in runs]
        assert values == pytest.approx(alone, abs=1e-5) and len(set(values)) > 1, name


def test_what_was_not_measured_has_no_figure():
    silent = {"images": 1, "objects": 2}
    found = by_seed([[silent], [silent | {"mentioned": 2, "hallucinated": 1}]])
    assert found["chair_i"] == [None, 0.5] and found["recall"] == [0, 0]


def test_deviation_over_seeds_is_held_against_that_over_images():
    """Over 400 images that deviate by 0.4 a mean deviates by 0.02; seeds at -d, 0 and d do by d."""
    runs = runs_of([0.5])
    assert bootstrap(runs)["recall"].std() == pytest.approx(0.4 / 400**0.5, rel=0.1)
    assert not seeds_dominate(runs_of([0.5 - 0.026, 0.5, 0.5 + 0.026]))  # 1.5 times 0.02 is 0.03
    assert seeds_dominate(runs_of([0.5 - 0.033, 0.5, 0.5 + 0.033]))
    # A quarter of the images: they deviate twice as much.
    assert not seeds_dominate(runs_of([0.5 - 0.052, 0.5, 0.5 + 0.052], images=100))


def test_images_deviate_by_what_all_seeds_say_of_them():
    """Where one seed finds less another finds more: other images would change nothing."""
    first, second = runs_of([0.5, 0.51])
    second = [image | {"found": 10.1 - image["found"]} for image in second]
    assert seeds_dominate([first, second]) and not seeds_dominate(runs_of([0.5, 0.51]))


@pytest.mark.parametrize(
    ("count", "dominates"), [("hallucinated", True), ("adversarial_fp", True), ("length", False)]
)
def test_any_figure_that_findings_compare_decides(count, dominates):
    runs = runs_of([0.5, 0.5, 0.5])
    for image in runs[2]:
        image[count] = image.get(count, 0) + 3
    assert seeds_dominate(runs) == dominates


def test_one_seed_says_nothing():
    """And numpy does not complain of a deviation of one number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not seeds_dominate(runs_of([0.5]))


def test_equal_seeds_do_not_dominate():
    assert not seeds_dominate(some_runs(4, 1, 30) * 3)
