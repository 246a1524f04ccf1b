"""Pictures: opened from a folder, and prepared for the tower as CLIP does."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minialign.data import anyres
from minialign.errors import UserError
from minialign.fields import (
    ANYTHING,
    REQUIRED,
    flag,
    list_of,
    number,
    object_of,
    one_of,
    read_fields,
)
from minialign.files import read_json
from minialign.model.config import read_config

# EXIF's orientation -> what puts the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What is decoded, by its content: Pillow knows more, some of which starts other programs. To it MPO
# is a kind of JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LONGEST = 200  # times the short edge
KINDS = ("CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as transformers 5 has it: what is transparent becomes white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class PreparedImage:
    """A picture as the model takes it: what the tower sees, and what the decoder makes of that.

    pixels    (tiles, 3, size, size) float32
    features  how many features the tower gives for it, all tiles together
    packing   (image tokens,) which of these, or NEWLINE, each image token stands for
    """

    pixels: Tensor
    features: int
    packing: Tensor


@dataclass(frozen=True)
class ImageProcessor:
    """CLIP's preprocessing: short edge to `size`, centre crop, rescale, normalise.

    Follows CLIPImageProcessor. With `pad` the picture is padded to a square first, as
    LlavaImageProcessor does; with `pinpoints` it is cut into tiles (anyres.py). Resizing is
    Pillow's bicubic: torch's differs by up to 21 grey levels.
    """

    size: int = 336
    patch: int = 14
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    pad: bool = False
    pinpoints: tuple[anyres.Size, ...] = ()

    @staticmethod
    def from_folder(folder: Path) -> "ImageProcessor":
        """Read preprocessor_config.json, or processor_config.json, in which transformers 5 has the
        same object."""
        config = read_config(folder)
        tower, patch = config.vision.image_size, config.vision.patch_size
        path = folder / "processor_config.json"
        processor = read_json(path, "download the folder again") if path.exists() else {}
        strategy = config.raw.get("vision_feature_select_strategy", "default")
        fields = {
            "patch_size": one_of(patch, default=patch),
            "vision_feature_select_strategy": one_of(strategy, default=strategy),
            "image_processor": object_of(ANYTHING, default=None),
        }
        raw = read_fields(path, processor, fields)["image_processor"]
        if raw is None:
            path = folder / "preprocessor_config.json"
            raw = read_json(path, "a model folder needs Hugging Face's preprocessor_config.json")

        # Anything else would be another preprocessing; what is missing has CLIP's value at 336.
        missing = 336 if tower == 336 else REQUIRED
        grid = [list(size) for size in config.pinpoints]
        fields = {
            "image_processor_type": one_of(*KINDS, *(f"{kind}Fast" for kind in KINDS), default=""),
            "do_resize": one_of(True, default=True),
            "size": one_of(tower, {"shortest_edge": tower}, default=missing),
            "resample": one_of(3, default=3),
            "do_center_crop": one_of(True, default=True),
            "crop_size": one_of(tower, {"height": tower, "width": tower}, default=missing),
            "do_pad": flag(default=False),
            "do_rescale": one_of(True, default=True),
            "rescale_factor": one_of(1 / 255, default=1 / 255),
            "do_normalize": one_of(True, default=True),
            "image_mean": list_of(number(0, 1), 3, default=ImageProcessor.mean),
            "image_std": list_of(number(0.001, 1000), 3, default=ImageProcessor.std),
            "image_grid_pinpoints": one_of(grid, default=grid) if grid else ANYTHING,
        }
        values = read_fields(path, raw, fields)
        is_clip = values["image_processor_type"].startswith("CLIP")  # which knows no do_pad
        return ImageProcessor(
            size=tower,
            patch=patch,
            mean=tuple(values["image_mean"]),
            std=tuple(values["image_std"]),
            pad=values["do_pad"] and not config.pinpoints and not is_clip,
            pinpoints=config.pinpoints,
        )

    @property
    def patches(self) -> int:
        """Patches of one tile."""
        return (self.size // self.patch) ** 2

    def crop(self, image: Image.Image) -> Image.Image:
        """The square that the tower sees of the whole picture, before normalising."""
        self.require_shape(image)
        image = to_rgb(image)
        if self.pinpoints:
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.pad:
            image = pad_to_square(image, tuple(int(255 * m) for m in self.mean))

        width, height = image.size
        long = int(self.size * max(width, height) / min(width, height))
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
        """Pixels and layout of a picture, which travel together."""
        features, packing = self.layout(image)
        return PreparedImage(self(image), features, packing)

    def layout(self, image: Image.Image) -> tuple[int, Tensor]:
        """How many features the tower gives for a picture, and its packing."""
        self.require_shape(image)
        if not self.pinpoints:
            return self.patches, torch.arange(self.patches)
        side = self.size // self.patch
        return anyres.packing((image.height, image.width), self.size, side, self.pinpoints)

    def require_shape(self, image: Image.Image) -> None:
        """Refuse a picture so long that it would fill the memory on being resized or padded; a
        padded one has Pillow's own limit."""
        short, long = min(image.size), max(image.size)
        limit = 2 * Image.MAX_IMAGE_PIXELS
        if long > LONGEST * short or (self.pad and long**2 > limit):
            size = f"a picture of {image.width}x{image.height} pixels"
            raise UserError(f"{size} is too long for its width, or too large; drop its record")

    def normalise(self, image: Image.Image) -> Tensor:
        """RGB picture of the right size -> (3, size, size) float32."""
        # Rescaled in float64, as by transformers' numpy path: equal to the last bit.
        pixels = (np.asarray(image) * (1 / 255)).astype(np.float32)
        pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
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
    refused.
    """
    try:
        # Before it is opened: a pipe would wait for somebody to write into it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"image {path}: no file but a folder, a pipe or a device; {remedy}")
        with Image.open(path, formats=FORMATS) as picture:
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                message = f"more than 8 bits per value (mode {picture.mode}); convert it to 8 bits"
                raise UserError(f"image {path}: {message}")
            # Not ImageOps.exif_transpose, which fails on any odd tag in the EXIF.
            turned = TURNS.get(picture.getexif().get(0x0112))
            return to_rgb(picture if turned is None else picture.transpose(turned))
    except FileNotFoundError:
        raise UserError(f"image {path}: no such file; {remedy}") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise anything on damaged files
        message = f"not a readable picture ({error}); replace it or drop its record"
        raise UserError(f"image {path}: {message}") from None
