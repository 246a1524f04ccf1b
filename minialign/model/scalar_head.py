"""A head that makes one number of a hidden state: a response's reward (Eq. 1), or a token's value.

It stands on the policy's own body and is trained at the adapters' rate, in float32. One for values
starts at zero: then the first advantages are the returns. One for rewards starts at random, as
TRL's does: from zero, on the embedded world, hundreds of steps taught it nothing.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from minialign.model.llava import Llava
from minialign.model.masks import TokenTree

HEAD = "scalar_head.weight"  # its one tensor, among those that are trained


def new_head(model: Llava, kind: Literal["value", "reward"]) -> Tensor:
    """The weight (1, D), float32, that a head begins with.

    Of zeros for values; for rewards normal with the standard deviation (D + 1)^-1/2.
    """
    # Silent in the paper: how a head begins.
    size = model.config.text.hidden_size
    weight = nn.Linear(size, 1, bias=False).weight.detach()
    return nn.init.normal_(weight, std=(size + 1) ** -0.5 if kind == "reward" else 0.0)


def scalars(model: Llava, hidden: Tensor) -> Tensor:
    """The head's number of every hidden state, (..., D) -> (...), float32."""
    return model.scalar_head(hidden.float())[..., 0]


def branch_rewards(model: Llava, tree: TokenTree, tower_features: Tensor | None) -> Tensor:
    """r(x, y) of Eq. 1 for every branch, (B, S) float32: the head on the branch's last token, which
    has seen all of it.
    """
    hidden = model(tree, tower_features)
    row = torch.arange(len(hidden), device=hidden.device)[:, None]
    return scalars(model, hidden[row, tree.tip.clamp(min=0)])


def set_head(model: Llava, weight: Tensor) -> None:
    """Give the model a head of this weight (1, D), where it is."""
    model.scalar_head = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
    model.scalar_head.weight = nn.Parameter(weight)
