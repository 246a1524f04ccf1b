"""How good is an annotator? And preference pairs of a model's own answers, ranked by one.

    python -m minialign.annotate --annotator DIR --pairs pairs.jsonl --images DIR   # Table 10
    python -m minialign.annotate --annotator runs/reward/merged --pairs a.jsonl,b.jsonl   # Table 7
    python -m minialign.annotate --annotator DIR --rank FILE --model DIR --images DIR \\
        --out pairs.jsonl

With --pairs it judges pairs whose better response is known: its accuracy, and its bias of position.
An annotator is a LLaVA, a reward model, or on the embedded world `oracle`, its exact truth.

With --rank two answers of --model to every prompt are sampled, and the annotator ranks them: so
VLFeedback and RLAIF-V are made, and what a step of online DPO draws from the policy is this. Of no
use are ties and pairs between which it does not decide: they are left out and counted. A record's
answers depend on --seed and its id alone. The pairs file appears whole.
"""

import json
import random
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

from minialign import edge
from minialign.align.annotators import Comparison, Verdict
from minialign.claims import require_new_file
from minialign.cli import (
    flag_of,
    require,
    require_at_least,
    require_device,
    require_seed,
    require_temperature,
    run_main,
)
from minialign.data.images import PreparedImage
from minialign.data.record_files import Records, open_pairs, sift
from minialign.data.records import FormatName, Record, pair_fields, require_different
from minialign.errors import UserError
from minialign.evaluation.metrics import Counts, Figures, print_table, with_intervals
from minialign.files import write_json, write_whole
from minialign.sampling.assistant import Assistant
from minialign.sampling.generate import Sampling, generate
from minialign.seeds import stable_seed

FIGURES: Figures = {
    "accuracy": (("right",), ("decided",)),
    "first": (("first",), ("placed",)),
    "ties": (("tie",), ("pairs",)),
    "unparsable": (("no verdict",), ("pairs",)),
}


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.annotate`."""

    # `oracle` for the embedded world (`oracle:0.1` errs in 10 %), or the folder of a LLaVA or of a
    # reward model
    annotator: str = "oracle"
    pairs: str | None = None  # held-out preference pairs, one file or several with commas between
    rank: str | None = None  # records, or `toy`: make pairs of the model's answers to them
    out: str | None = None  # JSON file to write as well; with --rank the pairs file
    format: FormatName | None = None  # of the data file; else that of its first record
    images: str = "toy"  # folder of the pictures, or `toy`
    # form of conversation: vicuna_v1, llava_v1, mistral, chatml, short, a file; else the model's
    template: str | None = None
    # how a LLaVA judges: by which response's name is likelier, in its own words, or by how many
    # claims of each response it denies (logprobs and claims take one forward pass)
    verdict: Literal["logprobs", "generated", "claims"] = "logprobs"
    # show it the responses in a random order, or ask in both (claims have none)
    orders: Literal["random", "both"] = "random"
    batch_size: int = 8  # pairs that are judged together
    seed: int = 0  # whatever is drawn follows from it
    device: str = "cpu"  # torch device
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    skip_bad_records: bool = False  # skip and count malformed records instead of stopping
    json: bool = False  # print one JSON object instead of the table
    model: str = "toy"  # --rank: who answers, a Hugging Face LLaVA folder, or `toy`
    temperature: float = 1.0  # --rank: of sampling
    max_new_tokens: int = 128  # --rank: limit of an answer
    limit: int | None = None  # --rank: a random subset of so many records


def check(config: Config) -> list[str]:
    """Refuse values that make no sense; returns the pairs files."""
    given = (config.pairs is None) != (config.rank is None)
    what = "--pairs, preference pairs to judge, or --rank, records to make pairs of"
    require(given, f"one of two things to do; give either {what}")
    require_at_least(config, batch_size=1, limit=1, max_new_tokens=1)
    require_seed(config.seed)
    require_device(config.device)
    if config.out is not None:
        require_new_file(config)
    if config.rank is not None:
        require(config.out is not None, "--out is missing; name the pairs file to write")
        same = "two greedy answers are the same; give one above it"
        require(config.temperature > 0, f"--temperature 0: {same}")
        require_temperature(config.temperature)
        return []

    for name in ("model", "temperature", "max_new_tokens", "limit"):
        not_asked = getattr(config, name) == getattr(Config, name)
        require(not_asked, f"{flag_of(name)}: not for --pairs, only for --rank; leave it out")
    paths = [config.pairs] if Path(config.pairs).exists() else config.pairs.split(",")
    twice = f"--pairs {config.pairs}: a file stands twice; name each once"
    require(len(set(paths)) == len(paths), twice)
    return paths


# ---------------------------------------------------------------- how good is it?


def comparison_of(record: Record, pictures, seed: int) -> tuple[Comparison, int]:
    """A pair's responses in an order that tells nothing, and the number of the chosen one."""
    require_different(record)
    flipped = random.Random(stable_seed(seed, record.id)).random() < 0.5
    responses = (record.rejected, record.chosen) if flipped else (record.chosen, record.rejected)
    return Comparison(record, responses, pictures(record.image)), int(flipped)


def count_verdict(verdict: Verdict, chosen: int) -> Counts:
    """What one verdict counts; `chosen` is the number of the response that the pair prefers."""
    return {
        "pairs": 1,
        verdict.reason or "clear": 1,
        "decided": verdict.better is not None,
        "right": verdict.better == chosen,
        "placed": verdict.first is not None,
        "first": bool(verdict.first),
    }


def judge(records: Records, pictures, annotator, config: Config) -> tuple[list[Counts], list[str]]:
    """What the verdict on every pair of a file counts, and why pairs were left out."""
    counts, left_out = [], []

    def parse(number: int) -> tuple[Comparison, int]:
        return comparison_of(records.parse(number), pictures, config.seed)

    for start in tqdm(range(0, len(records.numbers), config.batch_size), desc="judge"):
        part = records.numbers[start : start + config.batch_size]
        places = ((records.file.place(number), number) for number in part)
        batch, refused = sift(places, parse, config.skip_bad_records)
        left_out += [f"{place}: {error}" for place, error in refused]
        verdicts = annotator.choose([comparison for comparison, _ in batch])
        for verdict, (_, chosen) in zip(verdicts, batch, strict=True):
            counts.append(count_verdict(verdict, chosen))
    if not counts:
        raise UserError(f"--pairs {records.file.path}: no usable pair, {left_out[0]}; give pairs")
    return counts, left_out


def measure(config: Config, paths: list[str]) -> None:
    """Accuracy on pairs whose better response is known, and the bias of position; a column per
    file.
    """
    results = {}
    with redirect_stdout(sys.stderr):  # what is printed on the way is no result
        files = {path: open_pairs(path, config.format) for path in paths}
        pictures = edge.picture_source(config.images)
        annotator = edge.annotator_of(config.annotator, config)
        for path, records in files.items():
            counts, left_out = judge(records, pictures, annotator, config)
            if left_out:
                first = f"{len(left_out)} pairs left out, the first: {left_out[0]}"
                tqdm.write(f"{path}: {first}", file=sys.stderr)
            facts = {"pairs": len(counts), "left_out": len(left_out)}
            results[path] = facts | with_intervals([counts], FIGURES)

    found = results[paths[0]] if len(paths) == 1 else results
    if config.out is not None:
        write_json(Path(config.out), found)
    if config.json:
        print(json.dumps(found))
        return
    columns = {}
    for path, result in results.items():
        title = config.annotator if len(paths) == 1 else Path(path).name
        columns[title] = {name: result[name] for name in FIGURES}
    print_table(columns)


# ---------------------------------------------------------------- pairs of a model's own answers


def rank(config: Config) -> None:
    """Write a pairs file: two answers to each record's prompt, the better one chosen."""
    records = edge.records_of(
        config.rank, config.format, config.limit, config.seed, config.skip_bad_records, "--rank"
    )
    pictures = edge.picture_source(config.images)
    folder, dtype = edge.model_folder(config.model), getattr(torch, config.dtype)
    assistant = Assistant.from_folder(folder, config.device, dtype, config.template)
    assistant.announce(folder)
    annotator = edge.annotator_of(config.annotator, config)
    counts: Counter = Counter()
    lines, left_out = [], []

    def load(record: Record) -> tuple[Record, Image.Image, PreparedImage]:
        picture = pictures(record.image)
        image = assistant.processor.prepare(picture)
        if assistant.positions_left(record.turns, image, record.image_turn) < 1:
            message = f"image and prompt take all {assistant.positions} positions of the decoder"
            raise UserError(f"{message}; drop the record")
        return record, picture, image

    for start in tqdm(range(0, len(records), config.batch_size), desc="rank"):
        part = records[start : start + config.batch_size]
        places = ((record.place or record.id, record) for record in part)
        batch, refused = sift(places, load, config.skip_bad_records)
        left_out += [f"{place}: {error}" for place, error in refused]
        if batch:
            for record, answers in ranked_pairs(assistant, annotator, batch, config, counts):
                line = pair_fields(record, answers)
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")

    if left_out:
        tqdm.write(f"{len(left_out)} records left out on the way, the first: {left_out[0]}")
    ties, unclear, empty = counts["tie"], counts["no verdict"], counts["empty"]
    unused = f"{ties} ties, {unclear} without a verdict, {empty} with an empty answer"
    if not lines:
        message = f"--rank {config.rank}: not one pair of {counts['judged']} prompts ({unused})"
        raise UserError(f"{message}; give another --annotator, or more records")
    write_whole(Path(config.out), "".join(lines))
    print(f"{config.out}: {len(lines)} pairs of {counts['judged']} prompts; left out: {unused}")


def ranked_pairs(
    assistant: Assistant, annotator, batch: list[tuple], config: Config, counts: Counter
) -> list[tuple[Record, dict[str, str]]]:
    """The records of which one answer is better, with both; `counts` takes down the others."""
    tokenizer = assistant.tokenizer
    images = [image for _, _, image in batch]
    sequences, seeds = [], []
    for record, _, image in batch:
        turns, image_turn = record.turns, record.image_turn
        sequences.append(assistant.sequence(turns, image, [[], []], image_turn=image_turn))
        seeds.append([stable_seed(config.seed, 0, record.id, n) for n in (0, 1)])
    completions = generate(
        assistant.model,
        sequences,
        assistant.encode(images),
        Sampling(config.max_new_tokens, config.temperature),
        {tokenizer.eos_id},
        seeds,
        tokenizer.pad_id,
    )

    # Which one is better?
    comparisons = []
    for (record, picture, _), row in zip(batch, completions, strict=True):
        texts = tuple(tokenizer.decode(completion.ids) for completion in row)
        comparisons.append(Comparison(record, texts, picture))

    pairs = []
    for comparison, verdict in zip(comparisons, annotator.choose(comparisons), strict=True):
        texts = comparison.responses
        counts["judged"] += 1
        if texts[0] == texts[1]:
            counts["tie"] += 1
        elif verdict.better is None:
            counts[verdict.reason] += 1
        elif not all(text.strip() for text in texts):
            counts["empty"] += 1
        else:
            better = verdict.better
            answers = {"chosen": texts[better], "rejected": texts[1 - better]}
            pairs.append((comparison.record, answers))
    return pairs


def main(config: Config) -> None:
    """Judge pairs, or make some."""
    paths = check(config)
    if config.rank is not None:
        rank(config)
    else:
        measure(config, paths)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
