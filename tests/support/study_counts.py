"""Random counts of evaluated images, in the form of counts.json."""

import random

from minialign.evaluation.metrics import DIRECT_QUESTIONS, SETTINGS_OF_POPE

COUNTED = (
    "images", "length", "objects", "mentioned", "hallucinated", "typical", "true", "coloured",
    "wrong_colour", "placed", "wrong_place", "settings", "wrong_setting", "hallucinating", "found",
    *(f"{what}_{kind}" for what in ("asked", "right") for kind in DIRECT_QUESTIONS),
)  # fmt: skip
POPE = {f"{setting}_{part}": 0 for setting in SETTINGS_OF_POPE for part in ("tp", "fp", "fn", "tn")}


def image_counts(rng: random.Random) -> dict[str, float]:
    """Counts of one image, as the toy benchmark makes them: what was never counted is missing, as
    in a Counter.
    """
    counts = {name: rng.randrange(5) for name in COUNTED}
    counts |= {"images": 1, "objects": rng.randrange(1, 5)}
    counts = {name: value for name, value in counts.items() if value}
    return counts | {name: rng.randrange(4) for name in POPE}


def some_runs(seed: int, runs: int, images: int) -> list[list[dict]]:
    """Evaluations of the same images."""
    rng = random.Random(seed)
    return [[image_counts(rng) for _ in range(images)] for _ in range(runs)]
