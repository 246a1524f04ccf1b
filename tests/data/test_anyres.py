"""AnyRes against transformers' LLaVA-NeXT: tiles to the last bit, packed features and their
count.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minialign.data.anyres import PINPOINTS, best_resolution, packing
from minialign.data.images import ImageProcessor
from minialign.model.masks import NEWLINE

# Height, width, the best resolution, the kept grid and the number of image embeddings at 336
# pixels, 14 per patch.
TABLE = [
    (480, 640, (672, 672), (36, 48), 2340),
    (640, 480, (672, 672), (48, 36), 2352),
    (336, 336, (336, 672), (24, 24), 1176),
    (427, 640, (672, 672), (32, 48), 2144),
    (1024, 1024, (672, 672), (48, 48), 2928),
    (300, 1200, (336, 1008), (18, 72), 1890),
    (333, 500, (336, 672), (24, 36), 1464),
    (1200, 200, (1008, 336), (72, 12), 1512),
]
SIZES = [row[:2] for row in TABLE] + [
    (1, 1),
    (10, 2000),
    (2000, 10),
    (337, 335),
    (673, 1009),
    (50, 49),
    (38, 38),
    (390, 288),
    (258, 688),
    (1079, 1920),
]
RANDOM = [tuple(random.Random(seed).randint(1, 1500) for _ in range(2)) for seed in range(12)]


@pytest.fixture(scope="module")
def theirs():
    """transformers' own preprocessing and packing."""
    from transformers.models.llava_next import image_processing_pil_llava_next, modeling_llava_next

    processor = image_processing_pil_llava_next.LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    return SimpleNamespace(processor=processor, model=modeling_llava_next)


def noise(size, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize(("height", "width", "best", "grid", "count"), TABLE)
def test_table(height, width, best, grid, count):
    patches, packed = packing((height, width), 336, 24)
    assert patches == 576 * (1 + best[0] * best[1] // 336**2)
    assert best_resolution((height, width)) == best
    assert len(packed) == count == 576 + grid[0] * (grid[1] + 1)
    assert (packed == NEWLINE).sum() == grid[0]


@pytest.mark.parametrize("size", SIZES + RANDOM)
def test_packing_equals_transformers(theirs, size):
    """The same vectors in the same order; every patch has its number as its feature."""
    best = best_resolution(size)
    count = 1 + (best[0] // 336) * (best[1] // 336)
    features = torch.arange(count * 576.0).view(count, 576, 1)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=336, patch_size=14),
        image_grid_pinpoints=[list(p) for p in PINPOINTS],
    )
    expected, lengths = theirs.model.LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [features],
        torch.tensor([size]),
        "default",
        torch.tensor([float(NEWLINE)]),
    )
    patches, packed = packing(size, 336, 24)
    assert patches == 576 * count
    assert lengths.tolist() == [len(packed)] and torch.equal(packed.float()[:, None], expected[0])


@pytest.mark.parametrize("size", [s for s in SIZES + RANDOM if s[0] * s[1] < 10**6])
def test_tiles_equal_transformers(theirs, size):
    image = noise(size, sum(size))
    expected = theirs.processor(image, return_tensors="np")["pixel_values"][0]
    found = ImageProcessor(pinpoints=PINPOINTS)(image)
    assert found.shape == expected.shape
    assert np.array_equal(found.numpy(), expected)
