"""Good input files to spoil, the scripts run on them by flags, what a bad one's error says."""

import json
import re
from pathlib import Path

from helpers import refused, toy_processor, toy_tokenizer
from script_runs import is_claim

import sample_bdhs
import train_dpo
from minialign.cli import parse_config
from minialign.data.collate import PairCollator
from minialign.data.record_files import open_pairs, read_records, usable_pairs
from minialign.data.records import Record
from minialign.toy import world

MESSAGE = {"role": "user", "content": "Q"}
DEEP, LONG_NUMBER = "[" * 100_000, "1" * 5000
# What is no data at all, for every reader: bytes, and what the message says of them.
NO_DATA = [
    (b"", "no usable record"),
    (b"\n", "no usable record"),
    (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", "line 1: not JSON"),
    ("[{}]".encode("utf-16"), "line 1: not JSON"),
    (b"\x00" * 50, "line 1: not JSON"),
    (DEEP.encode(), "not readable as JSON"),
    (LONG_NUMBER.encode(), "line 1: not JSON"),
    (b"5", "expected a JSON"),
    (b'"text"', "line 1: expected a JSON object"),
    (
        b'{"id": 1, "picture": "a.png"}',
        r"fields id, picture are of no known format .*; give one of these",
    ),
    (b"null", "expected a JSON"),
]
# What a message that says what to do has one of.
REMEDIES = (
    ";",
    "expected a JSON array",
    "at least",
    "between",
    "above",
    "below",
    "or more",
    "number of 64 bits",
)


def instruct(number: int = 0, **changes) -> dict:
    """A good LLaVA-Instruct record with a picture of the embedded world; None deletes a field."""
    raw = world.alignment_records(1, first=number)[0] | changes
    return {name: value for name, value in raw.items() if value is not None}


def pair(number: int = 0, **changes) -> dict:
    """A good line of a pairs file; None deletes a field."""
    bdhs = {"iterations": 1, "similarity": 0.5, "mask_seed": number, "guided": True, "rho_th": 0.7}
    raw = {
        "id": f"pair-{number}",
        "images": [world.image_name("alignment", number)],
        "prompt": "What is there?",
        "chosen": "A red cup.",
        "rejected": "A blue cup, perhaps.",
        "bdhs": bdhs,
    } | changes
    return {name: value for name, value in raw.items() if value is not None}


def talk(*turns: tuple) -> list[dict]:
    """LLaVA's form of a conversation."""
    return [{"from": role, "value": text} for role, text in turns]


def lines(*raws: dict | str) -> bytes:
    """JSON Lines; a text is a line as it is."""
    texts = (raw if isinstance(raw, str) else json.dumps(raw) for raw in raws)
    return "".join(text + "\n" for text in texts).encode("utf-8", "surrogatepass")


def array(*raws: object) -> bytes:
    """A JSON array."""
    return json.dumps(raws).encode("utf-8")


def sample(model: str, out: Path, *argv: str) -> None:
    """sample_bdhs.py, few tokens, greedily."""
    few = ["--rho-th", "0.7", "--max-new-tokens", "4", "--temperature", "0"]
    given = ["--model", model, "--out", str(out / "pairs.jsonl"), *few, *argv]
    sample_bdhs.main(parse_config(sample_bdhs.Config, "", given))


def train(model: str, out: Path, *argv: str) -> None:
    """train_dpo.py, one epoch of a small adapter."""
    few = ["--eval-images", "0", "--epochs", "1", "--lora-rank", "2"]
    given = ["--model", model, "--out", str(out), *few, *argv]
    train_dpo.main(parse_config(train_dpo.Config, "", given))


def records_in(path: Path, limit: int | None = None, skip_bad: bool = False) -> list[Record]:
    """What sample_bdhs.py reads of a data file."""
    return read_records(str(path), None, limit, 0, skip_bad)


def pairs_in(path: Path, limit: int | None = None, skip_bad: bool = False) -> list[Record]:
    """What train_dpo.py reads of a pairs file, pictures and lengths aside."""
    check = toy_collator().require_different
    records = usable_pairs(open_pairs(str(path), None), check, limit, 0, skip_bad)
    return [records.parse(number) for number in records.numbers]


def toy_collator(limit: int = 512, **options) -> PairCollator:
    """The scripts' collator for the toy model and pictures, by a limit of response tokens."""
    return PairCollator(toy_tokenizer(), toy_processor(), world.open_picture, limit, **options)


def left_in(folder: Path) -> list[str]:
    """All paths below a folder, which may not be there; marks and locks aside."""
    paths = [path for path in folder.rglob("*") if not is_claim(path)]
    return sorted(str(path.relative_to(folder)) for path in paths)


def gives_remedy(run, match: str, *named: object) -> None:
    """`run()` must raise a UserError of one line that matches, names these and says what to do."""
    message = refused(run, *named)
    assert re.search(match, message), f"{match!r} does not match {message!r}"
    assert any(mark in message for mark in REMEDIES), f"no remedy: {message}"
