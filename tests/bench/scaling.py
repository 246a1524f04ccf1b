"""The figures of docs/scaling.md: memory per GPU and time per 1,000 pairs, from sizes and a GPU's
data sheet.

    python -m tests.bench.scaling             # the tables that follow from formulas
    python -m tests.bench.scaling --measure   # growth.py's tables and plots, measured here, too

What is not known is assumed, and stands in `ASSUMED`: nothing here was measured on a GPU.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from minialign.cli import run_main
from minialign.data.anyres import PINPOINTS, packing
from minialign.model.clip import ClipConfig
from minialign.model.llama import LlamaConfig
from minialign.model.llava import Llava, LlavaConfig
from minialign.model.lora import LoraLinear
from minialign.model.masks import Branch, Sequence, TokenTree, build_tree
from tests.bench import memory, roofline
from tests.bench.sizes import PICTURE

GB = 1e9
RANK = 128
H100 = roofline.GPUS["H100"]
# Of the makers' data sheets: bytes of memory, float32 FLOP/s outside of the tensor cores, bytes/s
# of NVLink one way between the 8 GPUs of a node, and of the node's 8 network ports of 400 Gbit/s.
MEMORY, FLOAT32, NODE, NVLINK, NETWORK = 80e9, 67e12, 8, 450e9, 8 * 50e9
# Of the peak rate is reached; the rest of a step that is no product of matrices is in it.
ASSUMED = 0.5
LARGE = MEMORY - 5e9  # bytes that a step may take: the rest is for the driver, NCCL and fragments
MODELS = {
    "7B": LlamaConfig(32064, 4096, 11008, 32, 32, 32),
    "13B": LlamaConfig(32064, 5120, 13824, 40, 40, 40),
    "34B": LlamaConfig(64064, 7168, 20480, 60, 56, 8),
}
GPUS = (1, 8, 32, 256)


@cache
def policy(name: str) -> Llava:
    """A LLaVA-1.6 with adapters of rank 128, frozen weights in bfloat16, without data."""
    config = LlavaConfig(MODELS[name], ClipConfig(), image_token_id=32000, pinpoints=PINPOINTS)
    return memory.meta_model(config, torch.bfloat16, RANK)


@cache
def judge(name: str) -> Llava:
    """The same without adapters, as an annotator is: frozen, the projector in float32."""
    with torch.device("meta"):
        config = LlavaConfig(MODELS[name], ClipConfig(), image_token_id=32000, pinpoints=PINPOINTS)
        model = Llava(config).to(torch.bfloat16)
        model.multi_modal_projector.float()
    return model.requires_grad_(False)


@cache
def batch(pairs: int = 1, response: int = 100, prompt: int = 60) -> tuple[TokenTree, int]:
    """Pairs on pictures of 640 x 480 (2,340 image tokens), and how many tiles the tower sees."""
    vision = ClipConfig()
    side = vision.image_size // vision.patch_size
    patches, order = packing(PICTURE[::-1], vision.image_size, side)
    row = Sequence([1] * prompt + [32000], [Branch([2] * response)] * 2, patches, packing=order)
    return build_tree([row] * pairs, 32000, 0), pairs * patches // vision.patches


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Seconds:
    """Of one optimizer step on one GPU; `hidden` is the communication that takes place beside the
    computing."""

    base: float  # products in bfloat16, attention's included
    projector: float  # products in float32
    hidden: float
    summing: float  # of all gradients, when they are there

    @property
    def computing(self) -> float:
        """What the GPU itself has to do."""
        return self.base + self.projector

    @property
    def total(self) -> float:
        """The step: computing or the communication beside it, whichever takes longer, and what
        comes after."""
        return max(self.computing, self.hidden) + self.summing


def bus(gpus: int) -> float:
    """Bytes/s at which a collective moves: rings go through all ports of a node at a time."""
    return NVLINK if gpus <= NODE else min(NVLINK, NETWORK)


def moved(gpus: int, size: int) -> float:
    """Seconds in which every GPU gets what the others hold of `size` bytes; latency is left out."""
    return size * (gpus - 1) / gpus / bus(gpus)


@cache
def flops(name: str, pairs: int, reference: bool) -> int:
    """roofline.dpo_flops of some pairs."""
    return roofline.dpo_flops(policy(name), *batch(pairs), reference)


@cache
def gathered(name: str, cached: bool) -> int:
    """Bytes that --shard full gathers in one forward and backward pass.

    Each layer three times: for the reference (unless it is cached), the policy and the backward
    pass; all else once. What is trained is moved once more, as gradients.
    """
    model = policy(name)
    layers = memory.whole_bytes(model.language_model.layers)
    once = memory.whole_bytes(model) + memory.trained_bytes(model)
    return once + (1 if cached else 2) * layers


@dataclass(frozen=True)
class Plan:
    """A model on so many GPUs, each with so many pairs in a pass; --accumulate gives the passes of
    a step."""

    name: str
    gpus: int
    shard: str
    pairs: int = 1

    @property
    def model(self) -> Llava:
        """Shapes."""
        return policy(self.name)

    @property
    def batch_size(self) -> int:
        """The paper's 16, or what gives every GPU a pass."""
        return max(16, self.gpus * self.pairs)

    def peak(self, recompute: bool) -> dict[str, int]:
        """Bytes per GPU."""
        processes = self.gpus if self.shard == "full" else 1
        return memory.peak_parts(self.model, batch(self.pairs)[0], processes, recompute)

    @cached_property
    def recompute(self) -> bool:
        """Only where it must be."""
        return sum(self.peak(recompute=False).values()) > LARGE

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes per GPU, with --recompute where it must be."""
        return self.peak(self.recompute)

    @property
    def fits(self) -> bool:
        """Into a GPU's memory."""
        return sum(self.parts.values()) <= LARGE

    def step(self, cached: bool = False) -> Seconds:
        """One optimizer step, on each GPU.

        FLOPs are roofline.dpo_flops', of which the projector's are float32. --recompute adds
        another forward pass of the policy: what a reference costs, and 2 L per token of L adapter
        parameters. With whole models the gradients of what is trained are summed once a step, which
        moves them twice.
        """
        passes, tree = self.batch_size // (self.gpus * self.pairs), batch(self.pairs)[0]
        tokens, features = tree.ids.numel(), int((tree.feature >= 0).sum())
        both = self.decoder_flops(features, reference=True)
        alone = self.decoder_flops(features, reference=False)
        linears = [module for module in self.model.modules() if isinstance(module, LoraLinear)]
        adapters = sum(linear.lora_A.numel() + linear.lora_B.numel() for linear in linears)
        again = both - alone + 2 * tokens * adapters

        base = (alone if cached else both) + self.recompute * again
        wide = roofline.projector_flops(self.model, features, not cached)
        hidden = summing = 0.0
        if self.shard == "full":
            hidden = passes * moved(self.gpus, gathered(self.name, cached))
        else:
            summing = 2 * moved(self.gpus, memory.trained_bytes(self.model))
        base_seconds = passes * base / (ASSUMED * H100.flops)
        projector_seconds = passes * wide / (ASSUMED * FLOAT32)
        return Seconds(base_seconds, projector_seconds, hidden, summing)

    def decoder_flops(self, features: int, reference: bool) -> int:
        """roofline.dpo_flops' of some pairs but for the projector's, which are float32."""
        projector = roofline.projector_flops(self.model, features, reference)
        return flops(self.name, self.pairs, reference) - projector

    def bound(self) -> str:
        """What the time goes to, or why there is none."""
        if not self.fits:
            return "memory: does not fit"
        step = self.step()
        longer = "computing" if step.computing >= step.hidden else "gathering"
        if not step.hidden:
            return longer
        return f"{longer}; gathering is {step.hidden / step.computing:.0%} of it"


# ---------------------------------------------------------------- tables


def plans() -> list[Plan]:
    """All that the page tells of; one GPU has nobody to share with."""
    found = []
    for name in MODELS:
        for gpus in GPUS:
            kinds = ("none", "full") if gpus > 1 else ("none",)
            found += [Plan(name, gpus, shard) for shard in kinds]
    return found


def markdown(head: str, rows: list[list[str]]) -> str:
    """A table; the names of its columns are parted by bars."""
    rule = "|".join("---" for _ in head.split("|"))
    lines = [head, rule, *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def main_table() -> str:
    """Memory and time."""
    head = "model | GPUs | --shard | --batch-size | --recompute | weights | gradients, moments"
    head += " | gathered | activations | workspace | GB in all | s per 1,000 pairs"
    head += " | with --ref-cache | bound by"
    rows = []
    for plan in plans():
        parts, recompute = plan.parts, "yes" if plan.recompute else "no"
        row = [plan.name, str(plan.gpus), plan.shard, str(plan.batch_size), recompute]
        row += [f"{value / GB:.1f}" for value in (*parts.values(), sum(parts.values()))]
        for cached in (False, True):
            seconds = 1000 / plan.batch_size * plan.step(cached).total
            row.append(f"{seconds:,.1f}" if plan.fits else "-")
        rows.append([*row, plan.bound()])
    return markdown(head, rows)


def whole_table() -> str:
    """What `gathered` holds: while it samples, is evaluated or hashed, every GPU has the whole
    model."""
    rows = []
    for name in MODELS:
        model = policy(name)
        whole, row = memory.whole_bytes(model), [name]
        for gpus in GPUS[1:]:
            local = memory.frozen_bytes(model, gpus) + 3 * memory.trained_bytes(model, gpus)
            row.append(f"{(whole + local) / GB:.1f}")
        rows.append(row)
    return markdown("model | GB per GPU, of 8 | of 32 | of 256", rows)


def judge_phases(name: str, annotator: str, gpus: int, sharded: bool) -> dict[str, int]:
    """Bytes per GPU of online DPO by a policy in shards, while it answers (without keys and
    values), is judged, and learns.

    An annotator in shards keeps gathered what no layer holds, from its first verdict on; while it
    judges two layers, and one layer's activations of a pair as long as it is learned from.
    """
    model, other, config = policy(name), judge(annotator), MODELS[annotator]
    trained = memory.trained_bytes(model, gpus)
    shards = memory.frozen_bytes(model, gpus) + 3 * trained
    layers = other.language_model.layers
    kept, two = memory.frozen_bytes(other), 0
    if sharded:
        two = 2 * memory.whole_bytes(layers[0])
        outside = memory.gathered_bytes(other) - two
        kept = memory.frozen_bytes(other, gpus) + outside
    tokens = batch()[0].ids.numel()
    return {
        "annotator": kept,
        "answers": kept + shards + memory.whole_bytes(model),
        "judged": kept + shards + two + tokens * memory.layer_bytes(config, 0, 2, parts=2),
        "learns": kept + sum(Plan(name, gpus, "full").parts.values()),
    }


def judge_table() -> str:
    """The paper's own setting: a 7B and its 34B annotator on one node."""
    rows = []
    for sharded in (False, True):
        phases = judge_phases("7B", "34B", NODE, sharded)
        where = "in shards" if sharded else "whole in every process"
        fits = "yes" if max(phases.values()) <= LARGE else "no"
        rows.append([where, *(f"{size / GB:.1f}" for size in phases.values()), fits])
    head = "34B annotator | its GB per GPU | GB in all while a 7B answers | while it is judged"
    return markdown(f"{head} | while it learns | fits", rows)


def network_table() -> str:
    """How fast a node's network must be for computing to hide what shards gather over it."""
    rows = []
    for name in MODELS:
        step = Plan(name, 32, "full").step()
        slow = step.hidden * NETWORK / 50e9 / step.computing
        needed = NETWORK * step.hidden / step.computing
        times = [f"{seconds * 1e3:,.0f}" for seconds in (step.computing, step.hidden)]
        rows.append([name, *times, f"{needed / GB:,.0f}", str(math.ceil(slow))])
    head = "model on 32 GPUs | ms of computing, a pair | ms of gathering at 400 GB/s"
    head += " | GB/s per node that hide it | pairs in a pass that hide it at 50 GB/s"
    return markdown(head, rows)


def length_table() -> str:
    """Activations of one pair and keys and values of one sequence, per 1,000 tokens."""
    rows = []
    for name, config in MODELS.items():
        layer = memory.layer_bytes(config, RANK, 2, parts=2)
        cache = memory.kv_cache_bytes(config, 1, 1000, 2)
        kept = 1000 * config.num_hidden_layers * layer
        inputs = 1000 * (config.num_hidden_layers * 2 * config.hidden_size + layer)
        sizes = [f"{size / GB:.2f}" for size in (kept, inputs, cache)]
        rows.append([name, f"{layer:,}", *sizes])
    head = "model | bytes per token and layer | GB per 1,000 tokens | with --recompute"
    return markdown(f"{head} | keys and values", rows)


def tables() -> dict[str, str]:
    """The tables of the page that follow from formulas, by what stands above them."""
    return {
        "Memory per GPU and time": main_table(),
        "Whole models out of shards": whole_table(),
        "An annotator beside the policy": judge_table(),
        "Gathering against computing": network_table(),
        "Per token": length_table(),
    }


@dataclass(frozen=True)
class Config:
    """Flags."""

    measure: bool = False  # measure growth and loading here (three minutes), write the plots
    out: str = "docs"  # folder of the plots


def main(config: Config) -> None:
    """Print all tables."""
    for title, table in tables().items():
        print(f"## {title}\n\n{table}")
    if config.measure:
        from tests.bench import growth  # here, as it needs transformers, which the formulas do not

        growth.main(config.out)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
