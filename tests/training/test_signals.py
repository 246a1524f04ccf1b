"""Signals to a run: SIGTERM, or Ctrl-C, lets the step end, saves and exits 0, or 130; a second
Ctrl-C ends it at once, and a kill at any moment costs no more than a step.

The scripts run in a process group of their own, and go on to the same bytes afterwards."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from forks import Forked
from helpers import refused
from safetensors import safe_open
from script_runs import contents, read_lines, train
from torchruns import finish, wait_for

TRAIN = {
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lr": 1e-3,
    "projector_lr": 1e-4,
    "epochs": 4,
    "batch_size": 4,
    "eval_images": 0,
    "save_every": 3,
}
STEPS = 16
# A step that does not end by itself: it says when it has begun, and when Ctrl-C was heard.
ENDLESS = """
import signal, sys, time
from pathlib import Path
import train_dpo
from minialign.cli import run_main
real, calls, folder = train_dpo.preference_metrics, [], Path(sys.argv.pop(1))
def endless(*args):
    calls.append(args)
    while len(calls) == 5:
        (folder / "begun").touch()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            (folder / "heard").touch()
        time.sleep(0.01)
    return real(*args)
train_dpo.preference_metrics = endless
run_main(train_dpo.main, train_dpo.Config, "", train_dpo.DEFAULTS)
"""


def training(model: str, pairs: str, out: Path, workers: int) -> list[str]:
    """The flags of a run."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TRAIN.items()]
    return [
        "--model",
        model,
        "--pairs",
        pairs,
        "--out",
        str(out),
        "--workers",
        str(workers),
        *flags,
    ]


def steps_in(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.fixture(scope="module")
def whole(model, pairs, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed run leaves, but for the file that names its folder."""
    out = tmp_path_factory.mktemp("whole")
    train(model, out, pairs=pairs, workers=0, **TRAIN)
    return {name: data for name, data in contents(out).items() if name != "config.json"}


def resumed(model: str, pairs: str, out: Path) -> dict[str, bytes]:
    train(model, out, pairs=pairs, workers=0, resume=True, **TRAIN)
    return {name: data for name, data in contents(out).items() if name != "config.json"}


@pytest.mark.parametrize(
    ("number", "to_all", "workers", "code"),
    [
        (signal.SIGTERM, False, 0, 0),
        (signal.SIGTERM, True, 2, 0),
        (signal.SIGINT, True, 0, 130),
        (signal.SIGINT, True, 2, 130),
    ],
)
def test_the_step_ends_and_is_saved(model, pairs, tmp_path, whole, number, to_all, workers, code):
    """Whether the main process gets it, or the whole group as from a scheduler or a terminal."""
    out = tmp_path / "out"
    process = Forked(1, "train_dpo.py", training(model, pairs, out, workers))
    wait_for(lambda: steps_in(out / "metrics.jsonl") >= 4, process)
    (os.killpg if to_all else os.kill)(process.pid, number)
    done = finish(process, 60)
    steps = len(read_lines(out / "metrics.jsonl"))
    assert f"ended after step {steps}; --resume goes on from there\n" in done.stderr
    assert done.returncode == code and 4 <= steps < STEPS and "Traceback" not in done.stderr
    with safe_open(out / "checkpoint/progress.safetensors", "pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == steps
    refused(
        lambda: train(model, out, pairs=pairs, workers=0, **TRAIN),
        "holds an unfinished run; --resume goes on",
    )
    assert resumed(model, pairs, out) == whole


def test_a_second_ctrl_c_does_not_wait(model, pairs, tmp_path, whole):
    """The step in progress is lost, and those before it since the last checkpoint are made anew."""
    out, script = tmp_path / "out", tmp_path / "endless.py"
    script.write_text(ENDLESS)
    flags = [str(tmp_path), *training(model, pairs, out, workers=0)]
    process = Forked(1, str(script), flags)
    for told in ("begun", "heard"):
        wait_for((tmp_path / told).exists, process)
        os.killpg(process.pid, signal.SIGINT)
    done = finish(process, 60)
    assert done.returncode == 130 and len(read_lines(out / "metrics.jsonl")) == 4
    assert "interrupted; what was written so far is whole\n" in done.stderr
    assert "ended after step" not in done.stderr and "Traceback" not in done.stderr
    assert resumed(model, pairs, out) == whole


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_training_goes_on(model, pairs, tmp_path, whole, seed):
    """kill -9 at a random moment: of a step, of a checkpoint, or of what is written at the end."""
    rng, out = random.Random(seed), tmp_path / "out"
    process = Forked(1, "train_dpo.py", training(model, pairs, out, workers=0))
    after = rng.randrange(STEPS)
    wait_for(lambda: steps_in(out / "metrics.jsonl") >= after, process)
    time.sleep(rng.random() * 0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process, 60).returncode == -signal.SIGKILL
    if not (out / "config.json").exists():  # before anything was written
        train(model, out, pairs=pairs, workers=0, **TRAIN)
    assert resumed(model, pairs, out) == whole
