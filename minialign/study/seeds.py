"""How much training seeds matter: every figure seed by seed, and which rows need more of them."""

from collections import Counter

import numpy as np

from minialign.evaluation.metrics import Counts, bootstrap, rounded
from minialign.study.findings import METRICS

# A row's seeds dominate where they deviate so many times as much as its images do. From there on
# the interval of three seeds holds the true value less often than 95 times in 100, as resampling a
# few runs understates how they differ (python -m tests.bench.coverage).
DOMINATE = 1.5
# Such a row gets so many seeds beyond --seeds. Where they deviate far more, that is too few still.
SEEDS_MORE = 2
ROUNDING = 1e-9  # two equal figures deviate by less


def by_seed(runs: list[list[Counts]]) -> dict[str, list[float | None]]:
    """Every figure of each run alone; None where nothing was there to measure."""
    figures = [bootstrap([run], resamples=0) for run in runs]
    return {name: [rounded(each[name][0]) for each in figures] for name in figures[0]}


def seeds_dominate(runs: list[list[Counts]]) -> bool:
    """Whether the standard deviation over seeds, of one of the figures that findings compare, is
    `DOMINATE` times that over images (the bootstrap's, all seeds pooled), or more.
    """
    if len(runs) < 2:
        return False
    of_images = [sum(map(Counter, image), Counter()) for image in zip(*runs, strict=True)]
    images = bootstrap([of_images])
    seeds = [bootstrap([run], resamples=0) for run in runs]
    for metric in METRICS:
        over_seeds = np.std([each[metric][0] for each in seeds], ddof=1)
        if over_seeds > DOMINATE * np.nanstd(images[metric][1:]) + ROUNDING:
            return True
    return False
