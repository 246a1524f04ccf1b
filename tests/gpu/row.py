"""One row of tests.gpu in a process of its own.

    python -m tests.gpu.row --row NAME --folder DIR --out FILE

The folder holds the size (size.json), and the model for rows that want it.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minialign.cli import require, run_main
from tests.bench.rows import Facts, Job
from tests.bench.sizes import Size
from tests.gpu import roads

ROAD = "road-"


def work_of(row: str):
    """What measures a row: a function of the row, the size, the folder and the facts.

    What needs torch is imported here, as the roads' processes do not.
    """
    if row.startswith(ROAD):
        return partial(roads.measure, row.removeprefix(ROAD))

    from tests.gpu import correct, ours

    return {
        "sampling": correct.measure_sampling,
        "gradients": correct.measure_gradients,
        "our-step": ours.measure_step,
        "our-step-compile": partial(ours.measure_step, compiled=True),
        "our-step-recompute": partial(ours.measure_step, recompute=True),
        "our-step-2-pairs": partial(ours.measure_step, pairs=2),
        "our-step-4-pairs-recompute": partial(ours.measure_step, pairs=4, recompute=True),
        "our-decoding": ours.measure_decoding,
        "our-decoding-compile": partial(ours.measure_decoding, compiled=True),
        "our-bdhs": ours.measure_bdhs,
    }[row]


@dataclass(frozen=True)
class Config:
    """Flags."""

    row: str = "sampling"  # which
    folder: str = ""  # of the size and the model
    out: str = ""  # file of the facts to write


def job(
    row: str,
    folder: Path,
    limit: float,
    least: float,
    needs: str | None = None,
    beside: bool = False,
) -> Job:
    """The process that measures a row."""
    flags = ["--row", row, "--folder", str(folder)]
    command = [sys.executable, "-m", "tests.gpu.row", *flags]
    return Job((row,), command, limit, least, needs, beside)


def main(config: Config) -> None:
    """Measure."""
    folder = Path(config.folder)
    require((folder / "size.json").is_file(), f"--folder {folder}: holds no size.json")
    work_of(config.row)(config.row, Size.of_folder(folder), folder, Facts(Path(config.out)))


if __name__ == "__main__":
    run_main(main, Config, __doc__)
