"""What a training loop does when: the order of the records, and the learning rate."""

import math
import random
from collections.abc import Sequence


def batches_of_epoch(
    numbers: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The epoch's batches of record numbers: every one once, in an order that follows from the
    seed."""
    order = list(numbers)
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def batches_of_run(
    numbers: Sequence[int], batch_size: int, seed: int, epochs: int, steps: int | None = None
) -> list[list[int]]:
    """The batches of all epochs, one per optimizer step; with `steps` so many, however many epochs
    that takes."""
    if steps is not None:
        epochs = math.ceil(steps / math.ceil(len(numbers) / batch_size))
    return [
        batch
        for epoch in range(epochs)
        for batch in batches_of_epoch(numbers, batch_size, seed, epoch)
    ][:steps]


def learning_rate(step: int, total: int, warmup: float, schedule: str) -> float:
    """Share of the peak rate at `step`: a linear rise, then a cosine or linear fall to zero, or
    none."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    done = (step - rise) / max(1, total - rise)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
