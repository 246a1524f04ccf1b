"""The optimizer of adapters and projector, and one update with it."""

import math

import torch

from minialign.errors import UserError
from minialign.llava import Llava
from minialign.lora import trainable_groups
from minialign.parallel import full, sum_gradients_across_ranks


def make_optimizer(model: Llava, lr: float, projector_lr: float) -> torch.optim.AdamW:
    """AdamW on what is trained; each group keeps its peak rate as `peak`."""
    # Differs from the paper: without weight decay; the paper is silent.
    groups = [group | {"peak": group["lr"]} for group in trainable_groups(model, lr, projector_lr)]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def update(
    optimizer: torch.optim.Optimizer, share: float, clip: float, loss: float, where: str
) -> float:
    """One step at `share` of the peak rates, the norm of all gradients clipped; returns the norm
    before clipping.

    Several processes add up their gradients, and make the same step.

    A loss or norm that is not finite is a `UserError`, and the weights stay as they were.
    """
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sum_gradients_across_ranks(trained)
    norm = full(torch.nn.utils.clip_grad_norm_(trained, clip)).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        said = f"{where}: loss {loss}, gradient norm {norm}; what was saved before it stays"
        raise UserError(
            f"{said}; begin anew with a lower --lr or a longer --warmup in another --out"
        )
    optimizer.step()
    optimizer.zero_grad()
    return norm
