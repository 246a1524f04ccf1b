"""minialign beside transformers and TRL, with the same weights, the same inputs and in one run.

    python -m tests.bench                 # a small LLaVA-1.6 of random weights on the CPU
    python -m tests.bench --size 7b       # LLaVA-1.6-7B's shapes in bfloat16 on a GPU, random weights

Before anything is timed each row checks that both sides do the same: same losses, gradients, tokens or tensors.
Ratios are the peer's medians over ours, of repeats that take turns. bench.json also holds the seconds and bytes.
"""

import datetime
import os
import platform
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from minialign.cli import parse_config, require, run_main
from minialign.files import write_json
from tests.bench import dpo, load, online, sampling
from tests.bench.models import make_folder
from tests.bench.sizes import SIZES, Size

ORDER = ("dpo-step", "dpo-step-cached-ref", "bdhs", "online-bdhs-overhead", "generate", "load")


@dataclass(frozen=True)
class Config:
    """Flags."""

    size: Literal["tiny", "7b"] = "tiny"  # the model and its inputs; 7b needs a GPU
    out: str = "bench.json"  # file to write


def machine(size: Size) -> dict:
    """Where and with what it was measured."""
    packages = ("torch", "transformers", "trl", "peft")
    return {
        "device": torch.cuda.get_device_name() if size.device == "cuda" else platform.machine(),
        "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def measure(size: Size, folder: Path) -> dict:
    """bench.json."""
    make_folder(size, folder)
    rows: dict[str, dict] = {}
    for part in (dpo, sampling, online, load):
        rows |= part.rows(size, folder)
    return {"machine": machine(size), "size": size.facts(), "rows": {name: rows[name] for name in ORDER}}


def table(bench: dict) -> str:
    """The rows for a terminal."""
    lines = [f"{'row':22}{'time':>8}{'memory':>8}{'ours':>11}{'peer':>11}{'ours':>10}{'peer':>10}"]
    for name, row in bench["rows"].items():
        if "overhead" in row:
            ratios = f"{row['overhead']:>+8.0%}{row['memory_overhead']:>+8.0%}"
        else:
            ratios = f"{row['time_ratio']:>7.2f}x{row['memory_ratio']:>7.2f}x"
        sides = [side for side in row.values() if isinstance(side, dict)]
        taken = "".join(f"{side['seconds']:>10.3f}s" for side in sides)
        lines.append(f"{name:22}{ratios}{taken}" + "".join(f"{side['peak'] / 1e6:>7,.0f} MB" for side in sides))
        lines += [f"  {row['work']}", f"  {row['checked']}"]
        lines += [f"  {fact.replace('_', ' ')} {row[fact]:.0%}" for fact in ("utilisation", "bandwidth_share")
                  if row.get(fact)]  # fmt: skip
    return "\n".join(lines)


def main(config: Config) -> None:
    """Measure, print, write."""
    size, out = SIZES[config.size], Path(config.out)
    message = f"--size {size.name}: needs a CUDA GPU, and there is none here; --size tiny runs on the CPU"
    require(size.device == "cpu" or torch.cuda.is_available(), message)
    require(out.parent.is_dir(), f"--out {out}: no such folder; make it first")
    warnings.simplefilter("ignore")  # of the peers about their own flags
    with tempfile.TemporaryDirectory() as folder:
        bench = measure(size, Path(folder))
    write_json(out, bench)
    print(table(bench))
    print(f"ratios are peer / ours, memory beyond the model's own; {out}")


if __name__ == "__main__":
    run_main(lambda: main(parse_config(Config, __doc__)))
