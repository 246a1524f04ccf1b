"""Progress of a training run: trained tensors, optimizer moments and the step, in one safetensors
file.

The data order follows from the seed and the step, and training draws no other random numbers, so
that a resumed run goes on bit for bit. No pickle is written or read.
"""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from minialign.cli import is_out_of_memory
from minialign.data.prefetch import load_ahead
from minialign.data.record_files import Records
from minialign.errors import UserError
from minialign.files import (
    append_lines,
    read_json,
    read_lines,
    require_same_settings,
    write_json,
    write_whole,
)
from minialign.model.hf_folder import check_tensors, opened, read_tensors
from minialign.model.llava import Llava
from minialign.model.lora import adapter_state
from minialign.training.optimizer import trained_parameters
from minialign.training.parallel import (
    fill_in,
    gather,
    on_rank0,
    rank,
    shard_batch,
    size,
    whole,
)

# In the progress bar, where they were logged.
SHOWN = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "objective/scores",
    "objective/kl",
    "sampled/length",
)

# What a resumed run may be given anew. The first five change the rounding of gradients alone; the
# rest do not touch them.
MAY_CHANGE = (
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


def require_same_flags(out: Path, config) -> None:
    """A resumed training must have the flags that its config.json notes; where there is none, it
    begins.

    `config` has a training script's flags.
    """
    if config.resume and (out / "config.json").exists():
        remedy = "give the old value, or leave --resume out and name another --out"
        require_same_settings(out / "config.json", asdict(config), MAY_CHANGE, remedy)


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


class TrainingLog:
    """The log and the checkpoints of a training run: `rows` so far, one more by `add`.

    In its `with` block SIGTERM lets the step in progress end; then the progress is saved, and the
    program exits with 0. A `UserError` there, or memory that has run out, saves what was done
    before it; of several processes the others may not have met it, and the last checkpoint stays.
    All of them hold the rows, the first one writes. A step of which some updates were made and
    others not is never saved.

    Where the KL to the reference passes `kl_stop`, the run is `stopped` and its progress saved; a
    resumed run, too, ends at such rows.
    """

    def __init__(
        self,
        out: Path,
        policy: Llava,
        optimizer: torch.optim.Optimizer,
        config,
        kl_stop: float | None = None,
    ):
        self.folder, self.file = out / "checkpoint", out / "metrics.jsonl"
        self.policy, self.optimizer, self.config = policy, optimizer, config
        self.kl_stop = kl_stop
        self.terminated = False
        self.bar: tqdm | None = None

        start = load_progress(self.folder, policy, optimizer) if config.resume else 0
        # Read by one process, as what a kill has cut off is taken away.
        rows = read_lines(self.file, "leave --resume out")[:start] if start and rank() == 0 else []
        self.rows: list[dict] = gather(rows)[0]
        if len(self.rows) < start:
            there = f"{len(self.rows)} of the checkpoint's {start} steps"
            raise UserError(f"{self.file}: {there}; leave --resume out")
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        on_rank0(lambda: write_whole(self.file, lines))
        self.stopped = passed_kl_stop(self.rows, self.kl_stop)
        self.updates = self.count_updates()
        if start:
            print(f"{self.folder}: {start} steps are done; going on from there")

    def steps(
        self, schedule: Sequence[list[int]], loader: Callable[[list[int]], list]
    ) -> Iterator[tuple[int, list]]:
        """(step, what `loader` makes of this process's records) of every step that is left.

        `schedule` holds the record numbers of all steps; they are loaded ahead by threads.
        """
        self.total = len(schedule)
        left = schedule[len(self.rows) :]

        def load(numbers: list[int]) -> list:
            return loader(shard_batch(numbers))

        with closing(load_ahead(left, load, self.config.workers)) as loaded:
            self.bar = tqdm(
                loaded, initial=len(self.rows), total=self.total, desc="train", disable=rank() > 0
            )
            for step, batches in enumerate(self.bar, start=len(self.rows)):
                if self.stopped:
                    return
                yield step, batches

    def add(self, row: dict) -> None:
        """Log a step that is done, and save the progress if it is time to."""
        self.rows.append(row)
        self.updates = self.count_updates()
        if rank() == 0:
            append_lines(self.file, [row])
        shown = {name: f"{row[name]:.3f}" for name in SHOWN if name in row}
        self.bar.set_postfix(shown)

        step = len(self.rows)
        due = step % self.config.save_every == 0 or step == self.total
        terminated = any(gather(self.terminated))
        self.stopped = passed_kl_stop(self.rows, self.kl_stop)
        if due or terminated or self.stopped:
            save_progress(self.folder, self.policy, self.optimizer, step)
        if terminated:
            if rank() == 0:
                print(f"terminated after step {step}; --resume goes on from there", file=sys.stderr)
            sys.exit(0)

    def __enter__(self) -> "TrainingLog":
        self.before = signal.signal(signal.SIGTERM, self.terminate)
        return self

    def terminate(self, *_) -> None:
        """SIGTERM has come."""
        self.terminated = True

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        signal.signal(signal.SIGTERM, self.before)
        whole_steps = self.rows and self.updates == self.count_updates()
        expected = kind is UserError or is_out_of_memory(error)
        if expected and size() == 1 and whole_steps:
            trained = trained_parameters(self.optimizer)
            if all(parameter.isfinite().all() for parameter in trained):
                save_progress(self.folder, self.policy, self.optimizer, len(self.rows))

    def count_updates(self) -> int:
        """Updates that the optimizer has made."""
        first = trained_parameters(self.optimizer)[0]
        return int(self.optimizer.state.get(first, {}).get("step", 0))


def passed_kl_stop(rows: list[dict], kl_stop: float | None) -> str | None:
    """Why RLHF has to end, read from the log's rows so that a resumed run ends there, too: the KL
    of the latest step that sampled, in nats per response, is above --kl-stop. Else None."""
    kls = [(row["step"], row["objective/kl"]) for row in rows if "objective/kl" in row]
    if kl_stop is None or not kls or kls[-1][1] <= kl_stop:
        return None
    step, kl = kls[-1]
    return f"step {step}: a KL of {kl:.2f} nats per response, above --kl-stop {kl_stop}"


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
                state.setdefault(name, torch.zeros_like(parameter))
                tensors[f"optimizer.{g}.{i}.{name}"] = state[name]
            state.setdefault("step", torch.zeros((), device=parameter.device))
            tensors[f"optimizer.{g}.{i}.step"] = state["step"]
    return tensors


def load_progress(folder: Path, model: Llava, optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_progress` wrote into model and optimizer; returns the number of steps done.

    That is 0 where a run was stopped before its first checkpoint: it begins anew, and leaves the
    same bytes.
    """
    path = folder / "progress.safetensors"
    if not path.exists():
        print(f"{path}: no checkpoint yet; beginning at the first step")
        return 0
    found, wanted = dict(read_tensors(path)), progress_tensors(model, optimizer)
    wanted_shapes = {name: tensor.shape for name, tensor in wanted.items()}
    found_shapes = {name: tensor.shape for name, tensor in found.items()}
    check_tensors(path, wanted_shapes, found_shapes)
    for name, tensor in wanted.items():
        fill_in(tensor, found[name])
    with opened(path) as file:
        noted = (file.metadata() or {}).get("progress")
    if noted is None:
        raise UserError(f"{path}: does not say which step it is of; leave --resume out")
    return json.loads(noted)["step"]
