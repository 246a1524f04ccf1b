"""How often intervals hold the true value: counts drawn as the page says; docs/results.json has
what the program finds."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bench import coverage
from tests.bench.coverage import DEVIATION, IMAGES, MEAN, OBJECTS, RATIOS, SEEDS, SPREAD

RESULTS = Path(__file__).resolve().parents[2] / "docs/results.json"


def test_one_seeds_recall_deviates_over_images_as_is_said():
    rng = np.random.default_rng(1)
    shares = rng.uniform(MEAN - SPREAD, MEAN + SPREAD, (4000, IMAGES))
    recalls = rng.binomial(OBJECTS, shares).mean(1) / OBJECTS
    assert recalls.std() == pytest.approx(DEVIATION, rel=0.05)


def test_the_figures_kept_are_those_of_the_program():
    """Of the two ends: 120 trials of 1,000, within four standard errors of a share of so many."""
    kept = {
        (case["ratio"], case["seeds"]): case for case in json.loads(RESULTS.read_text())["coverage"]
    }
    assert sorted(kept) == [(ratio, seeds) for ratio in RATIOS for seeds in SEEDS]
    for ratio in (RATIOS[0], RATIOS[-1]):
        share = kept[ratio, 3]["coverage"]
        rng = np.random.default_rng(0)
        held = np.mean([coverage.covers(rng, 3, ratio) for _ in range(120)])
        assert abs(held - share) < 4 * max(share * (1 - share), 0.01) ** 0.5 / 120**0.5


def test_every_case_is_simulated(monkeypatch):
    """By the share of trials in which the interval held."""
    monkeypatch.setattr(coverage, "covers", lambda rng, seeds, ratio: rng.random() < 0.5 + ratio)
    found = coverage.coverage(trials=40)
    assert [(case["ratio"], case["seeds"]) for case in found] == [
        (a, b) for a in RATIOS for b in SEEDS
    ]
    assert 0.2 < found[0]["coverage"] < 0.8 and found[-1]["coverage"] == 1
