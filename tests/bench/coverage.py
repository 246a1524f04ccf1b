"""How often the study's 95 % intervals hold the true value, on counts that are drawn here.

    python -m tests.bench.coverage    # some two minutes

An image has six objects; a share of them is found, which differs from image to image, and by a
shift from seed to seed. The true value is the mean over all images and seeds there could be. So the
bootstrap over images and seeds is seen where seeds do not matter, where they differ as much as one
seed's figure does over images, and where they dominate.
"""

from dataclasses import dataclass

import numpy as np

from minialign.cli import run_main
from minialign.evaluation.metrics import CHAIR, bootstrap, interval
from tests.bench.scaling import markdown

IMAGES, OBJECTS = 100, 6
# An image's share: even between MEAN - SPREAD and MEAN + SPREAD. Half, so that shifts which would
# leave [0, 1] are cut off alike on both sides, and the true value stays.
MEAN, SPREAD = 0.5, 0.1
# The variance of an image's share, and of those of its six objects that are found.
OF_SHARES = SPREAD**2 / 3
OF_IMAGE = OF_SHARES + (MEAN * (1 - MEAN) - OF_SHARES) / OBJECTS
DEVIATION = (OF_IMAGE / IMAGES) ** 0.5  # of one seed's recall, over images
RATIOS = (0, 1, 1.5, 3, 10)  # seeds' standard deviation over the images'
SEEDS = (3, 5)
TRIALS = 1000


def covers(rng: np.random.Generator, seeds: int, ratio: float) -> bool:
    """Whether the interval of one study's row holds the true recall."""
    shares = rng.uniform(MEAN - SPREAD, MEAN + SPREAD, IMAGES)
    runs = []
    for shift in rng.normal(0, ratio * DEVIATION, seeds):
        found = rng.binomial(OBJECTS, np.clip(shares + shift, 0, 1))
        runs.append([{"found": int(count), "objects": OBJECTS} for count in found])
    recall = interval(bootstrap(runs, figures={"recall": CHAIR["recall"]})["recall"])
    return recall["low"] <= MEAN <= recall["high"]


def coverage(trials: int = TRIALS) -> list[dict]:
    """{"ratio", "seeds", "coverage"} of each case: the share of trials whose interval holds the
    true value.
    """
    cases = []
    for ratio in RATIOS:
        for seeds in SEEDS:
            rng = np.random.default_rng(0)
            held = sum(covers(rng, seeds, ratio) for _ in range(trials))
            cases.append({"ratio": ratio, "seeds": seeds, "coverage": round(held / trials, 3)})
    return cases


@dataclass(frozen=True)
class Config:
    """Flags: none."""


def main(config: Config) -> None:
    """Print a table."""
    rows = [[f"{value:g}" for value in case.values()] for case in coverage()]
    print(markdown("seeds' deviation / images' | seeds | intervals that hold it", rows))


if __name__ == "__main__":
    run_main(main, Config, __doc__)
