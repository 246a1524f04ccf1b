"""minialign beside transformers and TRL, with the same weights, the same inputs and in one run.

    python -m tests.bench              # a small LLaVA-1.6 of random weights on the CPU
    python -m tests.bench --size 7b    # LLaVA-1.6-7B's shapes in bfloat16 on a GPU, random too

Before anything is timed each row checks that both sides do the same: same losses, gradients, tokens
or tensors. Ratios are the peer's medians over ours, of repeats that take turns. bench.json also
holds the seconds and bytes. Each row has a process of its own (rows.py): one that fails or hangs
appears with its status and what is known, and costs the others nothing.
"""

import datetime
import os
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from minialign.cli import require, run_main
from minialign.files import write_json
from tests.bench.row import job
from tests.bench.rows import Job, Runner, reason
from tests.bench.sizes import SIZES, Size

# Rows by the process that measures them.
PROCESSES = (
    ("dpo-step", "dpo-step-cached-ref"),
    ("bdhs",),
    ("online-bdhs-overhead",),
    ("generate",),
    ("load",),
)
ON_A_GPU = (("dpo-step-liger",), ("bdhs-static-cache",), ("generate-static-cache",))
LIMIT = {"cpu": 900, "cuda": 240}  # seconds of a process


@dataclass(frozen=True)
class Config:
    """Flags."""

    size: Literal["tiny", "7b"] = "tiny"  # the model and its inputs; 7b needs a GPU
    out: str = "bench.json"  # file to write


def installed(package: str) -> str | None:
    """Its version; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(size: Size) -> dict:
    """Where and with what it was measured."""
    packages = ("torch", "transformers", "trl", "peft")
    return {
        "device": torch.cuda.get_device_name() if size.device == "cuda" else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {name: installed(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def model_folder(size: Size) -> tempfile.TemporaryDirectory:
    """A folder for the model; on a GPU's machine in memory, if there is room for files in it."""
    fast = Path("/dev/shm")
    beside = fast if size.device == "cuda" and fast.is_dir() else None
    return tempfile.TemporaryDirectory(prefix="bench-", dir=beside)


def plan(size: Size, folder: Path) -> list[Job]:
    """The processes, the one that makes the model first."""
    rows = PROCESSES + (ON_A_GPU if size.device == "cuda" else ())
    return [job(names, folder, LIMIT[size.device]) for names in (("model",), *rows)]


def measure(size: Size, out: Path) -> dict:
    """bench.json, which is written after every row."""
    bench = {"machine": machine(size), "size": size.facts(), "rows": {}}

    def report(rows: dict[str, dict]) -> None:
        """The model is no row, but where there is none."""
        made = rows["model"]["status"] == "ok"
        bench["rows"] = {name: row for name, row in rows.items() if name != "model" or not made}
        write_json(out, bench)

    with model_folder(size) as folder:
        size.save(Path(folder))
        Runner(report).run(plan(size, Path(folder)))
    return bench


def table(bench: dict) -> str:
    """The rows for a terminal."""
    heads = [f"{head:>8}" for head in ("time", "memory")]
    heads += [f"{head:>11}" for head in ("ours", "peer")]
    heads += [f"{head:>10}" for head in ("ours", "peer")]
    lines = [f"{'row':22}{''.join(heads)}"]
    for name, row in bench["rows"].items():
        lines += table_lines(name, row)
    return "\n".join(lines)


def table_lines(name: str, row: dict) -> list[str]:
    """A row's lines: ratios, seconds and bytes of both sides, what was done and checked."""
    sides = [side for side in row.values() if isinstance(side, dict)]
    seconds = "".join(f"{side['seconds']:>10.3f}s" for side in sides)
    taken = seconds + "".join(f"{side['peak'] / 1e6:>7,.0f} MB" for side in sides)
    if row["status"] != "ok":
        return [f"{name:22}{row['status']:16}{taken}", f"  {reason(row['error'])}"]
    if "overhead" in row:
        ratios = f"{row['overhead']:>+8.0%}{row['memory_overhead']:>+8.0%}"
    else:
        ratios = f"{row['time_ratio']:>7.2f}x{row['memory_ratio']:>7.2f}x"
    lines = [f"{name:22}{ratios}{taken}", f"  {row['work']}", f"  {row['checked']}"]
    shares = [fact for fact in ("utilisation", "bandwidth_share") if row.get(fact)]
    return lines + [f"  {fact.replace('_', ' ')} {row[fact]:.0%}" for fact in shares]


def main(config: Config) -> None:
    """Measure, print, write."""
    size, out = SIZES[config.size], Path(config.out)
    message = "needs a CUDA GPU, and there is none here; --size tiny runs on the CPU"
    there = size.device == "cpu" or torch.cuda.is_available()
    require(there, f"--size {size.name}: {message}")
    require(out.parent.is_dir(), f"--out {out}: no such folder; make it first")
    bench = measure(size, out.resolve())
    print(table(bench))
    print(f"ratios are peer / ours, memory beyond the model's own; {out}")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
