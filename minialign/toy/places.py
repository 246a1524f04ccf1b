"""The places of the toy world, drawn: what is behind the objects. All are pale, so that the objects
stand out.
"""


def mix(a, b, t):
    """A colour moved from `a` towards `b` by `t`."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def stripes(draw, size, *rows):
    """Horizontal stripes over the whole width: (top, bottom, colour) each."""
    for top, bottom, colour in rows:
        draw.rectangle((0, top, size, bottom), fill=colour)


def kitchen(draw, size):
    """Tiles, a shelf and a counter."""
    for x in range(0, size, 32):
        for y in range(0, size, 32):
            colour = (190, 218, 214) if (x + y) % 64 else (226, 240, 236)
            draw.rectangle((x, y, x + 32, y + 32), colour, outline=(214, 232, 228), width=2)
    stripes(draw, size, (176, 192, (206, 172, 132)), (192, 198, (160, 186, 182)))  # shelf
    stripes(draw, size, (336, size, (198, 194, 196)), (336, 346, (240, 238, 236)))  # counter


def house(draw, left, top, right, colour):
    """A house and its windows."""
    draw.rectangle((left, top, right, 150), fill=colour)
    for x in range(left + 12, right - 16, 26):
        for y in range(top + 14, 130, 32):
            draw.rectangle((x, y, x + 12, y + 16), fill=mix(colour, (120, 140, 170), 0.35))


def street(draw, size):
    """Houses with windows, a pavement and a road."""
    stripes(draw, size, (0, size, (206, 226, 242)))  # sky
    house(draw, 0, 40, 88, (222, 206, 196))
    house(draw, 88, 12, 192, (204, 204, 216))
    house(draw, 192, 56, 284, (226, 214, 190))
    house(draw, 284, 24, 384, (212, 200, 206))
    stripes(draw, size, (148, size, (222, 218, 212)), (194, size, (186, 182, 178)))  # pavement
    stripes(draw, size, (204, size, (160, 162, 170)))  # asphalt
    for x in range(10, size, 96):
        draw.rectangle((x, 280, x + 52, 290), fill=(238, 236, 226))  # lane marks


def park(draw, size):
    """Hills, a path and flowers."""
    stripes(draw, size, (0, size, (204, 230, 246)))  # sky
    draw.ellipse((-120, 70, 240, 330), fill=(186, 216, 160))  # hills
    draw.ellipse((140, 90, 520, 330), fill=(172, 208, 150))
    stripes(draw, size, (150, size, (192, 222, 158)))  # meadow
    draw.polygon([(0, 230), (size, 196), (size, 236), (0, 282)], fill=(234, 220, 184))  # path
    flowers = (250, 250, 240), (246, 206, 214), (168, 204, 132)
    for i in range(36):  # scattered evenly
        x, y = i * 0.618 % 1 * size, 290 + i * 0.414 % 1 * 90
        draw.circle((x, y), 4, fill=flowers[i % 3])


def desk(draw, size):
    """Wallpaper, a shelf and the desk's wood."""
    stripes(draw, size, (0, size, (238, 226, 228)))
    for x in range(0, size, 48):
        draw.rectangle((x, 0, x + 22, size), fill=(230, 214, 220))  # wallpaper
    stripes(draw, size, (178, 194, (250, 246, 240)), (194, 200, (204, 188, 194)))  # shelf
    stripes(draw, size, (316, size, (206, 164, 118)), (316, 322, (226, 188, 144)))  # desk
    for i, y in enumerate(range(336, size, 14)):  # the grain of the wood
        x = i * 90 % 200 - 60
        draw.line((x, y, x + 240, y), fill=(192, 150, 106), width=3)


def beach(draw, size):
    """The sea with its waves, and sand."""
    stripes(draw, size, (0, 60, (214, 236, 250)), (60, 150, (140, 202, 224)))  # sky, sea
    for i in range(12):  # waves
        x, y = i * 139 % size, 76 + i * 23 % 60
        draw.line((x, y, x + 44, y), fill=(190, 228, 240), width=4)
    for x in range(-20, size, 80):  # the edge of the water
        draw.ellipse((x, 132, x + 100, 172), fill=(244, 250, 250))
    stripes(draw, size, (156, size, (244, 226, 182)))  # sand
    grains = (226, 204, 156), (252, 240, 208)
    for i in range(60):
        draw.circle((i * 157 % size, 176 + i * 71 % 204), 3, fill=grains[i % 2])


PLACES = {"kitchen": kitchen, "street": street, "park": park, "desk": desk, "beach": beach}
