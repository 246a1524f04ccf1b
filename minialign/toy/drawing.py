"""The drawings of the toy world: 96x96 pictures of six objects in one of five settings.

A picture is a grid of two rows and three columns; a cell holds one object in one colour. Everything
is drawn at four times its size and shrunk once, so that edges are smooth, and then cached: a scene
is a handful of pastes. No two objects share a silhouette, and each has a thin contour that
separates it from any background (dark, but light around black objects).
"""

import functools
import random

from PIL import Image, ImageDraw, ImageFilter

from minialign.toy.objects import CLEAR, DRAW, Paint
from minialign.toy.places import PLACES, mix

SIZE, ROWS, COLUMNS = 96, 2, 3
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (216, 40, 45), "orange": (248, 134, 24), "yellow": (252, 218, 44),
    "green": (38, 158, 66), "blue": (42, 96, 222), "purple": (142, 62, 190),
    "white": (246, 246, 246), "black": (36, 36, 42),
}  # fmt: skip
SETTINGS: dict[str, tuple[str, ...]] = {
    "kitchen": ("cup", "kettle", "pan", "fork"),
    "street": ("car", "bus", "bicycle", "lamp"),
    "park": ("tree", "bench", "kite", "dog"),
    "desk": ("book", "laptop", "pencil", "clock"),
    "beach": ("boat", "umbrella", "ball", "crab"),
}
OBJECTS: tuple[str, ...] = tuple(name for names in SETTINGS.values() for name in names)

_SUPER = 4  # units per final pixel
_CANVAS = (120, 168)  # the size of an object in units, 30 x 42 pixels
_SCALES, _BRIGHTNESS = (0.9, 0.95, 1.0), (0.94, 0.97, 1.0, 1.03)


@functools.cache
def _object(name, colour):
    """One object in one colour on its canvas, as RGBA with its contour."""
    main = COLOURS[colour]
    ink = (214, 214, 222) if colour == "black" else (44, 38, 52)
    paint = Paint(main, mix(main, (255, 255, 255), 0.22), mix(main, (40, 36, 60), 0.22), ink)
    shape = Image.new("RGBA", _CANVAS, CLEAR)
    DRAW[name](ImageDraw.Draw(shape), paint)
    sprite = Image.new("RGBA", _CANVAS, ink)
    contour = shape.getchannel("A").filter(ImageFilter.MaxFilter(7))  # 3 units more
    sprite.putalpha(contour)
    sprite.alpha_composite(shape)
    return sprite


@functools.cache
def _sprite(name, colour, size=1.0, mirrored=False, scale=1):
    """The object at its final size, `scale` times."""
    sprite = _object(name, colour)
    if mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = [scale * round(side * size / _SUPER) for side in _CANVAS]
    return sprite.resize(pixels, Image.Resampling.BOX)


@functools.cache
def _background(setting, brightness=1.0, scale=1):
    """A place in a certain light, `scale` times."""
    picture = Image.new("RGB", (SIZE * _SUPER, SIZE * _SUPER))
    PLACES[setting](ImageDraw.Draw(picture), SIZE * _SUPER)
    picture = picture.resize((SIZE * scale, SIZE * scale), Image.Resampling.BOX)
    return picture.point(lambda value: min(255, round(value * brightness)))


def draw_scene(
    setting: str,
    cells: dict[tuple[int, int], tuple[str, str]],
    rng: random.Random,
    scale: int = 1,
) -> Image.Image:
    """Draw one 96 x 96 RGB picture, or `scale` times as large.

    cells: (row, column) -> (object, colour). rng varies the place, size and direction of each
    object, inside its cell, and the light a little.
    """
    picture = _background(setting, rng.choice(_BRIGHTNESS), scale).copy()
    width, height = SIZE // COLUMNS, SIZE // ROWS
    for (row, column), (name, colour) in sorted(cells.items()):
        sprite = _sprite(name, colour, rng.choice(_SCALES), rng.random() < 0.5, scale)
        sprite_width, sprite_height = sprite.width // scale, sprite.height // scale
        spare = width - sprite_width
        x = column * width + max(0, min(spare, spare // 2 + rng.randint(-2, 2)))
        y = (row + 1) * height - 3 + rng.randint(-2, 2) - sprite_height
        picture.paste(sprite, (scale * x, scale * y), sprite)
    return picture
