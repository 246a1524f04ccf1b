"""online-bdhs-overhead: a step of train_online.py with online BDHS over one of train_dpo.py, both
ours.

The online step encodes the pictures once, samples y- by Algorithm 1 (one guided, greedy iteration)
and learns. It learns from the stored y- all the same: what random weights say may be of any length,
and the overhead is to be that of sampling alone.
"""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from minialign.rlhf.rollout import OwnRejected, features_of

from minialign.align.logps import both_logps
from minialign.align.losses import preference_loss
from minialign.model.masks import build_tree
from tests.bench.dpo import CONFIG, Ours, collator, record, require_same_work, with_adapters
from tests.bench.models import load_ours
from tests.bench.rows import Facts
from tests.bench.sampling import make_bdhs
from tests.bench.sizes import Size
from tests.bench.timing import measured


def measure(size: Size, folder: Path, facts: Facts) -> None:
    """The row: time and memory beyond the offline step's, as shares of it."""
    model, tokenizer, processor = load_ours(size, folder)
    with_adapters(model, size.lora_rank)
    pair = record(size, folder, 0)
    offline = Ours(model, collator(tokenizer, processor, folder)([pair]))
    part = collator(tokenizer, processor, folder, keep=True)([pair])
    respond, counts = OwnRejected(make_bdhs(size, model, tokenizer, processor)), Counter()

    def online_step() -> tuple[float, float]:
        features = features_of(model.encode_images(part.pixels), part.sequences)
        respond(part, [0], features, 0, counts)
        tree = build_tree(part.sequences, tokenizer.image_id, tokenizer.pad_id).to(model.device)
        logps, ref_logps = both_logps(model, tree, torch.cat(features))
        weights = torch.ones(1, device=model.device)
        return offline.learn(preference_loss(logps, ref_logps, CONFIG.loss, CONFIG.beta, weights))

    online, stored = online_step(), offline.step()
    require_same_work(online, stored, size.dtype)
    works = {"online": online_step, "offline": offline.step}
    side = measured(works, dict.fromkeys(works, model), size.repeats, size.device)
    facts.finish(
        "online-bdhs-overhead",
        work="a step with one y- sampled by BDHS: our own step without",
        checked=f"losses {online[0]:.5f} and {stored[0]:.5f}",
        overhead=side["online"].seconds / side["offline"].seconds - 1,
        memory_overhead=side["online"].peak / side["offline"].peak - 1,
        **{name: asdict(one) for name, one in side.items()},
    )
