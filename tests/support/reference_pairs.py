"""Pairs for the random models, as the cache of the reference's log-probs is asked for them."""

import random

import torch
from helpers import IMAGE, random_ids

from minialign.model.masks import Branch, Sequence

Pair = tuple[Sequence, torch.Tensor]


def random_pairs(seed: int, count: int) -> list[Pair]:
    """Pairs of unlike lengths, and the pixels of their pictures."""
    rng, generator, pairs = random.Random(seed), torch.Generator().manual_seed(seed), []
    for _ in range(count):
        before, after = random_ids(rng, 1 + rng.randrange(3)), random_ids(rng, 2 + rng.randrange(6))
        branches = [Branch(random_ids(rng, 1 + rng.randrange(9))) for _ in range(2)]
        pixels = torch.randn(1, 3, 12, 12, generator=generator)
        pairs.append((Sequence([*before, IMAGE, *after], branches, 9), pixels))
    return pairs
