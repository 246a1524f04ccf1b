"""The paper's losses: pure functions of summed log-probs, and the one place that computes
log-probs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minialign.llava import Llava
from minialign.lora import adapters_off
from minialign.masks import TokenTree

CHUNK = 512  # branch tokens whose logits (CHUNK, V) are held at a time


def predicting(
    model: Llava, tree: TokenTree, tower_features: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All branch tokens and what predicts them: (row, branch - 1, ids, hidden states), (N,) each
    and (N, D).

    Response after response, each from its first token, which is predicted by the trunk token before
    the fork."""
    hidden = model(tree, tower_features)
    row, column = (tree.branch > 0).nonzero(as_tuple=True)
    branch, parent = tree.branch[row, column] - 1, tree.parent[row, column]
    return row, branch, tree.ids[row, column], hidden[row, parent]


def logps_of(lm_head: nn.Linear, ids: Tensor, hidden: Tensor) -> Tensor:
    """Log-probability of each token (N,) by the hidden state (N, D) that predicts it: (N,),
    float32.

    A chunk at a time. Where gradients are wanted, no chunk's logits are kept: the backward pass
    computes them again from the hidden states."""
    chunks = zip(hidden.split(CHUNK), ids.split(CHUNK), strict=True)
    return torch.cat(
        [
            checkpoint(
                predicted_logps, lm_head, *chunk, use_reentrant=False, preserve_rng_state=False
            )
            for chunk in chunks
        ]
    )


def token_logps(
    model: Llava, tree: TokenTree, tower_features: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of every branch token: (row, branch - 1, log-prob), (N,) each, float32.

    The LM head runs on the tokens that predict a branch's, and nowhere else.
    """
    row, branch, ids, hidden = predicting(model, tree, tower_features)
    return row, branch, logps_of(model.lm_head, ids, hidden)


def predicted_logps(lm_head: nn.Linear, hidden: Tensor, ids: Tensor) -> Tensor:
    """One chunk of `logps_of`."""
    return lm_head(hidden).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def branch_logps(model: Llava, tree: TokenTree, tower_features: Tensor | None) -> Tensor:
    """Log-probability of every branch, summed over its tokens: (B, S), float32."""
    return summed(tree, *token_logps(model, tree, tower_features))


def summed(tree: TokenTree, row: Tensor, branch: Tensor, values: Tensor) -> Tensor:
    """A value of every branch token (N,), summed by branch: (B, S)."""
    return values.new_zeros(tree.tip.shape).index_put((row, branch), values, accumulate=True)


def log_ratio_difference(policy_chosen, policy_rejected, ref_chosen, ref_rejected) -> Tensor:
    """h of Eq. 3: log[pi(y+|x) ref(y-|x) / (ref(y+|x) pi(y-|x))]."""
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def dpo_loss(h: Tensor, beta: float) -> Tensor:
    """Eq. 3: -log sigmoid(beta h)."""
    return -F.logsigmoid(beta * h)


def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """Sec. 5.7: (h - 1 / (2 beta))^2 on sums, as the IPO paper has it."""
    return (h - 1 / (2 * beta)) ** 2


def slic_loss(h: Tensor, beta: float) -> Tensor:
    """Sec. 5.7: max(0, 1 - beta h), the hinge as GPO (Tang et al. 2024) writes it."""
    return torch.relu(1 - beta * h)


LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "slic": slic_loss}


def reference_logps(model: Llava, tree: TokenTree, tower_features: Tensor | None) -> Tensor:
    """Summed log-probs of every branch (B, S) by the reference: the same model, adapters off."""
    with adapters_off(model):
        return branch_logps(model, tree, tower_features)


def both_logps(
    model: Llava, tree: TokenTree, tower_features: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Summed log-probs of every branch (B, S) by the policy, and by the reference."""
    ref_logps = reference_logps(model, tree, tower_features)
    return branch_logps(model, tree, tower_features), ref_logps


def preference_loss(
    logps: Tensor, ref_logps: Tensor, loss: str, beta: float, weights: Tensor
) -> Tensor:
    """Eq. 5: the loss of y+ against every y-, weighted; the mean over the batch.

    logps, ref_logps (B, 1 + K): y+ first. weights (K,): of each y-; one y- of weight 1 is Eq. 3.
    """
    h = log_ratio_difference(
        logps[:, :1], logps[:, 1:], ref_logps[:, :1], ref_logps[:, 1:]
    )  # (B, K)
    return (LOSSES[loss](h, beta) * weights).sum(1).mean()


def preference_metrics(
    logps: Tensor, ref_logps: Tensor, beta: float, weights: Tensor
) -> dict[str, float]:
    """What is plotted of a batch, by TRL's names; several y- count by their weights. Shapes as
    above."""
    chosen, rejected = logps[:, 0], (logps[:, 1:] * weights).sum(1)
    ref_chosen, ref_rejected = ref_logps[:, 0], (ref_logps[:, 1:] * weights).sum(1)
    metrics = {
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/ref_accuracies": (
            ref_chosen > ref_rejected
        ).float(),  # does the reference rank the pair already?
    }
    rewards = reward_metrics(beta * (logps - ref_logps), weights)
    return rewards | {name: value.mean().item() for name, value in metrics.items()}


def reward_metrics(rewards: Tensor, weights: Tensor) -> dict[str, float]:
    """The same of rewards (B, 1 + K), a reward model's or the implicit ones beta log(pi / ref)."""
    chosen, rejected = rewards[:, 0], (rewards[:, 1:] * weights).sum(1)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
    }
    return {name: value.mean().item() for name, value in metrics.items()}


def count_objective(logps: Tensor, ref_logps: Tensor) -> dict[str, float]:
    """Of responses that the policy has sampled: sums of log(pi / ref) and of -log pi, and how many
    they are.

    Their ratios are TRL's objective/kl and objective/entropy: estimates per response, summed over
    its tokens."""
    return {
        "kl": (logps - ref_logps).sum().item(),
        "entropy": -logps.sum().item(),
        "answers": logps.numel(),
    }
