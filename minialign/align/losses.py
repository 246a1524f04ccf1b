"""The paper's preference losses: four tensors of summed log-probs in, a loss out.

A log-prob here is that of a whole response, summed over its tokens (align/logps.py). chosen is y+,
(B, 1); rejected holds K responses y- to the same prompt, (B, K), and so does a loss. This file
imports torch and nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Strength of the pull to the reference, within App. A's ranges: DPO 0.05 to 0.5, IPO 0.8 to 1, SLiC
# 0.02 to 0.2.
BETAS = {"dpo": 0.1, "ipo": 0.9, "slic": 0.1}


def log_ratio_difference(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
) -> Tensor:
    """h of Eq. 3: log[pi(y+|x) ref(y-|x) / (ref(y+|x) pi(y-|x))]."""
    return (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """Eq. 3, DPO: -log sigmoid(beta h)."""
    h = log_ratio_difference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return -F.logsigmoid(beta * h)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """Sec. 5.7, IPO: (h - 1 / (2 beta))^2, with the responses' `lengths` in tokens, (B, 1 + K), on
    means of log-probs; without them on sums.
    """
    # Silent in the paper: means, as TRL has it, or sums, as the IPO paper.
    if lengths is not None:
        chosen_logps = chosen_logps / lengths[:, :1]
        rejected_logps = rejected_logps / lengths[:, 1:]
        ref_chosen_logps = ref_chosen_logps / lengths[:, :1]
        ref_rejected_logps = ref_rejected_logps / lengths[:, 1:]
    h = log_ratio_difference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (h - 1 / (2 * beta)) ** 2


def slic_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """Sec. 5.7, SLiC: max(0, 1 - beta h), the hinge as GPO (Tang et al. 2024) writes it."""
    h = log_ratio_difference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return torch.relu(1 - beta * h)


def preference_metrics(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    weights: Tensor,
) -> dict[str, float]:
    """What is plotted of a batch, by TRL's names; several y- count by their `weights` (K,)."""
    chosen, ref_chosen = chosen_logps[:, 0], ref_chosen_logps[:, 0]  # (B,)
    rejected = (rejected_logps * weights).sum(1)
    ref_rejected = (ref_rejected_logps * weights).sum(1)
    ranked = ref_chosen > ref_rejected  # does the reference rank the pair already?

    # The implicit rewards, beta log(pi / ref).
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    return reward_metrics(chosen_rewards, rejected_rewards, weights) | {
        "logps/chosen": chosen.mean().item(),
        "logps/rejected": rejected.mean().item(),
        "logps/ref_accuracies": ranked.float().mean().item(),
    }


def reward_metrics(
    chosen_rewards: Tensor, rejected_rewards: Tensor, weights: Tensor
) -> dict[str, float]:
    """The same of rewards, (B, 1) and (B, K): a reward model's, or DPO's implicit ones."""
    chosen = chosen_rewards[:, 0]
    rejected = (rejected_rewards * weights).sum(1)
    return {
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/accuracies": (chosen > rejected).float().mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
    }
