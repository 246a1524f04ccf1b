"""online-bdhs-overhead: a step of train_online.py with online BDHS over one of train_dpo.py, both
ours.

The online step encodes the pictures once, samples y- by Algorithm 1 (one guided, greedy iteration)
and learns. It learns from the stored y- all the same: what random weights say may be of any length,
and the overhead is to be that of sampling alone.
"""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import train_online
from tests.bench.dpo import Ours, batch_of, record, require_same_work, with_adapters
from tests.bench.models import load_ours
from tests.bench.rows import Facts
from tests.bench.sampling import bdhs_config, never_similar
from tests.bench.sizes import Size
from tests.bench.timing import measured


def measure(size: Size, folder: Path, facts: Facts) -> None:
    """The row: time and memory beyond the offline step's, as shares of it."""
    assistant = load_ours(size, folder)
    model = with_adapters(assistant.model, size.lora_rank)
    offline = Ours(model, batch_of(assistant, folder, [record(size, folder, 0)]))
    batch, config = offline.batch, bdhs_config(size)

    def online_step() -> tuple[float, float]:
        """Sample, then learn."""
        features = model.encode_images(batch.pixels)
        tiles = [len(pair.image.pixels) for pair in batch.pairs]
        seen, counts = list(features.split(tiles)), Counter()
        train_online.own_rejected(
            assistant, never_similar, batch.pairs, seen, config, 0, counts, []
        )
        return offline.learn(batch.tree, features)

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
