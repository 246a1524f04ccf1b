"""Where programs meet the embedded world: what `toy` and `oracle` stand for as a flag's value.

The core knows none of this: from here it is given what it understands already, a folder of a
model, a source of pictures, records, a benchmark, an annotator, a reward.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from minialign.align import claims
from minialign.align.annotators import ModelAnnotator, RewardAnnotator
from minialign.cli import require
from minialign.data.images import PictureFolder
from minialign.data.record_files import Records, open_pairs, open_records, read_records
from minialign.data.records import Record, instruct_record
from minialign.files import write_json, write_whole
from minialign.rlhf.scorers import HEAD_FILE, UserReward, load_function, load_reward_model
from minialign.sampling.assistant import Assistant
from minialign.toy import claims as toy_claims
from minialign.toy.benchmark import ToyBenchmark, false_words
from minialign.toy.corrupt import corrupted_pair
from minialign.toy.oracle import OracleAnnotator, oracle_reward
from minialign.toy.world import TOY_RECORDS, alignment_records, open_picture, scene_of
from minialign.training.outputs import Truth
from minialign.training.parallel import on_rank0
from minialign.training.progress import claim_run

CHECKPOINT = Path(__file__).parent / "toy" / "checkpoint"


def with_defaults(config, defaults: dict[str, tuple]):
    """The config with every flag that was not given at its value in `defaults`.

    There the paper's value stands first, the toy model's second.
    """
    toy = config.model == "toy"
    absent = {name: pair[toy] for name, pair in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **absent)


def model_folder(name: str, flag: str = "--model") -> Path:
    """`toy` names the embedded checkpoint; anything else is a folder."""
    folder = CHECKPOINT if name == "toy" else Path(name)
    remedy = "give a Hugging Face LLaVA folder (names on the hub are not fetched), or `toy`"
    require(folder.is_dir(), f"{flag} {name}: no such folder; {remedy}")
    is_run = (folder / "merged").is_dir() and not (folder / "tokenizer.json").exists()
    require(not is_run, f"{flag} {name}: is a run's folder; its model is {folder / 'merged'}")
    return folder


def picture_source(images: str) -> Callable[[str], Image.Image]:
    """What opens a picture by its name: `toy` draws the scene of that name, anything else is a
    folder.
    """
    if images == "toy":
        return open_picture
    message = f"--images {images}: no such folder; name that of the pictures, or `toy`"
    require(Path(images).is_dir(), message)
    return PictureFolder(images)


def picture_to_ask(images: str) -> str:
    """A picture that one may ask a trained model about, as `minialign.chat --image` has it."""
    return "test-000000.png" if images == "toy" else "PICTURE"


def truth_of(images: str) -> Truth | None:
    """What tells which words of a text are not true of a picture, by its name; None for pictures of
    which nobody knows.
    """
    if images == "toy":
        return lambda name, text: false_words(scene_of(name), text)
    return None


def records_of(
    data: str,
    form: str | None,
    limit: int | None,
    seed: int,
    skip_bad: bool,
    flag: str = "--data",
) -> list[Record]:
    """Records to sample for: a file's, or for `toy` the first of the alignment split."""
    if data != "toy":
        return read_records(data, form, limit, seed, skip_bad, flag)
    raws = alignment_records(limit or TOY_RECORDS)
    return [instruct_record(raw) for raw in raws]


def training_records(config) -> Records:
    """The records that RLHF takes prompts from: --data, or without it the embedded world's, which
    are written into --out.
    """
    data = config.data
    missing = "--data is missing; name a file of records or pairs"
    require(data is not None or config.images == "toy", missing)
    if data is None:
        claim_run(config)
        data = str(Path(config.out) / "data.json")
        count = config.limit or TOY_RECORDS
        on_rank0(lambda: write_json(Path(data), alignment_records(count)))
    return open_records(data, "--data", config.format, "give records or pairs")


def write_corrupted(path: Path, records: list[Record], seed: int) -> None:
    """Rule-corrupted pairs of some records, as a pairs file."""
    lines = [json.dumps(corrupted_pair(record, seed)) + "\n" for record in records]
    write_whole(path, "".join(lines))


def training_pairs(config) -> Records:
    """The pairs that a reward model learns from: --pairs, or without them rule-corrupted ones of
    the embedded world, which are written into --out.
    """
    pairs = config.pairs
    missing = "--pairs is missing; make one with sample_bdhs.py"
    require(pairs is not None or config.images == "toy", missing)
    if pairs is None:
        claim_run(config)
        pairs = str(Path(config.out) / "pairs.jsonl")
        records = records_of("toy", None, config.limit, config.seed, skip_bad=False)
        on_rank0(lambda: write_corrupted(Path(pairs), records, config.seed))
    return open_pairs(pairs, config.format)


def benchmark_of(images: str, split: str, count: int) -> ToyBenchmark | None:
    """What a run on the embedded world's pictures is evaluated by, before and after: `count`
    images of a split; none for other pictures.
    """
    return ToyBenchmark(split, count) if images == "toy" and count > 0 else None


def judge_of(assistant: Assistant, config, adapters_off: bool = False) -> ModelAnnotator:
    """A model as the annotator; `config` has the flags images, verdict, orders and seed."""
    asked = toy_claims.claims_of if config.images == "toy" else claims.claims_of
    both_orders = config.orders == "both"
    return ModelAnnotator(
        assistant, config.verdict, both_orders, config.seed, adapters_off, claims_of=asked
    )


def annotator_of(
    name: str, config, shard: bool = False
) -> OracleAnnotator | ModelAnnotator | RewardAnnotator:
    """`oracle`, `oracle:SHARE` that errs so often, or a folder's model, with `shard` dealt out to
    all processes; `config` has the flags of `judge_of`, template, device and dtype.
    """
    oracle, _, errs = name.partition(":")
    if oracle == "oracle":
        knows = "knows the embedded world alone; name a LLaVA folder"
        require(config.images == "toy", f"--annotator oracle: {knows}")
        number = re.fullmatch(r"\d*\.?\d+", errs or "0")
        remedy = "behind the colon stands how often it errs, between 0 and 1"
        require(number and float(number[0]) <= 1, f"--annotator {name}: {remedy}")
        return OracleAnnotator(float(number[0]))
    folder, dtype = model_folder(name, "--annotator"), getattr(torch, config.dtype)
    if (folder / HEAD_FILE).exists():
        return RewardAnnotator(load_reward_model(folder, config.device, dtype, shard))
    assistant = Assistant.from_folder(folder, config.device, dtype, config.template, shard=shard)
    assistant.announce(folder)
    return judge_of(assistant, config)


def scorer_of(name: str, config) -> Callable:
    """`oracle`, FILE.py:FUNCTION, or the folder of a reward model; `config` has the flags images,
    device and dtype.
    """
    if name == "oracle":
        knows = "knows the embedded world alone; give a reward model's folder"
        require(config.images == "toy", f"--reward oracle: {knows}")
        return oracle_reward
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return UserReward(load_function(Path(path), function), f"--reward {name}")
    folder = model_folder(name, "--reward")
    return load_reward_model(folder, config.device, getattr(torch, config.dtype))
