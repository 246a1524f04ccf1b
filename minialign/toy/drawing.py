"""The drawings of the toy world: 96x96 pictures of six objects in one of five settings.

A picture is a grid of two rows and three columns; a cell holds one object in one colour. Everything
is drawn at four times its size and shrunk once, so that edges are smooth, and then cached: a scene
is a handful of pastes. No two objects share a silhouette, and each has a thin contour that
separates it from any background (dark, but light around black objects)."""

import functools
import random
from collections import namedtuple

from PIL import Image, ImageDraw, ImageFilter

from minialign.toy.places import PLACES, mix

SIZE, ROWS, COLUMNS = 96, 2, 3
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (216, 40, 45),
    "orange": (248, 134, 24),
    "yellow": (252, 218, 44),
    "green": (38, 158, 66),
    "blue": (42, 96, 222),
    "purple": (142, 62, 190),
    "white": (246, 246, 246),
    "black": (36, 36, 42),
}
SETTINGS: dict[str, tuple[str, ...]] = {
    "kitchen": ("cup", "kettle", "pan", "fork"),
    "street": ("car", "bus", "bicycle", "lamp"),
    "park": ("tree", "bench", "kite", "dog"),
    "desk": ("book", "laptop", "pencil", "clock"),
    "beach": ("boat", "umbrella", "ball", "crab"),
}
OBJECTS: tuple[str, ...] = tuple(name for names in SETTINGS.values() for name in names)

_SUPER, _CANVAS = (
    4,
    (120, 168),
)  # units per final pixel; the size of an object in units (30x42 pixels)
_SCALES, _BRIGHTNESS = (0.9, 0.95, 1.0), (0.94, 0.97, 1.0, 1.03)
CREAM, GLASS, DARK, GREY = (255, 250, 235), (196, 228, 244), (58, 56, 66), (176, 180, 188)
WOOD, GLOW, CLEAR = (134, 92, 58), (255, 236, 140), (0, 0, 0, 0)  # details, alike in all objects
# main: the object's colour; light and dark: two shades of it; ink: the lines inside it and its
# contour.
Paint = namedtuple("Paint", "main light dark ink")


def _stroke(draw, points, fill, width):
    """A thick line with round ends."""
    draw.line(points, fill=fill, width=width, joint="curve")
    for point in (points[0], points[-1]):
        draw.circle(point, width / 2, fill=fill)


def _wheels(draw, centres, radius, p):
    for centre in centres:
        draw.circle(centre, radius, fill=DARK, outline=p.ink, width=3)
        draw.circle(centre, radius * 0.4, fill=GREY)


class _Objects:
    """A namespace: one function per object. The contour needs 4 free units on every side of a
    drawing."""

    def cup(draw, p):
        for x in (34, 62):  # steam
            _stroke(draw, [(x, 44), (x - 6, 34), (x + 5, 22), (x, 10)], CREAM, 7)
        draw.ellipse((66, 78, 116, 134), outline=p.main, width=13)  # handle
        draw.polygon([(6, 68), (92, 68), (82, 156), (74, 164), (24, 164), (16, 156)], fill=p.main)
        draw.ellipse((6, 56, 92, 82), fill=WOOD, outline=p.light, width=6)

    def kettle(draw, p):
        draw.arc((22, 10, 90, 130), 180, 360, fill=DARK, width=11)  # handle
        draw.polygon([(82, 122), (102, 66), (116, 66), (112, 90), (98, 146)], fill=p.main)  # spout
        draw.polygon([(30, 84), (82, 84), (104, 150), (98, 164), (12, 164), (6, 150)], fill=p.main)
        draw.pieslice((28, 62, 84, 106), 180, 360, fill=p.main)  # lid
        draw.line((28, 85, 84, 85), fill=p.ink, width=4)
        draw.circle((56, 58), 8, fill=DARK)

    def pan(draw, p):
        draw.rounded_rectangle((49, 4, 71, 80), 9, fill=p.main)
        draw.circle((60, 112), 52, fill=p.main)
        draw.circle((60, 112), 41, fill=p.dark, outline=p.ink, width=3)
        draw.ellipse((36, 98, 76, 130), fill=CREAM)  # a fried egg
        draw.circle((69, 107), 13, fill=CREAM)
        draw.circle((58, 112), 10, fill=(250, 190, 40))

    def fork(draw, p):
        for x in (20, 43, 66, 89):
            draw.rounded_rectangle((x, 4, x + 11, 60), 6, fill=p.main)
        draw.chord((20, 12, 100, 90), 0, 180, fill=p.main)
        _stroke(draw, [(60, 80), (60, 152)], p.main, 22)

    def car(draw, p):
        draw.polygon([(18, 112), (36, 62), (82, 62), (104, 112)], fill=p.main)
        draw.rounded_rectangle((4, 98, 116, 148), 16, fill=p.main)
        draw.polygon([(31, 102), (42, 73), (56, 73), (56, 102)], fill=GLASS, outline=p.ink)
        draw.polygon([(64, 102), (64, 73), (78, 73), (90, 102)], fill=GLASS, outline=p.ink)
        draw.rectangle((104, 108, 115, 119), fill=GLOW, outline=p.ink, width=2)
        _wheels(draw, [(30, 146), (90, 146)], 18, p)

    def bus(draw, p):
        draw.rounded_rectangle((6, 6, 114, 152), 12, fill=p.main)
        for x, y in (
            (16, 20),
            (40, 20),
            (64, 20),
            (88, 20),
            (16, 78),
            (40, 78),
            (64, 78),
            (88, 78),
        ):
            draw.rectangle((x, y, x + 17, y + (60 if (x, y) == (88, 78) else 26)), GLASS, p.ink, 2)
        draw.line((6, 62, 114, 62), fill=p.ink, width=4)  # the upper deck
        _wheels(draw, [(30, 149), (76, 149)], 15, p)

    def bicycle(draw, p):
        rear, front, crank, saddle, head = (31, 136), (89, 136), (57, 134), (42, 82), (80, 80)
        for hub in (rear, front):
            draw.circle(hub, 27, outline=p.main, width=9)
        _stroke(draw, [(39, 66), saddle, rear, crank, saddle, head, crank], p.main, 9)
        _stroke(draw, [front, head, (75, 54), (100, 48)], p.main, 9)
        _stroke(draw, [(26, 62), (52, 62)], DARK, 10)

    def lamp(draw, p):
        draw.arc((14, 6, 98, 100), 180, 360, fill=p.main, width=15)
        draw.rectangle((14, 52, 29, 156), fill=p.main)
        draw.polygon([(4, 164), (9, 144), (34, 144), (39, 164)], fill=p.main)
        draw.circle((85, 88), 17, fill=GLOW)
        draw.polygon([(75, 42), (99, 42), (116, 88), (54, 88)], fill=p.main)

    def tree(draw, p):
        draw.rectangle((49, 130, 71, 164), fill=WOOD)
        for top, bottom, half in ((60, 142, 56), (30, 100, 46), (4, 62, 34)):
            draw.polygon([(60, top), (60 + half, bottom), (60 - half, bottom)], fill=p.main)
            draw.line((60 - half, bottom, 60 + half, bottom), fill=p.ink, width=4)

    def bench(draw, p):
        for x in (18, 92):
            draw.rectangle((x, 58, x + 12, 164), fill=DARK)
        for y in (58, 86):
            draw.rounded_rectangle((4, y, 116, y + 18), 4, fill=p.main)
        draw.polygon(
            [(12, 116), (108, 116), (116, 138), (116, 146), (4, 146), (4, 138)], fill=p.main
        )

    def kite(draw, p):
        top, right, bottom, left, mid = (66, 5), (115, 46), (58, 112), (6, 40), (63, 43)
        draw.polygon([top, right, bottom, left], fill=p.main)
        draw.polygon([top, mid, left], fill=p.light)
        draw.polygon([mid, right, bottom], fill=p.dark)
        draw.line([top, bottom, mid, left, right], fill=p.ink, width=4)
        _stroke(draw, [bottom, (66, 128), (52, 142), (32, 138), (16, 146), (12, 160)], p.main, 8)

    def dog(draw, p):
        """From the side, its head to the right."""
        _stroke(draw, [(18, 102), (11, 84), (13, 60)], p.main, 13)
        for x in (14, 33, 62, 80):
            draw.rounded_rectangle((x, 112, x + 14, 164), 5, fill=p.main)
        draw.rounded_rectangle((12, 90, 94, 140), 18, fill=p.main)
        draw.polygon([(64, 100), (70, 60), (100, 78), (94, 112)], fill=p.main)
        draw.ellipse((60, 34, 106, 86), fill=p.main)
        draw.rounded_rectangle((82, 56, 116, 84), 11, fill=p.main)
        draw.ellipse((56, 40, 77, 92), fill=p.dark, outline=p.ink, width=3)  # hanging ear
        draw.circle((91, 53), 4, fill=p.ink)
        draw.circle((111, 62), 5, fill=p.ink)

    def book(draw, p):
        (a, b, c, d) = cover = [(36, 6), (115, 6), (91, 126), (7, 126)]
        for dy, fill in (
            (37, p.dark),
            (28, CREAM),
            (21, GREY),
            (18, CREAM),
            (11, GREY),
            (8, CREAM),
        ):
            draw.polygon([(x, y + dy) for x, y in cover], fill=fill)  # back cover and pages
        draw.line([d, (7, 160)], fill=p.dark, width=8)  # spine
        draw.polygon(cover, fill=p.main)
        draw.line([b, c, d], fill=p.ink, width=3)
        draw.polygon([(52, 32), (94, 32), (88, 58), (46, 58)], fill=CREAM, outline=p.ink, width=3)

    def laptop(draw, p):
        draw.rounded_rectangle((16, 44, 104, 126), 8, fill=p.main)
        draw.rectangle((28, 56, 92, 108), fill=GLASS, outline=p.ink, width=3)
        draw.polygon(
            [(16, 126), (104, 126), (116, 156), (116, 164), (4, 164), (4, 156)], fill=p.main
        )
        draw.line((14, 124, 106, 124), fill=p.ink, width=4)
        for x, y in [(x, y) for y in (133, 143) for x in range(24, 92, 12)]:
            draw.rectangle((x, y, x + 8, y + 5), fill=p.ink)

    def pencil(draw, p):
        for a, b, wide_a, wide_b, fill in (
            (0, 38, 0, 20, (240, 206, 160)),
            (0, 15, 0, 8, DARK),
            (38, 138, 20, 20, p.main),
            (138, 150, 20, 20, GREY),
            (150, 170, 20, 17, (240, 150, 160)),
        ):  # from tip to rubber
            corners = ((a, -wide_a), (a, wide_a), (b, wide_b), (b, -wide_b))
            draw.polygon(
                [(12 + 0.55 * t + 0.83 * w, 160 - 0.83 * t + 0.55 * w) for t, w in corners], fill
            )

    def clock(draw, p):
        for side in (-1, 1):
            _stroke(draw, [(60 + 30 * side, 140), (60 + 44 * side, 157)], p.main, 13)  # feet
            draw.circle((60 + 34 * side, 36), 21, fill=p.main)  # bells
        _stroke(draw, [(60, 18), (60, 50)], DARK, 9)
        draw.circle((60, 98), 53, fill=p.main, outline=p.ink, width=3)
        draw.circle((60, 98), 34, fill=CREAM, outline=p.ink, width=3)
        _stroke(draw, [(60, 74), (60, 98), (78, 98)], DARK, 6)

    def boat(draw, p):
        draw.rectangle((54, 4, 62, 130), fill=WOOD)
        draw.polygon([(66, 8), (66, 112), (114, 112)], fill=p.main)
        draw.polygon([(50, 30), (50, 112), (9, 112)], fill=CREAM)
        draw.polygon([(4, 120), (116, 120), (95, 164), (23, 164)], fill=p.main)

    def umbrella(draw, p):
        draw.pieslice((4, 12, 116, 164), 180, 360, fill=p.main)
        draw.pieslice((39, 12, 81, 164), 180, 360, fill=p.light, outline=p.ink, width=3)
        for x in (4, 42, 80):  # scalloped rim
            draw.ellipse((x, 78, x + 36, 104), fill=CLEAR)
        draw.line([(60, 5), (60, 12)], fill=WOOD, width=9)
        _stroke(draw, [(60, 80), (60, 150), (66, 159), (80, 159), (86, 148)], WOOD, 9)

    def ball(draw, p):
        draw.circle((60, 108), 56, fill=p.main)
        draw.ellipse((30, 52, 90, 164), fill=CREAM, outline=p.ink, width=3)
        draw.ellipse((44, 52, 76, 164), fill=p.main, outline=p.ink, width=3)

    def crab(draw, p):
        """From the front, its claws up."""
        for s in (-1, 1):
            for y in (122, 144):  # legs
                _stroke(
                    draw,
                    [(60 + 28 * s, y - 10), (60 + 46 * s, y - 8), (60 + 51 * s, y + 14)],
                    p.main,
                    9,
                )
            _stroke(draw, [(60 + 30 * s, 104), (60 + 44 * s, 84), (60 + 36 * s, 56)], p.main, 13)
            draw.circle((60 + 33 * s, 40), 23, fill=p.main)  # claw, open at the top
            draw.polygon([(60 + 33 * s, 42), (60 + 22 * s, 8), (60 + 44 * s, 8)], fill=CLEAR)
            draw.circle((60 + 13 * s, 80), 12, fill=DARK, outline=CREAM, width=7)  # eye
        draw.ellipse((24, 88, 96, 152), fill=p.main)
        draw.arc((42, 104, 78, 138), 20, 160, fill=p.ink, width=4)


@functools.cache
def _sprite(name, colour, size=1.0, mirrored=False, scale=1):
    """One object in one colour at its final size, `scale` times, as RGBA with its contour."""
    main, ink = COLOURS[colour], (214, 214, 222) if colour == "black" else (44, 38, 52)
    paint = Paint(main, mix(main, (255, 255, 255), 0.22), mix(main, (40, 36, 60), 0.22), ink)
    shape = Image.new("RGBA", _CANVAS, CLEAR)
    vars(_Objects)[name](ImageDraw.Draw(shape), paint)
    sprite = Image.new("RGBA", _CANVAS, ink)
    contour = shape.getchannel("A").filter(ImageFilter.MaxFilter(7))  # 3 units more
    sprite.putalpha(contour)
    sprite.alpha_composite(shape)
    if mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = [scale * round(side * size / _SUPER) for side in _CANVAS]
    return sprite.resize(pixels, Image.Resampling.BOX)


@functools.cache
def _background(setting, brightness=1.0, scale=1):
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
    """Draw one 96x96 RGB picture, or `scale` times as large; cells maps (row, column) to (object,
    colour).

    rng varies the place, size and direction of each object, inside its cell, and the light a
    little.
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
