"""CLIP preprocessing to the last bit against transformers, on random and real pictures."""

import importlib.util
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import random_picture
from helpers import refused
from llava_folders import edit_json
from PIL import Image

from minialign.data.images import ImageProcessor, PictureFolder
from minialign.edge import CHECKPOINT
from minialign.errors import UserError
from minialign.model.hf_folder import copy_companions
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
    for found in (picture, PictureFolder(str(tmp_path))("clear.png")):
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
    whole = oracle.transformers.CLIPImageProcessorPil.from_pretrained(CHECKPOINT)
    ours = ImageProcessor.from_folder(CHECKPOINT)
    assert torch.equal(ours(picture), whole(picture, return_tensors="pt").pixel_values)
    # Already the tower's size: not resampled.
    assert ours.crop(picture).tobytes() == picture.tobytes()


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
    tower = {"model_type": "llava", "vision_config": {"image_size": 48}}
    (tmp_path / "config.json").write_text(
        json.dumps(tower | {"text_config": {"vocab_size": 32064}})
    )
    with pytest.raises(UserError, match="no such file") as caught:
        ImageProcessor.from_folder(tmp_path)
    assert str(path) in str(caught.value)
    for raw in (
        {"size": 40, "crop_size": 48},
        {"size": {"height": 48, "width": 48}, "crop_size": 48},
    ):
        path.write_text(json.dumps(raw))
        with pytest.raises(UserError, match="size is .*; only 48 or") as caught:
            ImageProcessor.from_folder(tmp_path)
        assert str(path) in str(caught.value)
    path.write_text("{")
    with pytest.raises(UserError, match="JSON"):
        ImageProcessor.from_folder(tmp_path)


# ---------------------------------------------------------------- processor_config.json


@pytest.fixture
def folder(tmp_path):
    """The embedded folder's tokenizer and config, to which a processor is to be added."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(CHECKPOINT / name, tmp_path / name)
    return tmp_path


def as_next(folder: Path) -> None:
    """Make it a LLaVA-NeXT, of these pinpoints."""
    grid = {"image_grid_pinpoints": [[96, 192], [192, 96], [192, 192]]}
    edit_json(folder / "config.json", lambda raw: raw.update(grid, model_type="llava_next"))


KINDS = ["CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor"]


def save_processor(oracle, folder: Path, kind: str, version: int, **values) -> None:
    """The folder's processor as transformers writes it, in its version 5 or 4 (whose image
    processor stands in a file of its own, perhaps as the `Fast` one)."""
    kinds = oracle.transformers
    tokenizer = kinds.AutoTokenizer.from_pretrained(folder)
    sizes = {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}
    if "Next" in kind:
        as_next(folder)
        sizes["image_grid_pinpoints"] = [[96, 192], [192, 96], [192, 192]]
    images = getattr(kinds, f"{kind}Pil")(**sizes, **values)
    whole = kinds.LlavaNextProcessor if "Next" in kind else kinds.LlavaProcessor
    more = {"patch_size": 16, "vision_feature_select_strategy": "default"}
    whole(images, tokenizer, **more, num_additional_image_tokens=1).save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    if version == 4:
        own = json.loads((folder / "processor_config.json").read_text())
        inner = own.pop("image_processor")
        inner["image_processor_type"] += "Fast"
        inner |= {"data_format": "channels_first", "device": None, "do_convert_rgb": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(inner))
        (folder / "processor_config.json").write_text(json.dumps(own))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("values", [{}, {"do_pad": True, "image_std": [0.5, 0.25, 0.125]}], ids=str)
def test_processors_as_transformers_saves_them(oracle, folder, kind, version, values):
    save_processor(oracle, folder, kind, version, **values)
    ours = ImageProcessor.from_folder(folder)
    theirs = getattr(oracle.transformers, f"{kind}Pil").from_pretrained(folder)
    for seed in range(3):
        picture = random_picture(random.Random(seed))
        pixels = theirs(picture, return_tensors="pt").pixel_values
        assert torch.equal(ours(picture), pixels[0] if "Next" in kind else pixels)


def test_the_image_processor_inside_comes_first(oracle, folder):
    """As in transformers, where both files are there; `merged/` has both."""
    save_processor(oracle, folder, "CLIPImageProcessor", 5, image_mean=[0.5, 0.5, 0.5])
    shutil.copyfile(CHECKPOINT / "preprocessor_config.json", folder / "preprocessor_config.json")
    assert ImageProcessor.from_folder(folder).mean == (0.5, 0.5, 0.5)
    (folder / "merged").mkdir()
    copy_companions(folder, folder / "merged", json.loads((folder / "config.json").read_text()))
    assert ImageProcessor.from_folder(folder / "merged") == ImageProcessor.from_folder(folder)


CONTRADICTIONS = [
    ({"patch_size": 14}, "patch_size is 14; only 16"),
    ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
    ({"image_processor": [1]}, "image_processor is [1]"),
    ({"image_processor": {}}, "size is missing"),
    ({"image_processor": {"image_processor_type": "SiglipImageProcessor"}}, "Siglip"),
    ({"image_processor": {"size": 96, "crop_size": 96, "image_mean": [1e30] * 3}}, "image_mean"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=str)
def test_processors_that_are_refused(oracle, folder, changes, message):
    save_processor(oracle, folder, "LlavaImageProcessor", 5)
    edit_json(folder / "processor_config.json", lambda raw: raw.update(changes))
    refused(lambda: ImageProcessor.from_folder(folder), "processor_config.json", message)


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_factor": "1/255"},
        {"rescale_factor": [1]},
        {"image_std": [10**400, 1, 1]},
        {"image_std": [1e-40, 1, 1]},
        {"image_mean": [1e30, 0, 0]},
        {"image_mean": [float("nan"), 0, 0]},
        {"image_mean": []},
        {"do_pad": "yes"},
        {"resample": True},
        {"size": [96]},
    ],
    ids=str,
)
def test_numbers_that_make_no_pixels(folder, changes):
    raw = json.loads((CHECKPOINT / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(raw | changes))
    refused(lambda: ImageProcessor.from_folder(folder), "preprocessor_config.json", *changes)
