"""RLOO: REINFORCE on whole responses, the baseline of each being the mean reward of its prompt's
others.

The k responses to a prompt are k branches of one trunk, sampled and scored in one pass each. A
response is one action: its log-prob is the sum over its tokens, not their mean, or long responses
would count for less. The samples serve one update, by the policy that drew them: the ratio to that
policy is 1, and so there is nothing to clip. Draw at temperature 1 and top-p 1, since the gradient
is that of the plain distribution.

Left out: several updates per rollout with a clipped ratio (per response), advantages divided by
their standard deviation (by the group's it would be GRPO, which weighs prompts by how little their
rewards differ), an entropy bonus."""

from torch import Tensor

from minialign.rlhf.rewards import sequence_rewards


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantage of every response: its reward less the mean of its prompt's others. (B, k) -> (B,
    k).

    The baseline does not depend on the response that it is taken from, so that the gradient stays
    unbiased. With the mean of all k in its place every advantage would be (k - 1) / k of this."""
    k = rewards.shape[1]
    if k < 2:
        raise ValueError("one response per prompt: there are no others to compare it with")
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)


def rloo_loss(logps: Tensor, ref_logps: Tensor, scores: Tensor, beta: float) -> Tensor:
    """The loss whose gradient is minus the policy gradient of Eq. 2; the mean over all responses.

    logps, ref_logps (B, k): summed over tokens, by the policy that has sampled and by the
    reference. scores (B, k). Its value tells nothing; what is maximised is the mean of
    `sequence_rewards`."""
    rewards = sequence_rewards(
        scores, logps, ref_logps, beta
    )  # constant to the gradient, its KL too
    return -(leave_one_out(rewards) * logps).mean()
