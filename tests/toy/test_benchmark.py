"""The toy benchmark against figures counted by hand."""

import random
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from helpers import plain_greedy, random_toy, toy_assistant, toy_model

from minialign.evaluation.metrics import (
    DIRECT_QUESTIONS,
    in_words,
    print_table,
    with_intervals,
)
from minialign.toy import benchmark, world
from minialign.toy.benchmark import (
    ToyBenchmark,
    count_description,
    count_direct,
    count_pope,
    direct_questions,
    pope_questions,
    popular_objects,
)
from minialign.toy.drawing import OBJECTS, SETTINGS

NW, N, NE, SW, S, SE = world.POSITIONS.values()
KITCHEN = world.Scene("kitchen", {(0, 0): ("cup", "red"), (1, 2): ("dog", "black")}, 0)
POPE = ("random", "popular", "adversarial")
NOTHING = {f"{setting}_{part}": 0 for setting in POPE for part in ("tp", "fp", "fn", "tn")}
TEXTS = [
    # A kettle that is not there (typical), the cup's colour wrong, the dog's place wrong.
    f"This is a kitchen. The {NW} cup is blue. The {N} kettle is green. "
    f"The {SW} dog is black. The {SE} is empty.",
    # A crab that is not there, twice (not typical); the cup twice; the dog is not mentioned.
    f"The {NW} cup is red. The {NE} crab is orange. A crab. A cup.",
    "The picture shows nothing.",
]


# ---------------------------------------------------------------- descriptions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            TEXTS[0],
            {
                "mentioned": 3,
                "hallucinated": 1,
                "typical": 1,
                "true": 2,
                "wrong_colour": 1,
                "wrong_place": 1,
                "hallucinating": 1,
                "found": 2,
            },
        ),
        (
            TEXTS[1],
            {
                "mentioned": 4,
                "hallucinated": 2,
                "typical": 0,
                "true": 2,
                "wrong_colour": 0,
                "wrong_place": 0,
                "hallucinating": 1,
                "found": 1,
            },
        ),
        (
            TEXTS[2],
            {
                "length": 4,
                "mentioned": 0,
                "hallucinated": 0,
                "typical": 0,
                "true": 0,
                "wrong_colour": 0,
                "wrong_place": 0,
                "hallucinating": 0,
                "found": 0,
            },
        ),
        ("", {"length": 0, "mentioned": 0, "hallucinated": 0, "hallucinating": 0, "found": 0}),
        # No colour or place said: neither can be wrong. A true object twice is found once.
        (
            "A cup. The cup.",
            {"length": 4, "mentioned": 2, "true": 2, "coloured": 0, "placed": 0, "found": 1},
        ),
        # Whole words only: no tree in a street, no pan in a panda, no car in a scar; orange alone
        # is no object.
        ("This is a street. A panda with a scar is orange.", {"mentioned": 0, "hallucinating": 0}),
        # What is denied is not said to be there.
        (
            f"There is no cup. The {SE} dog is black. There is no red kettle.",
            {"mentioned": 1, "true": 1, "hallucinated": 0, "found": 1, "length": 14},
        ),
        # A place belongs to its own sentence.
        (f"The {SW} is empty. The cup is red.", {"wrong_place": 0, "true": 1}),
    ],
)
def test_counts_by_hand(text, expected):
    counts = count_description(KITCHEN, text)
    assert counts["images"] == 1 and counts["objects"] == 2
    assert {name: counts[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "wrong_colour", "wrong_place"),
    [
        (f"The {NW} cup is red. The {N} cup is blue.", 0, 0),
        (f"The {N} cup is red.", 1, 0),  # a cup, but that one is blue
        ("The cup is red. The cup is blue. The cup.", 0, 0),  # no place: one of them has the colour
        ("The cup is green.", 1, 0),
        (f"The {SW} cup is red.", 0, 1),
        (f"The {SW} cup is green.", 1, 1),
    ],
)
def test_an_object_may_be_there_twice(text, wrong_colour, wrong_place):
    scene = world.Scene("kitchen", {(0, 0): ("cup", "red"), (0, 1): ("cup", "blue")}, 0)
    counts = count_description(scene, text)
    assert (counts["wrong_colour"], counts["wrong_place"]) == (wrong_colour, wrong_place)
    assert counts["objects"] == counts["found"] == 1 and counts["hallucinated"] == 0
    assert counts["mentioned"] == counts["true"] == text.count("cup")


@pytest.mark.parametrize("seed", range(6))
def test_direct_questions_have_one_true_answer(seed):
    """One of each kind, about one cell; the answer is read off the scene by hand."""
    scene = world.make_scene("validation", seed)
    asked = direct_questions(scene)
    assert set(asked) == set(DIRECT_QUESTIONS)
    position, name, colour = re.fullmatch(r"The (\w+) (\w+) is (\w+)\.", asked["cell"][1]).groups()
    [cell] = [cell for cell, place in world.POSITIONS.items() if place == position]
    assert scene.cells[cell] == (name, colour) and asked["cell"][0] == f"What is in the {position}?"
    assert asked["colour"] == (f"What colour is the {name}?", f"The {name} is {colour}.")
    assert asked["position"] == (f"Where is the {name}?", f"The {name} is in the {position}.")
    assert asked["count"][1] == "Once." and name in asked["count"][0]
    assert asked["setting"] == ("What place is this?", f"This is a {scene.setting}.")
    assert direct_questions(scene) == asked


def test_direct_answers_count_word_for_word():
    """A wrong colour is wrong, and so is another form; figures are shares of what was asked."""
    asked = direct_questions(world.make_scene("validation", 3))
    answers = {kind: truth for kind, (_, truth) in asked.items()}
    answers |= {"colour": "The cup is mauve.", "count": "once"}
    counts = count_direct(asked, answers)
    assert [counts[f"right_{kind}"] for kind in DIRECT_QUESTIONS] == [1, 0, 1, 0, 1]
    assert all(counts[f"asked_{kind}"] == 1 for kind in DIRECT_QUESTIONS)
    figures = with_intervals([[{**NOTHING, **counts}]])
    assert figures["ask"]["value"] == 0.6 and figures["ask_colour"]["value"] == 0
    # Of a scene in which everything is there twice colour and place are not asked.
    cells = {cell: ("cup", "red") for cell in world.CELLS}
    twice = direct_questions(world.Scene("kitchen", cells, 0))
    assert set(twice) == {"cell", "count", "setting"} and twice["count"][1] == "Six times."


def test_metrics_by_hand():
    counts = [{**count_description(KITCHEN, text), **NOTHING} for text in TEXTS]
    values = {name: figure["value"] for name, figure in with_intervals([counts]).items()}
    assert values["chair_i"] == pytest.approx(3 / 7, abs=1e-5)
    assert values["chair_s"] == pytest.approx(2 / 3, abs=1e-5)
    assert values["recall"] == pytest.approx(3 / 6, abs=1e-5)
    assert values["typical_share"] == pytest.approx(1 / 3, abs=1e-5)
    assert values["colour_errors"] == pytest.approx(1 / 3, abs=1e-5)
    assert values["position_errors"] == pytest.approx(1 / 3, abs=1e-5)
    counts = [
        {**count_description(KITCHEN, text), **NOTHING} for text in ("The cup is red.", TEXTS[2])
    ]
    assert with_intervals([counts])["length"]["value"] == pytest.approx((4 + 4) / 2, abs=1e-5)


def test_what_nobody_mentions_is_not_measured(capsys):
    """No object is mentioned: there is no share of hallucinated ones, least of all a perfect
    one.
    """
    figures = with_intervals([[{**count_description(KITCHEN, TEXTS[2]), **NOTHING}] * 3])
    assert all(
        set(figures[name].values()) == {None}
        for name in ("chair_i", "typical_share", "colour_errors")
    )
    assert figures["chair_s"] == {"value": 0, "low": 0, "high": 0}
    print_table({"run": figures})
    lines = capsys.readouterr().out.splitlines()
    of = {name: next(line for line in lines if line.startswith(in_words(name))) for name in figures}
    assert "not measured" in of["chair_i"] and "0.000 [0.000, 0.000]" in of["chair_s"]


def test_a_resample_without_objects_does_not_spoil_the_interval():
    said = {**count_description(KITCHEN, TEXTS[0]), **NOTHING}
    silent = {**count_description(KITCHEN, TEXTS[2]), **NOTHING}
    assert len(set(with_intervals([[said, silent]])["chair_i"].values())) == 1


# ---------------------------------------------------------------- POPE


def test_pope_by_hand():
    """Present: yes, no, yes. Random: no, no, yes. Popular: no, no, no. Adversarial: yes, yes,
    no.
    """
    names = {
        "present": ["cup", "dog", "car"],
        "random": ["bus", "pan", "fork"],
        "popular": ["boat", "ball", "crab"],
        "adversarial": ["kettle", "pan", "fork"],
    }
    said = {"present": "yny", "random": "nny", "popular": "nnn", "adversarial": "yyn"}
    text = {"y": "Yes, there is.", "n": "No, there is no such thing."}
    answers = {
        (kind, name): text[c]
        for kind in names
        for name, c in zip(names[kind], said[kind], strict=True)
    }
    counts = count_pope(names, answers)
    expected = {"random": (2, 1, 1, 2), "popular": (2, 0, 1, 3), "adversarial": (2, 2, 1, 1)}
    for setting, (tp, fp, fn, tn) in expected.items():
        assert [counts[f"{setting}_{part}"] for part in ("tp", "fp", "fn", "tn")] == [
            tp,
            fp,
            fn,
            tn,
        ]
    counts = {**count_description(KITCHEN, ""), **counts}
    values = {name: figure["value"] for name, figure in with_intervals([[counts] * 2]).items()}
    assert [values[f"pope_{s}"] for s in expected] == pytest.approx([4 / 6, 5 / 6, 3 / 6], abs=1e-5)
    assert [values[f"pope_{s}_f1"] for s in expected] == pytest.approx(
        [4 / 6, 4 / 5, 4 / 7], abs=1e-5
    )
    assert [values[f"pope_{s}_yes"] for s in expected] == pytest.approx(
        [3 / 6, 2 / 6, 4 / 6], abs=1e-5
    )


@pytest.mark.parametrize("split", ["test", "validation", "train"])
def test_pope_questions(split):
    exhausted = 0
    for index in range(150):
        scene = world.make_scene(split, index)
        questions = pope_questions(scene)
        assert questions == pope_questions(scene)
        assert list(questions) == ["present", "random", "popular", "adversarial"]
        present, absent = questions["present"], [o for o in OBJECTS if o not in scene.objects]
        assert set(present) <= scene.objects.keys() and len(set(present)) == len(present) == min(
            3, len(scene.objects)
        )
        for kind in POPE:
            assert len(set(questions[kind])) == len(questions[kind]) == len(present)
            assert set(questions[kind]) <= set(absent)
        typical = [o for o in absent if o in SETTINGS[scene.setting]]
        n = min(len(typical), len(present))
        assert set(questions["adversarial"][:n]) <= set(
            typical
        )  # typical ones first, as many as there are
        exhausted += n < len(present)
        ranks = [popular_objects().index(name) for name in questions["popular"]]
        others = [
            popular_objects().index(name) for name in absent if name not in questions["popular"]
        ]
        assert ranks == sorted(ranks) and max(ranks) < min(
            others
        )  # the most frequent of the absent
    assert 0 < exhausted < 150  # both cases were met


def test_popular_objects_are_those_of_the_training_split():
    things = [name for i in range(2000) for name in world.make_scene("train", i).objects]
    counts = [things.count(name) for name in popular_objects()]
    assert sorted(popular_objects()) == sorted(OBJECTS)
    assert counts == sorted(counts, reverse=True)


# ---------------------------------------------------------------- the whole benchmark


class Scripted:
    """An assistant without a model: it tells the truth, or the exact opposite.

    A picture is its scene here, and so is all that is made of it.
    """

    model = None

    def __init__(self, truthful: bool):
        self.truthful = truthful
        self.processor = SimpleNamespace(prepare=lambda scene: scene)

    def encode(self, scenes):
        return scenes

    def answers(self, features, scenes, questions, max_new_tokens):
        assert features is scenes and len(scenes) == len(questions)
        return [
            [self.answer(scene, question) for question in asked]
            for scene, asked in zip(scenes, questions, strict=True)
        ]

    def answer(self, scene: world.Scene, question: str) -> str:
        if question == world.DESCRIBE[0]:
            absent = next(name for name in OBJECTS if name not in scene.objects)
            true = world.description(scene, random.Random(0))
            return true if self.truthful else f"A {absent}."
        there = any(re.search(rf"\b{name}\b", question) for name in scene.objects)
        return "Yes, there is." if there == self.truthful else "No, there is not."


@pytest.mark.parametrize(("truthful", "good"), [(True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_the_truth_scores_best_and_its_opposite_worst(truthful, good, batch_size, monkeypatch):
    monkeypatch.setattr(benchmark, "picture", lambda scene: scene)
    monkeypatch.setattr(benchmark, "unsharded", lambda model: nullcontext())
    found = ToyBenchmark("validation", 10, batch_size).run(Scripted(truthful))
    counts = found.counts
    assert len(counts) == 10
    assert [bool(answer.false) for answer in found.answers] == [not truthful] * 6
    figures = with_intervals([counts])
    for name in ("recall", "pope_random", "pope_popular", "pope_adversarial", "pope_random_f1"):
        assert figures[name] == {"value": good, "low": good, "high": good}, name
    for name in ("chair_i", "chair_s"):
        assert figures[name] == {"value": 1 - good, "low": 1 - good, "high": 1 - good}, name


@pytest.mark.parametrize("make", [toy_model, random_toy])
def test_answers_equal_each_question_alone(make):
    """The picture is the trunk, the questions are branches; the plain way asks one by one."""
    assistant = toy_assistant(make())
    questions = [
        ["Is there a cup in the picture?", "What place is this?", "Where is the umbrella?"],
        ["Describe."],
    ]
    scenes = [world.make_scene("validation", i) for i in (0, 1)]
    images = [assistant.processor.prepare(world.picture(scene)) for scene in scenes]
    features = assistant.encode(images)
    answers = assistant.answers(features, images, questions, 12)
    tokenizer = assistant.tokenizer
    for row, (asked, replies) in enumerate(zip(questions, answers, strict=True)):
        assert len(replies) == len(asked)
        for question, reply in zip(asked, replies, strict=True):
            prompt = tokenizer.prompt([("user", question)])
            ids, _ = plain_greedy(assistant.model, prompt, features[row], {tokenizer.eos_id}, 12)
            assert reply == tokenizer.decode(ids)


def test_the_benchmark_does_not_depend_on_the_batch_size():
    runs = [ToyBenchmark("validation", 3, size).run(toy_assistant()) for size in (1, 2)]
    assert runs[0].counts == runs[1].counts and len(runs[0].counts) == 3
    assert [a.text for a in runs[0].answers] == [a.text for a in runs[1].answers]
