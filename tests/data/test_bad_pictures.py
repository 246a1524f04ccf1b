"""Bad pictures are refused by name, and no picture is read from outside --images."""

import os
import random
import socket
import struct
import zlib

import pytest
from input_files import array, gives_remedy, instruct, left_in, lines, pair, pairs_in, sample, train
from PIL import Image

from minialign import chat
from minialign.data.images import FORMATS, ImageProcessor, PictureFolder, read_picture
from minialign.errors import UserError

BAD_PICTURES = [
    ("none.png", "no such file; names of pictures are below --images"),
    ("truncated.png", "not a readable picture"),
    ("header.png", "not a readable picture"),
    ("broken.png", "not a readable picture"),
    ("text.png", "not a readable picture"),
    ("empty.png", "not a readable picture"),
    ("deep", "no file but a folder, a pipe or a device"),
    (".", "no file but a folder"),
    ("../outside.png", "leaves the folder --images"),
    ("deep/../../outside.png", "leaves the folder --images"),
    ("/etc/hostname", "leaves the folder --images"),
    ("up/../../outside.png", "leaves the folder --images"),
    ("loop.png", "not a readable picture"),
    ("a\0b.png", "not a readable picture"),
    ("x" * 300 + ".png", "not a readable picture"),
]


@pytest.mark.parametrize("name,match", BAD_PICTURES, ids=[name[:20] for name, _ in BAD_PICTURES])
def test_bad_pictures(model, tmp_path, pictures, name, match):
    gives_remedy(lambda: PictureFolder(str(pictures))(name), match)
    out, images = tmp_path / "out", ["--images", str(pictures)]
    (tmp_path / "pairs.jsonl").write_bytes(
        lines(pair(0, images=["good.png"]), pair(1, images=[name]))
    )
    run = ["--pairs", str(tmp_path / "pairs.jsonl"), *images]
    gives_remedy(
        lambda: train(model, out, *run), f"line 2: .*{match}.*, or pass --skip-bad-records"
    )
    assert left_in(out) == []
    (tmp_path / "data.json").write_bytes(
        array(instruct(0, image="good.png"), instruct(1, image=name))
    )
    run = ["--data", str(tmp_path / "data.json"), *images, "--batch-size", "1"]
    gives_remedy(lambda: sample(model, out, *run), match)
    assert left_in(out) == ["pairs.jsonl", "pairs.jsonl.config.json"]  # the first batch, whole
    assert (out / "pairs.jsonl").read_text().endswith("}\n") and len(
        pairs_in(out / "pairs.jsonl")
    ) == 1


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures(tmp_path, form):
    """Whatever a file holds: an RGB picture or a `UserError`."""
    rng, seen = random.Random(form), set()
    Image.effect_noise((24, 20), 50).convert("P" if form in ("PNG", "GIF") else "RGB").save(
        tmp_path / "x", form
    )
    data = (tmp_path / "x").read_bytes()
    for _ in range(40):
        bad = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            bad[rng.randrange(len(bad) if rng.random() < 0.5 else 100)] = rng.randrange(256)
        (tmp_path / "x").write_bytes(bad[: rng.randrange(len(bad))] if rng.random() < 0.3 else bad)
        try:
            seen.add(PictureFolder(str(tmp_path))("x").mode)
        except UserError:
            seen.add("refused")
    assert "refused" in seen <= {"RGB", "refused"}


def test_good_pictures(pictures):
    source = PictureFolder(str(pictures))
    plain = ["good.png", "deep/good.png", "deep/../good.png", "inside.png"]
    for name in [*plain, str(pictures / "good.png")]:
        assert source(name).size == (40, 30)
    # The user's own links, as to a data set's folder elsewhere; never by way of a link's parent.
    for name in ("link.png", "up/outside.png"):
        assert source(name).size == (256, 256)
    assert source("up/../good.png").size == (40, 30)


def test_chat_takes_any_path(pictures, monkeypatch):
    """The user named that one file: there is no folder to stay in."""
    monkeypatch.chdir(pictures / "deep")
    for name in (
        "../good.png",
        "../link.png",
        "../up/outside.png",
        str(pictures / "good.png"),
        "good.png",
    ):
        assert chat.open_picture(name).mode == "RGB"
    Image.new("RGB", (7, 9)).save("test-000000.png")  # a file goes before the embedded world
    assert chat.open_picture("test-000000.png").size == (7, 9)
    assert chat.open_picture("test-000001.png").size == (96, 96)


# ---------------------------------------------------------------- never opened, or too large


@pytest.mark.parametrize("form", ["EPS", "PCX", "TGA", "ICO", "SGI", "PDF"])
def test_other_formats_are_not_decoded(tmp_path, form, monkeypatch):
    """Whatever the name says; of EPS, Pillow would start Ghostscript."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png", form)
    gives_remedy(lambda: read_picture(tmp_path / "x.png", ""), "cannot identify image file")
    assert not started.exists()


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
def test_formats_that_are_decoded_by_their_content(tmp_path, form):
    Image.new("RGB", (20, 10)).save(tmp_path / "x.eps", form)
    assert read_picture(tmp_path / "x.eps", "").size == (20, 10)


def test_what_is_no_file_is_not_opened(tmp_path):
    """A pipe would be waited for, and a device has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    os.symlink("pipe.png", tmp_path / "link.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.png"))
        for name in ("pipe.png", "zero.png", "link.png", "socket.png"):
            gives_remedy(lambda name=name: PictureFolder(str(tmp_path))(name), "no file but")


def test_a_name_that_is_no_utf8(tmp_path):
    """As a command line gives it; the line that is said holds no half characters."""
    name = os.fsdecode(bytes(tmp_path) + b"/\xff.png")
    gives_remedy(lambda: chat.open_picture(name), "no such file")
    Image.new("RGB", (20, 10)).save(name)
    assert chat.open_picture(name).size == (20, 10)


def grey_png(width: int, height: int) -> bytes:
    """A black picture of one bit per pixel: few bytes, whatever its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PROCESSORS = {
    "crop": ImageProcessor(96),
    "pad": ImageProcessor(96, pad=True),
    "tiles": ImageProcessor(96, pinpoints=((96, 192), (192, 96))),
}


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(1, 30000), (30000, 1), (20, 4002), (4002, 20), (1, 201)])
def test_pictures_too_long_for_their_width(tmp_path, monkeypatch, kind, size):
    """Refused before anything of their size is made, with their layout too."""
    (tmp_path / "x.png").write_bytes(grey_png(*size))
    assert (tmp_path / "x.png").stat().st_size < 200
    picture = read_picture(tmp_path / "x.png", "")
    monkeypatch.setattr(Image.Image, "resize", None)
    monkeypatch.setattr(Image, "new", None)
    for call in (PROCESSORS[kind], PROCESSORS[kind].layout, PROCESSORS[kind].prepare):
        gives_remedy(lambda call=call: call(picture), "too long for its width")


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(1, 200), (200, 1), (3, 600)])
def test_thin_pictures(kind, size):
    pixels = PROCESSORS[kind](Image.new("L", size))
    assert pixels.shape[1:] == (3, 96, 96) and bool(pixels.isfinite().all())


def test_a_padded_picture_has_pillows_limit(monkeypatch):
    """Twice MAX_IMAGE_PIXELS, from which on Pillow opens no picture."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    pad = PROCESSORS["pad"]
    assert len(pad(Image.new("L", (100, 10)))) == 1
    gives_remedy(lambda: pad(Image.new("L", (101, 10))), "too large")
    assert len(PROCESSORS["crop"](Image.new("L", (101, 10)))) == 1
