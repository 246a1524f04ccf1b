"""The arithmetic of RLOO and PPO: pure functions of tensors; their loops are in rloo.py and ppo.py.

RLOO: a response is one action. Its log-prob is the sum over its tokens, not their mean, or long
responses would count for less.

PPO: a token is an action. All is flat, (branch tokens,) in the order of `token_logps`: there is no
padding to mask, and parts of a batch concatenate.
"""

import torch
from torch import Tensor

# ---------------------------------------------------------------- RLOO


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantage of every response: its reward less the mean of its prompt's others.
    (B, k) -> (B, k).

    The baseline does not depend on the response that it is taken from, so that the gradient stays
    unbiased. With the mean of all k in its place every advantage would be (k - 1) / k of this.
    """
    k = rewards.shape[1]
    if k < 2:
        raise ValueError("one response per prompt: there are no others to compare it with")
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)


def rloo_loss(logps: Tensor, rewards: Tensor) -> Tensor:
    """The loss whose gradient is minus the policy gradient of Eq. 2; the mean over all responses.

    logps (B, k): of the responses, summed over their tokens, by the policy that has sampled them.
    rewards (B, k): `sequence_rewards`, constant to the gradient. The loss's value tells nothing;
    what is maximised is the rewards' mean.
    """
    return -(leave_one_out(rewards) * logps).mean()


# ---------------------------------------------------------------- PPO


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, last: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimate of every token: A_t = delta_t + gamma lam A_t+1, where
    delta_t = r_t + gamma V_t+1 - V_t.

    rewards, values, last (tokens,): responses one behind another, `last` True on the last token of
    each, behind which both A and V are 0. lam = 1: the return less the value, unbiased; lam = 0:
    delta_t. The value's target is A + V, taken before A is whitened.
    """
    advantages: list[float] = []
    advantage = value_after = 0.0
    tokens = zip(rewards.tolist(), values.tolist(), last.tolist(), strict=True)
    for reward, value, ends in reversed(list(tokens)):
        if ends:
            advantage = value_after = 0.0
        advantage = reward + gamma * value_after - value + gamma * lam * advantage
        value_after = value
        advantages.append(advantage)
    return rewards.new_tensor(advantages[::-1])


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The clipped loss -min(q A, clamp(q, 1 - clip, 1 + clip) A), q = pi / pi_old per token; the
    mean over tokens.

    The smaller of both: a token that has moved far enough the way A points has no gradient, one
    that has moved the wrong way keeps it. In the first update q = 1, and the gradient is
    REINFORCE's, -A grad log pi.
    """
    ratio = (logps - old_logps).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """The clipped loss of values against A + V: half the square error, the mean over tokens.

    The larger of both errors, so that a value which has moved by more than `clip` towards its
    target has no gradient. `clip` is in units of the reward, whatever they are; infinity takes the
    clipping away.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2).mean()


@torch.no_grad()
def ppo_metrics(logps: Tensor, old_logps: Tensor, clip: float) -> dict[str, float]:
    """Of one update, by TRL's names: the share of tokens out of the clip's range, and the KL from
    the old policy.

    The KL is half the mean square log-ratio (k2), here to look at and not to learn from.
    """
    log_ratio = logps - old_logps
    return {
        "policy/clipfrac_avg": ((log_ratio.exp() - 1).abs() > clip).float().mean().item(),
        "policy/approxkl_avg": 0.5 * (log_ratio**2).mean().item(),
    }
