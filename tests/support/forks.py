"""Programs as processes that are forked from one which has imported torch and them: they begin at
once, where each of `python` or torchrun takes seconds of imports.

Run as a program this file is that one. For every order it forks a launcher, which forks a process
per rank, in a session of its own, and waits for them, as torchrun's agent does.
"""

import faulthandler
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def server() -> subprocess.Popen:
    """The process that is forked from; it ends with this one, as its input does."""
    words = [sys.executable, __file__]
    return subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, text=True)


class Forked:
    """Processes of one program, with what this project's tests use of a `subprocess.Popen`.

    `pid` is the launcher's where there are several, which know of each other by the variables that
    torchrun sets; one alone is as started by `python`.
    """

    def __init__(self, processes: int, program: str, flags: list[str]):
        from torch.distributed import TCPStore

        self.args, self.returncode = [program, *flags], None
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        environments: list[dict] = [{}]
        if processes > 1:
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            together = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self.store.port,
                "WORLD_SIZE": processes,
                "TORCHELASTIC_RUN_ID": "forked",
                "TORCHELASTIC_USE_AGENT_STORE": True,
                "TORCHELASTIC_RESTART_COUNT": 0,
            }
            environments = [
                together | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)
            ]
        order = {"folder": str(self.folder), "environments": environments, "words": self.args}
        print(json.dumps(order), file=server().stdin, flush=True)
        launcher, *pids = self.left("pids", 60)
        self.pid = launcher if processes > 1 else pids[0]

    def left(self, name: str, seconds: float) -> list[int]:
        """The numbers that the launcher has written down, or will within so many seconds."""
        end = time.monotonic() + seconds
        while not (self.folder / name).exists():
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, seconds)
            time.sleep(0.005)
        return json.loads((self.folder / name).read_text())

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """What all have said, when they have ended."""
        codes = self.left("codes", timeout)
        self.returncode = next((code for code in codes if code), 0)
        return tuple((self.folder / name).read_text() for name in ("stdout", "stderr"))

    def poll(self) -> int | None:
        """The first exit status that is not 0, if all have ended; a signal's number is negative."""
        if self.returncode is None and (self.folder / "codes").exists():
            self.communicate()
        return self.returncode


# ---------------------------------------------------------------- the process that is forked from


def serve() -> None:
    """Import what takes long, and fork for every line of stdin."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401

    import train_online  # noqa: F401
    from minialign.rlhf import ppo, reward_model, rloo  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for launchers
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            launch(**json.loads(line))


def launch(folder: str, environments: list[dict], words: list[str]) -> None:
    """Fork a process for each environment; leave their numbers, and how they have ended."""
    streams = [os.open(os.devnull, os.O_RDONLY)]
    for name in ("stdout", "stderr"):
        streams.append(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND))
    pids = []
    for environment in environments:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.environ.update({name: str(value) for name, value in environment.items()})
            run_program(words)
        pids.append(pid)
    leave(Path(folder, "pids"), [os.getpid(), *pids])
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    leave(Path(folder, "codes"), codes)
    os._exit(0)


def leave(path: Path, numbers: list[int]) -> None:
    """Write them, whole at any moment."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(numbers))
    partial.replace(path)


def run_program(words: list[str]) -> None:
    """As `python` does: a script, or a module by its name. At SIGABRT all stacks are told."""
    # torch makes its pool of threads anew behind a fork: before there are threads that want it.
    sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    sys.argv = words
    if words[0].endswith(".py"):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    if "RANK" in os.environ:  # as the programs end there: without Python's own tidying up
        sys.stdout.flush()
        os._exit(0)
    sys.exit()


if __name__ == "__main__":
    serve()
