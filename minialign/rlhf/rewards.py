"""Rewards of RLHF: the loss that a reward model learns from (Eq. 1), and what the policy is paid
(Eq. 2). This file imports torch and nothing else.

A score is r(x, y), one number per response: a reward model's, whitened, or an exact truth's. A
reward is what is left of it once the way from the reference is paid for: per response for RLOO, per
token for PPO. Its mean is Eq. 2.

The KL estimate is log(pi / ref) of the tokens drawn (k1): its mean over the policy's samples is the
KL, though one response's may be negative. Paid as a reward, and constant to the gradient, it gives
Eq. 2 its exact policy gradient. Left out: k2 = k1^2 / 2 and k3 = exp(-k1) - 1 + k1 (never negative,
but as rewards they move the optimum), a beta that adapts to a target KL, a penalty for responses
without an end, clipped scores, a reward loss with a margin or centred.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def reward_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Eq. 1: -log sigmoid(r(x, y+) - r(x, y-)), elementwise.

    Eq. 3 is this of r = beta log(pi / ref).
    """
    return -F.logsigmoid(chosen - rejected)


@dataclass(frozen=True)
class Whitening:
    """Mean and standard deviation to whiten by: those of a batch's advantages, or of a data set's
    scores (Sec. 5.5).

    Eq. 1 fixes neither of a reward model's scores: it sees differences alone. With whitened ones
    beta of Eq. 2 counts in standard deviations; RLOO does not see the mean.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, values: Tensor) -> "Whitening":
        """Of the values themselves, which are all that is meant: no correction for a sample."""
        return cls(values.mean().item(), values.std(correction=0).item())

    def __call__(self, values: Tensor) -> Tensor:
        """Values with mean 0 and standard deviation 1; all 0 where those it was made of are all
        equal.
        """
        return (values - self.mean) / (self.std + 1e-8)


@torch.no_grad()
def sequence_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Eq. 2 per response: r(x, y) - beta log(pi / ref). All (B, k), log-probs summed over a
    response's tokens.
    """
    return scores - beta * (logps - ref_logps)


def last_tokens(row: Tensor, branch: Tensor) -> Tensor:
    """Which of the branch tokens of one tree are their response's last: (branch tokens,) bool.

    Here and below, (branch tokens,) is the order of `token_logps`: response after response, each
    from its first token.
    """
    same_as_next = (row[1:] == row[:-1]) & (branch[1:] == branch[:-1])
    return F.pad(~same_as_next, (0, 1), value=True)


@torch.no_grad()
def token_rewards(
    scores: Tensor, row: Tensor, branch: Tensor, logps: Tensor, ref_logps: Tensor, beta: float
) -> Tensor:
    """Eq. 2 per token: -beta log(pi / ref) on every token, and the score on the response's last.

    scores (B, S), of every branch; the others (branch tokens,), as the result. Summed over a
    response's tokens it is `sequence_rewards`. The last token is the stop token, which the policy
    draws too, or where the limit has cut.
    """
    return last_tokens(row, branch) * scores[row, branch] - beta * (logps - ref_logps)
