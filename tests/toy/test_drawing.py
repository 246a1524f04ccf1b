"""The drawings of the embedded world: pinned to the byte, and the same picture at every scale."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from minialign.toy.drawing import SIZE
from minialign.toy.world import SPLITS, make_scene, picture

# SHA-256 of the first 100 pictures of a split, on which the shipped checkpoint was trained.
HASHES = {
    "train": "50b52a8fe19d5d90b89ca813ca79324cb68a7e4dbf7aa71277d2a9c511974a73",
    "alignment": "2923f617aca20db9915fbf64f99e0e4b8d7e29cf5684b158feea9edfa8b50c93",
    "validation": "98349ed2de55fbf8c175d500f28ca84e2a223163ec66e61fbb24ebefd6ebb1c4",
    "test": "675c46dbdefb1919efee0cc00a5f1d8339d1b27d8d23afa88a15adddef0acae1",
}


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_are_those_of_the_checkpoint(split):
    digest = hashlib.sha256()
    for index in range(100):
        digest.update(picture(make_scene(split, index)).tobytes())
    assert digest.hexdigest() == HASHES[split]


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("split", ["alignment", "test"])
def test_scale_changes_nothing_but_the_size(split, scale):
    """Shrunk again a scaled picture is the original, up to the rounding of edges: 2.5 grey levels
    on average, where a picture that is moved by one pixel differs by ten.
    """
    for index in range(12):
        scene = make_scene(split, index)
        original = np.asarray(picture(scene), dtype=float)
        large = picture(scene, scale)
        assert large.mode == "RGB" and large.size == (SIZE * scale, SIZE * scale)
        shrunk = np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=float)
        assert np.abs(shrunk - original).mean() < 2.5
        for axis in (0, 1):
            moved = np.roll(shrunk, 1, axis)
            assert np.abs(moved - original).mean() > 4 * np.abs(shrunk - original).mean()


def test_a_scaled_picture_has_detail_that_a_stretched_one_lacks():
    """Within what is one pixel of the original it is not all of one colour."""
    large = np.asarray(picture(make_scene("test", 0), 4), dtype=int)
    blocks = large.reshape(SIZE, 4, SIZE, 4, 3)
    spread = blocks.max(axis=(1, 3)) - blocks.min(axis=(1, 3))
    assert (spread.max(axis=-1) > 50).mean() > 0.05
