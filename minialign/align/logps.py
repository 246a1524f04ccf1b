"""The one place that computes log-probs: of every response of a token tree."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minialign.model.llava import Llava
from minialign.model.lora import adapters_off
from minialign.model.masks import TokenTree

CHUNK = 512  # branch tokens whose logits (CHUNK, V) are held at a time


def branch_logps(model: Llava, tree: TokenTree, tower_features: Tensor | None) -> Tensor:
    """Log-probability of every branch, summed over its tokens: (B, S), float32."""
    row, branch, logps = token_logps(model, tree, tower_features)
    return summed(tree, row, branch, logps)


def branch_lengths(tree: TokenTree) -> Tensor:
    """How many tokens every branch has: (B, S), float32; at least 1, also where there is none."""
    row, column = (tree.branch > 0).nonzero(as_tuple=True)
    ones = torch.ones(len(row), device=row.device)
    return summed(tree, row, tree.branch[row, column] - 1, ones).clamp(min=1)


def reference_logps(model: Llava, tree: TokenTree, tower_features: Tensor | None) -> Tensor:
    """The same by the reference, which is the model with its adapters switched off."""
    with adapters_off(model):
        return branch_logps(model, tree, tower_features)


def token_logps(
    model: Llava, tree: TokenTree, tower_features: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of every branch token: (row, branch - 1, log-prob), (N,) each, float32.

    The LM head runs on the tokens that predict a branch's, and nowhere else.
    """
    row, branch, ids, hidden = predicting(model, tree, tower_features)
    return row, branch, logps_of(model.lm_head, ids, hidden)


def predicting(
    model: Llava, tree: TokenTree, tower_features: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All branch tokens and what predicts them: (row, branch - 1, ids, hidden states), (N,) each
    and (N, D).

    Response after response, each from its first token, which is predicted by the trunk token before
    the fork.
    """
    hidden = model(tree, tower_features)  # (B, T, D)
    row, column = (tree.branch > 0).nonzero(as_tuple=True)
    branch = tree.branch[row, column] - 1
    parent = tree.parent[row, column]
    return row, branch, tree.ids[row, column], hidden[row, parent]


def logps_of(lm_head: nn.Linear, ids: Tensor, hidden: Tensor) -> Tensor:
    """Log-probability of each token (N,) by the hidden state (N, D) that predicts it: (N,),
    float32.

    A chunk at a time. Where gradients are wanted, no chunk's logits are kept: the backward pass
    computes them again from the hidden states.
    """
    logps = []
    for some_hidden, some_ids in zip(hidden.split(CHUNK), ids.split(CHUNK), strict=True):
        chunk = checkpoint(
            predicted_logps,
            lm_head,
            some_hidden,
            some_ids,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        logps.append(chunk)
    return torch.cat(logps)


def predicted_logps(lm_head: nn.Linear, hidden: Tensor, ids: Tensor) -> Tensor:
    """One chunk of `logps_of`."""
    return lm_head(hidden).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def summed(tree: TokenTree, row: Tensor, branch: Tensor, values: Tensor) -> Tensor:
    """A value of every branch token (N,), summed by branch: (B, S)."""
    return values.new_zeros(tree.tip.shape).index_put((row, branch), values, accumulate=True)
