"""Which sequences share a row with --pack: as few tokens as may be, padding included, in rows as narrow as may be."""

import random

import pytest

from minialign.masks import shared_rows


@pytest.mark.parametrize(("lengths", "pack", "expected"), [
    ([5, 3, 2, 4, 1], None, [[0], [1], [2], [3], [4]]),
    ([5, 3, 2, 4, 1], 5, [[0], [1, 2], [3, 4]]),  # nothing is padding
    ([5, 3, 2, 4, 2], 16, [[0, 1, 2, 3, 4]]),  # 16 tokens; two rows would take 18, three as many, four 20
    ([4, 4, 4, 4], 100, [[0], [1], [2], [3]]),  # nothing to gain
    ([9, 3, 3, 2], 4, [[0], [1, 2, 3]]),  # a longer one is alone, and the others have its width
    ([10, 10, 10, 4, 4], 22, [[0], [1], [2], [3, 4]]),  # 40 tokens; two rows would take as many, three 42
    ([7], 3, [[0]]),
])  # fmt: skip
def test_rows_by_hand(lengths, pack, expected):
    assert sorted(sorted(row) for row in shared_rows(lengths, pack)) == expected


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_random_lengths(seed):
    """All are there once, no row is wider than it may be, and never is there more padding than with a row each."""
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 60) for _ in range(rng.randrange(1, 20))]
    pack = rng.randrange(1, 300)
    rows = shared_rows(lengths, pack)
    assert sorted(sum(rows, [])) == list(range(len(lengths))) and all(rows)
    width = max(sum(lengths[i] for i in row) for row in rows)
    assert width <= max(pack, *lengths)
    assert len(rows) * width <= len(lengths) * max(lengths)
    if pack >= sum(lengths) and len(set(lengths)) > 1:
        assert len(rows) * width == sum(lengths)
