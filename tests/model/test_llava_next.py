"""LLaVA-1.6 against transformers: tiny random models of each family, pictures of many shapes, with
and without mask.
"""

import json
import random

import numpy as np
import pytest
import torch
from helpers import refused, worst
from PIL import Image

from minialign.data.images import ImageProcessor
from minialign.model.config import read_config
from minialign.model.hf_folder import load_model
from minialign.model.masks import Sequence, build_tree

FAMILIES = ["vicuna", "mistral", "34b"]
SIZES = [
    (480, 640),
    (640, 480),
    (16, 16),
    (427, 640),
    (100, 100),
    (30, 120),
    (33, 50),
    (120, 20),
    (1, 1),
    (1, 60),
    (60, 1),
    (17, 15),
    (97, 31),
    (12, 99),
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, oracle, tmp_path_factory):
    """(transformers' model, ours, transformers' image processor, ours) of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = oracle.make_next(FAMILIES.index(request.param), request.param)
    theirs.save_pretrained(folder)
    size, pinpoints = theirs.config.vision_config.image_size, theirs.config.image_grid_pinpoints
    processor = oracle.transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_grid_pinpoints=pinpoints,
    )
    processor.save_pretrained(folder)
    return theirs, load_model(folder), processor, ImageProcessor.from_folder(folder)


def random_picture(size: tuple[int, int]) -> Image.Image:
    """Noise, (height, width)."""
    return Image.fromarray(
        np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_pixels_tokens_and_logits(oracle, pair, size):
    theirs, ours, their_processor, processor = pair
    rng, picture = random.Random(sum(size)), random_picture(size)
    pixels = processor(picture)
    expected = their_processor(picture, return_tensors="pt")
    assert torch.equal(pixels, expected["pixel_values"][0])
    image = ours.config.image_token_id
    text = [i for i in range(ours.config.text.vocab_size) if i != image]
    ids = [
        *rng.choices(text, k=rng.randrange(1, 5)),
        image,
        *rng.choices(text, k=rng.randrange(1, 20)),
    ]
    patches, packing = processor.layout(picture)
    assert patches == pixels.shape[0] * ours.config.vision.patches
    features = ours.encode_images(pixels)
    options = {"image_sizes": expected["image_sizes"], "count": len(packing)}
    for visible in (None, torch.tensor([rng.random() < 0.4 for _ in packing])):
        tree = build_tree([Sequence(ids, [], patches, visible, packing)], image, 0)
        logits = ours.lm_head(ours(tree, features))[0]
        wanted = oracle.logits(
            theirs, ids, pixels, None if visible is None else visible.tolist(), **options
        )
        assert worst(logits, wanted[tree.positions[0]]) < 1e-4


@torch.no_grad()
def test_pictures_of_different_shapes_in_one_batch(pair):
    """Each row is filled with its own picture's features and newlines."""
    _, ours, _, processor = pair
    pictures = [random_picture(size) for size in SIZES[:4]]
    image = ours.config.image_token_id
    layouts = [processor.layout(picture) for picture in pictures]
    rows = [
        Sequence([0, image, 30 + i], [], patches, None, packing)
        for i, (patches, packing) in enumerate(layouts)
    ]
    features = ours.encode_images(torch.cat([processor(picture) for picture in pictures]))
    together = ours(build_tree(rows, image, 0), features)
    for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        alone = ours(build_tree([row], image, 0), ours.encode_images(processor(picture)))
        assert worst(together[number, : alone.shape[1]], alone[0]) < 1e-4


@torch.no_grad()
def test_newlines_come_from_the_checkpoint(pair):
    """Another image_newline changes the logits of what follows, and a picture with no visible
    newline none.
    """
    _, ours, _, processor = pair
    picture, image = random_picture((50, 20)), ours.config.image_token_id
    patches, packing = processor.layout(picture)
    features, before = ours.encode_images(processor(picture)), ours.image_newline.clone()
    hidden = [[True] * len(packing), (packing >= 0).tolist()]
    trees = [
        build_tree([Sequence([0, image, 1], [], patches, torch.tensor(v), packing)], image, 0)
        for v in hidden
    ]
    first = [ours(tree, features)[0, -1] for tree in trees]
    ours.image_newline += 1
    second = [ours(tree, features)[0, -1] for tree in trees]
    ours.image_newline.copy_(before)
    assert worst(first[0], second[0]) > 1e-3 and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    "pinpoints", [[[16, 30]], [[16]], [16, 32], [["16", 32]], [[0, 16]], [[-16, 16]], {"a": 1}]
)
def test_pinpoints_that_are_no_multiples_of_a_tile(oracle, tmp_path, pinpoints):
    oracle.make_next(0, "vicuna").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_grid_pinpoints": pinpoints}))
    refused(lambda: read_config(tmp_path), "config.json", "image_grid_pinpoints")
