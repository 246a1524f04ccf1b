"""`python -m minialign.toy`: pictures and records, rule-corrupted pairs, and what it refuses."""

import json

import pytest
from helpers import refused
from input_files import gives_remedy
from PIL import Image
from script_runs import read_lines, train

from minialign.cli import parse_config
from minialign.data.images import PictureFolder
from minialign.data.records import instruct_record, pair_record
from minialign.edge import records_of
from minialign.toy import __main__ as program
from minialign.toy.benchmark import count_description
from minialign.toy.corrupt import corrupted_pair
from minialign.toy.world import (
    CELLS,
    alignment_records,
    attributes,
    make_scene,
    open_picture,
    scene_of,
)


def run(*argv: object) -> None:
    program.main(parse_config(program.Config, "", [str(word) for word in argv]))


def exported(folder) -> list[dict]:
    """The records; there is one picture for each, and nothing else."""
    records = json.loads((folder / "data.json").read_text())
    files = {path.name for path in folder.iterdir()}
    assert files == {"data.json", *(record["image"] for record in records)}
    return records


def test_export(tmp_path, capsys):
    """Pictures as the model sees them, and records that the parser of LLaVA-Instruct reads."""
    run("--export", tmp_path / "out", "--limit", 5)
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 5 pictures and data.json\n"
    records = exported(tmp_path / "out")
    assert records == alignment_records(5)
    pictures = PictureFolder(str(tmp_path / "out"))
    for raw in records:
        record = instruct_record(raw)
        assert pictures(record.image).tobytes() == open_picture(record.image).tobytes()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_export_of_another_split_from_a_number_on(tmp_path, split):
    run("--export", tmp_path, "--split", split, "--first", 7, "--limit", 3)
    records = exported(tmp_path)
    assert records == alignment_records(3, split, 7)
    assert [record["image"] for record in records] == [f"{split}-00000{n}.png" for n in (7, 8, 9)]


def test_export_of_other_questions_and_of_exact_answers(tmp_path):
    """Kinds in turn; without hearsay every answer is true."""
    run("--export", tmp_path, "--kinds", "attribute,description", "--hearsay", 0, "--limit", 40)
    records = exported(tmp_path)
    assert records == alignment_records(40, kinds=("attribute", "description"), rate=0.0)
    for index, raw in enumerate(records):
        scene, answer = scene_of(raw["image"]), raw["conversations"][1]["value"]
        if index % 2:
            told = count_description(scene, answer)
            assert told["mentioned"] == 6
            assert told["hallucinated"] == told["wrong_colour"] == told["wrong_setting"] == 0
        else:
            every = [attributes(scene, cell).values() for cell in CELLS]
            assert answer in {truth for questions in every for _, truth in questions}
    whole, untrue = alignment_records(200, kinds=("description",)), 0
    for raw in whole:
        untrue += count_description(scene_of(raw["image"]), raw["conversations"][1]["value"])[
            "hallucinated"
        ]
    assert untrue > 20  # hearsay, unless it is asked for none


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kinds", "poems"), "--kinds poems: give some of description, existence, attribute"),
        (("--kinds", ""), "--kinds : give some of description, existence, attribute"),
        (("--hearsay", 1.5), "--hearsay 1.5: a share between 0 and 1"),
    ],
)
def test_bad_questions_are_refused(tmp_path, flags, message):
    refused(lambda: run("--export", tmp_path / "out", *flags), message)
    assert not (tmp_path / "out").exists()


def test_export_of_larger_pictures(tmp_path):
    """The same records; the pictures alone are larger."""
    run("--export", tmp_path / "small", "--split", "test", "--limit", 2)
    run("--export", tmp_path / "large", "--split", "test", "--limit", 2, "--scale", 4)
    records = exported(tmp_path / "large")
    assert records == exported(tmp_path / "small")
    for record in records:
        with Image.open(tmp_path / "large" / record["image"]) as picture:
            assert picture.size == (384, 384) and picture.mode == "RGB"


def test_corrupted_pairs_are_what_training_reads(model, tmp_path, capsys):
    path = tmp_path / "new" / "pairs.jsonl"
    run("--corrupted", path, "--limit", 8)
    assert capsys.readouterr().out == f"{path}: 8 pairs\n"
    found = read_lines(path)
    assert found == [corrupted_pair(each, 0) for each in records_of("toy", None, 8, 0, False)]
    assert all(list(pair) == ["id", "images", "prompt", "chosen", "rejected"] for pair in found)
    records = [pair_record(pair) for pair in found]
    assert [record.id for record in records] == [raw["id"] for raw in alignment_records(8)]
    for index, record in enumerate(records):
        assert scene_of(record.image) == make_scene("alignment", index)
    assert [row["pairs"] for row in train(model, tmp_path / "run", pairs=str(path))] == [4, 4]

    again = tmp_path / "again.jsonl"
    run("--corrupted", again, "--limit", 8)
    assert again.read_bytes() == path.read_bytes()
    gives_remedy(lambda: run("--corrupted", path), f"--corrupted {path}: is there already")


def test_corrupted_pairs_of_exported_records(tmp_path):
    """From files the same pairs as from `toy`."""
    run("--export", tmp_path / "out", "--limit", 6)
    run("--corrupted", tmp_path / "a.jsonl", "--data", tmp_path / "out" / "data.json")
    run("--corrupted", tmp_path / "b.jsonl", "--limit", 6)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    run("--corrupted", tmp_path / "c.jsonl", "--limit", 6, "--seed", 1)
    assert (tmp_path / "c.jsonl").read_bytes() != (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([], "nothing to do; give --export DIR"),
        (["--export", "out", "--limit", "0"], "--limit 0: at least 1"),
        (["--export", "out", "--scale", "0"], "--scale 0: at least 1"),
        (["--export", "out", "--scale", "5"], "--scale 5: at most 4; "),
        (["--export", "out", "--first", "-1"], "--first -1: at least 0"),
        (["--corrupted", "."], "--corrupted .: is a folder"),
        (["--corrupted", "out.jsonl", "--data", "none.json"], "none.json: no such file"),
    ],
    ids=str,
)
def test_wrong_flags(tmp_path, monkeypatch, flags, match):
    monkeypatch.chdir(tmp_path)
    gives_remedy(lambda: run(*flags), match)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder_to_export_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    gives_remedy(lambda: run("--export", tmp_path / "file"), "--export", "name a folder")
    assert (tmp_path / "file").read_text() == "mine"
