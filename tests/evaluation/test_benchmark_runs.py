"""The four benchmarks on files from end to end: photographs and a random model; the embedded
world's own figures.
"""

import json
import re
from collections import Counter

import pytest
from benchmark_files import (
    NAMES,
    bench_line,
    captions,
    chair_photographs,
    coco,
    mmhal_item,
    photographs,
    pope_photographs,
    run,
    toy_pictures,
    toy_pope,
    write_lines,
)
from helpers import plain_greedy, random_toy, toy_assistant, toy_processor, toy_tokenizer

from minialign import evaluate
from minialign.cli import parse_config
from minialign.data.images import PictureFolder
from minialign.evaluation.metrics import with_intervals
from minialign.sampling.assistant import Assistant
from minialign.toy import world
from minialign.toy.benchmark import ToyBenchmark
from minialign.toy.drawing import OBJECTS


def saved(out) -> list[dict]:
    return [
        json.loads(line)
        for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def alone(images, name: str, question: str, limit: int) -> str:
    """The random model's answer to one question, the plain way."""
    tokenizer, model = toy_tokenizer(), random_toy(1)
    features = model.encode_images(toy_processor()(PictureFolder(str(images))(name)))[0]
    ids, _ = plain_greedy(
        model, tokenizer.prompt([("user", question)]), features, {tokenizer.eos_id}, limit
    )
    return tokenizer.decode(ids).strip()


def check_answers(out, images, count: int, limit: int) -> list[dict]:
    """Every answer is what the model says to that question about that picture alone."""
    lines = saved(out)
    assert len(lines) == count and len({line["id"] for line in lines}) == count
    for line in lines:
        assert line["answer"] == alone(images, line["image"], line["question"], limit), line
    return lines


@pytest.fixture
def images(tmp_path):
    return photographs(tmp_path / "images")


@pytest.mark.parametrize("workers", [0, 2])
def test_pope_on_photographs(model, tmp_path, images, workers):
    out, data = tmp_path / "out", pope_photographs(tmp_path / "coco_pope_popular.json")
    result = run(
        model=model,
        benchmark="pope",
        data=data,
        images=images,
        out=out,
        batch_size=3,
        max_new_tokens=5,
        workers=workers,
    )
    lines = check_answers(out, images, 12, 5)
    asked = [json.loads(line) for line in data.read_text().splitlines()]
    right = 0
    for line in lines:
        raw = asked[int(line["id"].split(":")[1]) - 1]
        assert (raw["image"], raw["text"]) == (line["image"], line["question"])
        yes = not re.search(r"(^| )(No|no|not)( |$)", line["answer"].split(".")[0].replace(",", ""))
        right += yes == (raw["label"] == "yes")
    assert result["pope_popular"]["value"] == pytest.approx(right / 12, abs=1e-5)
    assert result["questions"] == result["answered"] == 12 and result["file"] == "answers.jsonl"
    assert json.loads((out / "result.json").read_text()) == result
    settings = json.loads((out / "config.json").read_text())
    assert (
        settings["max_new_tokens"] == 5
        and settings["benchmark"] == "pope"
        and len(settings["weights"]) == 16
    )


def test_chair_on_photographs(model, tmp_path, images):
    """Three words that the random model says often are made names of objects: its answers are
    counted anew.
    """
    out, coco_flags = tmp_path / "out", chair_photographs(tmp_path / "coco")
    flags = ["--model", model, "--benchmark", "chair", *coco_flags, "--images", images]
    run(*flags, "--out", out, "--max-new-tokens", 80)
    lines = check_answers(out, images, 4, 80)
    assert {line["question"] for line in lines} == {"Please describe this image in detail."}
    often = Counter(
        re.findall(r"\b[a-z]{3,}\b", " ".join(line["answer"].lower() for line in lines))
    )
    names = dict(
        zip(
            [w for w, _ in often.most_common() if not w.endswith("s")],
            ("cup", "dog", "boat"),
            strict=False,
        )
    )
    assert len(names) == 3
    (tmp_path / "s.txt").write_text("\n".join(f"{thing}, {word}" for word, thing in names.items()))
    result = run(*flags, "--out", out, "--max-new-tokens", 80, "--synonyms", tmp_path / "s.txt")
    there = dict(zip(NAMES, ({"cup"}, {"cup", "dog"}, {"dog"}, {"boat"}), strict=True))
    names |= {word + "s": thing for word, thing in names.items()}
    said = {
        line["image"]: [names[w] for w in re.findall(r"\w+", line["answer"].lower()) if w in names]
        for line in lines
    }
    wrong = {
        image: [name for name in named if name not in there[image]] for image, named in said.items()
    }
    mentioned, false = sum(map(len, said.values())), sum(map(len, wrong.values()))
    assert mentioned >= 5 and 0 < false
    assert result["chair_i"]["value"] == pytest.approx(false / mentioned, abs=1e-5)
    assert result["chair_s"]["value"] == pytest.approx(sum(map(bool, wrong.values())) / 4, abs=1e-5)
    found = sum(len(set(named) & there[image]) for image, named in said.items())
    assert result["recall"]["value"] == pytest.approx(found / 5, abs=1e-5)
    assert (
        run(*flags, "--out", tmp_path / "two", "--limit", 2, "--max-new-tokens", 8)["questions"]
        == 2
    )


def test_llava_bench_on_photographs(model, tmp_path, images):
    out = tmp_path / "out"
    lines = [
        bench_line(n, image=name, text=text)
        for n, (text, name) in enumerate(
            [
                ("What is there?", NAMES[0]),
                ("Describe.", NAMES[1]),
                ("What place is this?", NAMES[0]),
            ]
        )
    ]
    lines[2]["question_id"] = 1  # the same as another's
    data = write_lines(tmp_path / "questions.jsonl", lines)
    result = run(
        model=model, benchmark="llava-bench", data=data, images=images, out=out, max_new_tokens=6
    )
    written = [
        json.loads(line)
        for line in (out / "llava-bench.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    expected = [alone(images, line["image"], line["text"], 6) for line in lines]
    assert [
        row["text"] for row in written
    ] == expected  # in the order of the questions, not of the pictures
    assert [line["id"] for line in saved(out)] == [
        "questions.jsonl:1",
        "questions.jsonl:3",
        "questions.jsonl:2",
    ]
    assert [(row["question_id"], row["prompt"]) for row in written] == [
        (r["question_id"], r["text"]) for r in lines
    ]
    assert all(
        list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        for row in written
    )
    assert len({row["answer_id"] for row in written}) == 3 and {
        row["model_id"] for row in written
    } == {"llava"}
    assert result["file"] == "llava-bench.jsonl" and result["answered"] == 3
    assert result["length"]["value"] == pytest.approx(
        sum(len(text.split()) for text in expected) / 3, abs=1e-5
    )


def test_mmhal_on_photographs(model, tmp_path, images):
    """Pictures are found by the end of their source, or by their id; what is not asked stays
    empty.
    """
    (images / "chelsea.png").rename(images / "0a1b.jpg")
    items = [
        mmhal_item(),
        mmhal_item(NAMES[2], image_id="0a1b"),
        mmhal_item(NAMES[1], question="Where is it?"),
        mmhal_item(NAMES[3], image_id="ü"),
    ]
    (tmp_path / "template.json").write_text(json.dumps(items))
    flags = (
        "--model",
        model,
        "--benchmark",
        "mmhal",
        "--data",
        tmp_path / "template.json",
        "--images",
        images,
        "--max-new-tokens",
        6,
    )
    result = run(*flags, "--out", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "mmhal.json").read_text(encoding="utf-8"))
    files = [NAMES[0], "0a1b.jpg", NAMES[1], NAMES[3]]
    answers = [
        alone(images, file, item["question"], 6) for file, item in zip(files, items, strict=True)
    ]
    assert written == [
        item | {"model_answer": text} for item, text in zip(items, answers, strict=True)
    ]
    assert [list(item) for item in written] == [list(item) for item in items] and result[
        "answered"
    ] == 4
    run(*flags, "--out", tmp_path / "two", "--limit", 2)
    written = json.loads((tmp_path / "two" / "mmhal.json").read_text(encoding="utf-8"))
    assert [item["model_answer"] for item in written] == [*answers[:2], "", ""]


def test_the_embedded_world_from_files(tmp_path):
    """Its pictures as PNG and its questions as POPE's and CHAIR's files give what `--benchmark toy`
    gives.
    """
    count, images = 12, toy_pictures(tmp_path / "images", 12)
    toy = run("--images", count)
    pope = run(
        benchmark="pope",
        data=toy_pope(tmp_path / "pope", count),
        images=images,
        out=tmp_path / "out",
    )
    same = [name for name in toy if name.startswith("pope")]
    assert len(same) == 9 and {name: pope[name] for name in same} == {
        name: toy[name] for name in same
    }
    scenes = {number: world.make_scene("test", number) for number in range(count)}
    files = {number: world.image_name("test", number) for number in scenes}
    there = [(number, name) for number, scene in scenes.items() for name in scene.objects]
    (tmp_path / "i.json").write_text(json.dumps(coco(files, there, list(OBJECTS))))
    (tmp_path / "c.json").write_text(json.dumps(captions([(0, "A picture.")])))
    (tmp_path / "s.txt").write_text("\n".join(OBJECTS))
    chair = run(
        benchmark="chair",
        data=tmp_path / "i.json",
        captions=tmp_path / "c.json",
        synonyms=tmp_path / "s.txt",
        images=images,
        out=tmp_path / "chair",
        question=world.DESCRIBE[0],
        max_new_tokens=128,
    )
    assert toy["chair_i"]["value"] > 0 and toy["recall"]["value"] > 0.5
    for name in ("chair_i", "chair_s", "recall", "length"):
        assert chair[name]["value"] == toy[name]["value"], name


def test_the_table_says_how_many(model, tmp_path, images, capsys, monkeypatch):
    data = pope_photographs(tmp_path / "q.json")
    argv = [
        "evaluate",
        "--model",
        model,
        "--benchmark",
        "pope",
        "--data",
        data,
        "--images",
        images,
        "--out",
        tmp_path / "out",
        "--workers",
        0,
        "--max-new-tokens",
        2,
        "--skip-bad-records",
    ]
    (images / NAMES[1]).write_text("no picture")
    monkeypatch.setattr("sys.argv", [str(word) for word in argv])
    evaluate.main(parse_config(evaluate.Config, ""))
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].split() == ["pope"] and "POPE, precision ↑" in shown.out
    assert (
        shown.out.splitlines()[-1]
        == f"9 of 12 questions answered; the answers: {tmp_path / 'out'}/answers.jsonl"
    )
    assert "1 bad records skipped, the first: question q.json:2: image" in shown.err
    assert len(saved(tmp_path / "out")) == 9


def test_white_space_around_an_answer_is_not_saved(model, tmp_path, images, monkeypatch):
    """LLaVA's own scripts drop it too; to POPE's reading a line break before `No` would make it a
    yes.
    """

    def answers(assistant, features, images, questions, limit):
        return [["\n No. "] * len(row) for row in questions]

    monkeypatch.setattr(Assistant, "answers", answers)
    result = run(
        model=model,
        benchmark="pope",
        data=pope_photographs(tmp_path / "q.json"),
        images=images,
        out=tmp_path / "out",
    )
    assert {line["answer"] for line in saved(tmp_path / "out")} == {"No."} and result["pope_yes"][
        "value"
    ] == 0


@pytest.mark.parametrize(
    ("kind", "filled"),
    [
        (
            "pope",
            {
                "max_new_tokens": 16,
                "limit": None,
                "out": "runs/eval-pope",
                "batch_size": 8,
                "workers": 4,
            },
        ),
        (
            "chair",
            {
                "max_new_tokens": 512,
                "limit": 500,
                "out": "runs/eval-chair",
                "seed": 0,
                "question": "Please describe this image in detail.",
            },
        ),
        (
            "llava-bench",
            {"max_new_tokens": 512, "limit": None, "out": "runs/eval-llava-bench", "seed": None},
        ),
        ("mmhal", {"max_new_tokens": 512, "limit": None, "out": "runs/eval-mmhal"}),
        ("toy", {"images": "500", "split": "test", "batch_size": 50, "out": None, "workers": None}),
    ],
)
def test_what_stands_for_flags_that_are_not_given(tmp_path, kind, filled):
    needed = dict.fromkeys(evaluate.NEEDED[kind], str(tmp_path))
    config = evaluate.completed(evaluate.Config(benchmark=kind, **needed))
    assert {name: getattr(config, name) for name in filled} == filled


def test_no_figures_of_the_embedded_world_are_changed():
    """`--benchmark toy` prints what ToyBenchmark counts."""
    counts = ToyBenchmark("validation", 3, 2).run(toy_assistant()).counts
    assert run("--split", "validation", "--images", 3, "--batch-size", 2) == with_intervals(
        [counts]
    )
