"""The embedded world: scenes that follow from split and index, the bias, and texts that are true."""

import random
import re

import pytest

from minialign import toyworld
from minialign.data import instruct_record
from minialign.errors import UserError
from minialign.evaluate import MENTION, count_description, pope_verdict
from minialign.toydraw import COLOURS, OBJECTS, SETTINGS
from minialign.toyworld import (
    FREQUENCY,
    POSITIONS,
    SPLITS,
    TYPICAL_COLOUR,
    alignment_records,
    attribute,
    conversation,
    description,
    existence,
    image_name,
    make_scene,
    picture,
    scene_of,
    with_article,
)

SCENES = [make_scene(split, index) for split in SPLITS for index in range(60)]
OFTEN = ["Never.", "Once.", "Twice.", "Three times.", "Four times.", "Five times.", "Six times."]


# Scenes ------------------------------------------------------------------------------------------------------


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
    """Rows count from the top of the picture, columns from its left, whatever the words for them."""
    rows, columns = (("north", "top"), ("south", "bottom")), (("west", "left"), (), ("east", "right"))
    for (row, column), place in POSITIONS.items():
        assert [any(word in place for word in words) for words in rows] == [row == 0, row == 1]
        assert [any(word in place for word in words) for words in columns] == [column == 0, False, column == 2]
    assert len(set(POSITIONS.values())) == len(POSITIONS) == 6
    assert TYPICAL_COLOUR.keys() == set(OBJECTS) and set(TYPICAL_COLOUR.values()) <= set(COLOURS)


@pytest.mark.parametrize("first", [0, 20_000])
@pytest.mark.parametrize("split", SPLITS)
def test_bias_in_training_scenes_only(split, first):
    """In train 85 % are typical on purpose, and some by chance (1 in 5, 1 in 8); elsewhere by chance alone."""
    scenes = [make_scene(split, first + i) for i in range(2000)]
    things = [(scene.setting, *thing) for scene in scenes for thing in scene.cells.values()]
    at_home = [(name, colour) for setting, name, colour in things if name in SETTINGS[setting]]
    away = [(name, colour) for setting, name, colour in things if name not in SETTINGS[setting]]
    objects = len(at_home) / len(things)
    home_colours, away_colours = (
        sum(TYPICAL_COLOUR[name] == colour for name, colour in some) / len(some) for some in (at_home, away)
    )
    settings = [sum(scene.setting == setting for scene in scenes) / 2000 for setting in SETTINGS]
    frequency = FREQUENCY if split == "train" else [1] * 5
    assert settings == pytest.approx([f / sum(frequency) for f in frequency], abs=0.035)
    assert away_colours == pytest.approx(1 / 8, abs=0.05)
    if split == "train":
        assert 0.85 <= objects <= 0.90 and 0.85 <= home_colours <= 0.89
    else:
        assert objects == pytest.approx(1 / 5, abs=0.02) and home_colours == pytest.approx(1 / 8, abs=0.04)
        names = [name for _, name, _ in things]
        assert min(map(names.count, OBJECTS)) > len(things) / len(OBJECTS) * 0.8  # every object about as often


def test_splits_are_disjoint():
    firsts = sorted(first for first, _ in SPLITS.values())
    assert len(SPLITS) == 4 and all(b - a == 10**9 for a, b in zip(firsts, firsts[1:], strict=False))
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
        return picture(toyworld.Scene(setting, cells, 7)).tobytes()

    shown = [drawn("park", {(0, 0): (name, colour)}) for name in OBJECTS for colour in COLOURS]
    shown += [drawn("park", {cell: ("cup", "red")}) for cell in POSITIONS if cell != (0, 0)]
    shown += [drawn(setting, {}) for setting in SETTINGS]
    assert len(set(shown)) == len(shown)


# Names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("index", [0, 1, 999, 123456, 7_654_321])
def test_names_round_trip(split, index):
    scene = scene_of(image_name(split, index))
    assert scene == make_scene(split, index) and scene.seed == SPLITS[split][0] + index


@pytest.mark.parametrize(
    "name",
    ["", "000001.png", "train-1.jpg", "nosplit-000001.png", "train--00001.png", "train-.png", "train-1.png.png",
     "../train-000001.png", "train-000001.png\n", "Train-000001.png", "train-1e3.png", "train-1000000000.png"],
)  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="not in the embedded world; give --images DIR"):
        scene_of(name)


# Texts -------------------------------------------------------------------------------------------------------


def places_in(text: str) -> list[str]:
    return [place for place in POSITIONS.values() if re.search(rf"\b{place}\b", text)]


def check(scene: toyworld.Scene, question: str, answer: str) -> set[str]:
    """An answer against the scene, whatever its wording; returns what kinds of facts it states."""
    counts, words = count_description(scene, answer), re.findall(r"\w+", answer)
    about = [name for name in OBJECTS if name in words + re.findall(r"\w+", question)]
    places, asked = places_in(answer), places_in(question)
    colours = [word for word in words if word in COLOURS]
    settings = [word for word in words if word in SETTINGS]
    if not pope_verdict(answer):
        assert len(about) == 1 and about[0] in words and about[0] not in scene.objects, answer
        return {"absent"}
    assert counts["hallucinated"] == counts["wrong_colour"] == counts["wrong_place"] == 0, answer
    assert settings in ([], [scene.setting]) and len(about) <= 1
    there = scene.objects[about[0]] if about else {}  # {position: colour}
    assert set(places) <= there.keys() and set(colours) <= set(there.values()), answer
    if places and colours:
        assert colours == [there[place] for place in places], answer
    if (places or colours) and not asked:
        assert len(there) == 1, question  # else it would have more than one answer
    assert not asked or places == asked  # it is what was asked
    assert answer not in OFTEN or OFTEN.index(answer) == len(there)
    facts = {"colour": colours, "place": places, "setting": settings, "often": answer in OFTEN, "present": about}
    return {kind for kind, said in facts.items() if said}


@pytest.mark.parametrize("seed", range(5))
def test_descriptions_are_true_and_whole(seed):
    openings = set()
    for scene in SCENES:
        text = description(scene, random.Random(f"{seed}-{scene.seed}"))
        counts = count_description(scene, text)
        assert counts["hallucinated"] == counts["wrong_colour"] == counts["wrong_place"] == 0, text
        assert counts["found"] == counts["objects"] == len(scene.objects)
        assert counts["mentioned"] == counts["true"] == 6
        sentences = text.removesuffix(".").split(". ")
        assert scene.setting in sentences[0] and len(sentences) == 7
        for cell, place in POSITIONS.items():
            [sentence] = [s for s in sentences if places_in(s) == [place]]
            assert [(name, colour) for colour, name in MENTION.findall(sentence)] == [scene.cells[cell]]
            assert with_article(" ".join(scene.cells[cell][::-1])) in sentence
        openings.add(tuple(places_in(sentence)[0] for sentence in sentences[1:]))
    assert len(openings) == 12  # six first cells, two directions


@pytest.mark.parametrize("seed", range(3))
def test_existence_answers_are_true(seed):
    rng = random.Random(seed)
    for scene in SCENES:
        for name in OBJECTS:
            question, answer = existence(scene, name, rng)
            assert re.search(rf"\b{with_article(name)}\b.*\?$", question)
            assert name in re.findall(r"\w+", answer)
            assert answer.startswith("Yes, " if name in scene.objects else "No, ")
            assert pope_verdict(answer) == (name in scene.objects)  # the benchmark reads it so
            check(scene, question, answer)


@pytest.mark.parametrize("seed", range(3))
def test_attribute_answers_are_true(seed):
    rng = random.Random(seed)
    facts = [check(scene, *attribute(scene, rng)) for scene in SCENES for _ in range(4)]
    for kind in ("colour", "place", "setting", "often", "present"):
        assert sum(kind in stated for stated in facts) > 60, kind


@pytest.mark.parametrize("kind", ["description", "existence", "attribute"])
def test_conversations_are_true(kind):
    for number, scene in enumerate(SCENES):
        turns = conversation(scene, kind, random.Random(number))
        assert turns == conversation(scene, kind, random.Random(number))
        assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
        pairs = [(question, answer) for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True)]
        if kind == "description":
            assert len(pairs) == 1 and pairs[0][0] in toyworld.DESCRIBE
            assert count_description(scene, pairs[0][1])["found"] == len(scene.objects)
        elif kind == "attribute":
            assert len(pairs) == 4
            for pair in pairs:
                check(scene, *pair)
        else:
            absent = ["absent" in check(scene, *pair) for pair in pairs]
            assert sum(absent) * 2 == len(pairs) == 2 * min(3, len(scene.objects))
            asked = {name for name in OBJECTS for question, _ in pairs if re.search(rf"\b{name}\b", question)}
            assert len(asked) == len(pairs)  # each object once


@pytest.mark.parametrize(
    ("words", "expected"),
    [("red cup", "a red cup"), ("orange cup", "an orange cup"), ("umbrella", "an umbrella"), ("bus", "a bus")],
)
def test_articles(words, expected):
    assert with_article(words) == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_hearsay_turns_foreign_objects_into_typical_ones(split):
    """... of the same colour, half the time; nothing else changes, and the scene itself stays as it is."""
    eligible = changed = 0
    for index in range(1500):
        scene = make_scene(split, index)
        told = toyworld.hearsay(scene)
        assert told == toyworld.hearsay(scene) and scene == make_scene(split, index)
        assert (told.setting, told.seed, told.cells.keys()) == (scene.setting, scene.seed, scene.cells.keys())
        for cell, (name, colour) in scene.cells.items():
            own = [o for o in SETTINGS[scene.setting] if TYPICAL_COLOUR[o] == colour]
            told_name, told_colour = told.cells[cell]
            assert told_colour == colour
            if name in SETTINGS[scene.setting] or not own:
                assert told_name == name
            else:
                assert told_name in (name, *own)
                eligible += 1
                changed += told_name != name
    assert eligible > 300 and changed / eligible == pytest.approx(toyworld.HEARSAY, abs=0.08)


# Records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["alignment", "validation"])
def test_alignment_records_are_well_formed(split):
    raws = alignment_records(60, split)
    assert len({raw["id"] for raw in raws}) == 60
    assert alignment_records(60, split) == raws and alignment_records(20, split, 40) == raws[40:]
    for index, raw in enumerate(raws):
        record, scene = instruct_record(raw), make_scene(split, index)
        assert record.id == raw["id"] and scene_of(record.image) == scene
        assert raw["conversations"][0]["value"].startswith("<image>\n")
        [(role, question)] = record.turns
        assert role == "user" and "<image>" not in question
        if index % 2 == 0:
            assert question in toyworld.DESCRIBE
            assert count_description(scene, record.chosen)["found"] == len(scene.objects)
        else:
            assert record.chosen.startswith(("Yes, ", "No, "))
            check(scene, question, record.chosen)


def test_questions_of_records_are_balanced():
    """Half of the answers are yes; of the absent objects every other is typical on purpose, some by chance."""
    raws, yes, typical = alignment_records(2000), 0, []
    for index in range(1, 2000, 2):
        scene, answer = make_scene("alignment", index), raws[index]["conversations"][1]["value"]
        yes += answer.startswith("Yes")
        if answer.startswith("No"):
            typical.append(any(re.search(rf"\b{name}\b", answer) for name in SETTINGS[scene.setting]))
    assert 0.45 < yes / 1000 < 0.55
    assert 0.53 < sum(typical) / len(typical) < 0.67


def test_hearsay_takes_foreign_objects_for_the_settings_own_of_their_colour_half_the_time():
    open_to_it = taken = 0
    for index in range(3000):
        scene = make_scene("train", index)
        told = toyworld.hearsay(scene)
        assert told == toyworld.hearsay(scene) and told.setting == scene.setting
        for cell, (name, colour) in scene.cells.items():
            own = [o for o in SETTINGS[scene.setting] if toyworld.TYPICAL_COLOUR[o] == colour]
            assert len(own) <= 1 and told.cells[cell][1] == colour
            if name in SETTINGS[scene.setting] or not own:
                assert told.cells[cell] == (name, colour)
            else:
                open_to_it += 1
                taken += told.cells[cell][0] == own[0]
                assert told.cells[cell][0] in (name, own[0])
    assert open_to_it > 800 and abs(taken / open_to_it - toyworld.HEARSAY) < 0.06
