"""Bad pictures are refused by name, and no picture is read from outside --images."""

import random

import pytest
from input_files import array, gives_remedy, instruct, left_in, lines, pair, pairs_in, sample, train
from PIL import Image

from minialign import chat
from minialign.data.images import PictureFolder
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
    ("x" * 5000 + ".png", "not a readable picture"),
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
