"""bdhs and generate: minialign's branches beside transformers' `generate`, greedy, so that both say the same.

The peer has SDPA, one batched call with left padding and a KV cache; on a GPU the cache is static and the decoding
step compiled. Both start from pixels. The peer's prompts are tokenised and padded before the clock runs, while our
side of `bdhs` also pays for tokenising, cutting and joining. No random number is drawn on either side.
"""

from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import Tensor

import minialign.bdhs
from minialign.bdhs import Bdhs, BdhsConfig, Example
from minialign.chat import Tokenizer
from minialign.generate import Completion, Sampling, generate
from minialign.images import ImageProcessor
from minialign.llava import Llava
from minialign.masks import Branch, Sequence
from tests.bench import roofline
from tests.bench.models import load_ours, load_peer
from tests.bench.sizes import PICTURE, Size, picture
from tests.bench.timing import Side, compared, interleaved, model_bytes, peak_bytes

RHO_TH = 0.99


class PeerBatch:
    """Every branch as a prompt of its own, in one left-padded batch, each with its picture's tiles.

    Hidden image keys are masked by attention_mask. transformers would count positions from that mask, but a hidden
    token leaves a gap: positions are given, so that both sides compute the same logits.
    """

    def __init__(self, model, sequences: list[Sequence], pixels: list[Tensor]):
        self.model, image = model, model.config.image_token_id
        rows = []
        for number, sequence in enumerate(sequences):
            for branch in sequence.branches:
                ids = sequence.trunk[: branch.fork] + branch.ids
                place, tokens = ids.index(image), sequence.image_tokens
                visible = [1] * tokens if sequence.image_visible is None else sequence.image_visible.int().tolist()
                seen = [1] * place + visible + [1] * (len(ids) - place - 1)
                rows.append((ids[:place] + [image] * tokens + ids[place + 1 :], seen, number))
        self.width = max(len(ids) for ids, _, _ in rows)
        gaps = [self.width - len(ids) for ids, _, _ in rows]
        columns = {
            "input_ids": [[0] * gap + ids for gap, (ids, _, _) in zip(gaps, rows, strict=True)],
            "attention_mask": [[0] * gap + seen for gap, (_, seen, _) in zip(gaps, rows, strict=True)],
            "position_ids": [[0] * gap + [*range(self.width - gap)] for gap in gaps],
            "image_sizes": [PICTURE[::-1]] * len(rows),
        }
        self.inputs = {name: torch.tensor(values, device=model.device) for name, values in columns.items()}
        tiles = torch.stack([pixels[number] for _, _, number in rows])
        self.inputs["pixel_values"] = tiles.to(model.device, model.dtype)

    def generate(self, limit: int, stops: set[int]) -> list[list[int]]:
        """New ids of each prompt, greedy, up to a stop token (included) or the limit."""
        self.model.generation_config = transformers.GenerationConfig(
            max_new_tokens=limit, do_sample=False, eos_token_id=sorted(stops) or None, pad_token_id=0,
            suppress_tokens=[self.model.config.image_token_id],
            cache_implementation="static" if self.model.device.type == "cuda" else None,
        )  # fmt: skip
        out = self.model.generate(**self.inputs)
        return [until_stop(row, stops) for row in out[:, self.width :].tolist()]


def until_stop(ids: list[int], stops: set[int]) -> list[int]:
    """The ids up to the first stop token, which is kept."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


def require_same_tokens(ours: list[list[Completion]], peer: list[list[int]], dtype: str) -> str:
    """Both sides said the same, in words; in bfloat16, where near ties fall either way, the share is told."""
    said = [completion.ids for row in ours for completion in row]
    total = sum(len(ids) for ids in peer)
    same = sum(a == b for one, two in zip(said, peer, strict=True) for a, b in zip(one, two, strict=False))
    if dtype != "bfloat16":
        assert said == peer, f"other tokens: {same} of {total} are the same"
    return f"{same} of {total} new tokens are the same, of ours there are {sum(map(len, said))}"


def never_similar(texts: list[str], references: list[str]) -> list[float]:
    """One iteration of Algorithm 1 is enough."""
    return [0.0] * len(texts)


def make_bdhs(size: Size, model: Llava, tokenizer: Tokenizer, processor: ImageProcessor) -> Bdhs:
    """Algorithm 1, one guided and greedy iteration."""
    sampling = Sampling(size.sentence_tokens, temperature=0.0)
    return Bdhs(model, tokenizer, processor, never_similar, BdhsConfig(RHO_TH, n_bdhs=1, sampling=sampling))


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


def bdhs_row(size: Size, ours, peer) -> dict:
    """y- for a batch of examples."""
    model, tokenizer, processor = ours
    bdhs = make_bdhs(size, *ours)
    turns = [[("user", size.question(i))] for i in range(size.examples)]
    batch = [Example(str(i), picture(i), turns[i], size.answer(i, "chosen")) for i in range(size.examples)]
    pixels = [processor(example.image) for example in batch]

    def our_work() -> list:
        features = model.encode_images(torch.cat(pixels))
        return bdhs.sample(batch, list(features.split([len(tiles) for tiles in pixels])))

    sequences, said = recorded(our_work)
    prompts = PeerBatch(peer, sequences, pixels)

    def peer_work() -> list:
        return prompts.generate(size.sentence_tokens, bdhs.sentence_stops)

    checked = require_same_tokens(said, peer_work(), size.dtype)
    work = f"BDHS, rho_th {RHO_TH}: {len(prompts.inputs['input_ids'])} sentences of {len(batch)} pictures"
    return measured(size, ours, peer, our_work, peer_work, f"{work}: transformers' generate", checked)


def two_samples(size: Size, tokenizer: Tokenizer, processor: ImageProcessor) -> tuple[list[Sequence], list[Tensor]]:
    """Questions with two empty branches each, and their pictures' pixels."""
    pictures, sequences = [picture(i) for i in range(size.examples)], []
    for number, one in enumerate(pictures):
        patches, packing = processor.layout(one)
        prompt = tokenizer.prompt([("user", size.question(number))])
        sequences.append(Sequence(prompt, [Branch([]), Branch([])], patches, packing=packing))
    return sequences, [processor(one) for one in pictures]


def generate_row(size: Size, ours, peer) -> dict:
    """Two samples of each picture, as long as asked for."""
    model, tokenizer, processor = ours
    sequences, pixels = two_samples(size, tokenizer, processor)
    prompts = PeerBatch(peer, sequences, pixels)

    def our_work(tokens: int = size.new_tokens) -> list:
        return generate(model, sequences, model.encode_images(torch.cat(pixels)), Sampling(tokens, 0.0), set())

    def peer_work() -> list:
        return prompts.generate(size.new_tokens, set())

    checked = require_same_tokens(our_work(), peer_work(), size.dtype)
    work = f"2 x {size.new_tokens} tokens of each of {len(sequences)} pictures: transformers' generate"
    row = measured(size, ours, peer, our_work, peer_work, work, checked)
    if size.device == "cuda":
        prefill = interleaved({"ours": lambda: our_work(1)}, size.repeats, size.device)["ours"]
        decoding = row["ours"]["seconds"] - prefill
        row["bandwidth_share"] = roofline.bandwidth_share(model, sequences, size.new_tokens - 1, decoding)
    return row


def measured(size: Size, ours, peer, our_work, peer_work, work: str, checked: str) -> dict:
    """A row of two sides that have both been called once."""
    sides, models = {"ours": our_work, "peer": peer_work}, {"ours": ours[0], "peer": peer}
    seconds = interleaved(sides, size.repeats, size.device)
    side = {
        name: Side(seconds[name], peak_bytes(call, size.device), model_bytes(models[name]))
        for name, call in sides.items()
    }
    return compared(work, checked, side["ours"], side["peer"])


def rows(size: Size, folder: Path) -> dict[str, dict]:
    """Both rows."""
    ours, peer = load_ours(size, folder), load_peer(size, folder)
    return {"bdhs": bdhs_row(size, ours, peer), "generate": generate_row(size, ours, peer)}
