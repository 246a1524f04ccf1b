"""PPO: a token is an action; GAE gives its advantage, and clipped losses let a rollout serve
several updates.

The order of a step: sample; `token_rewards`, reference and values, once, by the policy that
sampled; `gae`; whiten the advantages of the whole batch, of all processes; then some epochs of
`policy_loss` + value_coef * `value_loss` over its parts. All are flat, (branch tokens,) in the
order of `token_logps`: there is no padding to mask, and parts of a batch concatenate.

What matters and stands elsewhere or with the caller:
  value of a token   of the state before it: the head on the hidden state that predicts the token (`tree.parent`)
  value head         starts at zero, so that the first advantages are the returns; a random one adds noise to them
  old log-probs      of the training pass, not of the sampler: in the first update the ratio is 1 to the last bit
  sampling           temperature 1 and top-p 1: log-probs and their gradient are those of the plain distribution
  reward             KL per token by k1, the score on the last token, whitened by the data set: minialign/rlhf/rewards.py
Left out: a value network of its own (the paper trains adapters alone: a head on the policy's body
costs one vector); rewards whitened per batch (they are by the data set); a value of the state
behind a truncated response (it ends there, like one that stops); a penalty for it; stopping a
rollout's epochs at a KL; a ratio per response (the clip is per token); an entropy bonus; the mean
per response before that over the batch (here a long one counts for more, as every token is an
action); dropout, which would make the ratio noisy."""

import torch
from torch import Tensor


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, last: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimate A_t = delta_t + gamma lam A_t+1, delta_t = r_t + gamma V_t+1 -
    V_t, per token.

    rewards, values, last (tokens,): responses one behind another, `last` True on the last token of
    each, behind which both A and V are 0. lam = 1: the return less the value, unbiased; lam = 0:
    delta_t. The value's target is A + V, taken before A is whitened."""
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
    REINFORCE's, -A grad log pi."""
    ratio = (logps - old_logps).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """The clipped loss of values against A + V: half the square error, the mean over tokens.

    The larger of both errors, so that a value which has moved by more than `clip` towards its
    target has no gradient. `clip` is in units of the reward, whatever they are; infinity takes the
    clipping away."""
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
