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

import sample_bdhs
from minialign.data.records import Record
from minialign.model.llava import Llava
from minialign.model.masks import Sequence
from minialign.sampling.assistant import Assistant
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
        input_ids, attention_mask, position_ids = [], [], []
        for ids, seen, _ in rows:
            gap = [0] * (self.width - len(ids))
            input_ids.append(gap + ids)
            attention_mask.append(gap + seen)
            position_ids.append(gap + [*range(len(ids))])
        self.inputs = {
            "input_ids": torch.tensor(input_ids, device=model.device),
            "attention_mask": torch.tensor(attention_mask, device=model.device),
            "position_ids": torch.tensor(position_ids, device=model.device),
            "image_sizes": torch.tensor([PICTURE[::-1]] * len(rows), device=model.device),
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
    own = [completion.ids for row in ours for completion in row]
    total = sum(len(ids) for ids in peer)
    both = zip(own, peer, strict=True)
    same = sum(a == b for one, two in both for a, b in zip(one, two, strict=False))
    if dtype != "bfloat16":
        assert own == peer, f"other tokens: {same} of {total} are the same"
    count = sum(map(len, own))
    return f"{same} of {total} new tokens are the same, of ours there are {count}"


def never_similar(texts: list[str], references: list[str]) -> list[float]:
    """One iteration of Algorithm 1 is enough."""
    return [0.0] * len(texts)


def bdhs_config(size: Size) -> sample_bdhs.Config:
    """Algorithm 1, one guided and greedy iteration."""
    flags = {"temperature": 0.0, "max_new_tokens": size.sentence_tokens}
    return sample_bdhs.Config(rho_th=RHO_TH, n_bdhs=1, **flags)


def recorded(work) -> tuple[list[Sequence], list[list[Completion]]]:
    """The sequences that `work` gives to `generate` inside of sample_bdhs.py, and what comes
    back."""
    calls = []

    def recording(model, sequences, *rest):
        calls.append((sequences, generate(model, sequences, *rest)))
        return calls[-1][1]

    with mock.patch.object(sample_bdhs, "generate", recording):
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
    completions: list[list[Completion]]
    limit: int  # new tokens
    stops: set[int]


def bdhs_example(assistant: Assistant, size: Size, number: int) -> sample_bdhs.Example:
    """A question about a picture, and its y+."""
    turns = [("user", size.question(number))]
    record = Record(str(number), "", turns, size.answer(number, "chosen"))
    image = assistant.processor.prepare(picture(number))
    return sample_bdhs.Example(record, picture(number), image)


def bdhs_work(size: Size, assistant: Assistant) -> Work:
    """y- for a batch of examples."""
    config = bdhs_config(size)
    batch = [bdhs_example(assistant, size, number) for number in range(size.examples)]

    def call() -> list:
        return sample_bdhs.sample(assistant, never_similar, batch, config)

    sequences, completions = recorded(call)
    sentences = sum(len(sequence.branches) for sequence in sequences)
    title = f"BDHS, rho_th {RHO_TH}: {sentences} sentences of {len(batch)} pictures"
    pixels = [example.image.pixels for example in batch]
    stops = assistant.tokenizer.sentence_ends
    return Work(call, title, sequences, pixels, completions, size.sentence_tokens, stops)


def two_samples(size: Size, assistant: Assistant) -> tuple[list[Sequence], list[Tensor]]:
    """Questions with two empty branches each, and their pictures' pixels."""
    sequences, pixels = [], []
    for number in range(size.examples):
        image = assistant.processor.prepare(picture(number))
        turns = [("user", size.question(number))]
        sequences.append(assistant.sequence(turns, image, [[], []]))
        pixels.append(image.pixels)
    return sequences, pixels


def generate_work(size: Size, assistant: Assistant) -> Work:
    """Two samples of each picture, as long as asked for: `call` takes the number of tokens."""
    model = assistant.model
    sequences, pixels = two_samples(size, assistant)

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
        share = roofline.bandwidth_share(model, work.sequences, steps, seconds - prefill)
        found["bandwidth_share"] = share
    return found


def compare(size: Size, work: Work, ours: Llava, peer, static: bool = False) -> dict:
    """The row's facts: both sides do the same, and what each takes."""
    prompts = PeerBatch(peer, work.sequences, work.pixels, static)

    def theirs() -> list:
        return prompts.generate(work.limit, work.stops)

    checked = require_same_tokens(work.completions, theirs(), size.dtype)
    works, models = {"ours": work.call, "peer": theirs}, {"ours": ours, "peer": peer}
    side = measured(works, models, size.repeats, size.device)
    means = "transformers' generate" + (", static cache" if static else "")
    return compared(f"{work.title}: {means}", checked, side["ours"], side["peer"])


def measure_bdhs(size: Size, folder: Path, facts: Facts, static: bool = False) -> None:
    """The row bdhs, or bdhs-static-cache."""
    row = "bdhs-static-cache" if static else "bdhs"
    assistant = load_ours(size, folder)
    work, model = bdhs_work(size, assistant), assistant.model
    facts.add(row, ours=alone(work.call, model, size.device))
    facts.finish(row, **compare(size, work, model, load_peer(size, folder), static))


def measure_generate(size: Size, folder: Path, facts: Facts, static: bool = False) -> None:
    """The row generate, or generate-static-cache."""
    row = "generate-static-cache" if static else "generate"
    assistant = load_ours(size, folder)
    work, model = generate_work(size, assistant), assistant.model
    own = alone(work.call, model, size.device)
    facts.add(row, ours=own, **bandwidth_share(size, model, work, own["seconds"]))
    facts.finish(row, **compare(size, work, model, load_peer(size, folder), static))
