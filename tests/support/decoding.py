"""Random rows to sample for, with as many seeds as they have branches."""

import random

import torch
from helpers import IMAGE, random_ids

from minialign.model.masks import Branch, Sequence
from minialign.seeds import stable_seed

PATCHES = 9  # of the random models' tower
SEEDS = range(6)


def random_rows(seed: int) -> tuple[list[Sequence], torch.Tensor]:
    """Rows of unlike lengths; one to four branches each, with and without forced tokens, that fork
    anywhere. With them what the tower sees of the pictures, (N, patches, D)."""
    rng = random.Random(seed)
    rows = []
    for row in range(4):
        image = row == 0 or rng.random() < 0.6
        before = random_ids(rng, 1 + rng.randrange(3))
        trunk = before + [IMAGE] * image + random_ids(rng, 2 + rng.randrange(6))
        forks = [None, *(rng.randrange(1, len(trunk) + 1) for _ in range(rng.randrange(4)))]
        branches = [Branch(random_ids(rng, rng.randrange(4)), fork) for fork in forks]
        rows.append(Sequence(trunk, branches, PATCHES if image else 0))

    pictures = sum(row.image_tokens > 0 for row in rows)
    generator = torch.Generator().manual_seed(seed)
    return rows, torch.randn(pictures, PATCHES, 16, generator=generator)


def seeds_of(rows: list[Sequence], base: int = 0) -> list[list[int]]:
    """A seed for every branch."""
    return [
        [stable_seed(base, number, branch) for branch in range(len(row.branches))]
        for number, row in enumerate(rows)
    ]
