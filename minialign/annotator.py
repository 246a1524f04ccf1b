"""The annotator of online DPO: which of two responses is better? And how good an annotator is
(Tables 7 and 10).

    python -m minialign.annotator --annotator DIR --pairs pairs.jsonl --images DIR    # any LLaVA folder as the judge
    python -m minialign.annotator --annotator oracle --pairs pairs.jsonl              # the embedded world's truth
    python -m minialign.annotator --annotator runs/reward/merged --pairs a.jsonl,b.jsonl    # a reward model (Table 7)

A model is shown image, question and both responses, and asked in our own words for what Table 14
asks. Its verdict must begin with `Response 1` or `Response 2`; what does not is dropped and
counted. The paper found no bias of position; the order is random all the same, or both orders are
asked, and a pair on which they differ is a tie. A reward model (reward_model.py) is not asked: the
response with the higher reward is the better one."""

import json
import random
import re
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minialign import benchmarks, lora, toybench, toyworld
from minialign.chat import Tokenizer, announce
from minialign.checkpoint import load_model, resolve_model
from minialign.cli import require, require_device, require_images, require_seed, run_main
from minialign.data import open_pairs, sift
from minialign.errors import UserError
from minialign.files import write_json
from minialign.generate import stable_seed
from minialign.images import ImageProcessor, open_image
from minialign.llava import Llava
from minialign.metrics import Counts, Figures, print_table, with_intervals
from minialign.records import FormatName, Record, require_different
from minialign.reward_model import HEAD_FILE, RewardModel, load_reward_model
from minialign.toydraw import COLOURS, OBJECTS

INSTRUCTION = """Two responses to a question about this image are to be compared. The better one hallucinates less: \
whatever it says must be in the image, every object, attribute, colour and relation as it is there. What the image \
leaves open must not be stated as a fact. To a practical question a short and helpful response is better than a long \
one. All of this must be judged by the image alone.
Question: {question}
Response 1: {first}
Response 2: {second}
Which one is better? Begin with "Response 1" or "Response 2", then give the reason."""
VERDICT = re.compile(
    r"\W*Response ([12])\b(?![*_\s]*(?:(?:and|or)\b|[&/]))"
)  # `Response 1 & Response 2` is none
# `there is no cup`, `no red cup`: mentions none.
DENIED = re.compile(rf"\bno (?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(OBJECTS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Comparison:
    """Two responses to the prompt of a record; `picture` is what a model looks at that has not seen
    it yet."""

    record: Record
    responses: tuple[str, str]
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Verdict:
    """Which response is better, 0 or 1, or None with the reason; `first`: the one that stood first
    was chosen."""

    better: int | None
    reason: Literal["", "tie", "unparsable"] = ""
    first: bool | None = None


class OracleAnnotator:
    """The embedded world's exact truth: fewer hallucinated objects, then fewer wrong attributes,
    then more recall."""

    both_orders = policy_off = False  # a model's ways, of which the truth has none

    def choose(
        self, comparisons: list[Comparison], features: Tensor | None = None
    ) -> list[Verdict]:
        """A verdict on each; responses that are equally true are a tie."""
        verdicts = []
        for comparison in comparisons:
            scene = toyworld.scene_of(comparison.record.image)
            a, b = (self.score(scene, text) for text in comparison.responses)
            verdicts.append(Verdict(None, "tie") if a == b else Verdict(int(b > a)))
        return verdicts

    @staticmethod
    def score(scene: toyworld.Scene, text: str) -> tuple[float, float, float]:
        """The higher the better, compared from left to right."""
        counts = toybench.count_description(scene, DENIED.sub("", text))
        return (
            -counts["hallucinated"],
            -counts["wrong_colour"] - counts["wrong_place"],
            counts["found"],
        )


@dataclass(frozen=True)
class ModelAnnotator:
    """A LLaVA as the judge; with `policy_off` it is the policy's own base, its adapters switched
    off."""

    model: Llava
    tokenizer: Tokenizer
    processor: ImageProcessor
    both_orders: bool = False
    seed: int = 0
    policy_off: bool = False
    max_new_tokens: int = 16  # the verdict comes first

    def choose(
        self, comparisons: list[Comparison], features: Tensor | None = None
    ) -> list[Verdict]:
        """A verdict on each. features (tiles, patches, D): of the pictures, where this model's
        tower has seen them."""
        if not comparisons:
            return []
        pictures = [comparison.picture for comparison in comparisons]
        if features is None:
            features = self.model.encode_images(
                torch.cat([self.processor(picture) for picture in pictures])
            )
        layouts = [self.processor.layout(picture) for picture in pictures]
        orders = [self.orders(comparison) for comparison in comparisons]
        asked = [
            [self.question(c, order) for order in each]
            for c, each in zip(comparisons, orders, strict=True)
        ]
        over = [
            self.too_long(texts, len(packing))
            for texts, (_, packing) in zip(asked, layouts, strict=True)
        ]
        asked = [
            [""] * len(texts) if long else texts for texts, long in zip(asked, over, strict=True)
        ]
        with lora.adapters_off(self.model) if self.policy_off else nullcontext():
            said = benchmarks.answers(
                self.model, self.tokenizer, features, layouts, asked, self.max_new_tokens
            )
        verdicts = [self.verdict(answers, each) for answers, each in zip(said, orders, strict=True)]
        return [
            Verdict(None, "unparsable") if long else v
            for v, long in zip(verdicts, over, strict=True)
        ]

    def too_long(self, texts: list[str], image_tokens: int) -> bool:
        """Whether the decoder has no position left for a verdict on what it is asked."""
        longest = max(len(self.tokenizer.prompt([("user", text)])) for text in texts)
        return longest - 1 + image_tokens >= self.model.config.text.max_position_embeddings

    def orders(self, comparison: Comparison) -> list[tuple[int, int]]:
        """The orders in which the two responses are shown: both, or one at random."""
        flipped = (
            random.Random(
                stable_seed(self.seed, comparison.record.id, *comparison.responses)
            ).random()
            < 0.5
        )
        return [(0, 1), (1, 0)] if self.both_orders else [(1, 0) if flipped else (0, 1)]

    def question(self, comparison: Comparison, order: tuple[int, int]) -> str:
        """What the model is asked; of several turns, all that was said before stands in the
        question."""
        first, second = (comparison.responses[i] for i in order)
        return INSTRUCTION.format(question=comparison.record.asked, first=first, second=second)

    def verdict(self, answers: list[str], orders: list[tuple[int, int]]) -> Verdict:
        """What the answers say; where two orders were asked they must agree."""
        found = [VERDICT.match(answer) for answer in answers]
        if not all(found):
            return Verdict(None, "unparsable")
        places = [int(match[1]) - 1 for match in found]
        better = {order[place] for order, place in zip(orders, places, strict=True)}
        return (
            Verdict(better.pop(), first=places[0] == 0)
            if len(better) == 1
            else Verdict(None, "tie", places[0] == 0)
        )


@dataclass(frozen=True)
class RewardAnnotator:
    """The response with the higher reward is the better one; the same text twice is a tie, whatever
    rounding says."""

    model: RewardModel
    both_orders = policy_off = False  # of a model that is asked in words

    def choose(
        self, comparisons: list[Comparison], features: Tensor | None = None
    ) -> list[Verdict]:
        """A verdict on each; the reward model's own tower looks at the pictures."""
        if not comparisons:
            return []
        texts = [each.responses for each in comparisons]
        records, pictures = (
            [each.record for each in comparisons],
            [each.picture for each in comparisons],
        )
        both = zip(texts, self.model(records, pictures, texts).tolist(), strict=True)
        return [
            Verdict(None, "tie") if x == y or a == b else Verdict(int(b > a))
            for (x, y), (a, b) in both
        ]


# ---------------------------------------------------------------- how good is it?

FIGURES: Figures = {
    "accuracy": ("right", "decided"),
    "first": ("first", "placed"),
    "ties": ("tie", "pairs"),
    "unparsable": ("unparsable", "pairs"),
}


def count_verdict(verdict: Verdict, chosen: int) -> Counts:
    """What one verdict counts; `chosen` is the number of the response that the pair prefers."""
    placed = {"placed": verdict.first is not None, "first": bool(verdict.first)}
    decided = {"decided": verdict.better is not None, "right": verdict.better == chosen}
    return {"pairs": 1, verdict.reason or "clear": 1} | decided | placed


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.annotator`."""

    # `oracle` for the embedded world, or the folder of a LLaVA or of a reward model
    annotator: str = "oracle"
    pairs: str | None = None  # held-out preference pairs, one file or several with commas between
    out: str | None = None  # JSON file to write as well
    format: FormatName | None = None  # of the pairs file; else that of its first record
    images: str = "toy"  # folder of the pictures, or `toy`
    template: str | None = None  # vicuna, llava_v1, mistral, chatml or short; else the model's own
    # show the responses in a random order, or ask in both
    orders: Literal["random", "both"] = "random"
    batch_size: int = 8  # pairs that are judged together
    seed: int = 0  # random orders follow from it
    device: str = "cpu"  # torch device
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    skip_bad_records: bool = False  # skip and count malformed pairs instead of stopping
    json: bool = False  # print one JSON object instead of the table


def load_annotator(name: str, config) -> OracleAnnotator | ModelAnnotator | RewardAnnotator:
    """`oracle`, or a folder's model; `config` has the flags template, orders, seed, device and
    dtype."""
    if name == "oracle":
        require(
            config.images == "toy",
            "--annotator oracle: knows the embedded world alone; name a LLaVA folder",
        )
        return OracleAnnotator()
    folder = resolve_model(name, "--annotator")
    if (folder / HEAD_FILE).exists():
        return RewardAnnotator(
            load_reward_model(folder, config.device, getattr(torch, config.dtype))
        )
    model = load_model(folder, config.device, getattr(torch, config.dtype))
    tokenizer, processor = (
        Tokenizer.from_folder(folder, config.template),
        ImageProcessor.from_folder(folder),
    )
    announce(folder, model, tokenizer)
    return ModelAnnotator(model, tokenizer, processor, config.orders == "both", config.seed)


def comparison(record: Record, config: Config) -> tuple[Comparison, int]:
    """A pair's responses in an order that tells nothing, and the number of the chosen one."""
    require_different(record)
    flipped = random.Random(stable_seed(config.seed, record.id)).random() < 0.5
    two = (record.rejected, record.chosen) if flipped else (record.chosen, record.rejected)
    return Comparison(record, two, open_image(config.images, record.image)), int(flipped)


def judge(path: str, annotator, config: Config) -> tuple[list[Counts], list[str]]:
    """What the verdict on every pair of a file counts, and why pairs were left out."""
    records = open_pairs(path, config.format)
    counts, left_out, numbers = [], [], list(records.numbers)
    for start in tqdm(range(0, len(numbers), config.batch_size), desc="judge"):
        numbered = ((records.file.place(n), n) for n in numbers[start : start + config.batch_size])
        batch, refused = sift(
            numbered, lambda n: comparison(records.parse(n), config), config.skip_bad_records
        )
        left_out += [f"{place}: {error}" for place, error in refused]
        verdicts = annotator.choose([each for each, _ in batch])
        counts += [
            count_verdict(verdict, chosen)
            for verdict, (_, chosen) in zip(verdicts, batch, strict=True)
        ]
    if not counts:
        raise UserError(f"--pairs {path}: no usable pair, {left_out[0]}; give pairs")
    return counts, left_out


def main(config: Config) -> None:
    """Accuracy on pairs whose better response is known, and the bias of position; a column per
    file."""
    require(config.pairs is not None, "--pairs is missing; name a file of preference pairs")
    require(config.batch_size >= 1, f"--batch-size {config.batch_size}: at least 1")
    require_seed(config.seed)
    require_images(config.images)
    require_device(config.device)
    paths = [config.pairs] if Path(config.pairs).exists() else config.pairs.split(",")
    require(
        len(set(paths)) == len(paths),
        f"--pairs {config.pairs}: a file stands twice; name each once",
    )
    for path in paths if len(paths) > 1 else ():
        require(
            Path(path).is_file(), f"--pairs {path}: no such file; name files of preference pairs"
        )
    results = {}
    with redirect_stdout(sys.stderr):  # what is printed on the way is no result
        annotator = load_annotator(config.annotator, config)
        for path in paths:
            counts, left_out = judge(path, annotator, config)
            if left_out:
                tqdm.write(
                    f"{path}: {len(left_out)} pairs left out, the first: {left_out[0]}",
                    file=sys.stderr,
                )
            facts = {"pairs": len(counts), "left_out": len(left_out)}
            results[path] = facts | with_intervals([counts], FIGURES)
    one = len(results) == 1
    found = results[paths[0]] if one else results
    if config.out is not None:
        write_json(Path(config.out), found)
    if config.json:
        return print(json.dumps(found))
    figures = {path: {name: result[name] for name in FIGURES} for path, result in results.items()}
    print_table(
        {config.annotator: figures[paths[0]]}
        if one
        else {Path(path).name: figures[path] for path in paths}
    )


if __name__ == "__main__":
    run_main(main, Config, __doc__)
