"""Pairs of a model's own answers, ranked: what is left out, what depends on what, and what is
refused."""

import json
from pathlib import Path

import pytest
from helpers import refused
from online_runs import Scripted
from script_runs import instruct_file

from minialign import ranked
from minialign.align.annotators import Verdict
from minialign.cli import parse_config
from minialign.toy import world
from minialign.toy.oracle import OracleAnnotator


def run(monkeypatch, out: Path, *flags: object) -> list[dict]:
    monkeypatch.setattr("sys.argv", ["ranked", "--out", str(out), *map(str, flags)])
    ranked.main(parse_config(ranked.Config, ""))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_truth_ranks_the_toys_answers(tmp_path, monkeypatch, capsys):
    """The chosen one is better by the truth; no pair of equals; the same pairs whatever the
    batch."""
    pairs = run(monkeypatch, tmp_path / "a.jsonl", "--limit", 12, "--batch-size", 5)
    assert 3 <= len(pairs) < 12
    for pair in pairs:
        assert pair.keys() == {"id", "images", "prompt", "chosen", "rejected"}
        scene = world.scene_of(pair["images"][0])
        assert OracleAnnotator.score(scene, pair["chosen"]) > OracleAnnotator.score(
            scene, pair["rejected"]
        )
    said = capsys.readouterr().out
    assert f"{len(pairs)} pairs of 12 prompts; left out: {12 - len(pairs)} ties" in said
    assert run(monkeypatch, tmp_path / "b.jsonl", "--limit", 12, "--batch-size", 12) == pairs
    assert run(monkeypatch, tmp_path / "c.jsonl", "--limit", 12, "--seed", 1) != pairs


def test_the_same_text_twice_is_a_tie_whoever_judges(tmp_path, monkeypatch):
    """Two answers of next to no temperature; a judge that always says 1."""

    class First(Scripted):
        def choose(self, comparisons, features=None):
            return [Verdict(0) for _ in comparisons]

    monkeypatch.setattr(ranked, "load_annotator", lambda *_: First(len))
    flags = ["--limit", 4, "--temperature", 0.001]
    refused(lambda: run(monkeypatch, tmp_path / "a.jsonl", *flags), "not one pair was ranked")
    assert not (tmp_path / "a.jsonl").exists()


def test_an_empty_answer_is_no_pair(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        ranked, "load_annotator", lambda *_: Scripted(lambda text: (len(text), text))
    )
    real = ranked.Tokenizer.decode
    monkeypatch.setattr(
        ranked.Tokenizer, "decode", lambda self, ids: real(self, ids) if sum(ids) % 3 else ""
    )
    pairs = run(monkeypatch, tmp_path / "a.jsonl", "--limit", 16)
    assert all(pair["chosen"] and pair["rejected"] for pair in pairs)
    assert "0 with an empty answer" not in capsys.readouterr().out


def test_bad_records_are_met_with_their_place_or_skipped(tmp_path, monkeypatch, capsys):
    """A picture that is not there, and a prompt that fills all positions."""
    good, long = (
        [("human", "<image>\nDescribe the picture."), ("gpt", "A cup.")],
        "<image>\n" + "a cup " * 900,
    )
    data = Path(
        instruct_file(
            tmp_path / "data.json", good, [("human", long), ("gpt", "A.")], good, good, good
        )
    )
    raws = json.loads(data.read_text())
    raws[2]["image"] = "nothere.png"
    data.write_text(json.dumps(raws))
    flags = ["--data", data, "--batch-size", 2]
    refused(
        lambda: run(monkeypatch, tmp_path / "a.jsonl", *flags),
        f"{data}, record 2: image and prompt take",
    )
    run(monkeypatch, tmp_path / "a.jsonl", *flags, "--skip-bad-records")
    shown = capsys.readouterr()
    assert f"2 records left out on the way, the first: {data}, record 2" in shown.out + shown.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature", 0], "--temperature 0: two greedy answers are the same"),
        (["--limit", 0], "--limit 0"),
        (["--annotator", "nowhere"], "--annotator nowhere: no such folder"),
        (["--batch-size", 0], "--batch-size 0"),
    ],
)
def test_wrong_flags(tmp_path, monkeypatch, flags, said):
    refused(lambda: run(monkeypatch, tmp_path / "a.jsonl", *flags), said)
    assert not (tmp_path / "a.jsonl").exists()


def test_a_file_that_is_there_is_kept(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("precious")
    refused(
        lambda: run(monkeypatch, tmp_path / "a.jsonl"),
        "is there already; name another file, or remove it",
    )
    assert (tmp_path / "a.jsonl").read_text() == "precious"
