"""train_online.py and the programs of RLHF run on a few records, and annotators that follow a
script."""

import json
from pathlib import Path

import train_online
from minialign.align.annotators import Comparison, Verdict
from minialign.rlhf import ppo, rloo

RLHF = {"rloo": rloo, "ppo": ppo}
# What every run takes where a test says nothing else, and what train_online.py takes beside it.
DEFAULTS = {
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lr": 1e-3,
    "projector_lr": 1e-4,
    "epochs": 1,
    "batch_size": 4,
    "eval_images": 0,
    "max_new_tokens": 6,
    "workers": 0,
}
BDHS = {"rho_th": 0.7, "n_bdhs": 2}
TIMES = ("time/sampling", "time/training")


def online(model: str, out: Path, **changes) -> list[dict]:
    """The rows of metrics.jsonl that a run of train_online.py leaves, without its times."""
    flags = DEFAULTS | BDHS | changes
    train_online.main(train_online.Config(model=model, out=str(out), **flags))
    return rows_of(out)


def rlhf(method: str, model: str, out: Path, **changes) -> list[dict]:
    """The same of minialign.rlhf.rloo or ppo."""
    program, flags = RLHF[method], DEFAULTS | changes
    program.main(program.Config(model=model, out=str(out), **flags))
    return rows_of(out)


def rows_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in TIMES} for row in rows]


def weights_of(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


class Scripted:
    """Prefers by a score of the text: the higher the better; equal ones tie."""

    def __init__(self, score):
        self.score, self.seen = score, []

    def choose(self, comparisons: list[Comparison]) -> list[Verdict]:
        self.seen += comparisons
        scores = [[self.score(text) for text in comparison.responses] for comparison in comparisons]
        return [Verdict(None, "tie") if a == b else Verdict(int(b > a)) for a, b in scores]
