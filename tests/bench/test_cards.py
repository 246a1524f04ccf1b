"""docs/running.md's tables of one card: they are those of the formulas, which agree with
docs/scaling.md's and with hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import cards, memory, scaling
from tests.bench.cards import CARDS

PAGE = Path(__file__).resolve().parents[2] / "docs/running.md"


def test_the_pages_tables_are_these():
    page = PAGE.read_text(encoding="utf-8")
    remedy = "run python -m tests.bench.cards, and put its table into docs/running.md"
    for title, table in cards.tables().items():
        assert table in page, f"{title}: {remedy}"


def test_the_h100_is_that_of_the_scaling_page():
    """Memory of a usual pair but for the mask, and the time of a pair, cached or not."""
    h100, plan = CARDS[-1], scaling.Plan("7B", 1, "none")
    parts = cards.training_bytes(h100.rank, h100.recompute, longest=False)
    mask = parts.pop("mask")
    assert parts == plan.parts and 0 < mask < 2e6
    for cached in (False, True):
        seconds = plan.step(cached).total / plan.batch_size
        assert cards.pair_seconds(h100, cached) == pytest.approx(seconds)


def test_recompute_is_that_of_the_scaling_page(monkeypatch):
    tight = replace(CARDS[-1], recompute=True)
    monkeypatch.setattr(scaling, "LARGE", 30e9)
    plan = scaling.Plan("7B", 1, "none")
    assert plan.recompute
    assert cards.pair_seconds(tight, False) == pytest.approx(plan.step().total / plan.batch_size)


def test_sampling_by_hand():
    """Keys and values: 32 layers of two times 4096 numbers of two bytes a token; a context is a
    multiple of 128 columns."""
    base, trunk = cards.base_bytes(), 29 + 60 + 512
    width = 13 * 128  # 601 and 8 x 128 tokens
    more = cards.sampling_bytes(2) - cards.sampling_bytes(1)
    layer = trunk * memory.layer_bytes(scaling.MODELS["7B"], 0, 2)
    assert more == 2 * 32 * 4096 * 2 * width + layer
    assert 14.1e9 < base < 14.3e9 and 13e9 < cards.read_bytes() < base


def test_a_batch_fits_and_twice_as_much_does_not():
    for card in CARDS:
        sampled, asked = cards.batches_that_fit(card)
        room = card.memory - cards.FREE
        assert cards.sampling_bytes(sampled) <= room and cards.pope_bytes(asked, card.rank) <= room
        assert sampled == 32 or cards.sampling_bytes(2 * sampled) > room
        assert asked == 8 or cards.pope_bytes(2 * asked, card.rank) > room
