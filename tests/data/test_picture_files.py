"""Photographs in every kind of file: read as transformers' `load_image` reads them, or refused by
name.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import photograph
from helpers import refused
from PIL import Image, ImageOps

from minialign.data.anyres import PINPOINTS
from minialign.data.images import ImageProcessor, read_picture

PHOTOGRAPHS = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"]
SHAPES = [(640, 427), (427, 640), (300, 300), (600, 150), (150, 600), (37, 41)]


def files(folder: Path, picture: Image.Image) -> dict[str, Path]:
    """The photograph in every mode and format, by what is special about it."""
    exif = picture.getexif()
    paths = {}

    def save(kind: str, suffix: str, image: Image.Image, **options) -> None:
        paths[kind] = folder / f"{kind}{suffix}"
        image.save(paths[kind], **options)

    for mode in ("RGB", "L", "P", "1", "RGBA", "LA"):
        save(mode, ".png", picture.convert(mode))
    save("CMYK", ".jpg", picture.convert("CMYK"))
    save("webp", ".webp", picture)
    save("tiff", ".tiff", picture)
    save("bmp", ".bmp", picture)
    save("animated", ".gif", picture, save_all=True, append_images=[picture.rotate(180)])
    for turn in range(1, 9):
        exif[0x0112] = turn  # orientation
        save(f"turned {turn}", ".jpg", picture, exif=exif)
    return paths


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_files_are_read_as_transformers_reads_them(tmp_path, name):
    from transformers.image_utils import load_image

    for kind, path in files(tmp_path, photograph(name).resize((64, 48))).items():
        ours, theirs = read_picture(path, ""), load_image(str(path))
        assert ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(theirs)), kind


def test_turned_pictures_stand_upright(tmp_path):
    """A picture stored lying on its side, with the note that says so, is the upright one again."""
    picture = photograph("rocket.jpg").resize((60, 40))
    exif = picture.getexif()
    exif[0x0112] = 6  # stored a quarter turn counter-clockwise
    picture.rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "lying.png", "")), np.asarray(picture))


@pytest.mark.parametrize("values", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_refused(tmp_path, values):
    """Their values would be clipped to white without a word."""
    grey = np.asarray(photograph("coffee.png").convert("L")).astype(values) * 200
    Image.fromarray(grey).save(tmp_path / "deep.tiff")
    refused(
        lambda: read_picture(tmp_path / "deep.tiff", ""),
        "deep.tiff",
        "more than 8 bits",
        "convert it to 8 bits",
    )


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    photograph("rocket.jpg").save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(
        lambda: read_picture(tmp_path / "bomb.png", ""),
        "bomb.png",
        "not a readable picture",
        "bomb",
    )


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_padded_and_in_tiles(oracle, name, size):
    """LLaVA-1.5's `pad` and 1.6's AnyRes, to the last bit."""
    picture, kinds = photograph(name).resize(size), oracle.transformers
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    padded = kinds.LlavaImageProcessorPil(**sizes, do_pad=True)(
        picture, return_tensors="pt"
    ).pixel_values
    assert torch.equal(ImageProcessor(pad=True)(picture), padded)
    tiles = kinds.LlavaNextImageProcessorPil(**sizes)(picture, return_tensors="pt").pixel_values[0]
    assert torch.equal(ImageProcessor(pinpoints=PINPOINTS)(picture), tiles)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_odd_exif_tag_beside_the_orientation(tmp_path, orientation):
    """Turned as Pillow turns it, whatever else the EXIF holds: a tag of a wrong type cannot be
    written anew.
    """
    picture, path = photograph("coffee.png").resize((60, 40)), tmp_path / "odd.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    with Image.open(path) as plain:
        wanted = ImageOps.exif_transpose(plain)
    assert np.array_equal(np.asarray(read_picture(path, "")), np.asarray(wanted))
    # ResolutionUnit (0x0128) as the text "in" (type 2), where a number is to be.
    entries = [(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), (0x0128, 2, 3, b"in\0\0")]
    block = b"II*\0" + struct.pack("<IH", 8, len(entries))
    block += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    picture.save(path, exif=block)
    assert np.array_equal(np.asarray(read_picture(path, "")), np.asarray(wanted))


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, TypeError, AttributeError, struct.error, OSError]
)
def test_whatever_a_reader_raises(tmp_path, monkeypatch, error):
    """Pillow's plugins raise anything on damaged files."""
    path = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(path)

    def broken(*_):
        raise error("inside")

    monkeypatch.setattr(Image.Image, "convert", broken)
    refused(lambda: read_picture(path, ""), path, "not a readable picture", "inside")
