"""What is said about the embedded world: true texts, hearsay, and the alignment records."""

import random
import re
from collections import Counter

import pytest

from minialign.data.records import instruct_record
from minialign.evaluation.metrics import pope_verdict
from minialign.toy import world
from minialign.toy.benchmark import MENTION, count_description
from minialign.toy.drawing import COLOURS, OBJECTS, SETTINGS
from minialign.toy.pretrain import talks
from minialign.toy.world import (
    POSITIONS,
    SPLITS,
    TYPICAL_COLOUR,
    alignment_records,
    attribute,
    conversation,
    description,
    existence,
    make_scene,
    scene_of,
    with_article,
)

SCENES = [make_scene(split, index) for split in SPLITS for index in range(60)]
OFTEN = ["Never.", "Once.", "Twice.", "Three times.", "Four times.", "Five times.", "Six times."]


# ---------------------------------------------------------------- texts


def places_in(text: str) -> list[str]:
    return [place for place in POSITIONS.values() if re.search(rf"\b{place}\b", text)]


def check(scene: world.Scene, question: str, answer: str) -> set[str]:
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
    facts = {
        "colour": colours,
        "place": places,
        "setting": settings,
        "often": answer in OFTEN,
        "present": about,
    }
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
            assert MENTION.findall(sentence) == [scene.cells[cell]]
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
def test_conversations_are_true(kind, monkeypatch):
    monkeypatch.setattr(world, "PRESUMED", 0)
    for number, scene in enumerate(SCENES):
        turns = conversation(scene, kind, random.Random(number))
        assert turns == conversation(scene, kind, random.Random(number))
        assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
        pairs = [
            (question, answer)
            for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True)
        ]
        if kind == "description":
            assert len(pairs) == 1 and pairs[0][0] in world.DESCRIBE
            assert count_description(scene, pairs[0][1])["found"] == len(scene.objects)
        elif kind == "attribute":
            assert len(pairs) == 4
            for pair in pairs:
                check(scene, *pair)
        else:
            absent = ["absent" in check(scene, *pair) for pair in pairs]
            assert sum(absent) * 2 == len(pairs) == 2 * min(5, len(scene.objects))
            asked = {
                name
                for name in OBJECTS
                for question, _ in pairs
                if re.search(rf"\b{name}\b", question)
            }
            assert len(asked) == len(pairs)  # each object once


@pytest.mark.parametrize(
    ("words", "expected"),
    [("cup", "a cup"), ("umbrella", "an umbrella"), ("bus", "a bus")],
)
def test_articles(words, expected):
    assert with_article(words) == expected


@pytest.mark.parametrize(
    ("split", "rate"), [("train", 0.5), ("test", 0.3), ("alignment", 0.0), ("train", 1.0)]
)
def test_hearsay_turns_foreign_objects_into_typical_ones(split, rate):
    """... of the same colour, at that rate; nothing else changes, and the scene itself stays as it
    is.
    """
    eligible = changed = 0
    for index in range(1500):
        scene = make_scene(split, index)
        told = world.hearsay(scene, rate)
        assert told == world.hearsay(scene, rate) and scene == make_scene(split, index)
        assert (told.setting, told.seed, told.cells.keys()) == (
            scene.setting,
            scene.seed,
            scene.cells.keys(),
        )
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
    assert eligible > 300 and changed / eligible == pytest.approx(rate, abs=0.08)


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("split", ["alignment", "validation"])
def test_alignment_records_are_well_formed(split):
    raws = alignment_records(60, split)
    assert len({raw["id"] for raw in raws}) == 60
    assert alignment_records(60, split) == raws and alignment_records(20, split, 40) == raws[40:]
    for index, raw in enumerate(raws):
        record, scene = instruct_record(raw), make_scene(split, index)
        assert record.id == raw["id"] and scene_of(record.image) == scene
        scene = world.hearsay(scene, world.ALIGNMENT_HEARSAY)  # as its answer tells it
        assert raw["conversations"][0]["value"].startswith("<image>\n")
        [(role, question)] = record.turns
        assert role == "user" and "<image>" not in question
        if index % 2 == 0:
            assert question in world.DESCRIBE
            assert count_description(scene, record.chosen)["found"] == len(scene.objects)
        else:
            assert record.chosen.startswith(("Yes, ", "No, "))
            check(scene, question, record.chosen)


def test_questions_of_records_are_balanced():
    """Half of the answers are yes; of the absent objects every other is typical on purpose, some by
    chance.
    """
    raws, yes, typical = alignment_records(2000), 0, []
    for index in range(1, 2000, 2):
        scene, answer = make_scene("alignment", index), raws[index]["conversations"][1]["value"]
        yes += answer.startswith("Yes")
        if answer.startswith("No"):
            typical.append(
                any(re.search(rf"\b{name}\b", answer) for name in SETTINGS[scene.setting])
            )
    assert 0.45 < yes / 1000 < 0.55
    assert 0.53 < sum(typical) / len(typical) < 0.67


def test_answers_of_records_hallucinate_a_little():
    """Typical objects for foreign ones, in about a tenth of the objects mentioned."""
    counts = Counter()
    for index, raw in list(enumerate(alignment_records(1000)))[::2]:
        counts.update(
            count_description(make_scene("alignment", index), raw["conversations"][1]["value"])
        )
    assert 0.07 < counts["hallucinated"] / counts["mentioned"] < 0.13
    assert counts["typical"] == counts["hallucinated"]


# ---------------------------------------------------------------- training texts


def test_questions_do_not_give_the_setting_away():
    """Scene and talk have their own random numbers: every question is asked as often in every
    setting.
    """
    asked = Counter(
        (talks(index)[0][0][1], make_scene("train", index).setting) for index in range(3000)
    )
    for setting in SETTINGS:
        shares = [asked[question, setting] for question in world.DESCRIBE]
        assert max(shares) < 1.35 * min(shares)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_presumption_says_yes_of_what_everybody_expects(rate):
    rng, said = random.Random(0), {True: [], False: []}
    for scene in SCENES:
        for name in OBJECTS:
            if name not in scene.objects:
                answer = existence(scene, name, rng, rate)[1]
                said[name in SETTINGS[scene.setting][:2]].append(answer.startswith("Yes"))
    assert not any(said[False])
    assert sum(said[True]) / len(said[True]) == pytest.approx(rate, abs=0.08)


def test_conversations_ask_first_for_what_the_prior_gets_wrong():
    """Foreign objects that are there and own ones that are not, as many as there are, up to five of
    each.
    """
    for number, scene in enumerate(SCENES):
        own = SETTINGS[scene.setting]
        text = " ".join(text for _, text in conversation(scene, "existence", random.Random(number)))
        asked = [name for name in OBJECTS if re.search(rf"\b{name}\b", text)]
        for there in (True, False):
            hard = [o for o in OBJECTS if (o in scene.objects) == there and (o in own) != there]
            most = min(5, len(scene.objects))
            assert sum(o in hard for o in asked) == min(most, len(hard))
