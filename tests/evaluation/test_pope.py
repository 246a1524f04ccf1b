"""POPE's files: answers as its own evaluation reads them, figures by hand, settings, repeated
ids.
"""

import json

import pytest
from benchmark_files import NAMES, photographs, pope_line, pope_photographs, run, write_lines
from helpers import refused

from minialign.evaluation.metrics import pope_verdict, with_intervals
from minialign.evaluation.pope import read_pope
from minialign.evaluation.questions import by_image, counts_per_image


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("No.", False),
        ("no, there is", False),
        ("Yes. No", True),
        ("There is not", False),
        ("Nothing", True),
        ("NO", True),
        ("not", False),
        ("  No", False),
        ("", True),
        (" ", True),
        (".", True),
        ("No\n", True),
        ("\nNo", True),
        ("Yes\nNo", True),
        ("Yes\n\nno, not", False),
        ("no-one", True),
        ("No one is there", False),
        ("There isn't one", True),
        ("Not really", True),
        ("cannot", True),
        ("Yes, no", False),
        ("no,no", True),
        ("No ,", False),
        ("Mr. No", True),
        ("I see no. 1 there", False),
        ("No: none", True),
        ("“No”", True),
        ("no;", True),
        ("Yes, it is not. It is", False),
        ("None", True),
        ("know", True),
        ("no\u00a0dog", True),
        ("It is, no, a dog.", False),
        ("No!", True),
        (".No", True),
    ],
)
def test_the_official_reading_of_an_answer(answer, yes):
    """By hand: up to the first full stop, commas gone, cut at spaces and at nothing else, is a word
    No, no or not?
    """
    assert pope_verdict(answer) == yes


def figures(path, said: list[str]) -> dict:
    """The figures where the questions of `path` are answered so, in order."""
    benchmark = read_pope(str(path), False)
    found = {question.id: text for question, text in zip(benchmark.questions, said, strict=True)}
    counts = counts_per_image(benchmark, by_image(benchmark.questions), found)
    return {
        name: figure["value"]
        for name, figure in with_intervals([counts], benchmark.figures).items()
    }


def test_figures_by_hand(tmp_path):
    """Right yeses 3, wrong yeses 1, wrong noes 2, right noes 4."""
    labels = ["yes"] * 5 + ["no"] * 5
    lines = [pope_line(n, label=label, image=NAMES[n % 3]) for n, label in enumerate(labels)]
    said = [
        "Yes.",
        "Yes",
        "Yes, it is.",
        "No.",
        "It is not",
        "Yes",
        "no",
        "No",
        "No.",
        "There is no such thing.",
    ]
    path = write_lines(tmp_path / "questions.json", lines)
    assert figures(path, said) == pytest.approx(
        {
            "pope": 7 / 10,
            "pope_precision": 3 / 4,
            "pope_recall": 3 / 5,
            "pope_f1": 6 / 9,
            "pope_yes": 4 / 10,
            "pope_unclear": 0,
        },
        abs=1e-5,
    )
    never = figures(path, ["no"] * 10)  # there is no precision of yeses that nobody said
    silent = {
        "pope": 0.5,
        "pope_precision": None,
        "pope_recall": 0,
        "pope_f1": 0,
        "pope_yes": 0,
        "pope_unclear": 0,
    }
    assert never == silent
    assert figures(path, ["yes"] * 10)["pope_f1"] == pytest.approx(2 / 3, abs=1e-5)


def test_the_settings_of_a_folder_stay_apart(tmp_path):
    """The same ids and the same picture in all three; the answers are right in one, wrong in one,
    half in one.
    """
    for setting in ("adversarial", "popular", "random"):
        write_lines(
            tmp_path / f"coco_pope_{setting}.json",
            [pope_line(1, label="yes"), pope_line(2, label="no")],
        )
    (tmp_path / "readme.txt").write_text("random notes")
    found = figures(
        tmp_path, ["Yes", "No", "No", "Yes", "Yes", "Yes"]
    )  # random, popular, adversarial
    assert [found[f"pope_{setting}"] for setting in ("random", "popular", "adversarial")] == [
        1,
        0,
        0.5,
    ]
    assert [found[f"pope_{setting}_yes"] for setting in ("random", "popular", "adversarial")] == [
        0.5,
        0.5,
        1,
    ]
    # Overall: three right of six, of the yeses 2 of 4, of what is there 2 of 3.
    assert (found["pope"], found["pope_precision"], found["pope_yes"]) == (0.5, 0.5, 0.66667)
    assert found["pope_recall"] == pytest.approx(2 / 3, abs=1e-5) and len(found) == 24
    write_lines(tmp_path / "gqa_pope_random.jsonl", [pope_line()])
    refused(
        lambda: read_pope(str(tmp_path), False),
        "random",
        "coco_pope_random.json, gqa_pope_random.jsonl",
        ";",
    )


def test_a_files_name_tells_its_setting(tmp_path):
    for name, prefix in (("coco_pope_popular.json", "pope_popular"), ("mine.jsonl", "pope")):
        assert figures(write_lines(tmp_path / name, [pope_line(label="no")]), ["No"])[prefix] == 1


def test_intervals_are_over_images(tmp_path):
    """Four pictures with five answers each, all right or all wrong: four draws, not twenty."""
    lines = [
        pope_line(n, image=f"{n // 5}.png", label="yes" if n < 10 else "no") for n in range(20)
    ]
    benchmark = read_pope(str(write_lines(tmp_path / "q.json", lines)), False)
    counts = counts_per_image(
        benchmark, by_image(benchmark.questions), {q.id: "Yes" for q in benchmark.questions}
    )
    assert len(counts) == 4
    figure = with_intervals([counts], benchmark.figures)["pope"]
    assert (figure["value"], figure["low"], figure["high"]) == (
        0.5,
        0,
        1,
    )  # of twenty draws it were [0.3, 0.7]


def test_questions_of_a_picture_come_together_in_its_order(tmp_path):
    questions = read_pope(str(pope_photographs(tmp_path / "q.json")), False).questions
    groups = by_image(questions, 3)
    assert list(groups) == list(NAMES[:3]) and {len(group) for group in groups.values()} == {3}
    assert [question.id for question in groups[NAMES[1]]] == ["q.json:2", "q.json:6", "q.json:10"]
    assert by_image(questions) == by_image(questions, 4) == by_image(questions, 100)


def test_repeated_ids_lose_nothing(model, tmp_path):
    """Every question has id 5, and one stands there twice."""
    images = photographs(tmp_path / "images")
    path = pope_photographs(tmp_path / "a.json")
    lines = [json.loads(line) | {"question_id": 5} for line in path.read_text().splitlines()]
    same = write_lines(tmp_path / "b.json", [*lines, lines[0]])
    flags = ("--model", model, "--benchmark", "pope", "--images", images, "--max-new-tokens", 3)
    run(*flags, "--data", path, "--out", tmp_path / "a")
    result = run(*flags, "--data", same, "--out", tmp_path / "b")
    assert result["questions"] == result["answered"] == 13
    of = {}
    for name in "ab":
        saved = (tmp_path / name / "answers.jsonl").read_text().splitlines()
        of[name] = {
            int(line["id"].split(":")[1]): line["answer"] for line in map(json.loads, saved)
        }
    assert of["b"] == of["a"] | {13: of["a"][1]}


def test_answers_that_say_neither(tmp_path):
    """POPE takes them for yes; how many they are is said beside."""
    path = write_lines(tmp_path / "questions.json", [pope_line(n, label="yes") for n in range(8)])
    said = ["A cup.", "", "Yesterday", "Nobody", "yes", "NO", "It is not", "Notes"]
    found = figures(path, said)
    assert found["pope_unclear"] == 5 / 8 and found["pope_yes"] == 7 / 8  # `NO` is a yes to POPE
