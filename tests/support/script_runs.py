"""sample_bdhs.py, train_dpo.py and a reward model's training run on a few records, what a run
leaves, and a way to stop it."""

import json
from pathlib import Path

import sample_bdhs
import train_dpo
from minialign import claims
from minialign.rlhf import reward_model
from minialign.toy import world
from minialign.training import progress

# What `train` takes where a test says nothing else.
DEFAULTS = {
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lr": 1e-3,
    "projector_lr": 1e-4,
    "epochs": 1,
    "batch_size": 4,
    "eval_images": 0,
}


def is_claim(path: Path) -> bool:
    """Whether a file is there to keep a place for one run."""
    return path.name == claims.MARK or (path.name.startswith(".") and path.suffix == ".lock")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but the report, which has the time in it, marks and locks."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.html" and not is_claim(path)
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def sample(model: str, out: Path, **changes) -> list[dict]:
    """The pairs that a run of a few tokens leaves."""
    knobs = {
        "limit": 7,
        "rho_th": 0.7,
        "temperature": 1.0,
        "max_new_tokens": 5,
        "batch_size": 3,
        "n_bdhs": 3,
    }
    sample_bdhs.main(sample_bdhs.Config(model=model, out=str(out), **(knobs | changes)))
    return read_lines(out)


def instruct_file(path: Path, *talks: list[tuple[str, str]]) -> str:
    """A LLaVA-Instruct file on pictures of the embedded world."""
    raws = [
        {
            "id": i,
            "image": world.image_name("alignment", i),
            "conversations": [{"from": role, "value": text} for role, text in talk],
        }
        for i, talk in enumerate(talks)
    ]
    path.write_text(json.dumps(raws))
    return str(path)


def train(model: str, out: Path, **changes) -> list[dict]:
    """The rows of metrics.jsonl that a run leaves."""
    train_dpo.main(train_dpo.Config(model=model, out=str(out), **(DEFAULTS | changes)))
    return read_lines(out / "metrics.jsonl")


def train_reward(model: str, out: Path, **changes) -> list[dict]:
    """The same of minialign.rlhf.reward_model."""
    flags = DEFAULTS | {"workers": 0} | changes
    reward_model.main(reward_model.Config(model=model, out=str(out), **flags))
    return read_lines(out / "metrics.jsonl")


def stop_at(monkeypatch, where: str, count: int, script=train_dpo) -> None:
    """Ctrl-C behind the `count`-th call of a function: of one that the script calls in a step, as
    `preference_metrics` behind its backward pass, or of `append_lines`, when the step's metrics are
    written but not its checkpoint.
    """
    module = script if hasattr(script, where) else progress
    real, calls = getattr(module, where), []

    def stopping(*args):
        result = real(*args)
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(module, where, stopping)
