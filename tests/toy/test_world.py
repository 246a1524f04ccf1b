"""The embedded world: scenes that follow from split and index, and the bias."""

import random

import pytest

from minialign.errors import UserError
from minialign.toy import world
from minialign.toy.drawing import COLOURS, OBJECTS, SETTINGS
from minialign.toy.world import (
    FREQUENCY,
    POSITIONS,
    SPLITS,
    TYPICAL_COLOUR,
    image_name,
    make_scene,
    picture,
    scene_of,
)

SCENES = [make_scene(split, index) for split in SPLITS for index in range(60)]


# ---------------------------------------------------------------- scenes


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_well_formed_and_deterministic(split):
    scenes = []
    for index in range(200):
        random.seed(index)  # no global randomness
        scene = make_scene(split, index)
        assert scene == make_scene(split, index)
        assert scene.setting in SETTINGS and list(scene.cells) == list(POSITIONS)
        assert {name for name, _ in scene.cells.values()} <= set(OBJECTS)
        assert {colour for _, colour in scene.cells.values()} <= set(COLOURS)
        assert {name: set(places.items()) for name, places in scene.objects.items()} == {
            name: {(POSITIONS[cell], c) for cell, (n, c) in scene.cells.items() if n == name}
            for name, _ in scene.cells.values()
        }
        scenes.append(str(scene.cells))
    assert len(set(scenes)) > 190
    assert {make_scene(split, i).setting for i in range(200)} == set(SETTINGS)


def test_names_of_places_and_colours():
    """Rows count from the top of the picture, columns from its left, whatever the words for
    them.
    """
    rows, columns = (
        (("north", "top"), ("south", "bottom")),
        (("west", "left"), (), ("east", "right")),
    )
    for (row, column), place in POSITIONS.items():
        assert [any(word in place for word in words) for words in rows] == [row == 0, row == 1]
        assert [any(word in place for word in words) for words in columns] == [
            column == 0,
            False,
            column == 2,
        ]
    assert len(set(POSITIONS.values())) == len(POSITIONS) == 6
    assert TYPICAL_COLOUR.keys() == set(OBJECTS) and set(TYPICAL_COLOUR.values()) <= set(COLOURS)


@pytest.mark.parametrize("first", [0, 20_000])
@pytest.mark.parametrize("split", SPLITS)
def test_bias_in_training_scenes_only(split, first):
    """In train 85 % are typical on purpose, and some by chance (1 in 5, 1 in 8); elsewhere by
    chance alone.
    """
    scenes = [make_scene(split, first + i) for i in range(2000)]
    things = [(scene.setting, *thing) for scene in scenes for thing in scene.cells.values()]
    at_home = [(name, colour) for setting, name, colour in things if name in SETTINGS[setting]]
    away = [(name, colour) for setting, name, colour in things if name not in SETTINGS[setting]]
    objects = len(at_home) / len(things)
    home_colours, away_colours = (
        sum(TYPICAL_COLOUR[name] == colour for name, colour in some) / len(some)
        for some in (at_home, away)
    )
    settings = [sum(scene.setting == setting for scene in scenes) / 2000 for setting in SETTINGS]
    frequency = FREQUENCY if split == "train" else [1] * 5
    assert settings == pytest.approx([f / sum(frequency) for f in frequency], abs=0.035)
    assert away_colours == pytest.approx(1 / 8, abs=0.05)
    if split == "train":
        assert 0.85 <= objects <= 0.90 and 0.85 <= home_colours <= 0.89
    else:
        assert objects == pytest.approx(1 / 5, abs=0.02) and home_colours == pytest.approx(
            1 / 8, abs=0.04
        )
        names = [name for _, name, _ in things]
        assert (
            min(map(names.count, OBJECTS)) > len(things) / len(OBJECTS) * 0.8
        )  # every object about as often


def test_splits_are_disjoint():
    firsts = sorted(first for first, _ in SPLITS.values())
    assert len(SPLITS) == 4 and all(
        b - a == 10**9 for a, b in zip(firsts, firsts[1:], strict=False)
    )
    seeds = [{make_scene(split, i).seed for i in (*range(300), 10**9 - 1)} for split in SPLITS]
    assert len(set.union(*seeds)) == 4 * 301


@pytest.mark.parametrize("split", SPLITS)
def test_pictures(split):
    pictures = []
    for index in range(5):
        random.seed(index)
        image = picture(make_scene(split, index))
        assert image.mode == "RGB" and image.size == (96, 96)
        assert image.tobytes() == picture(make_scene(split, index)).tobytes()
        pictures.append(image.tobytes())
    assert len(set(pictures)) == 5


def test_every_object_and_colour_shows():
    """A change of one thing, of its colour or of the setting changes the picture."""

    def drawn(setting, cells):
        return picture(world.Scene(setting, cells, 7)).tobytes()

    shown = [drawn("park", {(0, 0): (name, colour)}) for name in OBJECTS for colour in COLOURS]
    shown += [drawn("park", {cell: ("cup", "red")}) for cell in POSITIONS if cell != (0, 0)]
    shown += [drawn(setting, {}) for setting in SETTINGS]
    assert len(set(shown)) == len(shown)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("index", [0, 1, 999, 123456, 7_654_321])
def test_names_round_trip(split, index):
    scene = scene_of(image_name(split, index))
    assert scene == make_scene(split, index) and scene.seed == SPLITS[split][0] + index


@pytest.mark.parametrize(
    "name",
    [
        "",
        "000001.png",
        "train-1.jpg",
        "nosplit-000001.png",
        "train--00001.png",
        "train-.png",
        "train-1.png.png",
        "../train-000001.png",
        "train-000001.png\n",
        "Train-000001.png",
        "train-1e3.png",
        "train-1000000000.png",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="not in the embedded world; give --images DIR"):
        scene_of(name)
