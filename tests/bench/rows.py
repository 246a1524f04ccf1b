"""Rows that cost nothing but themselves: each is measured by a process of its own, in so much time.

`tests.bench` and `tests.gpu` are lists of such rows. The process writes down what it finds as soon
as it has it, whole (`Facts`). The `Runner` ends it where it takes too long, with all that it has
started, notes how each of its rows ended, has the report written again, and goes on.
"""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minialign.files import write_json

ROOT = Path(__file__).resolve().parents[2]
LINES, LETTERS = 60, 6000  # at most so much is kept of what a process said last, where it failed
# Ours begin with "error:".
EXCEPTION = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt|error)\b.*:")

# ---------------------------------------------------------------- in the row's process


class Facts:
    """What a process has found out about its rows so far, in a file that is whole at any time."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict] = {}

    def add(self, row: str, **facts) -> None:
        """Write facts down: they stay, whatever comes after."""
        self.rows.setdefault(row, {}).update(facts)
        write_json(self.path, self.rows)

    def finish(self, row: str, **facts) -> None:
        """The row's last facts: it is measured."""
        self.add(row, status="ok", **facts)

    def skip(self, row: str, why: str) -> None:
        """This row cannot be measured here."""
        self.add(row, status="skipped", error=why)


# ---------------------------------------------------------------- who starts them


@dataclass(frozen=True)
class Job:
    """A process and the rows that it measures; it is told with --out where its facts go."""

    rows: tuple[str, ...]
    command: list[str]
    limit: float  # seconds, after which it is ended
    least: float = 0.0  # seconds below which it is not begun
    needs: str | None = None  # a row without which it is not begun
    beside: bool = False  # it may run beside its neighbours: nothing is timed


def skipped(job: Job, why: str) -> dict[str, dict]:
    """Its rows, where it was not begun."""
    return {row: {"status": "skipped", "error": why} for row in job.rows}


class Runner:
    """Runs jobs in their order within so many seconds; `report` is given the rows so far, after
    each job."""

    def __init__(
        self,
        report: Callable[[dict[str, dict]], None],
        seconds: float = math.inf,
        side_by_side: int = 1,
    ):
        self.report, self.side_by_side = report, side_by_side
        self.end = time.monotonic() + seconds
        self.rows: dict[str, dict] = {}
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, jobs: list[Job]) -> dict[str, dict]:
        """All rows. Whatever ends this early ends what is still running, too."""
        with tempfile.TemporaryDirectory() as folder:
            for beside, group in itertools.groupby(jobs, lambda job: job.beside):
                with ThreadPoolExecutor(self.side_by_side if beside else 1) as pool:
                    try:
                        list(pool.map(partial(self.take, Path(folder)), group))
                    except BaseException:
                        self.stop()
                        raise
        return self.rows

    def stop(self) -> None:
        """End what is running; nothing more is begun."""
        self.stopped = True
        for process in list(self.running):
            end(process)

    def take(self, folder: Path, job: Job) -> None:
        """One job, if there is time for it."""
        left = self.end - time.monotonic()
        if self.stopped:
            return
        if job.needs and self.rows.get(job.needs, {}).get("status") != "ok":
            found = skipped(job, f"needs the row {job.needs}")
        elif left < job.least:
            why = f"no time: {max(0, left):.0f} s are left, and it wants {job.least:.0f}"
            found = skipped(job, why)
        else:
            found = self.measure(folder, job, min(job.limit, left))

        with self.lock:
            self.rows |= found
            self.report(self.rows)

    def measure(self, folder: Path, job: Job, seconds: float) -> dict[str, dict]:
        """The job's rows, and how each ended."""
        facts, log = folder / f"{job.rows[0]}.json", folder / f"{job.rows[0]}.log"
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if job.beside and self.side_by_side > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.side_by_side))

        begin = time.monotonic()
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*job.command, "--out", str(facts)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.add(process)
        try:
            ended = "ok" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            end(process)
            ended = "timeout"
        self.running.discard(process)

        took = round(time.monotonic() - begin, 1)
        message = last_words(log)
        if ended == "timeout":
            message = f"{message}\nnot done after {seconds:.3g} s"
        known = json.loads(facts.read_text()) if facts.exists() else {}
        return {row: ending(known.get(row, {}), ended, took, message) for row in job.rows}


def ending(facts: dict, ended: str, seconds: float, message: str) -> dict:
    """A row with its status: its own word if it has given one, else how its process ended."""
    status = facts.pop("status", "failed" if ended == "ok" else ended)
    error = {} if status in ("ok", "skipped") else {"error": message or "gave no result"}
    return {"status": status, "seconds": seconds} | error | facts


def reason(error: str) -> str:
    """The line of an error that says most: an exception's, if there is one, else the last.

    torchrun tells of its processes' ends after these have told of their exceptions.
    """
    lines = error.splitlines()
    named = [line for line in lines if EXCEPTION.match(line) and "ChildFailedError" not in line]
    return (named or lines)[-1]


def last_words(log: Path) -> str:
    """The end of what a process has said."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-LINES:])[-LETTERS:]


def end(process: subprocess.Popen) -> None:
    """End a process of ours with all that it has started, in sessions of their own, too."""
    if process.poll() is not None:
        return
    for pid in descendants(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have started (Linux)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:  # which grows meanwhile
        found += children.get(each, [])
    return found[1:]
