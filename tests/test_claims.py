"""Where a program may write: beside what is read, over nothing of the user's, and alone."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from helpers import refused
from script_runs import contents, stop_at, train
from test_layout import ROOT

import sample_bdhs
import train_dpo
import train_online
from minialign import annotate, claims, evaluate
from minialign.rlhf import ppo, reward_model, rloo
from minialign.study import __main__ as study_program
from minialign.toy import __main__ as toy_program
from minialign.training import progress


@dataclass(frozen=True)
class Places:
    """Some of the flags that name places."""

    out: str
    model: str = "toy"
    data: str | None = None
    pairs: str | None = None
    images: str = "toy"
    reward: str = "oracle"


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A user's folder: pictures, data, a model, and a link to the pictures."""
    for name in ("pictures/more", "model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "reward.py").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "out,flags,message",
    [
        ("", {}, "--out is empty; name a place"),
        (" ", {}, "--out is empty"),
        ("model", {"model": "model"}, "--out model: is --model"),
        ("model/merged", {"model": "model"}, "lies in --model"),
        (".", {"model": "model"}, "holds --model"),
        ("pictures", {"images": "pictures/more"}, "holds --images"),
        ("link", {"images": "pictures"}, "is --images"),
        ("pictures/x", {"images": "link"}, "lies in --images"),
        ("pairs.jsonl", {"pairs": "pairs.jsonl"}, "is --pairs"),
        ("./model/../pairs.jsonl", {"pairs": "x.jsonl,pairs.jsonl"}, "is --pairs"),
        (".", {"reward": "reward.py:score"}, "holds --reward"),
        ("pairs.jsonl/x", {}, "is a file; name another place"),
    ],
)
def test_a_place_apart_from_all_that_is_read(mine, out, flags, message):
    before = contents(mine)
    refused(lambda: claims.require_place(Places(out, **flags)), message)
    assert contents(mine) == before


@pytest.mark.parametrize("out", ["new", "a/b/c", "model2", "pictures.jsonl"])
def test_a_place_beside_what_is_read(mine, out):
    flags = {"model": "model", "images": "pictures", "pairs": "pairs.jsonl"}
    claims.require_place(Places(out, **flags))


def test_the_root_of_all(mine):
    """It holds what is read; and where nothing is read from a path, it is nobody's to write."""
    refused(lambda: claims.require_place(Places("/", pairs="pairs.jsonl")), "holds --pairs")
    refused(lambda: claims.require_own_folder(Places("/"), "study"), "--out /")


def test_names_of_the_embedded_world_are_no_paths(mine):
    (mine / "toy").mkdir()
    claims.require_place(Places("toy/run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(mine):
    (mine / "model").chmod(0o500)
    refused(lambda: claims.require_place(Places("model/x")), "no permission")


PROGRAMS = {
    "train_dpo": (train_dpo, {}),
    "train_online": (train_online, {}),
    "rloo": (rloo, {}),
    "ppo": (ppo, {}),
    "reward_model": (reward_model, {}),
    "study": (study_program, {}),
    "evaluate": (
        evaluate,
        {"benchmark": "pope", "data": "questions.json", "images": "pictures"},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_folder_that_is_there_is_nobodys_but_its_owners(name, mine):
    """Of no run, of another program's, or an ordinary file: refused, and nothing in it changes."""
    program, flags = PROGRAMS[name]
    (mine / "questions.json").write_text("[]")
    thesis = mine / "thesis"
    (thesis / "merged").mkdir(parents=True)
    (thesis / "merged/mine.txt").write_text("years of work")
    (thesis / "config.json").write_text('{"mine": 1}')
    before = contents(mine)

    config = program.Config(out="thesis", **flags)
    refused(lambda: program.main(config), "is there, and no run has made it; name a new folder")
    (thesis / claims.MARK).write_text("another\n")
    refused(lambda: program.main(config), f"was made by another; name a new folder for {name}")
    (thesis / claims.MARK).unlink()
    refused(lambda: program.main(replace(config, out="pairs.jsonl")), "is a file; name a folder")
    refused(lambda: program.main(replace(config, out="")), "--out is empty")
    assert contents(mine) == before


@pytest.mark.parametrize("place", ["runs/../{}", "runs/dpo/../../{}", "runs/../runs2/../{}/x"])
def test_behind_a_folder_that_is_not_there(mine, place):
    """`..` leads nowhere before that folder is made, and to the user's own afterwards."""
    (mine / "notes").mkdir()
    (mine / "notes/report.html").write_text("mine")
    (mine / "page.html").write_text("mine, too")
    before = contents(mine)
    missing = "goes through a folder that is not there; name the place without `..`"
    for name, (program, flags) in PROGRAMS.items():
        (mine / "questions.json").write_text("[]")
        config = program.Config(out=place.format("notes"), **flags)
        refused(lambda p=program, c=config: p.main(c), missing)
        assert name
    for flags in ({"export": "pictures"}, {"corrupted": "page.html"}, {"pretrain": "model"}):
        flags = {name: place.format(path) for name, path in flags.items()}
        refused(lambda f=flags: toy_program.main(toy_program.Config(**f, limit=1)), missing)
    config = annotate.Config(rank="toy", limit=1, out=place.format("page.html"))
    refused(lambda: annotate.main(config), missing)
    config = sample_bdhs.Config(limit=1, out=place.format("new.jsonl"))
    refused(lambda: sample_bdhs.main(config), missing)
    (mine / "questions.json").unlink()
    assert contents(mine) == before
    claims.require_place(Places("model/../new"))  # that one is there


@pytest.mark.parametrize("what", ["config", "stats", "sharegpt"])
def test_files_beside_the_pairs_that_are_somebodys(mine, what):
    """What sampling writes beside its --out is refused like that where another has made it."""
    path = mine / f"new.jsonl.{what}.json"
    path.write_text('{"precious": 1}')
    config = sample_bdhs.Config(out="new.jsonl", limit=1)
    refused(lambda: sample_bdhs.main(config), f"{path.name}: is there, and would be written")
    assert path.read_text() == '{"precious": 1}' and not (mine / "new.jsonl").exists()


def test_killed_between_the_settings_and_the_first_pair(mine):
    """Those settings are a sampling's own: it goes on."""
    settings = sample_bdhs.Config(out="new.jsonl", limit=1, max_new_tokens=4)
    (mine / "new.jsonl.config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    sample_bdhs.main(settings)
    assert len((mine / "new.jsonl").read_text().splitlines()) == 1


def test_whoever_stands_in_a_finished_run_keeps_it(model, pairs, tmp_path, monkeypatch):
    train(model, tmp_path / "run", pairs=pairs, limit=4)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "run")
    run = partial(train, model, Path("."), pairs=pairs, limit=4, seed=5)
    refused(run, "you are in it; change to another folder first")
    monkeypatch.chdir(tmp_path)
    found = contents(tmp_path)
    assert before == found
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    refused(lambda: toy_program.main(toy_program.Config(export=".", limit=1)), "you are in it")


def test_a_run_that_ended_while_this_one_was_loading(model, pairs, tmp_path, monkeypatch):
    """The other one was killed half-way, behind this one's first look: it is not written over."""
    real, out = progress.claim_folder, tmp_path / "run"

    def claim(folder, program):
        (out / "checkpoint").mkdir(parents=True)
        (out / progress.PROGRESS).write_bytes(b"of the other")
        real(folder, program)

    monkeypatch.setattr(progress, "claim_folder", claim)
    refused(lambda: train(model, out, pairs=pairs, limit=4), "holds an unfinished run")
    assert (out / progress.PROGRESS).read_bytes() == b"of the other"


@pytest.mark.parametrize("cache", ["run", "./run/"])
def test_a_cache_apart_from_the_run(mine, model, pairs, cache):
    run = partial(train, model, mine / "run", pairs=pairs, ref_cache=cache, limit=4)
    refused(run, f"--ref-cache {cache}: is --out, or holds it")


@pytest.mark.parametrize("flag", ["export", "corrupted", "pretrain"])
def test_the_embedded_world_is_written_to_new_places(flag, mine):
    before = contents(mine)
    for place in ("pictures", "pairs.jsonl", ""):
        config = toy_program.Config(**{flag: place}, limit=2)
        refused(lambda config=config: toy_program.main(config), f"--{flag} {place}")
    assert contents(mine) == before


def test_annotate_writes_over_nothing(mine):
    for out in ("pairs.jsonl", "model", ""):
        config = annotate.Config(pairs="pairs.jsonl", out=out)
        refused(lambda config=config: annotate.main(config), f"--out {out}")
    assert (mine / "pairs.jsonl").read_text() == "{}\n"


def test_sampling_does_not_write_over_a_file_that_no_sampling_made(mine):
    before = contents(mine)
    config = sample_bdhs.Config(out="pairs.jsonl", limit=2)
    refused(lambda: sample_bdhs.main(config), "pairs.jsonl.config.json: no such file; name another")
    refused(lambda: sample_bdhs.main(replace(config, out="model")), "is a folder")
    found = contents(mine)
    found.pop(".pairs.jsonl.lock", None)
    assert found == before


def test_a_cache_in_somebody_elses_folder(mine, model, pairs):
    message = "--ref-cache pictures: is there, and no run has made it"
    (mine / "pictures/a.png").write_text("")
    refused(lambda: train(model, mine / "out", pairs=pairs, ref_cache="pictures"), message)
    assert not (mine / "out").exists()


# ---------------------------------------------------------------- an earlier run of the same kind


def test_a_finished_run_gets_another_name(model, pairs, tmp_path):
    """Nothing of it is lost, whatever happens to the new one."""
    out = tmp_path / "out"
    train(model, out, pairs=pairs, limit=4)
    first = contents(out)
    train(model, out, pairs=pairs, limit=4, seed=1)
    second = contents(out)
    assert contents(tmp_path / "out.1") == first and second != first
    train(model, out, pairs=pairs, limit=4, seed=2)
    assert contents(tmp_path / "out.1") == first and contents(tmp_path / "out.2") == second


def test_a_run_behind_a_link_stays_behind_it(model, pairs, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/run")
    (tmp_path / "disk/run").mkdir()
    for seed in (0, 1):
        train(model, tmp_path / "out", pairs=pairs, limit=4, seed=seed)
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["run", "run.1"]


def test_a_refused_run_moves_nothing(model, pairs, tmp_path):
    out = tmp_path / "out"
    train(model, out, pairs=pairs, limit=4)
    before = contents(tmp_path)
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    with pytest.raises(Exception, match="not JSON"):
        train(model, out, pairs=str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").unlink()
    assert contents(tmp_path) == before


def test_inputs_below_the_out_folder(model, pairs, tmp_path):
    out = tmp_path / "run"
    (out / "merged").mkdir(parents=True)
    shutil.copy(pairs, out / "merged/pairs.jsonl")
    own = out / "merged/pairs.jsonl"
    refused(lambda: train(model, out, pairs=str(own)), "holds --pairs")
    assert own.exists()


# ---------------------------------------------------------------- two at once


HOLDS = """
import sys, time
from pathlib import Path
from minialign.claims import claim_file, claim_folder
claim_folder(Path(sys.argv[1]), "train_dpo")
claim_file(Path(sys.argv[2]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_kept_out_while_the_first_lives(model, pairs, tmp_path):
    out, file = tmp_path / "out", tmp_path / "pairs.jsonl"
    command = [sys.executable, "-c", HOLDS, str(out), str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert first.stdout.readline() == "held\n"
        before = contents(tmp_path)
        other = "another program is writing there; wait until it ends"
        refused(lambda: train(model, out, pairs=pairs, limit=4), other)
        refused(lambda: train(model, out, pairs=pairs, limit=4, resume=True), other)
        refused(lambda: sample_bdhs.main(sample_bdhs.Config(out=str(file), limit=2)), other)
        assert contents(tmp_path) == before
    finally:
        first.kill()
        first.wait()
    train(model, out, pairs=pairs, limit=4)  # a dead one's lock keeps nobody out


def test_a_run_whose_folder_is_removed_says_so(model, pairs, tmp_path, monkeypatch):
    """It is not made anew with half a log in it."""
    out = tmp_path / "out"
    real = train_dpo.preference_metrics

    def removing(*args):
        shutil.rmtree(out, ignore_errors=True)
        return real(*args)

    monkeypatch.setattr(train_dpo, "preference_metrics", removing)
    refused(lambda: train(model, out, pairs=pairs, limit=4), "metrics.jsonl: cannot be written")
    assert not out.exists()


# ---------------------------------------------------------------- what a checkpoint knows


def stopped_run(model: str, pairs: str, out: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "append_lines", 3)
        with pytest.raises(KeyboardInterrupt):
            train(model, out, pairs=pairs, save_every=1)


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("checkpoint/data.json", None, "data.json: no such file; leave --resume out"),
        (
            "checkpoint/data.json",
            {"pairs": 3},
            "annotator or reward are not those",
        ),
        ("metrics.jsonl", {"step": 1}, "not the log of the 2 steps"),
        ("metrics.jsonl", None, "not the log of the 2 steps"),
    ],
)
def test_a_tampered_run_does_not_go_on(model, pairs, tmp_path, monkeypatch, name, change, message):
    stopped_run(model, pairs, tmp_path / "out", monkeypatch)
    path = tmp_path / "out" / name
    path.unlink()
    if change is not None:
        path.write_text(json.dumps(change) + "\n")
    refused(lambda: train(model, tmp_path / "out", pairs=pairs, save_every=1, resume=True), message)


@pytest.mark.parametrize(
    "note,message",
    [
        *((note, "does not say which step it is of") for note in ("", "{", "[]", "7", "[" * 10**5)),
        ('{"step": 1}', "log is missing"),
        ('{"step": "x", "log": ""}', "step is 'x'; it must be a whole number"),
        ('{"step": Infinity, "log": ""}', "step is inf; it must be a whole number"),
    ],
    ids=range(8),
)
def test_a_tampered_note_in_a_checkpoint(model, pairs, tmp_path, monkeypatch, note, message):
    from safetensors.torch import load_file, save_file

    stopped_run(model, pairs, tmp_path / "out", monkeypatch)
    path = tmp_path / "out/checkpoint/progress.safetensors"
    save_file(load_file(path), path, {"progress": note})
    flags = {"pairs": pairs, "save_every": 1, "resume": True}
    refused(lambda: train(model, tmp_path / "out", **flags), path, message)


def test_a_diverging_last_step_leaves_no_weights(pairs, tmp_path):
    """merged/ has the types of the files that it comes from: float16 ends at 65,504."""
    flags = {"pairs": pairs, "steps": 1, "epochs": None, "lr": 1e9, "limit": 4}
    message = "in torch.float16 holds NaN, infinity or a number beyond"
    refused(lambda: train("toy", tmp_path / "out", **flags), message)
    assert not (tmp_path / "out/merged").exists() and not (tmp_path / "out/report.html").exists()


def test_a_diverged_checkpoint_is_not_written(model, pairs, tmp_path, monkeypatch):
    """The one before it stays."""
    real = progress.whole
    calls = []

    def diverged(tensors: dict) -> dict:
        calls.append(real(tensors))
        if len(calls) == 2:
            next(iter(calls[-1].values()))[0] = math.inf
        return calls[-1]

    monkeypatch.setattr(progress, "whole", diverged)
    flags = {"pairs": pairs, "save_every": 1, "batch_size": 2}
    said = ("step 2: ", " holds NaN, infinity", "; what was saved before it stays")
    refused(lambda: train(model, tmp_path / "out", **flags), *said)
    monkeypatch.undo()
    train(model, tmp_path / "out", resume=True, **flags)
