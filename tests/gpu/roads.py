"""The embedded world's whole road, by each script and method and with each means, on few
records."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.rows import ROOT, Facts, last_words
from tests.bench.sizes import Size

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
ANNOUNCED = " parameters, "  # in what a script says of its model
EVERY = 0.02  # seconds between two looks


@dataclass(frozen=True)
class Road:
    """A script, or a module that `-m` runs, its flags, and whether torchrun starts it."""

    program: str
    flags: tuple[str, ...] = ()
    torchrun: bool = False


BFLOAT16, SHARD = ("--dtype", "bfloat16"), ("--shard", "full")
RLOO, PPO, REWARD_MODEL = (f"minialign.rlhf.{name}" for name in ("rloo", "ppo", "reward_model"))


def online(method: str, *flags: str, torchrun: bool = False) -> Road:
    """A road of train_online.py; the world's exact truth annotates."""
    return Road("train_online.py", ("--method", method, *flags), torchrun)


# The most important first.
ROADS = {
    "dpo": Road("train_dpo.py"),
    "online-dpo": online("online-dpo"),
    "mixed-dpo": online("mixed-dpo"),
    "online-bdhs": online("online-bdhs"),
    "rloo": Road(RLOO),
    "ppo": Road(PPO),
    "sample": Road("sample_bdhs.py"),
    "reward": Road(REWARD_MODEL),
    "dpo-compile": Road("train_dpo.py", ("--compile",)),
    "dpo-recompute": Road("train_dpo.py", ("--recompute",)),
    "dpo-bf16": Road("train_dpo.py", BFLOAT16),
    "dpo-shard": Road("train_dpo.py", (*SHARD, *BFLOAT16), True),
    "online-bdhs-bf16": online("online-bdhs", *BFLOAT16),
    "online-bdhs-shard": online("online-bdhs", *SHARD, torchrun=True),
    "rloo-bf16": Road(RLOO, (*BFLOAT16, "--recompute")),
    "ppo-shard": Road(PPO, (*SHARD, *BFLOAT16), True),
    "sample-bf16": Road("sample_bdhs.py", BFLOAT16),
    "sample-shard": Road("sample_bdhs.py", (*SHARD, *BFLOAT16), True),
    "online-dpo-bf16": online("online-dpo", *BFLOAT16),
    "mixed-dpo-bf16": online("mixed-dpo", *BFLOAT16),
    "ppo-bf16": Road(PPO, BFLOAT16),
    "reward-bf16": Road(REWARD_MODEL, BFLOAT16),
    "rloo-compile": Road(RLOO, ("--compile",)),
}


def command(road: Road, size: Size, folder: Path) -> tuple[list[str], Path]:
    """The command line of a road into `folder`, and its pairs file, if it samples any."""
    few = size.name == "tiny"
    flags = ["--device", size.device, "--limit", "8" if few else "96", *road.flags]
    pairs = folder / "pairs.jsonl"
    if road.program == "sample_bdhs.py":
        flags += ["--out", str(pairs)]
    else:
        flags += ["--out", str(folder), "--batch-size", "4" if few else "16"]
        flags += ["--eval-images", "1" if few else "50"]
    if road.program == REWARD_MODEL:
        flags += ["--steps", "2" if few else "20"]

    start = [sys.executable, *(TORCHRUN if road.torchrun else [])]
    if road.program.endswith(".py"):
        return [*start, str(ROOT / road.program), *flags], pairs
    return [*start, "-m", road.program, *flags], pairs


def measure(name: str, row: str, size: Size, folder: Path, facts: Facts) -> None:
    """Walk a road: how long it took, how long from the announcement of the model to the first pair,
    and the script's last words. What it says is passed on, to be there if it hangs."""
    out = folder / "roads" / name
    out.mkdir(parents=True)
    words, pairs = command(ROADS[name], size, out)
    log, printed, announced = out / "log.txt", "", None
    begin = time.monotonic()
    with open(log, "wb") as output, open(log, errors="replace") as reader:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            now, new = time.monotonic(), reader.read()
            printed += new
            print(new, end="")
            if announced is None and ANNOUNCED in printed:
                announced = now
                facts.add(row, announced=round(now - begin, 1))
            if announced and "first_pair_seconds" not in facts.rows[row] and has_line(pairs):
                facts.add(row, first_pair_seconds=round(now - announced, 2))
            time.sleep(EVERY)
        print(reader.read(), end="")
    facts.add(row, road_seconds=round(time.monotonic() - begin, 1))
    if process.returncode:
        sys.exit(1)

    last = last_words(log).splitlines()[-1]
    parts = [*told(facts.rows[row]), *hallucinated(out / "result.json"), last[:60]]
    facts.finish(row, summary=", ".join(parts))


def has_line(file: Path) -> bool:
    """Whether something was written."""
    return file.exists() and file.stat().st_size > 0


def told(facts: dict) -> list[str]:
    """Seconds, in words."""
    words = [f"{facts['road_seconds']:.0f} s"]
    if "first_pair_seconds" in facts:
        words.append(f"first pairs {facts['first_pair_seconds']:.1f} s behind the model")
    return words


def hallucinated(result: Path) -> list[str]:
    """CHAIR_i before and after, where it was evaluated."""
    found = json.loads(result.read_text()) if result.exists() else {}
    if "after" not in found:
        return []
    before, after = (found[when]["chair_i"]["value"] for when in ("before", "after"))
    return [f"CHAIR_i {before:.3f} -> {after:.3f}"]
