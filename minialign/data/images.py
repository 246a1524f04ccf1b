"""Pictures: opened from a folder, and prepared for the tower as CLIP does."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minialign.data import anyres
from minialign.errors import UserError
from minialign.files import read_json
from minialign.model.config import read_config

TURN = Image.Transpose
TURNS = {
    2: TURN.FLIP_LEFT_RIGHT,
    3: TURN.ROTATE_180,
    4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE,
    6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE,
    8: TURN.ROTATE_90,
}  # EXIF's orientation -> what puts the picture upright
LONGEST = 2000  # times the short edge: a longer picture would fill the memory on being resized
# What preprocessor_config.json may not say otherwise, as it would be another preprocessing.
SUPPORTED = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as transformers 5 has it: what is transparent becomes white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class PreparedImage:
    """A picture as the model takes it: what the tower sees, and what the decoder makes of that.

    pixels   (tiles, 3, size, size) float32
    packing  (image tokens,) which of the tower's features, or NEWLINE, each image token stands for
    """

    pixels: Tensor
    packing: Tensor


@dataclass(frozen=True)
class ImageProcessor:
    """CLIP's preprocessing: short edge to `size`, centre crop, rescale, normalise. Follows
    CLIPImageProcessor.

    With `pad` the picture is padded to a square first, as LlavaImageProcessor does; with
    `pinpoints` it is cut into tiles (anyres.py). Resizing is Pillow's bicubic: torch's differs by
    up to 21 grey levels."""

    size: int = 336
    patch: int = 14
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    pad: bool = False
    pinpoints: tuple[anyres.Size, ...] = ()

    @staticmethod
    def from_folder(folder: Path) -> "ImageProcessor":
        """Read preprocessor_config.json."""
        path = folder / "preprocessor_config.json"
        raw = read_json(path, "a model folder needs Hugging Face's preprocessor_config.json")
        crop, edge = raw.get("crop_size", 336), raw.get("size", 336)
        crop = (
            crop.get("height")
            if isinstance(crop, dict) and crop.get("height") == crop.get("width")
            else crop
        )
        edge = edge.get("shortest_edge") if isinstance(edge, dict) else edge
        if edge != crop or not isinstance(crop, int) or crop <= 0:
            raise UserError(
                f"{path}: size {edge} and crop_size {crop}: CLIP's are one number of pixels; mend the file"
            )
        config = read_config(folder)
        if crop != config.vision.image_size:
            tower = config.vision.image_size
            raise UserError(
                f"{path}: crop_size {crop}, but the tower of config.json takes {tower}; mend the file"
            )
        given = raw.get("image_grid_pinpoints")
        if (
            given is not None
            and config.pinpoints
            and given != [list(pinpoint) for pinpoint in config.pinpoints]
        ):
            raise UserError(
                f"{path}: image_grid_pinpoints are not those of config.json; mend the file"
            )
        for name, value in SUPPORTED.items():
            if raw.get(name, value) not in (value, None):
                raise UserError(f"{path}: {name} is {raw[name]!r}; only {value!r} is supported")
        if abs((raw.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
            raise UserError(
                f"{path}: rescale_factor is {raw['rescale_factor']!r}; only 1/255 is supported"
            )
        default = ImageProcessor()
        values = [raw.get("image_mean") or default.mean, raw.get("image_std") or default.std]
        for numbers in values:
            right = isinstance(numbers, list | tuple) and len(numbers) == 3
            if not right or not all(
                isinstance(n, float | int) and math.isfinite(n) for n in numbers
            ):
                raise UserError(
                    f"{path}: image_mean and image_std are three numbers each, not {numbers!r}"
                )
        if min(values[1]) <= 0:
            raise UserError(f"{path}: image_std {values[1]!r} is not above 0")
        pad = raw.get("do_pad") is True and not config.pinpoints
        return ImageProcessor(
            crop, config.vision.patch_size, *map(tuple, values), pad, config.pinpoints
        )

    @property
    def patches(self) -> int:
        """Patches of one tile."""
        return (self.size // self.patch) ** 2

    def crop(self, image: Image.Image) -> Image.Image:
        """The square that the tower sees of the whole picture, before normalising."""
        image = to_rgb(image)
        if self.pinpoints:
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.pad:
            image = pad_to_square(image, tuple(int(255 * m) for m in self.mean))
        width, height = image.size
        short, long = min(width, height), max(width, height)
        if long > LONGEST * short:
            raise UserError(f"a picture of {width}x{height} pixels is no picture; drop its record")
        long = int(self.size * long / short)
        new = (self.size, long) if width <= height else (long, self.size)
        if new != image.size:
            image = image.resize(new, Image.Resampling.BICUBIC)
        left, top = (new[0] - self.size) // 2, (new[1] - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL picture -> (tiles, 3, size, size) float32; one tile unless there are pinpoints."""
        tiles = [self.crop(image)]
        if self.pinpoints:
            tiles += anyres.parts(to_rgb(image), self.size, self.pinpoints)
        return torch.stack([self.normalise(tile) for tile in tiles])

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Pixels and packing of a picture, which travel together."""
        return PreparedImage(self(image), self.layout(image)[1])

    def layout(self, image: Image.Image) -> tuple[int, Tensor]:
        """How many features the tower gives for a picture, and which of them its image tokens are:
        a packing."""
        if not self.pinpoints:
            return self.patches, torch.arange(self.patches)
        return anyres.packing(
            (image.height, image.width), self.size, self.size // self.patch, self.pinpoints
        )

    def normalise(self, image: Image.Image) -> Tensor:
        """RGB picture of the right size -> (3, size, size) float32."""
        # float64 until the end, as transformers' numpy path: the result is then equal to the last
        # bit.
        pixels = np.asarray(image) * (1 / 255)
        pixels = (pixels.astype(np.float32) - np.array(self.mean, np.float32)) / np.array(
            self.std, np.float32
        )
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of one colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@dataclass(frozen=True)
class PictureFolder:
    """A source of pictures: called with a picture's name in the data, it opens that file as RGB.

    Whatever opens a picture by its name can stand in its place.
    """

    folder: str

    def __call__(self, name: str) -> Image.Image:
        """The picture below the folder; a `UserError` where it is missing or cannot be read."""
        root = os.path.abspath(self.folder)
        path = os.path.normpath(os.path.join(root, name))  # links are the user's own, and followed
        if not Path(path).is_relative_to(root):
            where = f"leaves the folder --images {self.folder}"
            raise UserError(f"image {name!r} {where}; paths must stay inside it")
        return read_picture(Path(path), f"names of pictures are below --images {self.folder}")


def read_picture(path: Path, remedy: str) -> Image.Image:
    """A picture file as RGB, turned as its EXIF says; `remedy` is what to do where there is none.

    Of an animation the first picture. More than 8 bits per value would come out white, and are
    refused."""
    try:
        with Image.open(path) as picture:
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                raise UserError(
                    f"image {path}: more than 8 bits per value (mode {picture.mode}); convert it to 8 bits"
                )
            # Not ImageOps.exif_transpose, which writes all of the EXIF anew and fails on any odd
            # tag in it.
            turned = TURNS.get(picture.getexif().get(0x0112))
            return to_rgb(picture if turned is None else picture.transpose(turned))
    except FileNotFoundError:
        raise UserError(f"image {path}: no such file; {remedy}") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise anything on damaged files
        raise UserError(
            f"image {path}: not a readable picture ({error}); replace it or drop its record"
        ) from None
