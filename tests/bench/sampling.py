"""bdhs and generate: minialign's branches beside transformers' `generate`, greedy, so that both say
the same.

The peer has SDPA, one batched call with left padding and a KV cache: the dynamic one, with which it
needs no compiler; in the rows ...-static-cache a static one, with which it compiles its decoding
step on a GPU. Both start from pixels. The peer's prompts are tokenised and padded before the clock
runs, while our side of `bdhs` also pays for tokenising, cutting and joining. No random number is
drawn on either side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import minialign.sampling.bdhs
from minialign.data.images import ImageProcessor
from minialign.data.tokenizer import Tokenizer
from minialign.model.llava import Llava
from minialign.model.masks import Branch, Sequence
from minialign.sampling.bdhs import Bdhs, BdhsConfig, Example
from minialign.sampling.generate import Completion, Sampling, generate
from tests.bench import roofline
from tests.bench.models import load_ours, load_peer, quiet_transformers
from tests.bench.rows import Facts
from tests.bench.sizes import PICTURE, Size, picture
from tests.bench.timing import alone, compared, interleaved, measured

RHO_TH = 0.99


class PeerBatch:
    """Every branch as a prompt of its own, in one left-padded batch, each with its picture's tiles.

    Hidden image keys are masked by attention_mask. transformers would count positions from that
    mask, but a hidden token leaves a gap: positions are given, so that both sides compute the same
    logits.
    """

    def __init__(
        self, model, sequences: list[Sequence], pixels: list[Tensor], static: bool = False
    ):
        self.model, self.static = model, static
        image = model.config.image_token_id
        rows = []
        for number, sequence in enumerate(sequences):
            tokens, shown = sequence.image_tokens, sequence.image_visible
            visible = [1] * tokens if shown is None else shown.int().tolist()
            for branch in sequence.branches:
                ids = sequence.trunk[: branch.fork] + branch.ids
                place = ids.index(image)
                seen = [1] * place + visible + [1] * (len(ids) - place - 1)
                whole = ids[:place] + [image] * tokens + ids[place + 1 :]
                rows.append((whole, seen, number))

        self.width = max(len(ids) for ids, _, _ in rows)
        gaps = [self.width - len(ids) for ids, _, _ in rows]
        columns = {
            "input_ids": [[0] * gap + ids for gap, (ids, _, _) in zip(gaps, rows, strict=True)],
            "attention_mask": [
                [0] * gap + seen for gap, (_, seen, _) in zip(gaps, rows, strict=True)
            ],
            "position_ids": [[0] * gap + [*range(self.width - gap)] for gap in gaps],
            "image_sizes": [PICTURE[::-1]] * len(rows),
        }
        self.inputs = {
            name: torch.tensor(values, device=model.device) for name, values in columns.items()
        }
        tiles = torch.stack([pixels[number] for _, _, number in rows])
        self.inputs["pixel_values"] = tiles.to(model.device, model.dtype)

    def generate(self, limit: int, stops: set[int]) -> list[list[int]]:
        """New ids of each prompt, greedy, up to a stop token (included) or the limit."""
        self.model.generation_config = quiet_transformers().GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=sorted(stops) or None,
            pad_token_id=0,
            suppress_tokens=[self.model.config.image_token_id],
            cache_implementation="static" if self.static else None,
        )
        out = self.model.generate(**self.inputs)
        return [until_stop(row, stops) for row in out[:, self.width :].tolist()]


def until_stop(ids: list[int], stops: set[int]) -> list[int]:
    """The ids up to the first stop token, which is kept."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


def require_same_tokens(ours: list[list[Completion]], peer: list[list[int]], dtype: str) -> str:
    """Both sides said the same, in words; in bfloat16, where near ties fall either way, the share
    is told."""
    said = [completion.ids for row in ours for completion in row]
    total = sum(len(ids) for ids in peer)
    both = zip(said, peer, strict=True)
    same = sum(a == b for one, two in both for a, b in zip(one, two, strict=False))
    if dtype != "bfloat16":
        assert said == peer, f"other tokens: {same} of {total} are the same"
    count = sum(map(len, said))
    return f"{same} of {total} new tokens are the same, of ours there are {count}"


def never_similar(texts: list[str], references: list[str]) -> list[float]:
    """One iteration of Algorithm 1 is enough."""
    return [0.0] * len(texts)


def make_bdhs(size: Size, model: Llava, tokenizer: Tokenizer, processor: ImageProcessor) -> Bdhs:
    """Algorithm 1, one guided and greedy iteration."""
    sampling = Sampling(size.sentence_tokens, temperature=0.0)
    config = BdhsConfig(RHO_TH, n_bdhs=1, sampling=sampling)
    return Bdhs(model, tokenizer, processor, never_similar, config)


def recorded(work) -> tuple[list[Sequence], list[list[Completion]]]:
    """The sequences that `work` gives to `generate` inside of bdhs.py, and what comes back."""
    calls = []

    def recording(model, sequences, *rest, **options):
        calls.append((sequences, generate(model, sequences, *rest, **options)))
        return calls[-1][1]

    with mock.patch.object(minialign.bdhs, "generate", recording):
        work()
    [call] = calls
    return call


@dataclass(frozen=True)
class Work:
    """Our side of a row, called once, and what the peer needs to do the same."""

    call: Callable
    title: str
    sequences: list[Sequence]
    pixels: list[Tensor]
    said: list[list[Completion]]
    limit: int  # new tokens
    stops: set[int]


def bdhs_work(size: Size, ours) -> Work:
    """y- for a batch of examples."""
    model, _, processor = ours
    bdhs = make_bdhs(size, *ours)
    numbers = range(size.examples)
    batch = [
        Example(str(i), picture(i), [("user", size.question(i))], size.answer(i, "chosen"))
        for i in numbers
    ]
    pixels = [processor(example.image) for example in batch]

    def call() -> list:
        features = model.encode_images(torch.cat(pixels))
        return bdhs.sample(batch, list(features.split([len(tiles) for tiles in pixels])))

    sequences, said = recorded(call)
    sentences = sum(len(sequence.branches) for sequence in sequences)
    title = f"BDHS, rho_th {RHO_TH}: {sentences} sentences of {len(batch)} pictures"
    return Work(call, title, sequences, pixels, said, size.sentence_tokens, bdhs.sentence_stops)


def two_samples(
    size: Size, tokenizer: Tokenizer, processor: ImageProcessor
) -> tuple[list[Sequence], list[Tensor]]:
    """Questions with two empty branches each, and their pictures' pixels."""
    pictures, sequences = [picture(i) for i in range(size.examples)], []
    for number, one in enumerate(pictures):
        patches, packing = processor.layout(one)
        prompt = tokenizer.prompt([("user", size.question(number))])
        sequences.append(Sequence(prompt, [Branch([]), Branch([])], patches, packing=packing))
    return sequences, [processor(one) for one in pictures]


def generate_work(size: Size, ours) -> Work:
    """Two samples of each picture, as long as asked for: `call` takes the number of tokens."""
    model, tokenizer, processor = ours
    sequences, pixels = two_samples(size, tokenizer, processor)

    def call(tokens: int = size.new_tokens) -> list:
        features = model.encode_images(torch.cat(pixels))
        return generate(model, sequences, features, Sampling(tokens, 0.0), set())

    title = f"2 x {size.new_tokens} tokens of each of {len(sequences)} pictures"
    return Work(call, title, sequences, pixels, call(), size.new_tokens, set())


def bandwidth_share(size: Size, model: Llava, work: Work, seconds: float) -> dict:
    """Of `generate_work` that has taken so long: prefill, the steps after it, and on a GPU the
    share of its bandwidth that these have needed."""
    prefill = interleaved({"ours": lambda: work.call(1)}, size.repeats, size.device)["ours"]
    steps = size.new_tokens - 1
    found = {"prefill_seconds": prefill, "ms_per_token": 1e3 * (seconds - prefill) / steps}
    if size.device == "cuda":
        found["bandwidth_share"] = roofline.bandwidth_share(
            model, work.sequences, steps, seconds - prefill
        )
    return found


def compare(size: Size, work: Work, ours, peer, static: bool = False) -> dict:
    """The row's facts: both sides do the same, and what each takes."""
    prompts = PeerBatch(peer, work.sequences, work.pixels, static)

    def theirs() -> list:
        return prompts.generate(work.limit, work.stops)

    checked = require_same_tokens(work.said, theirs(), size.dtype)
    works, models = {"ours": work.call, "peer": theirs}, {"ours": ours[0], "peer": peer}
    side = measured(works, models, size.repeats, size.device)
    means = "transformers' generate" + (", static cache" if static else "")
    return compared(f"{work.title}: {means}", checked, side["ours"], side["peer"])


def measure_bdhs(size: Size, folder: Path, facts: Facts, static: bool = False) -> None:
    """The row bdhs, or bdhs-static-cache."""
    row = "bdhs-static-cache" if static else "bdhs"
    ours = load_ours(size, folder)
    work = bdhs_work(size, ours)
    facts.add(row, ours=alone(work.call, ours[0], size.device))
    facts.finish(row, **compare(size, work, ours, load_peer(size, folder), static))


def measure_generate(size: Size, folder: Path, facts: Facts, static: bool = False) -> None:
    """The row generate, or generate-static-cache."""
    row = "generate-static-cache" if static else "generate"
    ours = load_ours(size, folder)
    work = generate_work(size, ours)
    own = alone(work.call, ours[0], size.device)
    facts.add(row, ours=own, **bandwidth_share(size, ours[0], work, own["seconds"]))
    facts.finish(row, **compare(size, work, ours, load_peer(size, folder), static))
