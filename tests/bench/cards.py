"""The table for one card in docs/running.md: a LLaVA-1.6-7B on 24, 40 and 80 GB, by the formulas of
docs/scaling.md. Nothing here was measured.

    python -m tests.bench.cards

Assumed: half of a data sheet's FLOP/s and bytes/s are reached, and 5 GB of a card stay free (for
the driver and fragments), as in scaling.py. A stage is timed at its usual length. It has to fit at
its longest: a picture of 640 x 640, in training with two responses of 512 tokens (the default of
--max-response-tokens).
"""

from dataclasses import dataclass
from functools import cache

import torch

from minialign.cli import run_main
from minialign.data.anyres import PINPOINTS, packing
from minialign.model.clip import ClipConfig
from minialign.model.llava import Llava, LlavaConfig
from minialign.model.lora import LoraLinear
from minialign.model.masks import Branch, Sequence, TokenTree, build_tree
from tests.bench import memory, roofline
from tests.bench.scaling import ASSUMED, FLOAT32, GB, H100, MODELS, markdown
from tests.bench.sizes import PICTURE

FREE = 5 * GB  # of a card's memory
PAIRS, EPOCHS = 5000, 3  # the paper's subset; the default of --epochs
PROMPT, RESPONSE = 60, 100  # tokens
LARGEST, LIMIT = (640, 640), 512  # of COCO's pictures; tokens of a response at most
SENTENCES, COMPLETION, ITERATIONS = 8, 128, 5  # of a response; limits of a completion, of Alg. 1
POPE_PICTURES, QUESTIONS, QUESTION, ANSWER = 500, 18, 20, 16  # three settings of six; tokens
ENCODER = 109e6 * 4  # bytes of all-mpnet-base-v2 in float32
BATCHES = {"sample": (32, 16, 8, 4, 2, 1), "evaluate": (8, 4, 2, 1)}  # the default, and below


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's data sheet, and what of training it takes."""

    name: str
    memory: float  # bytes
    flops: float  # dense bfloat16, sums in float32
    float32: float  # FLOP/s outside of the tensor cores
    bandwidth: float  # bytes/s
    rank: int  # --lora-rank
    recompute: bool


CARDS = (
    Card("RTX 4090", 24 * GB, 165.2e12, 82.6e12, 1.008e12, rank=32, recompute=True),
    Card("A100, 40 GB", 40 * GB, 312e12, 19.5e12, 1.555e12, rank=128, recompute=True),
    Card("H100, 80 GB", 80 * GB, H100.flops, FLOAT32, H100.bandwidth, rank=128, recompute=False),
)


@cache
def policy(rank: int) -> Llava:
    """The 7B with adapters, frozen weights in bfloat16, without data."""
    config = LlavaConfig(MODELS["7B"], ClipConfig(), image_token_id=32000, pinpoints=PINPOINTS)
    return memory.meta_model(config, torch.bfloat16, rank)


@cache
def row(size: tuple[int, int], trunk: int, branches: int, response: int) -> tuple[TokenTree, int]:
    """One sequence on a picture of so many pixels, (width, height), and the tower's tiles."""
    vision = ClipConfig()
    side = vision.image_size // vision.patch_size
    patches, order = packing(size[::-1], vision.image_size, side)
    sequence = Sequence(
        [1] * trunk + [32000], [Branch([2] * response)] * branches, patches, packing=order
    )
    return build_tree([sequence], 32000, 0), patches // vision.patches


def base_bytes() -> int:
    """The model as it is sampled from and evaluated, all in bfloat16."""
    model = policy(1)
    vision, text = model.config.vision.hidden_size, model.config.text.hidden_size
    projector = vision * text + text + text * text + text
    return memory.frozen_bytes(model) + 2 * projector


def read_bytes() -> int:
    """What one decoding step reads: the decoder's matrices and the head, in bfloat16."""
    model = policy(1)
    frozen = roofline.weights_of(model.language_model.layers) + model.lm_head.weight.numel()
    return 2 * frozen


# ---------------------------------------------------------------- training


def training_bytes(rank: int, recompute: bool, longest: bool, processes: int = 1) -> dict[str, int]:
    """memory.peak_parts of one pair in a pass, and its mask."""
    size, response = (LARGEST, LIMIT) if longest else (PICTURE, RESPONSE)
    tree, _ = row(size, PROMPT, 2, response)
    parts = memory.peak_parts(policy(rank), tree, processes, recompute)
    return parts | {"mask": memory.dense_mask_bytes(policy(rank), tree)}


def pair_seconds(card: Card, cached: bool) -> float:
    """Of a usual pair: roofline.dpo_flops, and with --recompute another forward pass."""
    model, (tree, tiles) = policy(card.rank), row(PICTURE, PROMPT, 2, RESPONSE)
    features = int((tree.feature >= 0).sum())
    wide = roofline.projector_flops(model, features, not cached)
    flops = roofline.dpo_flops(model, tree, tiles, not cached) - wide
    if card.recompute:
        linears = [module for module in model.modules() if isinstance(module, LoraLinear)]
        adapters = sum(linear.lora_A.numel() + linear.lora_B.numel() for linear in linears)
        both = roofline.dpo_flops(model, tree, tiles, reference=True)
        once = both - roofline.dpo_flops(model, tree, tiles, reference=False)
        reference = roofline.projector_flops(model, features, True)
        reference -= roofline.projector_flops(model, features, False)
        flops += once - reference + 2 * tree.ids.numel() * adapters
    return (flops / card.flops + wide / card.float32) / ASSUMED


def training_hours(card: Card) -> float:
    """All pairs and epochs, with --ref-cache."""
    first, later = pair_seconds(card, cached=False), pair_seconds(card, cached=True)
    return PAIRS * (first + (EPOCHS - 1) * later) / 3600


# ---------------------------------------------------------------- sampling and evaluation


def forward_flops(tree: TokenTree, tiles: int) -> int:
    """A forward pass of the base, the tower's included."""
    model = policy(1)
    both = roofline.dpo_flops(model, tree, tiles, reference=True)
    return both - roofline.dpo_flops(model, tree, 0, reference=False)


def decoding_bytes(trunk: int, branches: int, limit: int, batch: int) -> int:
    """Base, the encoder, keys and values of a batch in a context of its final width, and what one
    layer holds of the prefill."""
    config = MODELS["7B"]
    width = -(-(trunk + branches * limit) // 128) * 128
    cache_bytes = memory.kv_cache_bytes(config, batch, width, 2)
    layer = batch * trunk * memory.layer_bytes(config, 0, 2)
    return int(base_bytes() + ENCODER + cache_bytes + layer)


def sampling_bytes(batch: int) -> int:
    """BDHS at rho_th 0.99: a hundredth of the picture, the prompt and y+."""
    trunk = 2928 // 100 + PROMPT + LIMIT
    return decoding_bytes(trunk, SENTENCES, COMPLETION, batch)


def pope_bytes(batch: int, rank: int) -> int:
    """A picture with all its questions, and an adapter in float32."""
    trunk = row(LARGEST, PROMPT, 0, 0)[0].ids.numel() + QUESTIONS * QUESTION
    adapter = memory.trained_bytes(policy(rank))
    return int(decoding_bytes(trunk, QUESTIONS, ANSWER, batch) - ENCODER + adapter)


def batches_that_fit(card: Card) -> tuple[int, int]:
    """The largest batches of sampling and evaluation, up to the defaults, that leave FREE bytes."""
    room = card.memory - FREE
    sampled = next(each for each in BATCHES["sample"] if sampling_bytes(each) <= room)
    asked = next(each for each in BATCHES["evaluate"] if pope_bytes(each, card.rank) <= room)
    return sampled, asked


def sampling_hours(card: Card, batch: int) -> float:
    """At most: every batch takes all iterations, and each of them all steps."""
    tree, tiles = row(PICTURE, 1, 0, 0)
    tower = forward_flops(tree, tiles) - forward_flops(tree, 0)
    tokens = tree.ids.numel() // 100 + PROMPT + RESPONSE
    prefill = 2 * roofline.weights_of(policy(1).language_model.layers) * tokens
    rows = [(tokens, SENTENCES)] * batch
    read = roofline.decoding_bytes(read_bytes() // 2, MODELS["7B"], 2, rows, COMPLETION)
    flops = batch * (tower + ITERATIONS * prefill)
    seconds = (flops / card.flops + ITERATIONS * read / card.bandwidth) / ASSUMED
    return -(-PAIRS // batch) * seconds / 3600


def pope_minutes(card: Card, batch: int) -> float:
    """At most: every answer takes all steps."""
    tree, tiles = row(PICTURE, PROMPT, QUESTIONS, QUESTION)
    rows = [(tree.ids.numel(), QUESTIONS)] * batch
    read = roofline.decoding_bytes(read_bytes() // 2, MODELS["7B"], 2, rows, ANSWER)
    seconds = (batch * forward_flops(tree, tiles) / card.flops + read / card.bandwidth) / ASSUMED
    return -(-POPE_PICTURES // batch) * seconds / 60


# ---------------------------------------------------------------- tables


def card_table() -> str:
    """One card: flags, memory and time of the three stages."""
    head = "card | what | flags besides the recipe's | GB | GB at the longest | time"
    rows = []
    for card in CARDS:
        sampled, asked = batches_that_fit(card)
        flags = [f"--lora-rank {card.rank}"] if card.rank != 128 else []
        flags += ["--recompute"] if card.recompute else []
        usual = sum(training_bytes(card.rank, card.recompute, longest=False).values())
        longest = sum(training_bytes(card.rank, card.recompute, longest=True).values())
        assert longest <= card.memory - FREE, card
        hours = f"{sampling_hours(card, sampled):.1f} h at most"
        minutes = f"{pope_minutes(card, asked):.0f} min at most"
        for name, said, least, most, time in (
            ("sampling", batch_flag(sampled, "sample"), "", sampling_bytes(sampled), hours),
            ("DPO", " ".join(flags), usual, longest, f"{training_hours(card):.1f} h"),
            ("POPE", batch_flag(asked, "evaluate"), "", pope_bytes(asked, card.rank), minutes),
        ):
            least = f"{least / GB:.1f}" if least else "-"
            said = f"`{said}`" if said else "none"
            rows.append([card.name, name, said, least, f"{most / GB:.1f}", time])
    return markdown(head, rows)


def batch_flag(batch: int, stage: str) -> str:
    """--batch-size, where it is not the program's own."""
    return "" if batch == BATCHES[stage][0] else f"--batch-size {batch}"


def rank_table() -> str:
    """What a training step takes, by rank, --recompute and cards that share the model."""
    head = "`--lora-rank` | cards | `--recompute` | weights | gradients, moments | gathered"
    head += " | GB, usual pair | GB, longest pair"
    rows = []
    for rank, processes, recompute in (
        (128, 1, False),
        (128, 1, True),
        (64, 1, True),
        (32, 1, True),
        (128, 2, False),
        (128, 2, True),
    ):
        usual = training_bytes(rank, recompute, False, processes)
        longest = training_bytes(rank, recompute, True, processes)
        shared = f"{processes}, `--shard full`" if processes > 1 else "1"
        cells = [str(rank), shared, "yes" if recompute else "no"]
        for name in ("weights", "gradients and moments", "gathered"):
            cells.append(f"{usual[name] / GB:.1f}")
        rows.append([*cells, *(f"{sum(each.values()) / GB:.1f}" for each in (usual, longest))])
    return markdown(head, rows)


def disk_table() -> str:
    """What a run reads and leaves."""
    rows = [["the model, in 16 bits", base_bytes()], ["the encoder, in float32", ENCODER]]
    for rank in (32, 128):
        trained = memory.trained_bytes(policy(rank))
        rows.append([f"`adapter/`, rank {rank}", trained])
        rows.append([f"`checkpoint/`, rank {rank}", 3 * trained])
    rows.append(["`merged/`", base_bytes()])
    return markdown("what | GB", [[name, f"{size / GB:.1f}"] for name, size in rows])


def tables() -> dict[str, str]:
    """The tables of docs/running.md that follow from formulas, by what stands above them."""
    return {
        "One card": card_table(),
        "A training step": rank_table(),
        "Disk": disk_table(),
    }


@dataclass(frozen=True)
class Config:
    """Flags: none."""


def main(config: Config) -> None:
    """Print all tables."""
    for title, table in tables().items():
        print(f"## {title}\n\n{table}")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
