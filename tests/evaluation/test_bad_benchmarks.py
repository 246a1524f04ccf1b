"""Bad benchmark files and flags: one line that names the place and the remedy, exit code 2, nothing
left in --out.
"""

import json

import pytest
from benchmark_files import (
    NAMES,
    bench_line,
    captions,
    chair_photographs,
    coco,
    mmhal_item,
    photographs,
    pope_line,
    pope_photographs,
)
from input_files import NO_DATA, array, left_in, lines

from minialign import evaluate
from minialign.cli import run_main

COCO = coco({1: "a.jpg"}, [(1, "cup")], ["cup"])
SAID = captions([(1, "A cup.")])


@pytest.fixture
def ends(capsys, monkeypatch, tmp_path):
    """Run it: it must end with exit code 2 and one line with these words in it, and leave only
    these files.
    """

    def call(argv: list, *words: str, left: tuple[str, ...] = ()) -> None:
        out = tmp_path.with_name(f"{tmp_path.name}-out")
        if "--benchmark" in argv:  # the embedded world's writes nothing
            argv = [*argv, "--out", out] if "--out" not in argv else argv
        argv = ["evaluate", *argv]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            run_main(evaluate.main, evaluate.Config, "")
        shown = capsys.readouterr()
        assert caught.value.code == 2 and shown.out == ""
        said = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert (
            len(said) == 1 and "Traceback" not in shown.err and shown.err.endswith(said[0] + "\n")
        ), shown.err
        assert all(str(word) in said[0] for word in words), said[0]
        assert ";" in said[0] or "at least" in said[0] or "64 bits" in said[0], (
            f"no remedy: {said[0]}"
        )
        assert left_in(out) == list(left)

    return call


BAD_POPE = [
    (lines(pope_line(), "{"), "line 2: not JSON"),
    (lines(pope_line(), "", pope_line()), "line 2: not JSON"),
    (array(pope_line(), [pope_line()]), "record 2: expected a JSON object"),
    (lines(pope_line(image=None)), "line 1: field 'image' is missing"),
    (lines(pope_line(), pope_line(image=7)), "line 2: field 'image' is not a text"),
    (lines(pope_line(text=None)), "field 'text' is missing"),
    (lines(pope_line(text=" \n")), "field 'text' is empty"),
    (lines(pope_line(text=["Is there?"])), "field 'text' is not a text"),
    (lines(pope_line(text="\ud800")), "half a surrogate pair"),
    (lines(pope_line(label=None)), "field 'label' is 'None', neither 'yes' nor 'no'"),
    (lines(pope_line(label="maybe")), "field 'label' is 'maybe'"),
    (lines(pope_line(label=["no"])), "field 'label'"),
    (lines(pope_line(label=False)), "field 'label'"),
    (b"", "no usable question"),
]
BAD_BENCH = [
    (lines(bench_line(question_id=None)), "line 1: field 'question_id' is missing"),
    (lines(bench_line(question_id=[1])), "field 'question_id' is missing, or neither"),
    (lines(bench_line(), bench_line(image="")), "line 2: field 'image' is empty"),
    (lines(bench_line(text=None)), "field 'text' is missing"),
]
BAD_MMHAL = [
    (array(mmhal_item(), mmhal_item())[:-1], "not readable as JSON"),
    (b"5", "expected a JSON object"),
    (array(mmhal_item(), 5), "record 2: expected a JSON object"),
    (array(mmhal_item(image_src=None)), "record 1: field 'image_src' is missing"),
    (array(mmhal_item(image_id=None)), "field 'image_id' is missing"),
    (array(mmhal_item(question="")), "field 'question' is empty"),
    (array(), "no usable question"),
]


BAD_PICTURES = [
    (
        "pope",
        lines(pope_line(image="../secret.png")),
        "question q.json:1: image '../secret.png' leaves the folder",
    ),
    ("pope", lines(pope_line(), pope_line(image="none.png")), "question q.json:2: image"),
    ("llava-bench", lines(bench_line(image="text.png")), "text.png: not a readable picture"),
    (
        "mmhal",
        array(mmhal_item("none.jpg")),
        "none.jpg: no such file; names of pictures are below --images",
    ),
    ("mmhal", array(mmhal_item(image_src="a\0b")), "not a readable picture"),
    (
        "mmhal",
        array(mmhal_item(image_src="https://example.org/", image_id="../secret")),
        "example.org: no such file",
    ),
]


def flags_of(tmp_path, model: str, kind: str, data: bytes) -> list:
    images = photographs(tmp_path / "images")
    (images / "text.png").write_text("no picture")
    (tmp_path / "q.json").write_bytes(data)
    flags = f"--benchmark {kind} --workers 0 --max-new-tokens 2".split()
    return [*flags, "--model", model, "--data", tmp_path / "q.json", "--images", images]


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        *(("pope", *row) for row in BAD_POPE),
        *(("llava-bench", *row) for row in BAD_BENCH),
        *(("mmhal", *row) for row in BAD_MMHAL),
    ],
)
def test_bad_questions(model, tmp_path, ends, kind, data, said):
    ends(flags_of(tmp_path, model, kind, data), said, "q.json")


@pytest.mark.parametrize("kind", ["pope", "llava-bench", "mmhal"])
@pytest.mark.parametrize("data", [data for data, _ in NO_DATA], ids=range(len(NO_DATA)))
def test_what_is_no_data_at_all(model, tmp_path, ends, kind, data):
    ends(flags_of(tmp_path, model, kind, data), tmp_path / "q.json")


@pytest.mark.parametrize(("kind", "data", "said"), BAD_PICTURES)
def test_bad_pictures(model, tmp_path, ends, kind, data, said):
    """They are met on the way, in the first batch: no answer is kept by then, and so no settings
    bind the folder."""
    ends(flags_of(tmp_path, model, kind, data), said, "or pass --skip-bad-records")


def without(raw: dict, name: str) -> dict:
    return {key: value for key, value in raw.items() if key != name}


BAD_COCO = [
    ({"instances": []}, "instances.json: expected a JSON object"),
    ({"instances": {}}, "--data", "instances.json: field 'categories' must be a list"),
    ({"instances": without(COCO, "images")}, "field 'images' must be a list"),
    ({"instances": COCO | {"annotations": {}}}, "field 'annotations' must be a list"),
    ({"instances": COCO | {"images": [5]}}, "images, record 1: field 'id' is missing"),
    (
        {"instances": COCO | {"images": [{"id": "1", "file_name": "a"}]}},
        "images, record 1: field 'id' is not a whole",
    ),
    ({"instances": COCO | {"images": [{"id": 1}]}}, "field 'file_name' is missing"),
    (
        {"instances": COCO | {"categories": [{"id": 10}]}},
        "categories, record 1: field 'name' is missing",
    ),
    (
        {"instances": COCO | {"categories": [{"id": 10, "name": "yak"}]}},
        "field 'name' is 'yak', which no line of",
    ),
    (
        {"instances": COCO | {"annotations": [{"image_id": 1, "category_id": 5}]}},
        "field 'category_id' is 5, which is",
    ),
    (
        {"instances": COCO | {"annotations": [{"category_id": 10}]}},
        "record 1: field 'image_id' is missing",
    ),
    ({"captions": []}, "captions.json: expected a JSON object"),
    ({"captions": {"annotations": []}}, "--captions", "field 'annotations' must be a list"),
    (
        {"captions": captions([(1, "")])},
        "captions.json, annotations, record 1: field 'caption' is empty",
    ),
    ({"captions": captions([("1", "A cup.")])}, "field 'image_id' is not a whole number"),
    ({"captions": captions([(2, "A cup.")])}, "no caption of an image of"),
    ({"synonyms": "\n,\n"}, "synonyms.txt: no names in it"),
    ({"synonyms": "cup, mug\nmug, cup"}, "synonyms.txt, line 2: 'mug' stands for 'cup' already"),
    ({"synonyms": b"\xff\xfe\x00"}, "synonyms.txt: not readable as text"),
    ({"instances": b"{"}, "instances.json: not readable as JSON"),
    ({"captions": b"\x00"}, "captions.json: not readable as JSON"),
]


@pytest.mark.parametrize(("changes", "words"), [(row[0], row[1:]) for row in BAD_COCO], ids=str)
def test_bad_coco_files(model, tmp_path, ends, changes, words):
    files = {"instances": COCO, "captions": SAID, "synonyms": "cup, mug"} | changes
    argv = ["--model", model, "--benchmark", "chair", "--images", tmp_path]
    for name, value in files.items():
        path = tmp_path / f"{name}.{'txt' if name == 'synonyms' else 'json'}"
        raw = value if isinstance(value, bytes | str) else json.dumps(value)
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        argv += ["--data" if name == "instances" else f"--{name}", path]
    ends(argv, *words)


BAD_FLAGS = [
    ("--benchmark pope", "--data is missing; --benchmark pope needs --data --images"),
    ("--benchmark pope --data q.json", "--images is missing"),
    ("--benchmark chair --data q --images . --captions c", "--synonyms is missing"),
    ("--benchmark mmhal --images .", "--data is missing"),
    ("--captions c.json", "--captions: not for --benchmark toy, only for chair; name one"),
    ("--benchmark pope --data q --images . --captions c", "--captions: not for --benchmark pope"),
    ("--benchmark pope --data q --images . --split test", "--split: not for --benchmark pope"),
    ("--benchmark mmhal --data q --images . --seed 0", "--seed: not for --benchmark mmhal"),
    ("--out runs/x", "--out: not for --benchmark toy"),
    ("--limit 5", "--limit: not for --benchmark toy"),
    ("--skip-bad-records", "--skip-bad-records: not for"),
    ("--max-new-tokens 9", "--max-new-tokens: not for"),
    ("--images folder", "--images folder: how many images"),
    ("--images 0", "--images 0:"),
    ("--benchmark pope --data q --images none", "--images none: no such folder"),
    ("--benchmark pope --data none --images .", "--data none: no such file"),
    ("--benchmark pope --data . --images .", "for the random setting there is no file"),
    ("--benchmark mmhal --data . --images .", "not readable"),
]
GOOD = "--benchmark pope --data good.json --images ."
BAD_FLAGS += [
    (f"{GOOD} --limit 0", "--limit 0: at least 1"),
    (f"{GOOD} --workers=-1", "--workers -1: at least 0"),
    (f"{GOOD} --batch-size 0", "--batch-size 0: at least"),
    (f"{GOOD} --max-new-tokens 0", "--max-new-tokens 0:"),
    (f"{GOOD} --out good.json", "--out good.json: is --data"),
    (f"{GOOD} --adapter none", "adapter_config.json"),
    (f"{GOOD} --model none", "none"),
]


@pytest.mark.parametrize(("argv", "said"), BAD_FLAGS, ids=str)
def test_bad_flags(tmp_path, ends, argv, said):
    pope_photographs(tmp_path / "good.json")
    ends(argv.split(), said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--question": " "}, "--question is empty"),
        ({"--seed": 2**70}, "a number of 64 bits"),
        ({"--synonyms": "none.txt"}, "--synonyms none.txt: no such file"),
    ],
)
def test_bad_flags_of_chair(tmp_path, ends, change, said):
    argv = ["--benchmark", "chair", *chair_photographs(tmp_path / "coco"), "--images", tmp_path]
    ends([*argv, *(word for pair in change.items() for word in pair)], said)


def test_no_picture_at_all(ends, model, tmp_path):
    """Also where others decode the pictures ahead."""
    data, empty = pope_photographs(tmp_path / "q.json"), tmp_path / "empty"
    empty.mkdir()
    argv = ["--benchmark", "pope", "--model", model, "--data", data, "--images", empty]
    argv += ["--workers", 2]
    ends([*argv, "--skip-bad-records"], f"--images {empty}: no picture could be read")
    ends(argv, f"question q.json:1: image {empty}/{NAMES[0]}: no such file")
