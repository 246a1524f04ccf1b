"""The embedded world's model on this device against the CPU: what it samples, what it learns.

In float32 both must agree: a draw or an argmax falls the other way only where two candidates nearly
tie. In bfloat16 it is told how far they are apart.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minialign.align.logps import both_logps
from minialign.align.losses import preference_loss
from minialign.data.collate import PairCollator
from minialign.data.images import ImageProcessor
from minialign.data.record_files import read_records
from minialign.data.tokenizer import Tokenizer
from minialign.evaluation.metrics import TOY
from minialign.model.hf_folder import load_model
from minialign.model.llava import Llava
from minialign.model.masks import Branch, Sequence
from minialign.sampling.bdhs import Bdhs, BdhsConfig, Example
from minialign.sampling.generate import Completion, Sampling, generate
from minialign.sampling.similarity import load_similarity
from minialign.toy import world
from tests.bench.dpo import with_adapters
from tests.bench.rows import Facts
from tests.bench.sizes import Size
from tests.gpu.ours import Graphs, recompute_layers

PICTURES, TOKENS, RANK, PAIRS = 16, 48, 8, 8
SAME = 0.95  # of the tokens, at least, in float32
# Relative distances to the CPU's float32 that are allowed: log-probs, loss, gradients.
ALLOWED = {"float32": (1e-4, 1e-3, 1e-3), "bfloat16": (3e-2, 1e-1, 3e-1)}

# ---------------------------------------------------------------- sampling


def prompts(tokenizer: Tokenizer, processor: ImageProcessor) -> tuple[list[Sequence], Tensor]:
    """Questions about pictures, two samples of each, and the pictures' pixels."""
    sequences, pixels = [], []
    for i in range(PICTURES):
        picture = world.picture(world.make_scene("validation", i))
        patches, packing = processor.layout(picture)
        ids = tokenizer.prompt([("user", world.DESCRIBE[i % len(world.DESCRIBE)])])
        sequences.append(Sequence(ids, [Branch([]), Branch([])], patches, packing=packing))
        pixels.append(processor(picture))
    return sequences, torch.cat(pixels)


def said_by(model: Llava, temperature: float, fixed: bool) -> list[Completion]:
    """All completions, on the model's device."""
    tokenizer, processor = Tokenizer.from_folder(TOY), ImageProcessor.from_folder(TOY)
    sequences, pixels = prompts(tokenizer, processor)
    seeds = [[2 * i, 2 * i + 1] for i in range(len(sequences))]
    rows = generate(
        model,
        sequences,
        model.encode_images(pixels),
        Sampling(TOKENS, temperature),
        {tokenizer.eos_id},
        seeds,
        tokenizer.pad_id,
        fixed=fixed,
    )
    return [completion for row in rows for completion in row]


def distance(some: list[Completion], others: list[Completion]) -> dict:
    """The share of tokens that are the same up to the first that is not, of texts and of tokens;
    and the largest difference of two log-probs there."""
    texts = tokens = total = 0
    furthest = 0.0
    for one, two in zip(some, others, strict=True):
        texts += one.ids == two.ids
        total += len(two.ids)
        for i in range(len(two.ids)):
            if one.ids[: i + 1] != two.ids[: i + 1]:
                break
            tokens += 1
            furthest = max(furthest, abs(one.logps[i] - two.logps[i]))
    return {
        "texts": f"{texts} of {len(others)}",
        "tokens": tokens / total,
        "logps": furthest,
    }


def sampled_pairs(model: Llava) -> list[str]:
    """y- of some examples by Algorithm 1, whole."""
    tokenizer, processor = Tokenizer.from_folder(TOY), ImageProcessor.from_folder(TOY)
    config = BdhsConfig(rho_th=0.7, sampling=Sampling(TOKENS))
    bdhs = Bdhs(model, tokenizer, processor, load_similarity(None), config)
    examples = [
        Example(r.id, world.picture(world.scene_of(r.image)), r.turns, r.chosen)
        for r in read_records("toy", None, PICTURES, 0)
    ]
    return [sampled.rejected for sampled in bdhs.sample(examples)]


def measure_sampling(row: str, size: Size, folder: Path, facts: Facts) -> None:
    """Steps of a fixed width (on a GPU a graph) and a growing context here, a growing one on the
    CPU: greedy and drawn."""
    here, cpu = load_model(TOY, size.device), load_model(TOY)
    graphs, worst = Graphs(), {"tokens": 1.0, "logps": 0.0}
    with graphs.watch():
        for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
            plain = said_by(cpu, temperature, fixed=False)
            sides = {
                "fixed": said_by(here, temperature, fixed=True),
                "growing": said_by(here, temperature, fixed=False),
            }
            found = {f"{name} {side}": distance(said, plain) for side, said in sides.items()}
            facts.add(row, **found)
            for each in found.values():
                worst["tokens"] = min(worst["tokens"], each["tokens"])
                worst["logps"] = max(worst["logps"], each["logps"])

        pairs, others = sampled_pairs(here), sampled_pairs(cpu)
        same = sum(a == b for a, b in zip(pairs, others, strict=True))
        facts.add(row, bdhs=f"{same} of {len(pairs)}")

        half = load_model(TOY, size.device, torch.bfloat16)
        both = [said_by(half, 0.0, fixed=fixed) for fixed in (True, False)]
        facts.add(row, **{"bfloat16 greedy fixed against growing": distance(*both)})

    said = (
        f"{worst['tokens']:.1%} of tokens the same as the CPU's, log-probs to {worst['logps']:.1e}"
    )
    said += f", BDHS {same} of {len(pairs)}"
    said += f", {graphs.captured} graphs captured and {graphs.refused} refused"
    facts.add(row, said=said, captured=graphs.captured, refused=graphs.refused)
    assert worst["tokens"] >= SAME and worst["logps"] < 1e-3 and same >= SAME * len(pairs), said
    assert size.device == "cpu" or (graphs.captured and not graphs.refused), said
    facts.finish(row)


# ---------------------------------------------------------------- losses and gradients


def policy(device: str, dtype: torch.dtype) -> Llava:
    """The toy model with adapters that do something, the same numbers wherever it is."""
    torch.manual_seed(0)
    return with_adapters(load_model(TOY, "cpu", dtype), RANK).to(device)


def learned(model: Llava) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (2, B, 2) of policy and reference, the loss and all gradients (N,), in float32 on
    the CPU."""
    tokenizer, processor = Tokenizer.from_folder(TOY), ImageProcessor.from_folder(TOY)
    records = read_records("toy", None, 2 * PAIRS, 0)
    pairs = [
        replace(a, rejected=b.chosen) for a, b in zip(records[::2], records[1::2], strict=True)
    ]
    batch = PairCollator(tokenizer, processor, "toy", 512)(pairs)

    tree, features = batch.tree.to(model.device), model.encode_images(batch.pixels)
    logps, ref_logps = both_logps(model, tree, features)
    weights = torch.ones(1, device=model.device)
    loss = preference_loss(logps, ref_logps, "dpo", 0.1, weights)
    loss.backward()
    grads = [p.grad.float().flatten() for p in model.parameters() if p.requires_grad]
    found = torch.stack([logps.detach(), ref_logps]), loss.detach()[None], torch.cat(grads)
    return tuple(each.float().cpu() for each in found)


def apart(values: Tensor, others: Tensor) -> float:
    """Relative distance."""
    return ((values - others).norm() / others.norm()).item()


def measure_gradients(row: str, size: Size, folder: Path, facts: Facts) -> None:
    """A DPO step's log-probs, loss and gradients here against the CPU's in float32."""
    exact = learned(policy("cpu", torch.float32))
    words, failed = [], []
    for name, dtype, recompute in (
        ("float32", torch.float32, False),
        ("float32 --recompute", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        model = policy(size.device, dtype)
        if recompute:
            recompute_layers(model)
        far = [apart(*both) for both in zip(learned(model), exact, strict=True)]
        facts.add(row, **{name: dict(zip(("logps", "loss", "gradients"), far, strict=True))})
        words.append(f"{name} {far[0]:.1e} {far[1]:.1e} {far[2]:.1e}")
        allowed = ALLOWED[name.split()[0]]
        if not all(a <= b for a, b in zip(far, allowed, strict=True)):
            failed.append(name)
    said = f"log-probs, loss, gradients against the CPU, relative: {'; '.join(words)}"
    facts.add(row, said=said)
    assert not failed, f"{failed} too far: {said}"
    facts.finish(row)
