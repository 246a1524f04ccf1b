"""Progress of a training run: trained tensors, optimizer moments and the step, in one safetensors
file.

The data order follows from the seed and the step, and training draws no other random numbers, so
that a resumed run goes on bit for bit. No pickle is written or read."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from minialign.checkpoint import check_tensors, opened, read_tensors
from minialign.cli import is_out_of_memory
from minialign.data import Records
from minialign.errors import UserError
from minialign.files import append_lines, read_json, read_lines, write_json, write_whole
from minialign.llava import Llava
from minialign.lora import adapter_state
from minialign.parallel import fill_in, gather, on_rank0, rank, size, whole


def require_same_settings(
    path: Path, settings: dict, may_change: tuple[str, ...], remedy: str
) -> None:
    """A continued run must have the settings that `path` notes of the run so far, but for those
    that `may_change`."""
    before, settings = (
        read_json(path, remedy),
        json.loads(json.dumps(settings)),
    )  # as a file gives them back
    for name, value in settings.items():
        if name not in may_change and before.get(name) != value:
            raise UserError(
                f"{path}: of another {name}, {before.get(name)!r} and not {value!r}; {remedy}"
            )


def require_same_flags(out: Path, config) -> None:
    """A resumed training must have the flags that its config.json notes; where there is none, it
    begins.

    `config` has a training script's flags.
    """
    if config.resume and (out / "config.json").exists():
        # The first five change the rounding of gradients alone; the rest do not touch them.
        may_change = (
            "accumulate",
            "recompute",
            "compile",
            "device",
            "shard",
            "workers",
            "resume",
            "out",
            "skip_bad_records",
            "ref_cache",
            "kl_stop",
        )
        remedy = "give the old value, or leave --resume out and name another --out"
        require_same_settings(out / "config.json", asdict(config), may_change, remedy)


def begin(out: Path, config, records: Records, weights: str) -> None:
    """Note flags and data of a training in `out`; a new one takes an earlier one's results away
    first."""

    def note() -> None:
        """By one process, while the others wait."""
        if not config.resume:
            remove_results(out)
        write_json(out / "config.json", asdict(config) | {"resume": False})
        require_same_data(out / "checkpoint", records, weights, config.resume)

    on_rank0(note)


def require_same_data(folder: Path, records: Records, weights: str, resume: bool) -> None:
    """Note which pairs and base weights a run trains on; a resumed run must find the same ones."""
    data = {"pairs": len(records.numbers), "hash": records.file.hash(), "weights": weights}
    path = folder / "data.json"
    if resume and path.exists() and read_json(path, "leave --resume out") != data:
        raise UserError(
            f"--resume: pairs or model are not those that {path} was made for; leave --resume out"
        )
    write_json(path, data)


def remove_results(out: Path) -> None:
    """Take away what an earlier run left, which nobody must take for this one's; an unfinished one
    is refused."""
    if not out.exists():
        return
    if (out / "checkpoint/progress.safetensors").exists() and not (out / "report.html").exists():
        raise UserError(
            f"--out {out}: holds an unfinished run; --resume goes on with it, or name another --out"
        )
    if (out / "report.html").exists():
        print(f"{out}: the finished run there is replaced")
    for old in ("checkpoint/progress.safetensors", "result.json", "counts.json", "report.html"):
        (out / old).unlink(missing_ok=True)
    for old in ("adapter", "merged"):
        shutil.rmtree(out / old, ignore_errors=True)


class Run:
    """The log and the checkpoints of a training run: `rows` so far, one more by `add`.

    In its `with` block SIGTERM lets the step in progress end; then the progress is saved, and the
    program exits with 0. A `UserError` there, or memory that has run out, saves what was done
    before it; of several processes the others may not have met it, and the last checkpoint stays.
    All of them hold the rows, the first one writes. `watch(rows)` may say why the run has to end,
    which is then `stopped`, and the progress is saved; a resumed run, too, ends at such rows. A
    step of which some updates were made and others not is never saved."""

    def __init__(
        self,
        out: Path,
        model: Llava,
        optimizer: torch.optim.Optimizer,
        resume: bool,
        watch: Callable[[list[dict]], str | None] | None = None,
    ):
        self.folder, self.log, self.model, self.optimizer = (
            out / "checkpoint",
            out / "metrics.jsonl",
            model,
            optimizer,
        )
        self.start = load_progress(self.folder, model, optimizer) if resume else 0
        rows = (
            read_lines(self.log, "leave --resume out")[: self.start]
            if self.start and rank() == 0
            else []
        )
        self.rows = gather(rows)[0]  # read by one process, as what a kill has cut off is taken away
        if len(self.rows) < self.start:
            raise UserError(
                f"{self.log}: {len(self.rows)} of the checkpoint's {self.start} steps; leave --resume out"
            )
        on_rank0(
            lambda: write_whole(self.log, "".join(json.dumps(row) + "\n" for row in self.rows))
        )
        self.terminated, self.watch = False, watch or (lambda rows: None)
        self.stopped, self.updates = self.watch(self.rows), self.count_updates()
        if self.start:
            print(f"{self.folder}: {self.start} steps are done; going on from there")

    def add(self, row: dict, save: bool) -> None:
        """Log a step that is done, and save after it if `save`."""
        self.rows.append(row)
        self.updates = self.count_updates()
        if rank() == 0:
            append_lines(self.log, [row])
        terminated, self.stopped = any(gather(self.terminated)), self.watch(self.rows)
        if save or terminated or self.stopped:
            save_progress(self.folder, self.model, self.optimizer, len(self.rows))
        if terminated:
            if rank() == 0:
                print(
                    f"terminated after step {len(self.rows)}; --resume goes on from there",
                    file=sys.stderr,
                )
            sys.exit(0)

    def __enter__(self) -> "Run":
        self.before = signal.signal(signal.SIGTERM, self.terminate)
        return self

    def terminate(self, *_) -> None:
        """SIGTERM has come."""
        self.terminated = True

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        signal.signal(signal.SIGTERM, self.before)
        trained = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        whole_steps = self.rows and self.updates == self.count_updates()
        expected = kind is UserError or is_out_of_memory(error)
        if expected and size() == 1 and whole_steps and all(p.isfinite().all() for p in trained):
            save_progress(self.folder, self.model, self.optimizer, len(self.rows))

    def count_updates(self) -> int:
        """Updates that the optimizer has made."""
        state = self.optimizer.state.get(self.optimizer.param_groups[0]["params"][0], {})
        return int(state.get("step", 0))


def save_progress(folder: Path, model: Llava, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write `folder`/progress.safetensors, whole: the state after `step` optimizer steps.

    Whole tensors, so that any number of processes goes on from it.
    """
    tensors = whole(progress_tensors(model, optimizer))

    def write() -> None:
        """By one process, while the others wait."""
        folder.mkdir(parents=True, exist_ok=True)
        partial, path = folder / ".progress.partial", folder / "progress.safetensors"
        save_file(tensors, partial, {"progress": json.dumps({"step": step})})
        partial.replace(path)

    on_rank0(write)


def progress_tensors(model: Llava, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Trained tensors by name; moments by group and index, zero before the first step."""
    tensors = {f"model.{name}": tensor for name, tensor in adapter_state(model).items()}
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                tensors[f"optimizer.{g}.{i}.{name}"] = state.setdefault(
                    name, torch.zeros_like(parameter)
                )
            tensors[f"optimizer.{g}.{i}.step"] = state.setdefault(
                "step", torch.zeros((), device=parameter.device)
            )
    return tensors


def load_progress(folder: Path, model: Llava, optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_progress` wrote into model and optimizer; returns the number of steps done.

    That is 0 where a run was stopped before its first checkpoint: it begins anew, and leaves the
    same bytes."""
    path = folder / "progress.safetensors"
    if not path.exists():
        print(f"{path}: no checkpoint yet; beginning at the first step")
        return 0
    found, wanted = dict(read_tensors(path)), progress_tensors(model, optimizer)
    shapes = [{name: t.shape for name, t in tensors.items()} for tensors in (wanted, found)]
    check_tensors(path, *shapes)
    for name, tensor in wanted.items():
        fill_in(tensor, found[name])
    with opened(path) as file:
        noted = (file.metadata() or {}).get("progress")
    if noted is None:
        raise UserError(f"{path}: does not say which step it is of; leave --resume out")
    return json.loads(noted)["step"]
