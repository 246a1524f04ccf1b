"""The noise of Eq. 8-9: its level, its statistics, its seeds."""

import math
import random

import numpy as np
import pytest
import torch
from data_sets import random_picture
from PIL import Image

from minialign.sampling.noise import add_noise, noise_level


def plain_abar(steps: int) -> float:
    """abar_N, number by number."""
    product = 1.0
    for k in range(1, steps + 1):
        product *= 1 - ((0.5e-2 - 1e-5) / (1 + math.exp(6 - 12 * k / 1000)) + 1e-5)
    return product


def test_noise_level():
    abar = noise_level(500)
    assert abar**0.5 == pytest.approx(0.863, abs=1e-3) and (1 - abar) ** 0.5 == pytest.approx(
        0.505, abs=1e-3
    )
    assert (
        round(abar**0.5, 4) == 0.8634 and round((1 - abar) ** 0.5, 4) == 0.5044
    )  # the product of exactly 500
    assert noise_level(0) == 1.0
    for steps in (1, 2, 50, 500, 999, 1000):
        assert noise_level(steps) == pytest.approx(plain_abar(steps), rel=1e-12)
    levels = [noise_level(steps) for steps in range(0, 1001, 50)]
    assert levels == sorted(levels, reverse=True) and 0 < levels[-1] < 0.1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(3))
def test_no_steps_change_nothing(seed):
    picture = random_picture(random.Random(seed))
    assert np.array_equal(np.asarray(add_noise(picture, 0, generator(seed))), np.asarray(picture))


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_seeded_and_keeps_the_size(seed):
    picture = random_picture(random.Random(seed), longest=60)
    before = picture.tobytes()
    noisy = add_noise(picture, 500, generator(seed))
    assert noisy.size == picture.size and noisy.mode == "RGB" and picture.tobytes() == before
    assert noisy.tobytes() == add_noise(picture, 500, generator(seed)).tobytes()
    assert noisy.tobytes() != add_noise(picture, 500, generator(seed + 1)).tobytes() != before
    stream = generator(seed)  # one stream: every picture its own noise
    assert add_noise(picture, 500, stream).tobytes() != add_noise(picture, 500, stream).tobytes()
    grey = add_noise(picture.convert("L"), 500, generator(seed))
    assert grey.mode == "RGB" and len({grey.getchannel(c).tobytes() for c in "RGB"}) == 3


def below(x: float) -> float:
    """The normal distribution's P(Z <= x)."""
    return (1 + math.erf(x / 2**0.5)) / 2


def density(x: float) -> float:
    return math.exp(-x * x / 2) / (2 * math.pi) ** 0.5


@pytest.mark.parametrize("steps", [100, 300, 500, 800, 1000])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_statistics_of_the_noise(level, steps):
    """Mean and the shares of 0 and 255 are those of a normal variable clamped to [0, 1]; bytes do
    not wrap.
    """
    abar = plain_abar(steps)
    centre, sigma = abar**0.5 * level / 255, (1 - abar) ** 0.5
    picture = Image.new("RGB", (150, 120), (level,) * 3)
    values = (
        np.asarray(add_noise(picture, steps, generator(steps + level))) / 255.0
    )  # (120, 150, 3)
    low, high = -centre / sigma, (1 - centre) / sigma
    mean = (
        centre * (below(high) - below(low))
        + sigma * (density(low) - density(high))
        + 1
        - below(high)
    )
    error = 5 * min(sigma, 0.5) / values.size**0.5
    assert abs(values.mean() - mean) < error
    step = 0.5 / 255 / sigma  # what rounding adds to the ends
    assert abs((values == 0).mean() - below(low + step)) < 5 * 0.5 / values.size**0.5
    assert abs((values == 1).mean() - (1 - below(high - step))) < 5 * 0.5 / values.size**0.5
    channels = np.corrcoef(values.reshape(-1, 3).T)
    neighbours = np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]
    assert np.abs(channels - np.eye(3)).max() < 0.05 and abs(neighbours) < 0.05


def test_deviation_of_the_noise_on_mid_grey():
    """Few steps, so that nothing is clamped: the deviation is sigma itself."""
    for steps in (20, 60, 100):
        abar = plain_abar(steps)
        values = (
            np.asarray(add_noise(Image.new("RGB", (200, 200), (128,) * 3), steps, generator(steps)))
            / 255.0
        )
        assert values.min() > 0 and values.max() < 1
        assert values.std() == pytest.approx(((1 - abar) + (1 / 255) ** 2 / 12) ** 0.5, rel=0.02)
        assert values.mean() == pytest.approx(abar**0.5 * 128 / 255, abs=0.001)
