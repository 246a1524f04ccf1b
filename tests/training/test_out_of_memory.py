"""Memory that runs out ends in one line with a remedy that works, and the run goes on.

For real, under a limit on the address space (Linux), and on a GPU's error as torch words it.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from forks import Forked
from input_files import train as train_by_flags
from online_runs import rlhf
from script_runs import read_lines, train
from torchruns import finish

import sample_bdhs
import train_dpo
import train_online
from minialign import annotate, chat, evaluate
from minialign.cli import is_out_of_memory, out_of_memory, parse_config, run_main
from minialign.errors import UserError
from minialign.rlhf import ppo, reward_model, rloo
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
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def limited(tmp_path):
    """Runs a script under a limit; gives exit code, last line of stderr, and peak of the address
    space."""
    inside = tmp_path / "inside.py"
    inside.write_text(INSIDE)

    def limited(limit: int, script: str, flags: str) -> tuple[int, str, int]:
        done = finish(Forked(1, str(inside), [str(limit), script, *flags.split()]), 240)
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
        message, peak = done.stderr.rsplit("PEAK", 1)
        last = message.strip().splitlines()[-1] if message.strip() else ""
        return done.returncode, last, int(peak)

    return limited


@pytest.fixture
def long_pairs(tmp_path) -> Path:
    """12 pairs whose responses have some 130 tokens each."""
    path = tmp_path / "pairs.jsonl"
    with open(path, "w") as file:
        for i in range(12):
            pair = {
                "id": str(i),
                "images": [world.image_name("alignment", i)],
                "prompt": "What is there?",
            }
            texts = {
                "chosen": "A red cup is at the top left. " * 13,
                "rejected": "There is no cup at all. " * 16,
            }
            file.write(json.dumps(pair | texts) + "\n")
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_the_remedy_works(limited, model, long_pairs, tmp_path):
    """A run of one record, then of 12 at a time, which take more than the room left, then the
    remedy."""
    flags = f"--model {model} --pairs {long_pairs} --steps 1 --eval-images 0 --lora-rank 4"
    code, _, peak = limited(0, "train_dpo.py", f"{flags} --limit 1 --out {tmp_path}/small")
    assert code == 0

    limit, out = peak + 100 * 2**20, tmp_path / "large"
    flags += f" --batch-size 12 --out {out}"
    code, message, _ = limited(limit, "train_dpo.py", flags)
    assert code == 2 and message.startswith("error: out of memory; "), message
    assert "--resume with --accumulate 2 or more" in message
    code, message, _ = limited(limit, "train_dpo.py", f"{flags} --resume --accumulate 12")
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


PROGRAMS = (train_dpo, train_online, sample_bdhs, rloo, ppo, reward_model, chat, annotate, evaluate)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_takes_the_flags_that_it_is_told(program):
    """Each remedy's flag, and --accumulate with the number that is told."""
    flags = re.findall(r"--[a-z-]+(?: (?:\d+|full|bfloat16))?", out_of_memory(program.Config()))
    assert flags
    for flag in flags:
        number = ["1"] if flag in ("--batch-size", "--max-new-tokens") else []
        if flag != "--out":
            given = parse_config(program.Config, "", flag.split() + number)
            assert given != program.Config(), flag


def test_while_it_samples_its_own_pairs(model, tmp_path, monkeypatch):
    """Parts of a step would not help there."""

    def failing(config):
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr(sample_bdhs, "main", failing)
    message = "while pairs were sampled; run `sample_bdhs.py --batch-size 8 --out .*--pairs"
    with pytest.raises(UserError, match=message):
        train(model, tmp_path)


@pytest.mark.parametrize(
    ("script", "loss", "error"),
    [
        (train_dpo, "dpo_loss", torch.OutOfMemoryError(GPU)),
        (rloo, "rloo_loss", RuntimeError(CPU)),
    ],
    ids=["train_dpo", "rloo"],
)
def test_what_was_done_is_saved_and_goes_on_in_smaller_parts(
    script, loss, error, model, pairs, tmp_path, monkeypatch
):
    """In the third step, half of which is done: the two before it are there, and the rest is the
    same."""

    def run(out: str, **changes) -> list[dict]:
        if script is rloo:
            return rlhf("rloo", model, tmp_path / out, limit=12, k=3, **changes)
        return train(model, tmp_path / out, pairs=pairs, lr=3e-3, **changes)

    whole = run("whole")
    real, calls = getattr(script, loss), []

    def failing(*given):
        calls.append(given)
        if len(calls) == 3:
            raise error
        return real(*given)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(script, loss, failing)
        run("cut")
    assert len(read_lines(tmp_path / "cut/metrics.jsonl")) == 2
    rows = run("cut", resume=True, accumulate=2, recompute=True)
    assert len(rows) == len(whole) > 2
    for row, also in zip(rows, whole, strict=True):
        assert row.pop("example", None) == also.pop("example", None)
        assert row == pytest.approx(also, abs=1e-4, rel=1e-4)
    names = row.keys() - {"time/sampling", "time/training"}
    assert all(rows[i][name] == whole[i][name] for i in range(2) for name in names)


@pytest.mark.parametrize("flag", ["--lr=1e-5", "--batch-size=3", "--dtype=bfloat16", "--seed=9"])
def test_what_changes_the_gradient_is_refused(flag, undisturbed, model, pairs, tmp_path):
    config = json.loads((undisturbed / "config.json").read_text())
    shutil.copytree(undisturbed, tmp_path / "out")
    given = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in config.items()
        if v is not None and k not in ("out", "resume") and not isinstance(v, bool)
    ]
    with pytest.raises(Exception, match=f"of another {flag[2:].split('=')[0].replace('-', '_')}"):
        train_by_flags(model, tmp_path / "out", *given, flag, "--resume")
