"""Rule-corrupted pairs: every error is what it is said to be, by parsing both texts against the
scene.
"""

import random
import re
from collections import Counter

from helpers import refused

from minialign.edge import records_of
from minialign.toy.corrupt import WORDS, corrupted, corrupted_pair
from minialign.toy.drawing import COLOURS, OBJECTS, SETTINGS
from minialign.toy.world import (
    POSITIONS,
    TOY_RECORDS,
    Scene,
    alignment_records,
    make_scene,
    scene_of,
)


def pairs(limit: int, seed: int) -> list[dict]:
    """Corrupted pairs, of each message its text."""
    lines = [corrupted_pair(record, seed) for record in records_of("toy", None, limit, 0, False)]
    names = ("prompt", "chosen", "rejected")
    return [line | {name: line[name][0]["content"] for name in names} for line in lines]


PAIRS = pairs(600, 0)
DESCRIPTIONS = [pair for pair in PAIRS if pair["chosen"].startswith("This is")]
ANSWERS = [pair for pair in PAIRS if not pair["chosen"].startswith("This is")]


def sentences(text: str) -> list[tuple[str, str, str]]:
    """(place, object, colour) of every sentence behind the first."""
    first, *rest = text.removesuffix(".").split(". ")
    assert re.fullmatch(r"This is a \w+", first)
    found = [re.fullmatch(r"The (\w+) (\w+) is (\w+)", sentence).groups() for sentence in rest]
    assert all(p in POSITIONS.values() and o in OBJECTS and c in COLOURS for p, o, c in found)
    return found


def changes(pair: dict) -> list[tuple[tuple, tuple]]:
    """The sentences that differ, before and after."""
    both = zip(sentences(pair["chosen"]), sentences(pair["rejected"]), strict=True)
    return [(before, after) for before, after in both if before != after]


def test_an_error_in_a_description_is_one_of_three():
    kinds, numbers = Counter(), Counter()
    for pair in DESCRIPTIONS:
        scene, errors = scene_of(pair["images"][0]), 0
        for before, after in changes(pair):
            place, name, colour = after
            there = scene.objects.get(before[1], {})  # of the object that y+ spoke of
            if name != before[1]:
                assert name in SETTINGS[scene.setting] and name not in scene.objects
            if colour != before[2]:
                assert colour not in there.values()
            if place != before[0]:
                assert place not in there
            assert (
                scene.objects.get(name, {}).get(place) != colour
            )  # whatever has changed, it is wrong
            different = [kind for kind, a, b in zip(WORDS, before, after, strict=True) if a != b]
            kinds.update(different)
            errors += len(different)
        numbers[errors] += 1
        assert pair["chosen"].split(".")[0] == pair["rejected"].split(".")[0]  # the setting stays
    assert set(numbers) == {1, 2} and min(numbers.values()) > 100  # of 300
    assert min(kinds.values()) > 90 and len(kinds) == 3


def test_yes_and_no_are_turned_round():
    for pair in ANSWERS:
        yes, no = sorted((pair["chosen"], pair["rejected"]), reverse=True)
        name = re.fullmatch(r"Yes, there is an? (\w+)\.", yes)[1]
        assert no == f"No, there is no {name}." and name in pair["prompt"]
    assert 100 < sum(pair["rejected"].startswith("Yes") for pair in ANSWERS) < 200  # of 300
    articles = {pair["rejected"] for pair in ANSWERS if "umbrella" in pair["rejected"]}
    assert articles == {"Yes, there is an umbrella.", "No, there is no umbrella."}


def test_as_long_as_the_chosen_one_and_never_the_same():
    assert len(DESCRIPTIONS) == len(ANSWERS) == 300
    for pair in PAIRS:
        assert pair["chosen"] != pair["rejected"]
        assert len(pair["chosen"].split()) == len(pair["rejected"].split())


def test_a_pair_follows_from_seed_and_id():
    few = pairs(20, 0)
    assert few == PAIRS[:20]  # whatever else is made
    other = pairs(20, 1)
    assert [pair["chosen"] for pair in other] == [pair["chosen"] for pair in few] and other != few


def test_an_object_is_swapped_only_where_a_typical_one_is_absent():
    """A kitchen with all its four objects: no word is false enough, colours and places remain."""
    names = (*SETTINGS["kitchen"], "cup", "pan")
    cells = {cell: (name, "red") for cell, name in zip(POSITIONS, names, strict=True)}
    scene = Scene("kitchen", cells, 0)
    answer = "This is a kitchen. The northwest cup is red. The north kettle is red."
    for seed in range(50):
        wrong = corrupted(scene, answer, random.Random(seed))
        assert [name for _, name, _ in sentences(wrong)] == ["cup", "kettle"] and wrong != answer


def test_no_alignment_answer_says_a_number():
    numbers = re.compile(r"\b(never|once|twice|times|one|two|three|four|five|six)\b", re.IGNORECASE)
    answers = [raw["conversations"][1]["value"] for raw in alignment_records(TOY_RECORDS)]
    assert not any(numbers.search(answer) for answer in answers)


def test_an_answer_of_another_world_is_refused():
    scene = make_scene("alignment", 0)
    for answer in ("A cup of coffee on a table.", "", "The lower cup is red."):
        refused(
            lambda text=answer: corrupted(scene, text, random.Random(0)), "embedded world's", ";"
        )
