"""Collapse: every sign stops a run with what was seen, and a run that learns, or only wavers, goes on."""

import random
from dataclasses import replace

import pytest

from minialign.collapse import CollapseLimits, collapse, repetition

SEEDS = range(5)
BETA, STEPS = 0.4, 60
LIMITS = CollapseLimits()


def run(seed: int, score=float, kl=float, entropy=lambda t: 10 - 5 * t, repeated=lambda t: 0.03) -> list[dict]:
    """Rows of a run, each metric a course over t in [0, 1] and noise; by default (score and KL: t) it learns well."""
    rng, rows = random.Random(seed), []
    for step in range(STEPS):
        t = step / (STEPS - 1)
        r, d = score(t) + rng.gauss(0, 0.1), kl(t) + rng.gauss(0, 0.05)
        rows.append({
            "step": step + 1, "objective/scores": r, "objective/kl": d, "objective/rlhf_reward": r - BETA * d,
            "objective/entropy": entropy(t) * rng.uniform(0.9, 1.1), "sampled/repetition": repeated(t),
        })  # fmt: skip
    return rows


def stops(rows: list[dict], limits: CollapseLimits = LIMITS) -> list[int]:
    """The steps, one row after another, at which a loop would stop."""
    return [n for n in range(1, len(rows) + 1) if collapse(rows[:n], limits) is not None]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_no_collapse(seed):
    """The reward pays for its KL; nothing happens at all; and the policy gets surer, to a third of its entropy."""
    assert stops(run(seed)) == []
    assert stops(run(seed, score=lambda t: 0, kl=lambda t: 0)) == []
    assert stops(run(seed, entropy=lambda t: 9 - 6 * t)) == []
    assert stops(run(seed, score=lambda t: -0.1 * t, kl=lambda t: 0)) == []  # by its noise


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("course", "sign"),
    [
        ({"kl": lambda t: 20 * t * t}, "the KL costs more than the reward has risen"),
        ({"score": lambda t: -2 * t}, "the reward has fallen"),
        ({"entropy": lambda t: 10 + 400 * t}, "the policy babbles"),
        ({"entropy": lambda t: 10 * (1 - t) ** 2}, "the entropy is all but gone"),
        ({"repeated": lambda t: t}, "the responses repeat themselves"),
    ],
)
def test_every_sign_stops(seed, course, sign):
    """Not before both windows are full, and by the end; the line names the step, the sign alone, and the figures."""
    rows = run(seed, **course)
    first = min(stops(rows))
    assert 2 * LIMITS.window <= first <= STEPS and stops(rows)[-1] == STEPS
    said = collapse(rows, LIMITS)
    assert said.startswith(f"step {STEPS}: {sign} (objective/scores ") and "sampled/repetition 0.0" in said
    assert stops(rows, replace(LIMITS, window=STEPS)) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_stop_is_hard(seed):
    """The first step whose KL is above it, though the reward pays for it, and without waiting for a window."""
    rows = run(seed, score=lambda t: 10 * t, kl=lambda t: 5 * t)
    above = [row["step"] for row in rows if row["objective/kl"] > 0.6]
    assert stops(rows) == [] and min(above) < 2 * LIMITS.window
    assert stops(rows, CollapseLimits(kl_stop=0.6)) == above
    said = collapse(rows[: above[0]], CollapseLimits(kl_stop=0.6))
    assert said.startswith(f"step {above[0]}: a KL of 0.") and said.endswith("above --kl-stop 0.6")


def test_steps_without_samples_do_not_count():
    rows = run(0, repeated=lambda t: 1.0)
    empty = [{"step": 2 * step, "loss": 0.1} for step in range(STEPS)]
    mixed = [row for two in zip(empty, rows, strict=True) for row in two]
    assert collapse(empty, LIMITS) is None and collapse([], LIMITS) is None
    assert min(stops(mixed)) == 4 * LIMITS.window


def test_wavering_alone_is_no_collapse():
    """Reward and KL without a trend: of 60 runs none is stopped."""
    assert sum(bool(stops(run(seed, score=lambda t: 0, kl=lambda t: 1))) for seed in range(60)) == 0


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([7, 7, 7], 0.0),  # shorter than four
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([7] * 8, 4 / 5),
        ([1, 2, 3, 4] * 2, 1 / 5),  # 1234 2341 3412 4123 1234
        ([1, 2, 3, 9, 1, 2, 3, 8], 0.0),  # three alike are not four
    ],
)
def test_repetition_by_hand(ids, share):
    assert repetition(ids) == pytest.approx(share)
