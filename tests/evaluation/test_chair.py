"""CHAIR: the objects that a text names, by awkward sentences and by every plural; scores by
hand.
"""

import json

import pytest
from benchmark_files import captions, coco
from coco_words import DOUBLE, LINES, PLURALS

from minialign.evaluation.chair import ObjectWords, count_caption, read_chair, read_synonyms
from minialign.evaluation.metrics import with_intervals
from minialign.evaluation.questions import by_image, counts_per_image


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """What is read from a file as long as CHAIR's own."""
    path = tmp_path_factory.mktemp("words") / "synonyms.txt"
    path.write_text("\r\n".join(LINES), newline="")
    return read_synonyms(str(path))


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("A man and two women with their children.", "person person person"),
        ("PEOPLE, people; a Person!", "person person person"),
        ("A baseball player stands at home plate.", "person"),
        ("A train track without a train", "train"),
        ("The train tracks lead away.", ""),
        ("a baby elephant and an adult bear", "elephant bear"),
        ("a baby and an elephant", "person elephant"),  # a baby is a person where no animal follows
        ("Baby elephants with adult elephants", "elephant elephant"),
        ("a passenger train, a passenger jet, a passenger", "train airplane person"),
        ("He wears a bow tie and a tie.", "tie tie"),
        ("a toilet seat", "toilet"),
        ("The seat of the toilet is up.", "toilet"),
        (
            "a toilet beside a chair and some seats",
            "toilet chair",
        ),  # seats are dropped, a chair is not
        ("The seat is empty.", "chair"),
        ("A hot dog, not a dog.", "hot dog dog"),
        ("hot dogs and dogs", "hot dog dog"),
        ("a teddy bear with bears", "teddy bear bear"),
        ("a stop sign at the traffic lights", "stop sign traffic light"),
        ("wine glasses, glasses and glass", "wine glass"),
        ("A tennis racket. Tennis rackets.", "tennis racket tennis racket"),
        ("sports balls and a ball", "sports ball sports ball"),
        ("two cell phones, a mobile phone, an iPhone", "cell phone cell phone cell phone"),
        ("a hair drier", "hair drier"),
        ("knives, forks and spoons", "knife fork spoon"),
        ("A knife and a pair of scissors", "knife scissors"),
        ("buses by the bus stop", "bus bus"),
        ("sheep and a sheep, geese, mice and oxen", "sheep sheep bird mouse cow"),
        ("on skis, two skiers ski", "skis person skis"),
        ("blue skies", ""),
        ("It takes care of its cares; a carpet, a scar, a cartoon", ""),
        ("The man's dog's bowl", "person dog bowl"),
        ("a cat/dog", "cat dog"),
        ("a cat-like cow", "cow"),
        ("oven.Then a sink", "oven sink"),
        ("stove top oven", "oven"),
        ("collies, ponies, puppies, doggies", "dog horse dog dog"),
        ("wolves and leaves and gloves", ""),
        ("a dining table", "dining table"),
        ("dining\n\ntable, desk", "dining table dining table"),
        ("a laptop computer on the desk", "laptop dining table"),
        ("baseball bats and a baseball glove", "baseball bat baseball glove"),
        ("A café in the naïve style 🐕", ""),
        ("", ""),
        ("...", ""),
        ("</s><image>", ""),
    ],
)
def test_the_objects_of_a_text(words, text, objects):
    assert " ".join(words.objects(text)) == objects


def test_every_name_and_every_plural(words):
    """The plurals are formed by hand, or by the grammar's rule."""
    assert len(LINES) == 80
    names = [(name.strip(), line.split(",")[0]) for line in LINES for name in line.split(",")]
    assert len(names) > 250
    for name, thing in names:
        first, last = name.rpartition(" ")[0], name.rpartition(" ")[2]
        many = f"{first} {PLURALS.get(last, plural(last))}".strip()
        for text in (name, many, f"The {many}.", f"one {name}, {many.upper()}"):
            assert set(words.objects(text)) == {thing}, (text, thing)
        assert words.objects(f"{name} and {many}") == [thing, thing], name


def plural(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


@pytest.mark.parametrize(("name", "objects"), DOUBLE.items())
def test_words_that_are_something_else_together(words, name, objects):
    assert words.objects(f"There is a {name} here.") == objects


def test_the_longest_name_goes_first():
    kitchen = ObjectWords.of([["oven", "stove top oven"], ["hob", "stove top"], ["top"]])
    assert kitchen.objects("stove top ovens, stove tops, tops, a stove") == ["oven", "hob", "top"]


THREE = {1: "a.jpg", 2: "b.jpg", 3: "c.jpg"}


def figures(tmp_path, said: dict[str, str], **changes) -> dict:
    """Figures where image a is a cat and a dog, b a person (by its caption), c nothing."""
    (tmp_path / "i.json").write_text(
        json.dumps(coco(THREE, [(1, "cat"), (1, "cat"), (9, "cow")], ["cat", "cow"]))
    )
    lines = [
        (1, "A puppy."),
        (1, "A cat looks."),
        (2, "Two women."),
        (3, "The sea."),
        (9, "A cow."),
    ]
    (tmp_path / "c.json").write_text(json.dumps(captions(lines)))
    (tmp_path / "s.txt").write_text("\n".join(LINES))
    files = (str(tmp_path / name) for name in ("i.json", "c.json", "s.txt"))
    benchmark = read_chair(*files, "What is there?", 0, False)
    assert {question.text for question in benchmark.questions} == {"What is there?"}
    found = {question.id: said[question.image] for question in benchmark.questions}
    counts = counts_per_image(benchmark, by_image(benchmark.questions), found)
    return {
        name: figure["value"]
        for name, figure in with_intervals([counts], benchmark.figures).items()
    }


def test_scores_by_hand(tmp_path):
    said = {
        # 4 mentions: cow and couch are not there; the dog is missed
        "a.jpg": "A kitten, a cat, and a cow on a sofa.",
        "b.jpg": "A man. Another man.",  # 2 mentions, both there; 1 object of 1
        "c.jpg": "A boat, a boat.",  # 2 mentions, neither there; no object
    }
    assert figures(tmp_path, said) == pytest.approx(
        {
            "chair_i": 4 / 8,
            "chair_s": 2 / 3,
            "recall": 2 / 3,
            "length": (10 + 4 + 4) / 3,
        },
        abs=1e-5,
    )
    silent = figures(tmp_path, dict.fromkeys(said, "Nothing."))
    assert silent == {"chair_i": None, "chair_s": 0, "recall": 0, "length": 1}


def test_one_caption_by_hand():
    counts = count_caption(["dog", "cat", "dog", "cow"], {"dog", "person"})
    assert counts == {
        "images": 1,
        "mentioned": 4,
        "hallucinated": 2,
        "hallucinating": True,
        "objects": 2,
        "found": 1,
    }


def test_the_subset_is_random_seeded_and_grows(tmp_path):
    files = {number: f"{number}.jpg" for number in range(200)}
    (tmp_path / "i.json").write_text(json.dumps(coco(files, [(0, "cat")], ["cat"])))
    (tmp_path / "c.json").write_text(json.dumps(captions([(0, "A cat.")])))
    (tmp_path / "s.txt").write_text("cat")
    paths = [str(tmp_path / name) for name in ("i.json", "c.json", "s.txt")]

    def subset(limit: int, seed: int) -> list[str]:
        return list(by_image(read_chair(*paths, "Q", seed, False).questions, limit))

    assert subset(50, 0) == subset(50, 0) == subset(100, 0)[:50] != subset(50, 1)
    drawn = [int(name.removesuffix(".jpg")) for name in subset(50, 0)]
    assert (
        len(set(drawn)) == 50 and 60 < sum(drawn) / 50 < 140
    )  # neither the first nor the last fifty
    assert drawn != sorted(drawn)
