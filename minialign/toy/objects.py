"""The objects of the toy world, drawn in units of a canvas of 120 x 168.

Each is a function of what it is drawn on and of the paint `p`. Its contour needs 4 free units on
every side.
"""

from collections import namedtuple

# Details, alike in all objects.
CREAM, GLASS, DARK, GREY = (255, 250, 235), (196, 228, 244), (58, 56, 66), (176, 180, 188)
WOOD, GLOW, CLEAR = (134, 92, 58), (255, 236, 140), (0, 0, 0, 0)
# main: the object's colour; light, dark: two shades of it; ink: the lines inside it, its contour.
Paint = namedtuple("Paint", "main light dark ink")


def stroke(draw, points, fill, width):
    """A thick line with round ends."""
    draw.line(points, fill=fill, width=width, joint="curve")
    for point in (points[0], points[-1]):
        draw.circle(point, width / 2, fill=fill)


def wheels(draw, centres, radius, p):
    """Tyres with hubs."""
    for centre in centres:
        draw.circle(centre, radius, fill=DARK, outline=p.ink, width=3)
        draw.circle(centre, radius * 0.4, fill=GREY)


def cup(draw, p):
    """Steaming, its handle to the right."""
    for x in (34, 62):  # steam
        stroke(draw, [(x, 44), (x - 6, 34), (x + 5, 22), (x, 10)], CREAM, 7)
    draw.ellipse((66, 78, 116, 134), outline=p.main, width=13)  # handle
    draw.polygon([(6, 68), (92, 68), (82, 156), (74, 164), (24, 164), (16, 156)], fill=p.main)
    draw.ellipse((6, 56, 92, 82), fill=WOOD, outline=p.light, width=6)


def kettle(draw, p):
    """Its spout to the right."""
    draw.arc((22, 10, 90, 130), 180, 360, fill=DARK, width=11)  # handle
    draw.polygon([(82, 122), (102, 66), (116, 66), (112, 90), (98, 146)], fill=p.main)  # spout
    draw.polygon([(30, 84), (82, 84), (104, 150), (98, 164), (12, 164), (6, 150)], fill=p.main)
    draw.pieslice((28, 62, 84, 106), 180, 360, fill=p.main)  # lid
    draw.line((28, 85, 84, 85), fill=p.ink, width=4)
    draw.circle((56, 58), 8, fill=DARK)


def pan(draw, p):
    """From above, a fried egg in it."""
    draw.rounded_rectangle((49, 4, 71, 80), 9, fill=p.main)
    draw.circle((60, 112), 52, fill=p.main)
    draw.circle((60, 112), 41, fill=p.dark, outline=p.ink, width=3)
    draw.ellipse((36, 98, 76, 130), fill=CREAM)  # a fried egg
    draw.circle((69, 107), 13, fill=CREAM)
    draw.circle((58, 112), 10, fill=(250, 190, 40))


def fork(draw, p):
    """Its four tines up."""
    for x in (20, 43, 66, 89):
        draw.rounded_rectangle((x, 4, x + 11, 60), 6, fill=p.main)
    draw.chord((20, 12, 100, 90), 0, 180, fill=p.main)
    stroke(draw, [(60, 80), (60, 152)], p.main, 22)


def car(draw, p):
    """From the side."""
    draw.polygon([(18, 112), (36, 62), (82, 62), (104, 112)], fill=p.main)
    draw.rounded_rectangle((4, 98, 116, 148), 16, fill=p.main)
    draw.polygon([(31, 102), (42, 73), (56, 73), (56, 102)], fill=GLASS, outline=p.ink)
    draw.polygon([(64, 102), (64, 73), (78, 73), (90, 102)], fill=GLASS, outline=p.ink)
    draw.rectangle((104, 108, 115, 119), fill=GLOW, outline=p.ink, width=2)
    wheels(draw, [(30, 146), (90, 146)], 18, p)


def bus(draw, p):
    """A double-decker from the side."""
    draw.rounded_rectangle((6, 6, 114, 152), 12, fill=p.main)
    for x in (16, 40, 64, 88):
        draw.rectangle((x, 20, x + 17, 46), GLASS, p.ink, 2)
        draw.rectangle((x, 78, x + 17, 138 if x == 88 else 104), GLASS, p.ink, 2)  # a door
    draw.line((6, 62, 114, 62), fill=p.ink, width=4)  # the upper deck
    wheels(draw, [(30, 149), (76, 149)], 15, p)


def bicycle(draw, p):
    """From the side."""
    rear, front, crank, saddle, head = (31, 136), (89, 136), (57, 134), (42, 82), (80, 80)
    for hub in (rear, front):
        draw.circle(hub, 27, outline=p.main, width=9)
    stroke(draw, [(39, 66), saddle, rear, crank, saddle, head, crank], p.main, 9)
    stroke(draw, [front, head, (75, 54), (100, 48)], p.main, 9)
    stroke(draw, [(26, 62), (52, 62)], DARK, 10)


def lamp(draw, p):
    """A desk or street lamp, its head hanging to the right."""
    draw.arc((14, 6, 98, 100), 180, 360, fill=p.main, width=15)
    draw.rectangle((14, 52, 29, 156), fill=p.main)
    draw.polygon([(4, 164), (9, 144), (34, 144), (39, 164)], fill=p.main)
    draw.circle((85, 88), 17, fill=GLOW)
    draw.polygon([(75, 42), (99, 42), (116, 88), (54, 88)], fill=p.main)


def tree(draw, p):
    """A fir."""
    draw.rectangle((49, 130, 71, 164), fill=WOOD)
    for top, bottom, half in ((60, 142, 56), (30, 100, 46), (4, 62, 34)):
        draw.polygon([(60, top), (60 + half, bottom), (60 - half, bottom)], fill=p.main)
        draw.line((60 - half, bottom, 60 + half, bottom), fill=p.ink, width=4)


def bench(draw, p):
    """From the front."""
    for x in (18, 92):
        draw.rectangle((x, 58, x + 12, 164), fill=DARK)
    for y in (58, 86):
        draw.rounded_rectangle((4, y, 116, y + 18), 4, fill=p.main)
    seat = [(12, 116), (108, 116), (116, 138), (116, 146), (4, 146), (4, 138)]
    draw.polygon(seat, fill=p.main)


def kite(draw, p):
    """With its tail."""
    top, right, bottom, left, mid = (66, 5), (115, 46), (58, 112), (6, 40), (63, 43)
    draw.polygon([top, right, bottom, left], fill=p.main)
    draw.polygon([top, mid, left], fill=p.light)
    draw.polygon([mid, right, bottom], fill=p.dark)
    draw.line([top, bottom, mid, left, right], fill=p.ink, width=4)
    stroke(draw, [bottom, (66, 128), (52, 142), (32, 138), (16, 146), (12, 160)], p.main, 8)


def dog(draw, p):
    """From the side, its head to the right."""
    stroke(draw, [(18, 102), (11, 84), (13, 60)], p.main, 13)
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
    """Closed, lying."""
    (a, b, c, d) = cover = [(36, 6), (115, 6), (91, 126), (7, 126)]
    pages = (28, CREAM), (21, GREY), (18, CREAM), (11, GREY), (8, CREAM)
    for dy, fill in ((37, p.dark), *pages):  # back cover and pages
        draw.polygon([(x, y + dy) for x, y in cover], fill=fill)
    draw.line([d, (7, 160)], fill=p.dark, width=8)  # spine
    draw.polygon(cover, fill=p.main)
    draw.line([b, c, d], fill=p.ink, width=3)
    draw.polygon([(52, 32), (94, 32), (88, 58), (46, 58)], fill=CREAM, outline=p.ink, width=3)


def laptop(draw, p):
    """Open."""
    draw.rounded_rectangle((16, 44, 104, 126), 8, fill=p.main)
    draw.rectangle((28, 56, 92, 108), fill=GLASS, outline=p.ink, width=3)
    base = [(16, 126), (104, 126), (116, 156), (116, 164), (4, 164), (4, 156)]
    draw.polygon(base, fill=p.main)
    draw.line((14, 124, 106, 124), fill=p.ink, width=4)
    for x in range(24, 92, 12):  # keys
        draw.rectangle((x, 133, x + 8, 138), fill=p.ink)
        draw.rectangle((x, 143, x + 8, 148), fill=p.ink)


def pencil(draw, p):
    """From the lower left to the upper right."""
    # From tip to rubber: beginning, end, half the width at either, colour.
    parts = [(0, 38, 0, 20, (240, 206, 160)), (0, 15, 0, 8, DARK), (38, 138, 20, 20, p.main)]
    parts += [(138, 150, 20, 20, GREY), (150, 170, 20, 17, (240, 150, 160))]
    for a, b, wide_a, wide_b, fill in parts:
        corners = []
        for t, w in ((a, -wide_a), (a, wide_a), (b, wide_b), (b, -wide_b)):
            corners.append((12 + 0.55 * t + 0.83 * w, 160 - 0.83 * t + 0.55 * w))
        draw.polygon(corners, fill)


def clock(draw, p):
    """An alarm clock with two bells."""
    for side in (-1, 1):
        stroke(draw, [(60 + 30 * side, 140), (60 + 44 * side, 157)], p.main, 13)  # feet
        draw.circle((60 + 34 * side, 36), 21, fill=p.main)  # bells
    stroke(draw, [(60, 18), (60, 50)], DARK, 9)
    draw.circle((60, 98), 53, fill=p.main, outline=p.ink, width=3)
    draw.circle((60, 98), 34, fill=CREAM, outline=p.ink, width=3)
    stroke(draw, [(60, 74), (60, 98), (78, 98)], DARK, 6)


def boat(draw, p):
    """Under sail."""
    draw.rectangle((54, 4, 62, 130), fill=WOOD)
    draw.polygon([(66, 8), (66, 112), (114, 112)], fill=p.main)
    draw.polygon([(50, 30), (50, 112), (9, 112)], fill=CREAM)
    draw.polygon([(4, 120), (116, 120), (95, 164), (23, 164)], fill=p.main)


def umbrella(draw, p):
    """Open."""
    draw.pieslice((4, 12, 116, 164), 180, 360, fill=p.main)
    draw.pieslice((39, 12, 81, 164), 180, 360, fill=p.light, outline=p.ink, width=3)
    for x in (4, 42, 80):  # scalloped rim
        draw.ellipse((x, 78, x + 36, 104), fill=CLEAR)
    draw.line([(60, 5), (60, 12)], fill=WOOD, width=9)
    stroke(draw, [(60, 80), (60, 150), (66, 159), (80, 159), (86, 148)], WOOD, 9)


def ball(draw, p):
    """With stripes."""
    draw.circle((60, 108), 56, fill=p.main)
    draw.ellipse((30, 52, 90, 164), fill=CREAM, outline=p.ink, width=3)
    draw.ellipse((44, 52, 76, 164), fill=p.main, outline=p.ink, width=3)


def crab(draw, p):
    """From the front, its claws up."""
    for s in (-1, 1):
        for y in (122, 144):
            leg = [(60 + 28 * s, y - 10), (60 + 46 * s, y - 8), (60 + 51 * s, y + 14)]
            stroke(draw, leg, p.main, 9)
        stroke(draw, [(60 + 30 * s, 104), (60 + 44 * s, 84), (60 + 36 * s, 56)], p.main, 13)
        draw.circle((60 + 33 * s, 40), 23, fill=p.main)  # claw, open at the top
        draw.polygon([(60 + 33 * s, 42), (60 + 22 * s, 8), (60 + 44 * s, 8)], fill=CLEAR)
        draw.circle((60 + 13 * s, 80), 12, fill=DARK, outline=CREAM, width=7)  # eye
    draw.ellipse((24, 88, 96, 152), fill=p.main)
    draw.arc((42, 104, 78, 138), 20, 160, fill=p.ink, width=4)


DRAWINGS = (
    cup, kettle, pan, fork, car, bus, bicycle, lamp, tree, bench, kite, dog, book, laptop,
    pencil, clock, boat, umbrella, ball, crab,
)  # fmt: skip
DRAW = {drawing.__name__: drawing for drawing in DRAWINGS}
