"""Signals to a run: SIGTERM saves and exits 0, Ctrl-C ends it at once, a kill at any moment costs
no more than a step.

The scripts run as a user runs them, in a process group of their own, and go on to the same bytes
afterwards."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import refused
from script_runs import contents, read_lines, train

import train_dpo

ROOT = Path(train_dpo.__file__).parent
TRAIN = {
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lr": 1e-3,
    "projector_lr": 1e-4,
    "epochs": 6,
    "batch_size": 4,
    "eval_images": 0,
    "save_every": 3,
}


def start(script: str, *flags: str) -> subprocess.Popen:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # where a shell's job in the background ignores Ctrl-C
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def training(model: str, pairs: str, out: Path, workers: int) -> list[str]:
    """The flags of a run of 24 steps."""
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


def wait_for(done, process: subprocess.Popen) -> None:
    """Until `done()`; a run that ends or takes too long before that is an error."""
    for _ in range(6000):
        if done():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("nothing happened for a minute")


@pytest.fixture(scope="module")
def whole(model, pairs, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed run leaves, but for the file that names its folder."""
    out = tmp_path_factory.mktemp("whole")
    train(model, out, pairs=pairs, workers=0, **TRAIN)
    return {name: data for name, data in contents(out).items() if name != "config.json"}


def resumed(model: str, pairs: str, out: Path) -> dict[str, bytes]:
    train(model, out, pairs=pairs, workers=0, resume=True, **TRAIN)
    return {name: data for name, data in contents(out).items() if name != "config.json"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("to_all", [False, True])
def test_sigterm_saves_and_exits_0(model, pairs, tmp_path, whole, workers, to_all):
    """Whether the main process gets it, or the whole group as from a scheduler."""
    out = tmp_path / "out"
    process = start("train_dpo.py", *training(model, pairs, out, workers))
    wait_for(lambda: steps_in(out / "metrics.jsonl") >= 4, process)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    steps = len(read_lines(out / "metrics.jsonl"))
    assert process.returncode == 0 and f"terminated after step {steps}; --resume goes on" in said
    assert 4 <= steps < 24 and "Traceback" not in said
    refused(
        lambda: train(model, out, pairs=pairs, workers=0, **TRAIN),
        "holds an unfinished run; --resume goes on",
    )
    assert resumed(model, pairs, out) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_a_run(model, pairs, tmp_path, whole, workers):
    out = tmp_path / "out"
    process = start("train_dpo.py", *training(model, pairs, out, workers))
    wait_for(lambda: steps_in(out / "metrics.jsonl") >= 4, process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; what was written so far is whole" in said
    assert resumed(model, pairs, out) == whole


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_training_goes_on(model, pairs, tmp_path, whole, seed):
    """kill -9 at a random moment: of a step, of a checkpoint, or of what is written at the end."""
    rng, out = random.Random(seed), tmp_path / "out"
    process = start("train_dpo.py", *training(model, pairs, out, workers=0))
    after = rng.randrange(24)
    wait_for(lambda: steps_in(out / "metrics.jsonl") >= after, process)
    time.sleep(rng.random() * 0.05)
    process.kill()
    process.communicate()
    if not (out / "config.json").exists():  # before anything was written
        train(model, out, pairs=pairs, workers=0, **TRAIN)
    assert resumed(model, pairs, out) == whole
