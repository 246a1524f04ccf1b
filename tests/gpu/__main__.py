"""Everything worth knowing on a GPU in one command, the most important first.

    python -m tests.gpu --out DIR --minutes 8                    # a GPU of 80 GB or more
    python -m tests.gpu --out DIR --size tiny --device cpu       # all of it here, on little
    python -m tests.gpu --out DIR --rows 'sampling,our-*'        # some of it

1. sampling and learning on the embedded world against the CPU
2. our own DPO step, decoding and BDHS on LLaVA-1.6-7B's shapes, plain and compiled, with kernels
3. the embedded world's whole road by each script and method, several beside one another
4. tests.bench: the same beside TRL and transformers
5. Liger's kernels, static caches, --recompute, several pairs, loading

Each row is a process of its own (tests/bench/rows.py) with a time limit, and is not begun where its
least time is not left. In DIR, written again after every row: table.txt, gpu.json, kernels.txt.
"""

import os
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch

from minialign.cli import require, run_main
from minialign.files import write_json, write_whole
from tests.bench import row as bench_row
from tests.bench.__main__ import machine, model_folder
from tests.bench.rows import Job, Runner, reason
from tests.bench.sizes import SIZES, Size, text_config, vision_config
from tests.bench.timing import in_words
from tests.gpu.roads import ROADS
from tests.gpu.row import ROAD, job

# Row -> (its limit, the least that must be left for it), in seconds on a GPU; in order.
CHECKS = {"sampling": (90, 20), "gradients": (90, 20)}
OURS = {
    "our-step": (90, 25),
    "our-decoding": (90, 30),
    "our-bdhs": (60, 20),
    "our-step-compile": (110, 60),
    "our-decoding-compile": (90, 50),
}
ROAD_SECONDS = (150, 40)
BENCH = {
    ("dpo-step", "dpo-step-cached-ref"): (150, 45),
    ("bdhs",): (120, 40),
    ("generate",): (180, 60),
    ("online-bdhs-overhead",): (90, 25),
}
EXTRA_BENCH = {
    ("dpo-step-liger",): (120, 45),
    ("bdhs-static-cache",): (100, 50),
    ("generate-static-cache",): (120, 60),
}
EXTRA_OURS = {
    "our-step-2-pairs": (60, 25),
    "our-step-4-pairs-recompute": (60, 30),
    "our-step-recompute": (60, 25),
}
LAST_BENCH = {("load",): (120, 50)}
PATIENCE = 3  # times as long may all take on a CPU, where two cores do all of this
LEAST = 15  # seconds that must be left there, at most
SHOWN = 150  # letters of an error
JOBS = min(12, os.cpu_count() or 1)


@dataclass(frozen=True)
class Config:
    """Flags."""

    out: str = "runs/gpu"  # folder to write
    minutes: float = 8.0  # what takes longer is left out, the least important first
    size: Literal["tiny", "7b"] = "7b"  # the model of the rows that are timed
    device: Literal["cpu", "cuda"] = "cuda"  # of all rows
    rows: str = "*"  # names or patterns of rows, with commas between them; else all
    jobs: int = JOBS  # checks or roads at a time; nothing runs beside what is timed


# ---------------------------------------------------------------- what is measured


def plan(size: Size, folder: Path) -> list[Job]:
    """All rows in their order; the model is made while the checks run, which do not need it."""

    def times(limit: float, least: float) -> tuple[float, float]:
        """On this device."""
        return (limit, least) if size.device == "cuda" else (PATIENCE * limit, min(LEAST, least))

    def own(row: str, limit: float, least: float, needs: str | None = "model") -> Job:
        return job(row, folder, *times(limit, least), needs, beside=needs is None)

    def benched(rows: dict) -> list[Job]:
        return [bench_row.job(names, folder, *times(*pair)) for names, pair in rows.items()]

    # On a CPU the compiler takes minutes: last, what wants it.
    def late(job: Job) -> bool:
        return size.device == "cpu" and "compile" in job.rows[0]

    made = bench_row.job(("model",), folder, *times(150, 30), beside=True)
    jobs = [
        made,
        *[own(row, *seconds, needs=None) for row, seconds in CHECKS.items()],
        *[own(row, *seconds) for row, seconds in OURS.items()],
        *[own(f"{ROAD}{name}", *ROAD_SECONDS, needs=None) for name in ROADS],
        *benched(BENCH),
        *benched(EXTRA_BENCH),
        *[own(row, *seconds) for row, seconds in EXTRA_OURS.items()],
        *benched(LAST_BENCH),
    ]
    return sorted(jobs, key=late)


def selected(jobs: list[Job], patterns: str) -> list[Job]:
    """The jobs of which a row is asked for, and what they need."""

    def asked(job: Job) -> bool:
        return any(fnmatchcase(row, p) for row in job.rows for p in patterns.split(","))

    needed = {job.needs for job in jobs if asked(job)}
    return [job for job in jobs if asked(job) or needed & set(job.rows)]


def scaled(config: Config) -> Size:
    """The size on this device; `tiny` is still smaller than tests.bench's, and each thing is
    measured once: that it can be is all that it is to show."""
    size = replace(SIZES[config.size], device=config.device)
    if size.name != "tiny":
        return size
    text, vision = text_config(579, 96, 256, 2, 3), vision_config(48, 3, 3, 6)
    return replace(size, text=text, vision=vision, loaded=text, repeats=1, new_tokens=16)


# ---------------------------------------------------------------- what is told


def summary(row: dict) -> str:
    """A row in one line."""
    if row["status"] != "ok":
        why = reason(row["error"])[:SHOWN]
        known = row.get("summary") or ours_alone(row)
        return why + (f" | so far: {known}" if known else "")
    if "summary" in row:
        return row["summary"]
    if "overhead" in row:
        return f"{row['overhead']:+.1%} time, {row['memory_overhead']:+.1%} memory"
    if "time_ratio" in row:
        ratios = f"{row['time_ratio']:.2f}x time, {row['memory_ratio']:.2f}x memory"
        peer = f"peer {row['peer']['seconds']:.3f} s {in_words(row['peer']['peak'])}"
        return f"{ratios}; {ours_alone(row)}; {peer}; {row['checked']}"
    return f"{in_words(row['bytes'])} in {row['shards']} shards"


def ours_alone(row: dict) -> str:
    """Our own side of a row with a peer, as far as it is known."""
    if "ours" not in row:
        return ""
    words = f"ours {row['ours']['seconds']:.3f} s {in_words(row['ours']['peak'])}"
    shares = [fact for fact in ("utilisation", "bandwidth_share") if row.get(fact)]
    return words + "".join(f", {fact.replace('_', ' ')} {row[fact]:.1%}" for fact in shares)


def table(rows: dict[str, dict]) -> str:
    """All rows for a terminal: how each ended, the seconds of its process, what it says."""
    lines = [f"{'row':27}{'status':9}{'s':>6}"]
    for name, row in rows.items():
        seconds = f"{row['seconds']:6.0f}" if "seconds" in row else " " * 6
        lines.append(f"{name:27}{row['status']:9}{seconds}  {summary(row)}")
    return "\n".join(lines) + "\n"


def kernels(rows: dict[str, dict]) -> str:
    """The kernels of all rows that have some."""
    texts = ["\n".join([name, *row["kernels"]]) for name, row in rows.items() if "kernels" in row]
    return "\n\n".join(texts) + "\n"


def main(config: Config) -> None:
    """Measure, write, print."""
    there = config.device == "cpu" or torch.cuda.is_available()
    require(there, "--device cuda: there is no CUDA GPU here; --device cpu --size tiny runs here")
    small = config.device == "cuda" or config.size == "tiny"
    require(small, "--device cpu: give --size tiny with it")
    require(config.minutes > 0, f"--minutes {config.minutes}: above 0")
    require(config.jobs >= 1, f"--jobs {config.jobs}: at least 1")
    out, size, begin = Path(config.out).resolve(), scaled(config), time.monotonic()
    head = {"machine": machine(size), "size": size.facts()}

    with model_folder(size) as name:
        folder = Path(name)
        size.save(folder)
        jobs = selected(plan(size, folder), config.rows)
        require(bool(jobs), f"--rows {config.rows}: names none of the rows")
        order = [row for job in jobs for row in job.rows]

        def report(found: dict[str, dict]) -> None:
            rows = {row: found[row] for row in order if row in found}
            taken = round(time.monotonic() - begin, 1)
            write_json(out / "gpu.json", head | {"seconds": taken, "rows": rows})
            write_whole(out / "table.txt", table(rows))
            write_whole(out / "kernels.txt", kernels(rows))

        Runner(report, 60 * config.minutes, config.jobs).run(jobs)

    print((out / "table.txt").read_text(), end="")
    print(f"{time.monotonic() - begin:.0f} s on {head['machine']['device']}; {out}")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
