"""train_online.py run on a few records, and annotators that follow a script."""

import json
from pathlib import Path

import train_online
from minialign.align.annotators import Comparison, Verdict

# What `online` takes where a test says nothing else.
DEFAULTS = {
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lr": 1e-3,
    "projector_lr": 1e-4,
    "epochs": 1,
    "batch_size": 4,
    "eval_images": 0,
    "rho_th": 0.7,
    "max_new_tokens": 6,
    "n_bdhs": 2,
    "workers": 0,
}
TIMES = ("time/sampling", "time/training")


def online(model: str, out: Path, **changes) -> list[dict]:
    """The rows of metrics.jsonl that a run leaves, without its times."""
    train_online.main(train_online.Config(model=model, out=str(out), **(DEFAULTS | changes)))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMES}
        for line in lines
    ]


def weights_of(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


class Scripted:
    """Prefers by a score of the text: the higher the better; equal ones tie."""

    both_orders = policy_off = False

    def __init__(self, score):
        self.score, self.seen = score, []

    def choose(self, comparisons: list[Comparison], features=None) -> list[Verdict]:
        self.seen += comparisons
        scores = [[self.score(text) for text in comparison.responses] for comparison in comparisons]
        return [Verdict(None, "tie") if a == b else Verdict(int(b > a)) for a, b in scores]
