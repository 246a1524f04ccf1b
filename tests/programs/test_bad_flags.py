"""Wrong values of flags, files that are not there and an --out that cannot be end every program in
one line.
"""

import pytest
from input_files import gives_remedy, left_in, lines, pair, sample, train

import sample_bdhs
from minialign import annotate, chat, evaluate
from minialign.cli import parse_config
from minialign.errors import UserError
from minialign.rlhf import ppo, reward_model, rloo
from minialign.study import __main__ as study
from minialign.toy import __main__ as toy


def test_files_that_are_not_there(model, tmp_path):
    out, none = tmp_path / "out", str(tmp_path / "none.json")
    gives_remedy(lambda: sample(model, out, "--data", none), "no such file", none)
    gives_remedy(
        lambda: train(model, out, "--pairs", none),
        "no such file; make one with sample_bdhs.py",
        none,
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    gives_remedy(lambda: sample(model, out, "--data", str(folder)), "not readable", folder)
    gives_remedy(lambda: train(model, out, "--pairs", str(folder)), "not readable", folder)
    gives_remedy(lambda: sample(none, out), "--model .* no such folder", none)
    gives_remedy(lambda: train(none, out, "--pairs", none), "--model .* no such folder", none)
    gives_remedy(lambda: sample(model, out, "--encoder", none), "no such folder", none)
    gives_remedy(
        lambda: train(model, out, "--images", str(tmp_path)), "--pairs is missing; make one"
    )
    assert left_in(out) == []


def test_an_out_that_cannot_be(model, tmp_path):
    (tmp_path / "pairs.jsonl").mkdir()
    gives_remedy(lambda: sample(model, tmp_path), "--out .* is a folder; name the pairs file")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "good.jsonl").write_bytes(lines(pair()))
    good = str(tmp_path / "good.jsonl")
    gives_remedy(
        lambda: train(model, tmp_path / "file", "--pairs", good),
        "--out .* is a file; name a folder",
    )
    message = "file is a file; name another place"
    gives_remedy(lambda: sample(model, tmp_path / "file", "--limit", "1"), message)
    gives_remedy(
        lambda: train(model, tmp_path / "file" / "x", "--pairs", good),
        "file is a file; name another",
    )
    assert left_in(tmp_path) == ["file", "good.jsonl", "pairs.jsonl"]
    assert (tmp_path / "file").read_text() == "in the way"


FLAGS = [
    (sample, "--rho-th", "1.5"),
    (sample, "--rho-th", "-0.1"),
    (sample, "--rho-th", "nan"),
    (sample, "--n-bdhs", "0"),
    (sample, "--batch-size", "0"),
    (sample, "--noise-steps", "-1"),
    (sample, "--noise-steps", "1001"),
    (sample, "--top-p", "0"),
    (sample, "--top-p", "1.1"),
    (sample, "--max-new-tokens", "0"),
    (sample, "--limit", "0"),
    (sample, "--limit", "-3"),
    (sample, "--eps-s", "1.5"),
    (sample, "--eps-s", "nan"),
    (sample, "--device", "gpu"),
    (train, "--lr", "-1e-4"),
    (train, "--lr", "0"),
    (train, "--lr", "nan"),
    (train, "--lr", "inf"),
    (train, "--projector-lr", "-1"),
    (train, "--projector-lr", "inf"),
    (train, "--beta", "0"),
    (train, "--beta", "inf"),
    (train, "--lora-rank", "0"),
    (train, "--lora-alpha", "0"),
    (train, "--epochs", "0"),
    (train, "--batch-size", "0"),
    (train, "--accumulate", "0"),
    (train, "--warmup", "1"),
    (train, "--warmup", "-0.1"),
    (train, "--clip", "0"),
    (train, "--save-every", "0"),
    (train, "--eval-images", "-1"),
    (train, "--limit", "0"),
    (train, "--device", "gpu"),
    (train, "--seed", str(2**64)),
    (train, "--max-response-tokens", "0"),
]


@pytest.mark.parametrize("script,flag,value", FLAGS, ids=lambda x: getattr(x, "__name__", x))
def test_wrong_values_of_flags(tmp_path, script, flag, value, model):
    (tmp_path / "pairs.jsonl").write_bytes(lines(pair()))
    argv = ["--pairs", str(tmp_path / "pairs.jsonl")] if script is train else []
    gives_remedy(
        lambda: script(model, tmp_path / "out", *argv, f"{flag}={value}"), f"{flag} {value[:1]}"
    )
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    "program,argv",
    [
        (chat, []),
        (chat, ["--image", "none.png"]),
        (chat, ["--image", "."]),
        (chat, ["--image", "x" * 5000]),
        (chat, ["--image", "test-000000.png", "--response", " "]),
        (chat, ["--rho-th", "2"]),
        (chat, ["--temperature=-1"]),
        (chat, ["--image", "test-000000.png", "--prompt", "a\udcff"]),
        (chat, ["--seed", "9" * 30]),
        (chat, ["--max-new-tokens", "0"]),
        (chat, ["--model", "none"]),
        (chat, ["--device", "gpu"]),
        (chat, ["--image", "test-000000.png", "--adapter", "none"]),
        (evaluate, ["--images", "0"]),
        (evaluate, ["--batch-size", "0"]),
        (evaluate, ["--model", "none"]),
        (study, ["--rows", "none"]),
        (study, ["--seeds", "0"]),
        (annotate, []),
        (annotate, ["--pairs", "none.jsonl"]),
        (annotate, ["--rank", "none.json", "--out", "pairs.jsonl"]),
        (toy, []),
        (toy, ["--export", "none", "--limit", "0"]),
        (reward_model, ["--pairs", "none.jsonl"]),
        (reward_model, ["--epochs", "0"]),
        (rloo, ["--k", "1"]),
        (rloo, ["--reward", "none"]),
        (ppo, ["--updates", "0"]),
        (ppo, ["--gae-lambda", "2"]),
    ],
    ids=str,
)
def test_the_other_programs(program, argv, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["program", *argv])
    gives_remedy(lambda: program.main(parse_config(program.Config, "")), "--|none|image|x{99}")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("value", [-1.0, 1e-320, float("inf"), float("nan")])
def test_a_temperature_that_cannot_divide_is_refused(tmp_path, value):
    with pytest.raises(UserError, match="--temperature"):
        sample_bdhs.main(
            sample_bdhs.Config(out=str(tmp_path / "pairs.jsonl"), limit=1, temperature=value)
        )
    assert list(tmp_path.iterdir()) == []
