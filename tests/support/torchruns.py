"""The scripts as several processes, by torchrun or forked; one that hangs says where."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from forks import ROOT, Forked


def command(processes: int, program: str, flags: str) -> list[str]:
    """`python program`, or `torchrun program` with several processes; a name without `.py` is a
    module."""
    words = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    if processes > 1:
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes}"
        words = [*torchrun.split(), *words]
    return [sys.executable, *words, *flags.split()]


def start(words: list[str]) -> subprocess.Popen:
    """At SIGABRT its processes write the stacks of all their threads to stderr, and end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children(process: subprocess.Popen | Forked) -> list[int]:
    """The processes that torchrun, or a launcher, has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def fail_with_stacks(process: subprocess.Popen | Forked, why: str) -> None:
    """Of the processes that torchrun has started, in their order; its own only where there are
    none."""
    pids = children(process)
    # Or it would end the others when the first has ended.
    kill([process.pid] if pids else [], signal.SIGSTOP)
    for pid in pids or [process.pid]:
        kill([pid], signal.SIGABRT)
        end = time.monotonic() + 5
        # One after the other, or their lines are mixed.
        while running(pid) and time.monotonic() < end:
            time.sleep(0.05)
    kill([process.pid], signal.SIGCONT)
    try:
        stdout, stderr = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        kill([*pids, process.pid], signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=30)
    pytest.fail(f"{why}: {' '.join(process.args)}\n{stdout[-3000:]}\n{stderr[-30000:]}")


def finish(process: subprocess.Popen | Forked, seconds: float) -> subprocess.CompletedProcess:
    """What it leaves; after so many seconds it counts as hanging."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        fail_with_stacks(process, f"not done after {seconds} s")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_for(done, process: subprocess.Popen | Forked, seconds: float = 120) -> None:
    """Until `done()`; a run that ends or takes too long before that is an error."""
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()[1][-3000:]
        if time.monotonic() > end:
            fail_with_stacks(process, f"not there after {seconds} s")
        time.sleep(0.05)


def launch(processes: int, program: str, flags: str) -> subprocess.CompletedProcess:
    """Forked; a program is what `command` takes."""
    return finish(Forked(processes, program, flags.split()), 240)


def run(processes: int, program: str, flags: str) -> subprocess.CompletedProcess:
    done = launch(processes, program, flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def killed(
    log: Path, process: subprocess.Popen | Forked, end: Callable
) -> subprocess.CompletedProcess:
    """A run of many steps that `end(process)` ends after its third step, as its log has them."""
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, process)
    end(process)
    return finish(process, 100)
