"""Rule-corrupted pairs: every error is what it is said to be, by parsing both texts against the
scene."""

import json
import random
import re
from collections import Counter

import pytest
from input_files import gives_remedy
from script_runs import read_lines, train

from minialign.cli import parse_config
from minialign.data.record_files import read_records
from minialign.data.records import pair_record
from minialign.sampling.pairs_file import pair_line
from minialign.toy import corrupt
from minialign.toy.corrupt import WORDS, corrupted
from minialign.toy.drawing import COLOURS, OBJECTS, SETTINGS
from minialign.toy.world import (
    POSITIONS,
    TOY_RECORDS,
    Scene,
    alignment_records,
    make_scene,
    scene_of,
)

PAIRS = [pair_line(record, 0) for record in read_records("toy", None, 600, 0)]
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
    few = [pair_line(record, 0) for record in read_records("toy", None, 20, 0)]
    assert few == PAIRS[:20]  # whatever else is made
    other = [pair_line(record, 1) for record in read_records("toy", None, 20, 0)]
    assert [pair["chosen"] for pair in other] == [pair["chosen"] for pair in few] and other != few


def test_an_object_is_swapped_only_where_a_typical_one_is_absent():
    """A kitchen with all its four objects: no word is false enough, colours and places remain."""
    cells = dict(
        zip(
            POSITIONS, [(name, "red") for name in (*SETTINGS["kitchen"], "cup", "pan")], strict=True
        )
    )
    scene, answer = (
        Scene("kitchen", cells, 0),
        "This is a kitchen. The northwest cup is red. The north kettle is red.",
    )
    for seed in range(50):
        wrong = corrupted(scene, answer, random.Random(seed))
        assert [name for _, name, _ in sentences(wrong)] == ["cup", "kettle"] and wrong != answer


def test_no_alignment_answer_says_a_number():
    numbers = re.compile(r"\b(never|once|twice|times|one|two|three|four|five|six)\b", re.IGNORECASE)
    answers = [raw["conversations"][1]["value"] for raw in alignment_records(TOY_RECORDS)]
    assert not any(numbers.search(answer) for answer in answers)


# ---------------------------------------------------------------- the program


def run(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr("sys.argv", ["toycorrupt", *argv])
    corrupt.main(parse_config(corrupt.Config, ""))


def test_program_writes_what_training_reads(model, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "pairs.jsonl"
    run(monkeypatch, "--out", str(path), "--limit", "8")
    assert capsys.readouterr().out == f"{path}: 8 pairs\n"
    found = read_lines(path)
    assert found == PAIRS[:8]
    assert all(list(pair) == ["id", "images", "prompt", "chosen", "rejected"] for pair in found)
    records = [pair_record(json.loads(json.dumps(pair))) for pair in found]
    assert [record.id for record in records] == [raw["id"] for raw in alignment_records(8)]
    assert all(
        scene_of(record.image) == make_scene("alignment", i) for i, record in enumerate(records)
    )
    assert [row["pairs"] for row in train(model, tmp_path / "run", pairs=str(path))] == [4, 4]
    gives_remedy(
        lambda: run(monkeypatch, "--out", str(path), "--limit", "8"),
        f"--out {path}: is there already",
    )
    run(monkeypatch, "--out", str(tmp_path / "again.jsonl"), "--limit", "8")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--out", "."]], ids=" ".join)
def test_wrong_flags(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    gives_remedy(lambda: run(monkeypatch, *flags), f"{flags[0]} {flags[1]}")
    assert list(tmp_path.iterdir()) == []
