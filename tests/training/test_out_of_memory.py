"""Memory that runs out ends in one line with a remedy that works, and the run goes on.

For real, under a limit on the address space (Linux), and on a GPU's error as torch words it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from input_files import train as train_by_flags
from script_runs import read_lines, train
from torchruns import ROOT

import sample_bdhs
import train_dpo
import train_online
from minialign import chat
from minialign.cli import is_out_of_memory, out_of_memory, run_main
from minialign.errors import UserError
from minialign.toy import world

INSIDE = """
import atexit, resource, runpy, sys
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmPeak"))
    print("PEAK", int(line.split()[1]) * 1024, file=sys.stderr)
atexit.register(peak)
sys.argv = sys.argv[2:]
sys.path.insert(0, ".")
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def limited(limit: int, program: str, flags: str) -> tuple[int, str, int]:
    """Exit code, last line of stderr, and peak of the address space, of a program under a limit."""
    words = [sys.executable, "-c", INSIDE, str(limit), program, *flags.split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    message, peak = done.stderr.rsplit("PEAK", 1)
    last = message.strip().splitlines()[-1] if message.strip() else ""
    return done.returncode, last, int(peak)


@pytest.fixture
def long_pairs(tmp_path) -> Path:
    """48 pairs whose responses have some 250 tokens each."""
    path = tmp_path / "pairs.jsonl"
    with open(path, "w") as file:
        for i in range(48):
            pair = {
                "id": str(i),
                "images": [world.image_name("alignment", i)],
                "prompt": "What is there?",
            }
            texts = {
                "chosen": "A red cup is at the top left. " * 25,
                "rejected": "There is no cup at all. " * 30,
            }
            file.write(json.dumps(pair | texts) + "\n")
    return path


# What a program is given, how many records are too many for the room left, and that room in MiB.
PROGRAMS = {
    "train_dpo.py": ("--pairs {pairs} --steps 1 --eval-images 0", 48, 400),
    "minialign.rlhf.rloo": ("--max-new-tokens 200 --steps 1 --eval-images 0", 32, 400),
    "sample_bdhs.py": ("--max-new-tokens 150 --n-bdhs 1", 96, 60),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_remedy_works(program, model, long_pairs, tmp_path):
    """A run of one record at a time, then one that takes more than the room left to it, then the
    remedy."""
    own, records, room = PROGRAMS[program]
    flags = f"--model {model} {own.format(pairs=long_pairs)} --limit"
    code, _, peak = limited(0, program, f"{flags} 1 --batch-size 1 --out {tmp_path}/small")
    assert code == 0

    limit, out = peak + room * 2**20, tmp_path / "large"
    flags = f"{flags} {records} --out {out} --batch-size"
    code, message, _ = limited(limit, program, f"{flags} {records}")
    assert code == 2 and message.startswith("error: out of memory; "), message

    if program == "sample_bdhs.py":
        assert "a smaller --batch-size" in message
        code, message, _ = limited(limit, program, f"{flags} 2")
        assert code == 0 and len(out.read_text().splitlines()) > 50, message
        return
    assert "--resume with --accumulate 2 or more" in message
    code, message, _ = limited(limit, program, f"{flags} {records} --resume --accumulate 16")
    assert code == 0 and (out / "report.html").exists(), message


GPU = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8 bytes."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(GPU),
        RuntimeError(CPU),
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    ],
)
def test_what_it_looks_like(error, capsys, monkeypatch):
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("a shape does not fit"))

    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        run_main(main, train_dpo.Config, "")
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.count("\n") == 1 and "--accumulate 2" in message


def test_remedies_are_flags_that_were_not_given():
    said = out_of_memory(train_online.Config(accumulate=4))
    assert "--accumulate 8" in said and "--recompute" in said and "--shard full" in said
    assert "--dtype bfloat16 in another --out" in said
    given = train_dpo.Config(recompute=True, shard="full", dtype="bfloat16")
    assert out_of_memory(given) == (
        "out of memory; go on by --resume with --accumulate 2 or more (a step in so many parts)"
    )
    assert "--accumulate" not in out_of_memory(train_dpo.Config(batch_size=4, accumulate=4))
    said = out_of_memory(sample_bdhs.Config())
    assert "--batch-size" in said and "--shard" not in said and "--resume" not in said
    said = out_of_memory(chat.Config(dtype="bfloat16"))
    assert said == "out of memory; give a smaller --max-new-tokens"


def test_while_it_samples_its_own_pairs(model, tmp_path, monkeypatch):
    """Parts of a step would not help there."""

    def failing(config):
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr(sample_bdhs, "main", failing)
    message = "while pairs were sampled; run `sample_bdhs.py --batch-size 8 --out .*--pairs"
    with pytest.raises(UserError, match=message):
        train(model, tmp_path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(GPU), RuntimeError(CPU)])
def test_what_was_done_is_saved_and_goes_on_in_smaller_parts(
    error, model, pairs, tmp_path, monkeypatch
):
    """In the fourth step, half of which is done: the three before it are there, and the rest is the
    same."""
    whole = train(model, tmp_path / "whole", pairs=pairs, epochs=2, lr=3e-3)
    real, calls = train_dpo.dpo_loss, []

    def failing(*given):
        calls.append(given)
        if len(calls) == 4:
            raise error
        return real(*given)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(train_dpo, "dpo_loss", failing)
        train(model, tmp_path / "cut", pairs=pairs, epochs=2, lr=3e-3)
    assert len(read_lines(tmp_path / "cut/metrics.jsonl")) == 3
    flags = {"pairs": pairs, "epochs": 2, "lr": 3e-3, "accumulate": 2, "recompute": True}
    rows = train(model, tmp_path / "cut", resume=True, **flags)
    assert rows[:3] == whole[:3] and len(rows) == len(whole)
    for row, also in zip(rows, whole, strict=True):
        assert row == pytest.approx(also, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("flag", ["--lr=1e-5", "--batch-size=3", "--dtype=bfloat16", "--seed=9"])
def test_what_changes_the_gradient_is_refused(flag, undisturbed, model, pairs, tmp_path):
    config = json.loads((undisturbed / "config.json").read_text())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    given = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in config.items()
        if v is not None and k not in ("out", "resume") and not isinstance(v, bool)
    ]
    with pytest.raises(Exception, match=f"of another {flag[2:].split('=')[0].replace('-', '_')}"):
        train_by_flags(model, tmp_path / "out", *given, flag, "--resume")
