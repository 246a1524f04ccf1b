"""Preference pairs of a model's own answers: two are sampled to every prompt, and an annotator
ranks them.

    python -m minialign.ranked --out runs/ranked/pairs.jsonl    # the embedded world, ranked by its truth
    python -m minialign.ranked --model DIR --data FILE --images DIR --annotator DIR --out pairs.jsonl

So VLFeedback and RLAIF-V are made, and what a step of online DPO draws from the policy is this. Of
no use are ties, the same answer twice or two between which the annotator does not decide: they are
left out and counted. An example's answers depend on --seed and its id alone. The file, as
sample_bdhs.py writes one, appears whole."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from minialign import parallel
from minialign.annotator import load_annotator
from minialign.chat import Tokenizer, announce
from minialign.checkpoint import load_model, resolve_model
from minialign.cli import (
    require,
    require_at_least,
    require_device,
    require_images,
    require_new_file,
    require_seed,
    require_temperature,
    run_main,
)
from minialign.collate import PairBatch, PairCollator
from minialign.data import read_records, sift
from minialign.errors import UserError
from minialign.files import write_whole
from minialign.generate import Sampling
from minialign.images import ImageProcessor
from minialign.llava import Llava
from minialign.records import FormatName, preference_fields
from minialign.rollout import RankedPairs, Sampler, features_of


@dataclass(frozen=True)
class Config:
    """Flags."""

    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    data: str = "toy"  # records, as sample_bdhs.py reads them, or `toy`
    format: FormatName | None = None  # of the data file; else that of its first record
    images: str = "toy"  # folder of the pictures, or `toy`
    template: str | None = None  # vicuna, llava_v1, mistral, chatml or short; else the model's own
    out: str = "runs/ranked/pairs.jsonl"  # pairs file to write
    # `oracle` for the embedded world, or the folder of a LLaVA or of a reward model
    annotator: str = "oracle"
    orders: Literal["random", "both"] = "random"  # in which a model sees the two responses
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = 128  # limit of an answer
    limit: int | None = None  # a random subset of so many records, which follows from --seed
    batch_size: int = 16  # prompts that are answered together
    seed: int = 0  # everything that is drawn follows from it
    device: str = "cpu"  # torch device
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    skip_bad_records: bool = False  # skip and count malformed records instead of stopping


def check(config: Config) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    require_at_least(config, limit=1, batch_size=1, max_new_tokens=1)
    require(
        config.temperature > 0,
        "--temperature 0: two greedy answers are the same; give one above it",
    )
    require_temperature(config.temperature)
    require_seed(config.seed)
    require_images(config.images)
    require_device(config.device)
    require_new_file(Path(config.out))


def pair_lines(
    part: PairBatch,
    model: Llava,
    ranked: RankedPairs,
    collate: PairCollator,
    counts: Counter,
    messages: bool,
) -> list[dict]:
    """A line for each of some records whose two answers are ranked; an empty one is no answer."""
    rows, features = (
        list(range(len(part))),
        features_of(model.encode_images(part.pixels), part.sequences),
    )
    lines = []
    for record, answer in zip(part.records, ranked(part, rows, features, 0, counts), strict=True):
        if answer is None:
            continue
        chosen, rejected = (
            collate.tokenizer.decode(branch.ids) for branch in answer.sequence.branches
        )
        counts["empty"] += not (chosen.strip() and rejected.strip())
        if chosen.strip() and rejected.strip():
            answers = preference_fields(
                record.turns, {"chosen": chosen, "rejected": rejected}, messages
            )
            lines.append({"id": record.id, "images": [record.image], **answers})
    return lines


def main(config: Config) -> None:
    """Write the pairs file."""
    check(config)
    records = read_records(
        config.data, config.format, config.limit, config.seed, config.skip_bad_records
    )
    folder = resolve_model(config.model)
    tokenizer, processor = (
        Tokenizer.from_folder(folder, config.template),
        ImageProcessor.from_folder(folder),
    )
    model = load_model(folder, config.device, getattr(torch, config.dtype))
    announce(folder, model, tokenizer)
    sampler = Sampler(
        model, tokenizer, Sampling(config.max_new_tokens, config.temperature), config.seed
    )
    ranked, counts, lines = (
        RankedPairs(sampler, load_annotator(config.annotator, config)),
        Counter(),
        [],
    )
    positions = (
        model.config.text.max_position_embeddings
    )  # the records' own answers, which nobody reads, are cut
    collate = PairCollator(
        tokenizer, processor, config.images, positions, positions, True, (), keep_pictures=True
    )
    left_out = []
    messages = any(len(record.turns) > 1 for record in records)
    for first in tqdm(range(0, len(records), config.batch_size), desc="rank"):
        placed = (
            (record.place or record.id, record)
            for record in records[first : first + config.batch_size]
        )
        loaded, refused = sift(placed, collate.loaded, config.skip_bad_records)
        left_out += [f"{place}: {error}" for place, error in refused]
        if loaded:
            lines += pair_lines(collate.batch(loaded), model, ranked, collate, counts, messages)
    parallel.tell_left_out(left_out, "records")
    if not lines:
        raise UserError(
            f"--data {config.data}: not one pair was ranked; give another --annotator, or more records"
        )
    write_whole(
        Path(config.out), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    print(
        f"{config.out}: {len(lines)} pairs of {counts['judged']} prompts; left out: {counts['tie']} ties, "
        f"{counts['unparsable']} without a clear verdict, {counts['empty']} with an empty answer"
    )


if __name__ == "__main__":
    run_main(main, Config, __doc__)
