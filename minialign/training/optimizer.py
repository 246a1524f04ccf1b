"""The optimizer of adapters and projector, its learning rate, and the order of the records."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from minialign.errors import UserError
from minialign.model.llava import Llava
from minialign.model.lora import trainable_groups
from minialign.training.parallel import full

# What helps where training has diverged.
BEGIN_ANEW = "begin anew with a lower --lr or a longer --warmup in another --out"


def make_optimizer(policy: Llava, lr: float, projector_lr: float) -> torch.optim.AdamW:
    """AdamW on what is trained; each group keeps its peak rate as `peak`."""
    # Silent in the paper: AdamW without weight decay, warm-up and decay, clipping.
    groups = [group | {"peak": group["lr"]} for group in trainable_groups(policy, lr, projector_lr)]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """All that an optimizer trains, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group at `factor` of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]


def clip_gradients(trained: list[torch.nn.Parameter], limit: float) -> float:
    """Scale all gradients to a common norm of at most `limit`; returns the norm before. Those of
    shards count whole."""
    return full(torch.nn.utils.clip_grad_norm_(trained, limit)).item()


def require_finite(step: int, loss: float, grad_norm: float) -> None:
    """Refuse to learn from a loss or a gradient that is none: the weights stay as they were."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        found = f"step {step + 1}: loss {loss}, gradient norm {grad_norm}"
        raise UserError(f"{found}; what was saved before it stays; {BEGIN_ANEW}")


def batches_of_epoch(
    numbers: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The epoch's batches of record numbers: every one once, in an order that follows from the
    seed."""
    order = list(numbers)
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Schedule(Sequence):
    """The batches of some steps of a run, of which one epoch's are in memory."""

    numbers: Sequence[int]
    batch_size: int
    seed: int
    steps: range
    latest: dict[int, list[list[int]]] = field(default_factory=dict, repr=False)  # by epoch

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, which: int | slice):
        """A step's batch, or the schedule of some steps."""
        if isinstance(which, slice):
            return replace(self, steps=self.steps[which])
        epoch, place = divmod(self.steps[which], math.ceil(len(self.numbers) / self.batch_size))
        if epoch not in self.latest:
            self.latest.clear()
            self.latest[epoch] = batches_of_epoch(self.numbers, self.batch_size, self.seed, epoch)
        return self.latest[epoch][place]


def batches_of_run(
    numbers: Sequence[int], batch_size: int, seed: int, epochs: int, steps: int | None = None
) -> Schedule:
    """The batches of all epochs, one per optimizer step; with `steps` so many, however many epochs
    that takes."""
    if steps is None:
        steps = epochs * math.ceil(len(numbers) / batch_size)
    return Schedule(numbers, batch_size, seed, range(steps))


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Share of the peak rate at `step`: a linear rise, then a cosine or linear fall to zero, or
    none."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    done = (step - rise) / max(1, total - rise)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
