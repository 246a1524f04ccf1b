"""The embedded world's model on this device against the CPU: what it samples, what it learns.

In float32 both must agree: a draw or an argmax falls the other way only where two candidates nearly
tie. In bfloat16 it is told how far they are apart.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import sample_bdhs
from minialign.align.logps import branch_logps, reference_logps
from minialign.align.losses import dpo_loss
from minialign.data.collate import PairCollator
from minialign.data.records import instruct_record
from minialign.edge import CHECKPOINT
from minialign.model.hf_folder import load_model
from minialign.model.llava import Llava
from minialign.sampling.assistant import Assistant
from minialign.sampling.generate import Completion, Sampling, generate
from minialign.sampling.similarity import load_similarity
from minialign.toy import world
from tests.bench.dpo import BETA, with_adapters
from tests.bench.rows import Facts
from tests.bench.sizes import Size
from tests.gpu.ours import Graphs, recompute_layers

PICTURES, TOKENS, RANK, PAIRS = 16, 48, 8, 8
SAME = 0.95  # of the tokens, at least, in float32
# Relative distances to the CPU's float32 that are allowed: log-probs, loss, gradients.
ALLOWED = {"float32": (1e-4, 1e-3, 1e-3), "bfloat16": (3e-2, 1e-1, 3e-1)}

# ---------------------------------------------------------------- sampling


def toy(device: str, dtype: torch.dtype = torch.float32) -> Assistant:
    """The embedded checkpoint."""
    return Assistant.from_folder(CHECKPOINT, device, dtype)


def samples_of(assistant: Assistant, temperature: float, fixed: bool) -> list[Completion]:
    """Two samples of each of some questions about pictures, on the model's device."""
    sequences, images = [], []
    for i in range(PICTURES):
        picture = world.picture(world.make_scene("validation", i))
        images.append(assistant.processor.prepare(picture))
        turns = [("user", world.DESCRIBE[i % len(world.DESCRIBE)])]
        sequences.append(assistant.sequence(turns, images[-1], [[], []]))

    tokenizer, features = assistant.tokenizer, assistant.encode(images)
    seeds = [[2 * i, 2 * i + 1] for i in range(PICTURES)]
    sampling, stops, pad = Sampling(TOKENS, temperature), {tokenizer.eos_id}, tokenizer.pad_id
    rows = generate(assistant.model, sequences, features, sampling, stops, seeds, pad, fixed=fixed)
    return sum(rows, [])


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
    return {"texts": f"{texts} of {len(others)}", "tokens": tokens / total, "logps": furthest}


def sampled_pairs(assistant: Assistant) -> list[str]:
    """y- of some examples by Algorithm 1, whole."""
    config = sample_bdhs.Config(rho_th=0.7, max_new_tokens=TOKENS)
    examples = []
    for record in map(instruct_record, world.alignment_records(PICTURES)):
        picture = world.open_picture(record.image)
        image = assistant.processor.prepare(picture)
        examples.append(sample_bdhs.Example(record, picture, image))
    sampled = sample_bdhs.sample(assistant, load_similarity(None), examples, config)
    return [each.rejected for each in sampled]


def measure_sampling(row: str, size: Size, folder: Path, facts: Facts) -> None:
    """Steps of a fixed width (on a GPU a graph) and a growing context here, a growing one on the
    CPU: greedy and drawn."""
    here, cpu = toy(size.device), toy("cpu")
    graphs, worst = Graphs(), {"tokens": 1.0, "logps": 0.0}
    with graphs.watch():
        for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
            plain = samples_of(cpu, temperature, fixed=False)
            sides = {
                "fixed": samples_of(here, temperature, fixed=True),
                "growing": samples_of(here, temperature, fixed=False),
            }
            found = {f"{name} {side}": distance(sampled, plain) for side, sampled in sides.items()}
            facts.add(row, **found)
            for each in found.values():
                worst["tokens"] = min(worst["tokens"], each["tokens"])
                worst["logps"] = max(worst["logps"], each["logps"])

        pairs, others = sampled_pairs(here), sampled_pairs(cpu)
        same = sum(a == b for a, b in zip(pairs, others, strict=True))
        facts.add(row, bdhs=f"{same} of {len(pairs)}")

        half = toy(size.device, torch.bfloat16)
        both = [samples_of(half, 0.0, fixed=fixed) for fixed in (True, False)]
        facts.add(row, **{"bfloat16 greedy fixed against growing": distance(*both)})

    summary = f"{worst['tokens']:.1%} of tokens the same as the CPU's"
    summary += f", log-probs to {worst['logps']:.1e}"
    summary += f", BDHS {same} of {len(pairs)}"
    summary += f", {graphs.captured} graphs captured and {graphs.refused} refused"
    facts.add(row, summary=summary, captured=graphs.captured, refused=graphs.refused)
    assert worst["tokens"] >= SAME and worst["logps"] < 1e-3 and same >= SAME * len(pairs), summary
    assert size.device == "cpu" or (graphs.captured and not graphs.refused), summary
    facts.finish(row)


# ---------------------------------------------------------------- losses and gradients


def policy(device: str, dtype: torch.dtype) -> Llava:
    """The toy model with adapters that do something, the same numbers wherever it is."""
    torch.manual_seed(0)
    return with_adapters(load_model(CHECKPOINT, "cpu", dtype), RANK).to(device)


def learned(model: Llava) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (2, B, 2) of policy and reference, the loss and all gradients (N,), in float32 on
    the CPU."""
    cpu = toy("cpu")
    collate = PairCollator(cpu.tokenizer, cpu.processor, world.open_picture, 512)
    records = [instruct_record(raw) for raw in world.alignment_records(2 * PAIRS)]
    both = zip(records[::2], records[1::2], strict=True)
    pairs = [replace(one, rejected=other.chosen) for one, other in both]
    batch = collate.batch([collate.load(pair) for pair in pairs])

    tree, features = batch.tree.to(model.device), model.encode_images(batch.pixels)
    ref_logps = reference_logps(model, tree, features)
    logps = branch_logps(model, tree, features)
    chosen, rejected = logps[:, :1], logps[:, 1:]
    loss = dpo_loss(chosen, rejected, ref_logps[:, :1], ref_logps[:, 1:], BETA).mean()
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
    kinds = [
        ("float32", torch.float32, False),
        ("float32 --recompute", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ]
    for name, dtype, recompute in kinds:
        model = policy(size.device, dtype)
        if recompute:
            recompute_layers(model)
        far = [apart(*both) for both in zip(learned(model), exact, strict=True)]
        facts.add(row, **{name: dict(zip(("logps", "loss", "gradients"), far, strict=True))})
        words.append(f"{name} {far[0]:.1e} {far[1]:.1e} {far[2]:.1e}")
        allowed = ALLOWED[name.split()[0]]
        if not all(a <= b for a, b in zip(far, allowed, strict=True)):
            failed.append(name)
    summary = f"log-probs, loss, gradients against the CPU, relative: {'; '.join(words)}"
    facts.add(row, summary=summary)
    assert not failed, f"{failed} too far: {summary}"
    facts.finish(row)
