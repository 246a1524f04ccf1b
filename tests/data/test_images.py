"""CLIP preprocessing to the last bit against transformers, on random pictures and real photographs;
the noise."""

import importlib.util
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minialign.data.images import ImageProcessor, open_image
from minialign.errors import UserError
from minialign.evaluation.metrics import TOY
from minialign.sampling.noise import add_noise, noise_level
from minialign.toy import world

SIZES = [96, 336]
PHOTOGRAPHS = [
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "camera.png",
]


def random_picture(rng: random.Random, mode: str = "RGB", longest: int = 500) -> Image.Image:
    """Noise over a gradient, of any size."""
    width, height = rng.randrange(1, longest), rng.randrange(1, longest)
    noise = np.random.default_rng(rng.randrange(2**32))
    values = noise.integers(0, 128, (height, width, 3)) + np.linspace(0, 127, width)[None, :, None]
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


def theirs(oracle, size: int, picture: Image.Image) -> torch.Tensor:
    """(3, size, size) by transformers' Pillow backend."""
    processor = oracle.transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return processor(picture, return_tensors="pt").pixel_values[0]


def check(oracle, picture: Image.Image) -> None:
    """Equal to the last bit at both sizes."""
    for size in SIZES:
        ours = ImageProcessor(size)(picture)[0]
        assert (
            ours.dtype == torch.float32 and ours.shape == (3, size, size) and ours.is_contiguous()
        )
        assert torch.equal(ours, theirs(oracle, size, picture)), (picture.size, picture.mode, size)


@pytest.mark.parametrize("seed", range(12))
def test_random_pictures(oracle, seed):
    rng = random.Random(seed)
    for _ in range(2):
        picture = random_picture(rng)
        before = picture.tobytes()
        check(oracle, picture)
        assert picture.tobytes() == before  # the caller's picture is left alone


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 60), (60, 1), (96, 96), (336, 336), (336, 337), (97, 96), (1000, 30)]
)
def test_awkward_sizes(oracle, size):
    check(oracle, random_picture(random.Random(0)).resize(size, Image.Resampling.NEAREST))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK", "1", "YCbCr"])
def test_other_modes(oracle, mode):
    rng = random.Random(mode)
    picture = random_picture(rng, "L").convert(mode) if mode == "LA" else random_picture(rng, mode)
    if mode.endswith("A"):  # what is transparent becomes white
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    check(oracle, picture)
    if mode == "P":
        stream = io.BytesIO()
        picture.save(stream, "PNG", transparency=picture.getpixel((0, 0)))
        check(oracle, Image.open(stream))


def test_what_is_transparent_is_white(tmp_path):
    picture = Image.new("RGBA", (50, 40), (200, 10, 10, 0))
    picture.save(tmp_path / "clear.png")
    for found in (
        picture,
        open_image(str(tmp_path), "clear.png"),
        add_noise(picture, 1, generator(0)),
    ):
        pixels = np.asarray(ImageProcessor(96).crop(found), dtype=float)
        assert pixels.mean() == pytest.approx(255, abs=1)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(oracle, name):
    path = Path(importlib.util.find_spec("skimage").origin).parent / "data" / name
    with Image.open(path) as picture:
        picture.load()
    check(oracle, picture)
    check(oracle, picture.rotate(90, expand=True))
    stream = io.BytesIO()  # as most pictures come
    picture.convert("RGB").save(stream, "JPEG", quality=80)
    check(oracle, Image.open(stream))


@pytest.mark.parametrize("split,index", [("train", 0), ("test", 5), ("alignment", 77)])
def test_pictures_of_the_embedded_world(oracle, split, index):
    picture = world.picture(world.make_scene(split, index))
    check(oracle, picture)
    whole = oracle.transformers.CLIPImageProcessorPil.from_pretrained(TOY)
    ours = ImageProcessor.from_folder(TOY)
    assert torch.equal(ours(picture), whole(picture, return_tensors="pt").pixel_values)
    assert (
        ours.crop(picture).tobytes() == picture.tobytes()
    )  # already the tower's size: not resampled


@pytest.mark.parametrize("seed", range(6))
def test_crop_is_centred(seed):
    """The picture that the report shows is the picture that the tower sees."""
    rng = random.Random(seed)
    picture, processor = random_picture(rng), ImageProcessor(96)
    square = processor.crop(picture)
    assert square.size == (96, 96) and square.mode == "RGB"
    assert torch.equal(processor(square), processor(picture))
    ramp = np.arange(rng.randrange(97, 250))
    wide = Image.fromarray(
        np.broadcast_to(ramp.astype(np.uint8)[None, :, None], (96, len(ramp), 3)).copy()
    )
    left = (len(ramp) - 96) // 2
    assert np.array_equal(np.asarray(processor.crop(wide))[0, :, 0], ramp[left : left + 96])
    assert np.array_equal(
        np.asarray(processor.crop(wide.rotate(-90, expand=True)))[:, 0, 0], ramp[left : left + 96]
    )


# ---------------------------------------------------------------- preprocessor_config.json

SPELLINGS = [
    {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}},
    {"size": 48, "crop_size": 48},
    {
        "size": {"shortest_edge": 48},
        "crop_size": 48,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.1, 0.2, 0.5],
    },
    {},
]


@pytest.mark.parametrize("raw", SPELLINGS, ids=str)
def test_spellings_of_the_config(oracle, tmp_path, raw):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    config = {"model_type": "llava", "text_config": {"vocab_size": 32064}}
    tower = {"vision_config": {"image_size": 48}} if raw else {}
    (tmp_path / "config.json").write_text(json.dumps(config | tower))
    ours = ImageProcessor.from_folder(tmp_path)
    assert ours.size == (48 if raw else 336)
    values = dict(raw) or {
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    }
    picture = random_picture(random.Random(1))
    expected = oracle.transformers.CLIPImageProcessorPil(**values)(
        picture, return_tensors="pt"
    ).pixel_values
    assert torch.equal(ours(picture), expected)


def test_configs_that_are_refused(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(UserError, match="no such file") as caught:
        ImageProcessor.from_folder(tmp_path)
    assert str(path) in str(caught.value)
    for raw in (
        {"size": 40, "crop_size": 48},
        {"size": {"height": 48, "width": 48}, "crop_size": 48},
    ):
        path.write_text(json.dumps(raw))
        with pytest.raises(UserError, match="crop_size") as caught:
            ImageProcessor.from_folder(tmp_path)
        assert str(path) in str(caught.value)
    path.write_text("{")
    with pytest.raises(UserError, match="JSON"):
        ImageProcessor.from_folder(tmp_path)


# ---------------------------------------------------------------- noise, Eq. 8-9


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
    not wrap."""
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
