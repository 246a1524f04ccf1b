"""`python -m minialign.annotate`: figures by hand, pairs of a model's own answers, ranked, and what
it refuses.
"""

import json
import random
import sys
from pathlib import Path

import pytest
from data_sets import photographs, write
from helpers import refused
from input_files import array, instruct, lines, pair
from judges import absent_objects, script, shown
from online_runs import Scripted
from script_runs import instruct_file

from minialign import annotate, edge
from minialign.align.annotators import Verdict
from minialign.cli import parse_config
from minialign.data.tokenizer import Tokenizer
from minialign.evaluation.metrics import in_words
from minialign.sampling import assistant
from minialign.toy import world
from minialign.toy.oracle import truth

TALK = {"prompt": "Is it there?"}
IN_WORDS = ("--annotator", "toy", "--verdict", "generated")


def run(monkeypatch, capsys, *argv: object) -> dict:
    """The object that --json prints, and nothing else on stdout."""
    monkeypatch.setattr(sys, "argv", ["annotate", *map(str, argv), "--json"])
    annotate.main(parse_config(annotate.Config, ""))
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "read as" in err
    return json.loads(out)


def refuse(monkeypatch, *argv: object, parts=()) -> None:
    """The flags end in one line that names these things."""
    monkeypatch.setattr(sys, "argv", ["annotate", *map(str, argv)])
    refused(lambda: annotate.main(parse_config(annotate.Config, "")), *parts)


def values(result: dict) -> dict:
    """The figures themselves."""
    assert all(
        figure.keys() == {"value", "low", "high"}
        for figure in result.values()
        if isinstance(figure, dict)
    )
    return {name: figure["value"] for name, figure in result.items() if isinstance(figure, dict)}


def yes_no(number: int, right: bool) -> dict:
    """A pair about an object that is there: the chosen response says so, or (not `right`) the
    rejected one.
    """
    name = next(iter(world.make_scene("alignment", number).objects))
    two = [f"Yes, there is {world.with_article(name)}.", f"No, there is no {name}."]
    chosen, rejected = two if right else two[::-1]
    return pair(number, chosen=chosen, rejected=rejected, **TALK)


def file_of(path: Path, *raws: dict) -> Path:
    path.write_bytes(lines(*raws))
    return path


def test_the_oracles_figures_by_hand(monkeypatch, capsys, tmp_path):
    """Four right of five that it decides, two ties of seven; it reads no positions, and all can be
    read.
    """
    first, second = absent_objects(world.make_scene("alignment", 5))[:2]
    ties = (
        pair(5, chosen=f"A {first}.", rejected=f"A {second}.", **TALK),
        pair(6, chosen="A.", rejected="B.", **TALK),
    )
    path = file_of(tmp_path / "pairs.jsonl", *(yes_no(i, i != 2) for i in range(5)), *ties)
    result = run(monkeypatch, capsys, "--pairs", path, "--batch-size", 3)
    assert result["pairs"] == 7 and result["left_out"] == 0
    assert values(result) == {
        "accuracy": 0.8,
        "first": None,
        "ties": pytest.approx(2 / 7, abs=1e-5),
        "unparsable": 0,
    }
    other = run(monkeypatch, capsys, "--pairs", path, "--batch-size", 8, "--seed", 5)
    assert other == result


def test_a_judge_that_prefers_the_first(monkeypatch, capsys, tmp_path):
    """It is right where the chosen response happens to stand first: half of the time; where both
    are asked it ties.
    """
    asked = script(monkeypatch, lambda question, number: "Response 1")
    raws = [pair(i, chosen=f"good {i}", rejected=f"bad {i}") for i in range(160)]
    path = file_of(tmp_path / "pairs.jsonl", *raws)
    found = values(run(monkeypatch, capsys, "--pairs", path, *IN_WORDS, "--batch-size", 32))
    right = sum(shown(row[0])[0].startswith("good") for row in asked)
    assert found == {
        "accuracy": pytest.approx(right / 160, abs=1e-5),
        "first": 1,
        "ties": 0,
        "unparsable": 0,
    }
    assert 0.38 < found["accuracy"] < 0.62
    both = values(run(monkeypatch, capsys, "--pairs", path, *IN_WORDS, "--orders", "both"))
    assert both == {"accuracy": None, "first": 1, "ties": 1, "unparsable": 0}


@pytest.mark.parametrize("seed", range(3))
def test_a_judges_figures_by_hand(monkeypatch, capsys, tmp_path, seed):
    """A judge whose answer to every pair is drawn: right, wrong, or nothing that can be read."""
    rng = random.Random(seed)
    count = rng.randrange(5, 30)
    wanted = [rng.choice(["good", "bad", "none"]) for _ in range(count)]

    def say(question: str, number: int) -> str:
        two = shown(question)
        kind = wanted[int(two[0].split()[1])]
        return (
            "Neither."
            if kind == "none"
            else f"Response {1 + [text.split()[0] for text in two].index(kind)}."
        )

    asked = script(monkeypatch, say)
    raws = [pair(i, chosen=f"good {i}", rejected=f"bad {i}") for i in range(count)]
    path = file_of(tmp_path / "pairs.jsonl", *raws)
    flags = (*IN_WORDS, "--batch-size", rng.randrange(1, 9), "--seed", seed)
    found = values(run(monkeypatch, capsys, "--pairs", path, *flags))
    decided = count - wanted.count("none")
    first = sum(
        shown(row[0])[0].split()[0] == kind for row, kind in zip(asked, wanted, strict=True)
    )
    by_hand = {
        "accuracy": wanted.count("good") / decided,
        "first": first / decided,
        "ties": 0,
        "unparsable": wanted.count("none") / count,
    }
    assert found == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("verdict", ["logprobs", "generated", "claims"])
def test_a_real_model_judges(monkeypatch, capsys, tmp_path, verdict):
    """The toy model was never taught to compare: by log-probs it decides all the same, in words it
    says nothing of the kind. What it was taught is whether an object is there."""
    path = file_of(tmp_path / "pairs.jsonl", *(yes_no(i, True) for i in range(12)))
    flags = ("--annotator", "toy", "--verdict", verdict)
    found = values(run(monkeypatch, capsys, "--pairs", path, *flags))
    if verdict == "generated":
        assert found == {"accuracy": None, "first": None, "ties": 0, "unparsable": 1}
    elif verdict == "logprobs":
        assert found["ties"] == found["unparsable"] == 0 and found["first"] is not None
    else:
        assert found == {"accuracy": 1, "first": None, "ties": 0, "unparsable": 0}


def test_the_table(monkeypatch, capsys, tmp_path):
    """Without --json every figure is a line, under the annotator's name."""
    path = file_of(tmp_path / "pairs.jsonl", *(yes_no(i, i > 0) for i in range(4)))
    monkeypatch.setattr(sys, "argv", ["annotate", "--pairs", str(path)])
    annotate.main(parse_config(annotate.Config, ""))
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["oracle"]
    for row, name in zip(rows[1:], annotate.FIGURES, strict=True):
        assert row.startswith(in_words(name))
    assert "↑  " in rows[1] and " 0.750 " in rows[1] and "not measured" in rows[2]


def test_pairs_of_no_use_are_left_out_and_counted(monkeypatch, capsys, tmp_path):
    """Ratings that tie, as in VLFeedback, and equal texts do not end the run; they are no pairs."""
    pictures, data = photographs(tmp_path / "pictures"), write(tmp_path, "vlfeedback")
    result = run(monkeypatch, capsys, "--pairs", data, "--images", pictures, "--annotator", "toy")
    assert (result["pairs"], result["left_out"]) == (2, 1)
    path = file_of(
        tmp_path / "pairs.jsonl",
        yes_no(0, True),
        pair(1, rejected=pair(1)["chosen"]),
        yes_no(2, True),
    )
    result = run(monkeypatch, capsys, "--pairs", path)
    assert (result["pairs"], result["left_out"], values(result)["accuracy"]) == (2, 1, 1)


def test_bad_pairs_end_the_run_or_are_skipped(monkeypatch, capsys, tmp_path):
    """In one line with the file and the line; with --skip-bad-records they are counted."""
    bad = [pair(1, chosen=None), pair(2, images=["photo.png"])]
    for raw, what in zip(
        bad, ("'chosen' is missing", "'photo.png' is not in the embedded world"), strict=True
    ):
        path = file_of(tmp_path / "one.jsonl", yes_no(0, True), raw)
        refuse(
            monkeypatch, "--pairs", path, parts=(f"{path}, line 2: ", what, "--skip-bad-records")
        )
    path = file_of(tmp_path / "all.jsonl", yes_no(0, True), *bad, yes_no(3, False))
    result = run(monkeypatch, capsys, "--pairs", path, "--skip-bad-records")
    assert (result["pairs"], result["left_out"], values(result)["accuracy"]) == (2, 2, 0.5)
    path = file_of(tmp_path / "none.jsonl", *bad)
    refuse(
        monkeypatch,
        "--pairs",
        path,
        "--skip-bad-records",
        parts=("no usable pair", "'chosen' is missing"),
    )


def test_bad_flags(monkeypatch, tmp_path):
    """Before any model is loaded."""
    monkeypatch.setattr(assistant, "load_model", None)
    path = file_of(tmp_path / "pairs.jsonl", yes_no(0, True))
    (tmp_path / "data.json").write_bytes(array(instruct()))
    refuse(monkeypatch, parts=["give either --pairs", "or --rank"])
    refuse(
        monkeypatch, "--pairs", path, "--rank", "toy", parts=["give either --pairs", "or --rank"]
    )
    refuse(monkeypatch, "--pairs", f"{path},{path}", parts=["a file stands twice"])
    refuse(monkeypatch, "--pairs", tmp_path / "no.jsonl", parts=["no.jsonl: no such file"])
    refuse(monkeypatch, "--pairs", tmp_path / "data.json", parts=["holds no rejected responses"])
    refuse(monkeypatch, "--pairs", path, "--batch-size", 0, parts=["--batch-size 0: at least 1"])
    refuse(monkeypatch, "--pairs", path, "--seed", 2**63, parts=["--seed", "64 bits"])
    refuse(
        monkeypatch,
        "--pairs",
        path,
        "--images",
        tmp_path / "no",
        parts=["--images", "no such folder"],
    )
    refuse(
        monkeypatch, "--pairs", path, "--images", tmp_path, parts=["oracle", "embedded world alone"]
    )
    refuse(monkeypatch, "--pairs", path, "--annotator", tmp_path / "no", parts=[tmp_path / "no"])
    refuse(monkeypatch, "--pairs", path, "--device", "abacus", parts=["--device abacus"])


# ---------------------------------------------------------------- --rank


def rank(out: Path, *flags: object, data: object = "toy") -> list[dict]:
    """The pairs file that a run leaves."""
    argv = ["--rank", data, "--out", out, *flags]
    annotate.main(parse_config(annotate.Config, "", [str(word) for word in argv]))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_truth_ranks_the_toys_answers(tmp_path, capsys):
    """The chosen one is better by the truth; no pair of equals; the same pairs whatever the
    batch.
    """
    pairs = rank(tmp_path / "a.jsonl", "--limit", 12, "--batch-size", 5)
    assert 3 <= len(pairs) < 12
    for each in pairs:
        assert each.keys() == {"id", "images", "prompt", "chosen", "rejected"}
        scene = world.scene_of(each["images"][0])
        better, worse = (each[name][0]["content"] for name in ("chosen", "rejected"))
        assert truth(scene, better) > truth(scene, worse)
    printed = capsys.readouterr().out
    assert f"{len(pairs)} pairs of 12 prompts; left out: {12 - len(pairs)} ties" in printed
    assert rank(tmp_path / "b.jsonl", "--limit", 12, "--batch-size", 12) == pairs
    assert rank(tmp_path / "c.jsonl", "--limit", 12, "--seed", 1) != pairs


def test_the_same_text_twice_is_a_tie_whoever_judges(tmp_path, monkeypatch):
    """Two answers of next to no temperature; a judge that always says 1."""

    class First:
        def choose(self, comparisons):
            return [Verdict(0) for _ in comparisons]

    monkeypatch.setattr(edge, "annotator_of", lambda *_: First())
    flags = ["--limit", 4, "--temperature", 0.001]
    refused(lambda: rank(tmp_path / "a.jsonl", *flags), "not one pair of 4 prompts (4 ties")
    assert not (tmp_path / "a.jsonl").exists()


def test_an_empty_answer_is_no_pair(tmp_path, monkeypatch, capsys):
    judge, real = Scripted(lambda text: (len(text), text)), Tokenizer.decode

    def decode(tokenizer, ids):
        return real(tokenizer, ids) if sum(ids) % 3 else ""

    monkeypatch.setattr(edge, "annotator_of", lambda *_: judge)
    monkeypatch.setattr(Tokenizer, "decode", decode)
    pairs = rank(tmp_path / "a.jsonl", "--limit", 16)
    texts = [each[name][0]["content"] for each in pairs for name in ("chosen", "rejected")]
    assert texts and all(texts)
    assert "0 with an empty answer" not in capsys.readouterr().out


def test_bad_records_are_met_with_their_place_or_skipped(tmp_path, capsys):
    """A picture that is not there, and a prompt that fills all positions."""
    good = [("human", "<image>\nDescribe the picture."), ("gpt", "A cup.")]
    long = [("human", "<image>\n" + "a cup " * 900), ("gpt", "A.")]
    data = Path(instruct_file(tmp_path / "data.json", good, long, good, good, good))
    raws = json.loads(data.read_text())
    raws[2]["image"] = "nothere.png"
    data.write_text(json.dumps(raws))
    out, flags = tmp_path / "a.jsonl", ["--batch-size", 2]
    refused(lambda: rank(out, *flags, data=data), f"{data}, record 2: image and prompt take")
    rank(out, *flags, "--skip-bad-records", data=data)
    shown = capsys.readouterr()
    assert f"2 records left out on the way, the first: {data}, record 2" in shown.out + shown.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", 0], "--temperature 0: two greedy answers are the same"),
        (["--limit", 0], "--limit 0"),
        (["--annotator", "nowhere"], "--annotator nowhere: no such folder"),
        (["--batch-size", 0], "--batch-size 0"),
    ],
)
def test_bad_flags_of_rank(tmp_path, flags, message):
    refused(lambda: rank(tmp_path / "a.jsonl", *flags), message)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("flag", [{"limit": 3}, {"model": "x"}, {"temperature": 0.5}])
def test_flags_of_rank_are_not_for_pairs(tmp_path, flag):
    path = file_of(tmp_path / "pairs.jsonl", yes_no(0, True))
    message = f"--{next(iter(flag))}: not for --pairs, only for --rank"
    refused(lambda: annotate.main(annotate.Config(pairs=str(path), **flag)), message)


def test_a_file_that_is_there_is_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text("precious")
    refused(
        lambda: rank(tmp_path / "a.jsonl"),
        "is there already; name another file, or remove it",
    )
    assert (tmp_path / "a.jsonl").read_text() == "precious"


def test_a_file_that_is_not_there_is_named_by_its_flag(tmp_path):
    config = annotate.Config(rank="nowhere.json", out=str(tmp_path / "out.jsonl"))
    refused(lambda: annotate.main(config), "--rank nowhere.json: no such file")
