"""Progress of a training run: trained tensors, optimizer moments and the step, in one safetensors
file.

The data order follows from the seed and the step, and training draws no other random numbers, so
that a resumed run goes on bit for bit. No pickle is written or read.
"""

import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from minialign.claims import claim_folder, require_own_folder, set_aside
from minialign.cli import is_out_of_memory
from minialign.data.prefetch import load_ahead
from minialign.data.record_files import Records
from minialign.data.templates import asked_form
from minialign.errors import UserError
from minialign.fields import read_fields, text
from minialign.fields import whole as whole_number
from minialign.files import (
    append_lines,
    read_json,
    read_lines,
    require_same_settings,
    write_json,
    write_whole,
)
from minialign.model.hf_folder import (
    check_tensors,
    read_note,
    read_tensors,
    require_finite,
)
from minialign.model.llava import Llava
from minialign.model.lora import adapter_state
from minialign.training.optimizer import BEGIN_ANEW, trained_parameters
from minialign.training.parallel import (
    fill_in,
    gather,
    on_rank0,
    rank,
    shard_batch,
    size,
    whole,
)

EXAMPLES = 6  # of what was sampled, in the log
PROGRESS = "checkpoint/progress.safetensors"  # in --out
NOTE = {"step": whole_number(1, 2**62), "log": text()}  # in its metadata
ENDING = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, and Ctrl-C
# Said when a run begins: what decides how much it learns.
TOLD = ("beta", "lr", "projector_lr", "batch_size", "epochs", "warmup", "schedule")
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


def require_run_folder(config) -> None:
    """Refuse an --out that this training cannot have: another program's, one that holds an
    unfinished run or, with --resume, a run of other flags.

    `config` has a training script's flags, and the script's name.
    """
    require_own_folder(config, config.program)
    out = Path(config.out)
    if config.resume and (out / "config.json").exists():
        remedy = "give the old value, or leave --resume out and name another --out"
        require_same_settings(out / "config.json", asdict(config), MAY_CHANGE, remedy)
        # Of one that --kl-stop has ended more may be left to do.
        if finished(out) and "stopped" not in read_json(out / "result.json", remedy):
            print(f"--out {out}: this run is finished; nothing is left to do")
            sys.exit(0)
    if not config.resume and (out / PROGRESS).exists() and not finished(out):
        message = "holds an unfinished run; --resume goes on with it, or name another --out"
        raise UserError(f"--out {out}: {message}")


def claim_run(config) -> None:
    """Take --out for this run alone; a finished run that is there gets another name.

    By one process, while the others wait. What is written from here on lands in it.
    """

    def claim() -> None:
        out = Path(config.out)
        claim_folder(out, config.program)
        require_run_folder(config)  # another run may have ended there, while this one was loading
        if not config.resume and finished(out):
            set_aside(out)
            claim_folder(out, config.program)

    on_rank0(claim)


def finished(out: Path) -> bool:
    """Whether a run has left all that it leaves: the report comes last."""
    return (out / "report.html").exists()


def begin(config, records: Records, weights: str) -> None:
    """Take --out, and note flags and data there; a resumed run must find the same data."""
    claim_run(config)
    out = Path(config.out)
    data = {"pairs": len(records.numbers), "hash": records.file.hash(), "weights": weights}
    data["template"] = asked_form(config.template)
    path = out / "checkpoint/data.json"

    def note() -> None:
        """By one process, while the others wait."""
        path.parent.mkdir(exist_ok=True)
        if config.resume and (out / PROGRESS).exists():
            if read_json(path, "leave --resume out") != data:
                what = "pairs, model, template, annotator or reward are not those"
                message = f"--resume: {what} that {path} was made for"
                raise UserError(f"{message}; leave --resume out")
        write_json(out / "config.json", asdict(config) | {"resume": False})
        write_json(path, data)

    on_rank0(note)
    shown = [f"{name} {getattr(config, name)}" for name in TOLD if hasattr(config, name)]
    print(f"{len(records.numbers)} records; {', '.join(shown)}")


class TrainingLog:
    """The log and the checkpoints of a training run: `rows` so far, one more by `add`.

    In its `with` block SIGTERM, or Ctrl-C, lets the step in progress end; then the progress is
    saved, and the program exits with 0 (Ctrl-C: 130; a second one does not wait). A `UserError`
    there, or memory that has run out, saves what was done before it; of several processes the
    others may not have met it, and the last checkpoint stays. All of them hold the rows, the first
    one writes. A step of which some updates were made and others not is never saved.

    Where the KL to the reference passes `kl_stop`, the run is `stopped` and its progress saved; a
    resumed run, too, ends at such rows.
    """

    def __init__(
        self,
        policy: Llava,
        optimizer: torch.optim.Optimizer,
        config,
        kl_stop: float | None = None,
    ):
        self.path, self.file = Path(config.out) / PROGRESS, Path(config.out) / "metrics.jsonl"
        self.policy, self.optimizer, self.config = policy, optimizer, config
        self.kl_stop = kl_stop
        self.ended_by: int | None = None  # the signal that has come
        self.bar: tqdm | None = None

        start, log_hash = 0, ""
        if config.resume:
            start, log_hash = load_progress(self.path, policy, optimizer)
        # Read by one process, as what a kill has cut off is taken away.
        rows = read_lines(self.file, "leave --resume out")[:start] if start and rank() == 0 else []
        self.rows: list[dict] = gather(rows)[0]
        if start and hash_of(self.rows) != log_hash:
            message = f"not the log of the {start} steps that {self.path} was saved after"
            raise UserError(f"{self.file}: {message}; leave --resume out and name another --out")
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        on_rank0(lambda: write_whole(self.file, lines))
        self.stopped = passed_kl_stop(self.rows, self.kl_stop)
        self.updates = self.count_updates()
        if start:
            print(f"{self.path}: {start} steps are done; going on from there")

    def steps(
        self, schedule: Sequence[list[int]], loader: Callable[[list[int], int], list]
    ) -> Iterator[tuple[int, list]]:
        """(step, what `loader` makes of this process's records) of every step that is left.

        `schedule` holds the record numbers of all steps; they are loaded ahead by threads.
        """
        self.total = len(schedule)
        left = range(len(self.rows), self.total)

        def load(step: int) -> list:
            return loader(shard_batch(schedule[step]), step)

        with closing(load_ahead(left, load, self.config.workers)) as loaded:
            self.bar = tqdm(
                loaded, initial=len(self.rows), total=self.total, desc="train", disable=rank() > 0
            )
            for step, batches in zip(left, self.bar, strict=True):
                if self.stopped:
                    return
                yield step, batches

    def add(self, row: dict, example: dict | None = None) -> None:
        """Log a step that is done, and save the progress if it is time to. An `example` of what was
        sampled is kept in a few rows, from the first step to the last.
        """
        if example and len(self.rows) % -(-self.total // EXAMPLES) == 0:
            row = row | {"example": example}
        self.rows.append(row)
        self.updates = self.count_updates()
        if rank() == 0:
            append_lines(self.file, [row])
        shown = {name: f"{row[name]:.3f}" for name in SHOWN if name in row}
        self.bar.set_postfix(shown)

        step = len(self.rows)
        due = step % self.config.save_every == 0 or step == self.total
        ended_by = next((number for number in gather(self.ended_by) if number), None)
        self.stopped = passed_kl_stop(self.rows, self.kl_stop)
        if due or ended_by or self.stopped:
            save_progress(self.path, self.policy, self.optimizer, self.rows)
        if ended_by:
            if rank() == 0:
                print(f"ended after step {step}; --resume goes on from there", file=sys.stderr)
            sys.exit(130 if ended_by == signal.SIGINT else 0)

    def __enter__(self) -> "TrainingLog":
        self.before = {number: signal.signal(number, self.end) for number in ENDING}
        return self

    def end(self, number: int, _) -> None:
        """SIGTERM or Ctrl-C has come; the next one ends the program at once."""
        self.ended_by = number
        signal.signal(number, self.before[number])

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        whole_steps = self.rows and self.updates == self.count_updates()
        expected = kind is UserError or is_out_of_memory(error)
        if expected and size() == 1 and whole_steps:
            # Where that fails, too, what has ended the run is said.
            with suppress(UserError, OSError, SafetensorError):
                save_progress(self.path, self.policy, self.optimizer, self.rows)

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


def hash_of(rows: list[dict]) -> str:
    """A short name of a log, by which the checkpoint knows its own; but for the seconds that steps
    took.
    """
    lasting = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return hashlib.sha256(json.dumps(lasting).encode()).hexdigest()[:16]


def save_progress(
    path: Path, model: Llava, optimizer: torch.optim.Optimizer, rows: list[dict]
) -> None:
    """Write the state after the steps of the log's `rows`, whole; weights that are none are
    refused.

    Whole tensors, so that any number of processes goes on from it.
    """
    tensors = whole(progress_tensors(model, optimizer))

    def write() -> None:
        """By one process, while the others wait."""
        remedy = f"what was saved before it stays; {BEGIN_ANEW}"
        for name, tensor in tensors.items():
            require_finite(f"step {len(rows)}: {name}", tensor, remedy)
        partial = path.with_name(f".{path.name}.partial")
        note = {"step": len(rows), "log": hash_of(rows)}
        save_file(tensors, partial, {"progress": json.dumps(note)})
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


def load_progress(path: Path, model: Llava, optimizer: torch.optim.Optimizer) -> tuple[int, str]:
    """Read what `save_progress` wrote into model and optimizer; returns the number of steps done,
    and the hash of their log.

    That is 0 where a run was stopped before its first checkpoint: it begins anew, and leaves the
    same bytes.
    """
    if not path.exists():
        print(f"{path}: no checkpoint yet; beginning at the first step")
        return 0, ""
    found, wanted = dict(read_tensors(path)), progress_tensors(model, optimizer)
    wanted_shapes = {name: tensor.shape for name, tensor in wanted.items()}
    found_shapes = {name: tensor.shape for name, tensor in found.items()}
    check_tensors(path, wanted_shapes, found_shapes)
    for name, tensor in wanted.items():
        fill_in(tensor, found[name])
    problem = "does not say which step it is of; leave --resume out and name another --out"
    note = read_fields(path, read_note(path, "progress", problem), NOTE)
    return note["step"], note["log"]
