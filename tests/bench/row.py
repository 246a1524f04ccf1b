"""One row of the bench, or two that share what they need, in a process of its own.

    python -m tests.bench.row --row NAME --folder DIR --out FILE

The folder holds the size (size.json), and from the row `model` on the model.
"""

import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minialign.cli import require, run_main
from tests.bench import dpo, load, models, online, sampling
from tests.bench.rows import Facts, Job
from tests.bench.sizes import Size

# What a row's process does, by the first of its rows.
WORK = {
    "model": models.measure,
    "dpo-step": dpo.measure,
    "dpo-step-liger": dpo.measure_liger,
    "bdhs": sampling.measure_bdhs,
    "generate": sampling.measure_generate,
    "bdhs-static-cache": partial(sampling.measure_bdhs, static=True),
    "generate-static-cache": partial(sampling.measure_generate, static=True),
    "online-bdhs-overhead": online.measure,
    "load": load.measure,
}


@dataclass(frozen=True)
class Config:
    """Flags."""

    row: str = "model"  # which
    folder: str = ""  # of the size and the model
    out: str = ""  # file of the facts to write


def job(
    rows: tuple[str, ...], folder: Path, limit: float, least: float = 0.0, beside: bool = False
) -> Job:
    """The process that measures such rows on the folder's model, or makes it."""
    flags = ["--row", rows[0], "--folder", str(folder)]
    command = [sys.executable, "-m", "tests.bench.row", *flags]
    needs = None if rows == ("model",) else "model"
    return Job(rows, command, limit, least, needs, beside)


def main(config: Config) -> None:
    """Measure."""
    require(config.row in WORK, f"--row {config.row}: one of {', '.join(WORK)}")
    warnings.simplefilter("ignore")  # of the peers about their own flags
    folder = Path(config.folder)
    WORK[config.row](Size.of_folder(folder), folder, Facts(Path(config.out)))


if __name__ == "__main__":
    run_main(main, Config, __doc__)
