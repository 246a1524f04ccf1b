"""Benchmarks. `--benchmark toy` counts hallucinations in the embedded world against exact ground truth.

CHAIR_i: share of mentioned objects that are not there; CHAIR_s: share of descriptions with at least one;
recall: share of the objects that are mentioned; POPE: yes/no questions about three objects that are there and
three that are not: random, popular (frequent in the training split) or adversarial (typical of the setting; where
fewer than three of its four objects are missing, others fill up).
Every figure has a bootstrap 95 % interval over images.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from minialign import toyworld
from minialign.chat import Tokenizer
from minialign.checkpoint import load_model, resolve_model
from minialign.cli import parse_config, require, require_device, run_main
from minialign.generate import Sampling, generate
from minialign.images import ImageProcessor
from minialign.llava import Llava
from minialign.lora import load_adapter
from minialign.masks import Branch, Sequence
from minialign.toydraw import COLOURS, OBJECTS, SETTINGS

SETTINGS_OF_POPE = ("random", "popular", "adversarial")
MENTION = re.compile(rf"\b({'|'.join(OBJECTS)})\b(?: is ({'|'.join(COLOURS)})\b)?")
POSITION = re.compile(rf"\b({'|'.join(toyworld.POSITIONS.values())})\b")
Counts = dict[str, float]


@cache
def popular_objects() -> tuple[str, ...]:
    """The objects in order of their frequency in the first 2,000 training scenes."""
    counts = Counter(name for i in range(2000) for name in toyworld.make_scene("train", i).objects)
    return tuple(name for name, _ in counts.most_common())


def pope_verdict(answer: str) -> bool:
    """POPE's reading of an answer: in its first sentence, without commas, the word No, no or not means no."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "no", "not") for word in words)


def pope_questions(scene: toyworld.Scene) -> dict[str, list[str]]:
    """Up to three present objects, and as many absent ones for each of POPE's three settings."""
    rng = random.Random(scene.seed + 3)
    absent = [o for o in OBJECTS if o not in scene.objects]
    typical = [o for o in absent if o in SETTINGS[scene.setting]]
    others = [o for o in absent if o not in typical]
    present = rng.sample(list(scene.objects), min(3, len(scene.objects)))
    n = len(present)
    adversarial = rng.sample(typical, len(typical)) + rng.sample(others, len(others))
    popular = [o for o in popular_objects() if o in absent]
    return {"present": present, "random": rng.sample(absent, n), "popular": popular[:n], "adversarial": adversarial[:n]}


def count_description(scene: toyworld.Scene, text: str) -> Counts:
    """What one description says, against what is there."""
    counts = Counter({"images": 1, "length": len(text.split()), "objects": len(scene.objects)})
    for sentence in re.split(r"(?<=\.)\s", text):
        place = POSITION.search(sentence)
        for name, colour in MENTION.findall(sentence):
            counts["mentioned"] += 1
            if name not in scene.objects:
                counts["hallucinated"] += 1
                counts["typical"] += name in SETTINGS[scene.setting]
                continue
            places = scene.objects[name]  # {position: colour}
            here = places.get(place[1]) if place else None
            counts["true"] += 1
            counts["placed"] += bool(place)
            counts["coloured"] += bool(colour)
            counts["wrong_place"] += bool(place) and here is None
            counts["wrong_colour"] += bool(colour) and colour not in ([here] if here else places.values())
    counts["hallucinating"] = counts["hallucinated"] > 0
    counts["found"] = sum(bool(re.search(rf"\b{name}\b", text)) for name in scene.objects)
    return counts


def count_pope(questions: dict[str, list[str]], answers: dict[tuple[str, str], str]) -> Counts:
    """True and false yeses and noes of one image, for each of POPE's settings."""
    counts: Counts = Counter()
    said = {key: pope_verdict(answer) for key, answer in answers.items()}
    for setting in SETTINGS_OF_POPE:
        counts[f"{setting}_tp"] = sum(said["present", name] for name in questions["present"])
        counts[f"{setting}_fn"] = len(questions["present"]) - counts[f"{setting}_tp"]
        counts[f"{setting}_fp"] = sum(said[setting, name] for name in questions[setting])
        counts[f"{setting}_tn"] = len(questions[setting]) - counts[f"{setting}_fp"]
    return counts


def ratios(sums: Counts) -> dict[str, np.ndarray]:
    """Metrics from summed counts (arrays over bootstrap resamples); NaN where there was nothing to count."""

    def per(a, b):
        return np.divide(a, b, out=np.full_like(b, np.nan, dtype=float), where=b > 0)

    values = {
        "chair_i": per(sums["hallucinated"], sums["mentioned"]),
        "chair_s": per(sums["hallucinating"], sums["images"]),
        "recall": per(sums["found"], sums["objects"]),
        "typical_share": per(sums["typical"], sums["hallucinated"]),
        "colour_errors": per(sums["wrong_colour"], sums["coloured"]),
        "position_errors": per(sums["wrong_place"], sums["placed"]),
        "length": per(sums["length"], sums["images"]),
    }
    for setting in SETTINGS_OF_POPE:
        tp, fp, fn, tn = (sums[f"{setting}_{part}"] for part in ("tp", "fp", "fn", "tn"))
        values[f"pope_{setting}"] = per(tp + tn, tp + fp + fn + tn)
        values[f"pope_{setting}_f1"] = per(2 * tp, 2 * tp + fp + fn)
        values[f"pope_{setting}_yes"] = per(tp + fp, tp + fp + fn + tn)
    return values


def bootstrap(runs: list[list[Counts]], resamples: int = 1000) -> dict[str, np.ndarray]:
    """Metrics of the runs' pooled counts, (1 + resamples,) each: as they are, then over resampled images and runs.

    `runs` are evaluations of the same images, one per training seed. The resampling depends on the numbers of
    runs and images alone, so that two rows of a study are resampled alike and their difference is paired.
    """
    names = sorted({name for counts in runs for c in counts for name in c})
    tables = np.array([[[c.get(name, 0) for name in names] for c in counts] for counts in runs], dtype=float)
    rng, (n_runs, n_images, _) = np.random.default_rng(0), tables.shape
    images = rng.multinomial(n_images, np.full(n_images, 1 / n_images), resamples)
    of_runs = rng.multinomial(n_runs, np.full(n_runs, 1 / n_runs), resamples)
    images = np.concatenate([np.ones((1, n_images)), images])  # the first row is the sample itself
    of_runs = np.concatenate([np.ones((1, n_runs)), of_runs])
    sums = np.einsum("br,bi,ric->cb", of_runs, images, tables, optimize=True)
    return ratios(dict.fromkeys(COUNTED, np.zeros(1 + resamples)) | dict(zip(names, sums, strict=True)))


def interval(values: np.ndarray) -> dict[str, float | None]:
    """A bootstrapped figure as {value, low, high} of its 95 % interval; None where nothing was there to measure."""
    if np.isnan(values[0]):
        return dict.fromkeys(("value", "low", "high"))
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"value": round(float(values[0]), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def with_intervals(runs: list[list[Counts]]) -> dict[str, dict[str, float]]:
    """Every metric of one or more runs on the same images: {name: {value, low, high}}."""
    return {name: interval(values) for name, values in bootstrap(runs).items()}


COUNTED = ("images", "length", "objects", "mentioned", "hallucinated", "typical", "true", "coloured", "wrong_colour",
           "placed", "wrong_place", "hallucinating", "found")  # fmt: skip


@dataclass(frozen=True)
class ToyBenchmark:
    """The embedded world's test or validation images, described and questioned."""

    split: Literal["test", "validation"] = "test"
    images: int = 500
    batch_size: int = 50

    def run(self, model: Llava, tokenizer: Tokenizer, processor: ImageProcessor, title="evaluate") -> list[Counts]:
        """Greedy answers for every image, counted against its scene; `with_intervals` makes metrics of them."""
        counts: list[Counts] = []
        for first in tqdm(range(0, self.images, self.batch_size), desc=title, leave=False):
            numbers = range(first, min(first + self.batch_size, self.images))
            scenes = [toyworld.make_scene(self.split, i) for i in numbers]
            pictures = [toyworld.picture(scene) for scene in scenes]
            features = model.encode_images(torch.cat([processor(picture) for picture in pictures]))
            layouts = [processor.layout(picture) for picture in pictures]
            described = [[toyworld.DESCRIBE[0]] for _ in scenes]
            texts = self.answers(model, tokenizer, features, layouts, described, 128)
            questions = [pope_questions(scene) for scene in scenes]
            asked = [[(kind, name) for kind, names in q.items() for name in names] for q in questions]
            spoken = [[toyworld.EXISTS[1].format(toyworld.with_article(n)) for _, n in keys] for keys in asked]
            replies = self.answers(model, tokenizer, features, layouts, spoken, 16)
            for scene, text, q, keys, reply in zip(scenes, texts, questions, asked, replies, strict=True):
                pope = count_pope(q, dict(zip(keys, reply, strict=True)))
                counts.append({**count_description(scene, text[0]), **pope})
        return counts

    def answers(self, model, tokenizer, features, layouts, questions: list[list[str]], limit: int) -> list[list[str]]:
        """Greedy answers to several questions per image: the image is the trunk, each question a branch."""
        sequences = []
        for asked, (patches, packing) in zip(questions, layouts, strict=True):
            prompts = [tokenizer.prompt([("user", question)]) for question in asked]
            shared = prompts[0].index(tokenizer.image_id) + 1
            branches = [Branch(prompt[shared:]) for prompt in prompts]
            sequences.append(Sequence(prompts[0][:shared], branches, patches, packing=packing))
        done = generate(model, sequences, features, Sampling(limit, 0.0), {tokenizer.eos_id}, pad_id=tokenizer.pad_id)
        return [[tokenizer.decode(completion.ids) for completion in row] for row in done]


def print_table(columns: dict[str, dict[str, dict[str, float]]]) -> None:
    """One line per metric, one column per run: value and interval."""
    names = [name for name in next(iter(columns.values()))]
    print(f"{'':22}" + "".join(f"{title:>26}" for title in columns))
    for name in names:
        values = [column[name] for column in columns.values()]
        cells = [
            "not measured" if v["value"] is None else f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"
            for v in values
        ]
        print(f"{name:22}" + "".join(f"{cell:>26}" for cell in cells))


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.evaluate`."""

    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    adapter: str | None = None  # adapter folder that train_dpo.py wrote
    template: str | None = None  # vicuna, llava_v1, mistral, chatml or short; else the model's own
    benchmark: Literal["toy"] = "toy"  # what to run
    split: Literal["test", "validation"] = "test"  # choices are made on validation; test is looked at last
    images: int = 500  # how many images
    batch_size: int = 50  # images answered at a time
    device: str = "cpu"  # torch device
    json: bool = False  # print one JSON object instead of the table


def main() -> None:
    """Evaluate one model."""
    config = parse_config(Config, __doc__)
    require(config.images > 0, f"--images {config.images}: at least 1")
    require(config.batch_size > 0, f"--batch-size {config.batch_size}: at least 1")
    require_device(config.device)
    folder = resolve_model(config.model)
    model = load_model(folder, config.device)
    if config.adapter is not None:
        load_adapter(model, Path(config.adapter))
    benchmark = ToyBenchmark(config.split, config.images, config.batch_size)
    tokenizer = Tokenizer.from_folder(folder, config.template)
    counts = benchmark.run(model, tokenizer, ImageProcessor.from_folder(folder))
    result = with_intervals([counts])
    if config.json:
        print(json.dumps(result))
    else:
        print_table({config.split: result})


if __name__ == "__main__":
    run_main(main)
