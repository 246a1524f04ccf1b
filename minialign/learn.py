"""What the policy learns from its answers, one class per kind of method: pairs (Eq. 3-5), RLOO and
PPO (Eq. 2).

A step's rollouts are looked back at once, `look`, by the policy that has answered; then each of the
step's `updates` goes through what that gives and adds up gradients of `loss`, the mean over a
batch. `count` of a batch is its weight in the step: pairs, responses by prompt, or tokens."""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minialign import ppo
from minialign.heads import scalars
from minialign.llava import Llava
from minialign.lora import adapters_off
from minialign.losses import (
    both_logps,
    count_objective,
    logps_of,
    predicting,
    preference_loss,
    preference_metrics,
    summed,
    token_logps,
)
from minialign.parallel import gather
from minialign.rewards import Whitening, last_tokens, sequence_rewards, token_rewards
from minialign.rloo import rloo_loss
from minialign.rollout import Rollout


@dataclass(frozen=True)
class Preferences:
    """DPO, IPO or SLiC on pairs, or on y+ with two kinds of y- (Eq. 5); `weights` (K,) are those of
    each y-."""

    model: Llava
    kind: str
    beta: float
    weights: Tensor
    updates = 1

    @property
    def branches(self) -> int:
        """Of a sequence: y+ and every y-."""
        return 1 + len(self.weights)

    def learned(self, rows: int) -> dict[str, int]:
        """What is logged of how much was learned from."""
        return {"pairs": rows}

    def look(self, rollouts: list[Rollout], counts: Counter) -> list[Rollout]:
        """Nothing: reference and policy are asked in the one update."""
        return rollouts

    def loss(self, batch: Rollout, counts: Counter) -> tuple[Tensor, dict[str, float]]:
        """The mean over pairs, and metrics by TRL's names."""
        logps, ref_logps = both_logps(self.model, batch.tree, batch.features)
        loss = preference_loss(logps, ref_logps, self.kind, self.beta, self.weights)
        counts.update(count_objective(logps[batch.own], ref_logps[batch.own]))
        return loss, {"loss": loss.item()} | preference_metrics(
            logps, ref_logps, self.beta, self.weights
        )


@dataclass(frozen=True)
class Rloo:
    """REINFORCE with a leave-one-out baseline: k responses to a prompt, one update."""

    model: Llava
    beta: float
    branches: int  # k
    updates = 1

    def learned(self, rows: int) -> dict[str, int]:
        """What is logged of how much was learned from."""
        return {"responses": rows * self.branches}

    def look(self, rollouts: list[Rollout], counts: Counter) -> list[Rollout]:
        """Nothing: the one update is that of the policy that has answered, and the ratio to it is
        1."""
        return rollouts

    def loss(self, batch: Rollout, counts: Counter) -> tuple[Tensor, dict[str, float]]:
        """The mean over responses; its value says nothing."""
        logps, ref_logps = both_logps(self.model, batch.tree, batch.features)
        if batch.count:
            counts.update(count_objective(logps, ref_logps))
            counts["rlhf"] += (
                sequence_rewards(batch.scores, logps, ref_logps, self.beta).sum().item()
            )
        loss = rloo_loss(logps, ref_logps, batch.scores, self.beta)
        return loss, {"loss": loss.item()}


@dataclass(frozen=True)
class Look:
    """A rollout as the policy that has answered sees it: flat, (branch tokens,) each, in
    `token_logps`' order."""

    rollout: Rollout
    logps: Tensor
    values: Tensor
    advantages: Tensor  # whitened over the step's tokens
    returns: Tensor  # what the values should have been: advantages, before they were whitened, plus values

    @property
    def count(self) -> int:
        """Tokens, each of which is an action."""
        return len(self.logps) if self.rollout.count else 0


@dataclass(frozen=True)
class Ppo:
    """Clipped losses per token, some updates per rollout, a value head on the policy's own body
    (ppo.py)."""

    model: Llava
    beta: float
    branches: int
    updates: int
    lam: float  # of GAE; rewards are not discounted
    clip: float  # of the ratio
    value_clip: float
    value_coef: float
    learned = Rloo.learned

    def look(self, rollouts: list[Rollout], counts: Counter) -> list[Look]:
        """Log-probs, values and advantages, before anything is learned; advantages are whitened
        over all processes."""
        looks = [self.look_at(rollout, counts) for rollout in rollouts]
        mine = [advantage for look in looks if look.count for advantage in look.advantages.tolist()]
        whitening = Whitening.of(torch.tensor(sum(gather(mine), []) or [0.0], dtype=torch.float64))
        return [replace(look, advantages=whitening(look.advantages)) for look in looks]

    @torch.no_grad()
    def look_at(self, rollout: Rollout, counts: Counter) -> Look:
        """One rollout, its advantages as they are."""
        tree, scores = rollout.tree, rollout.scores
        with adapters_off(self.model):
            ref_logps = token_logps(self.model, tree, rollout.features)[2]
        row, branch, logps, values = self.ask(rollout)
        rewards = token_rewards(scores, row, branch, logps, ref_logps, self.beta)
        advantages = ppo.gae(rewards, values, last_tokens(row, branch), 1.0, self.lam)
        if rollout.count:
            of_responses = (summed(tree, row, branch, each) for each in (logps, ref_logps))
            counts.update(count_objective(*of_responses), rlhf=rewards.sum().item())
        return Look(rollout, logps, values, advantages, advantages + values)

    def ask(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, branch, log-prob of every branch token, and the value of the state that it was drawn
        in."""
        row, branch, ids, hidden = predicting(self.model, rollout.tree, rollout.features)
        return row, branch, logps_of(self.model.lm_head, ids, hidden), scalars(self.model, hidden)

    def loss(self, look: Look, counts: Counter) -> tuple[Tensor, dict[str, float]]:
        """The mean over tokens, and metrics by TRL's names."""
        _, _, logps, values = self.ask(look.rollout)
        policy = ppo.policy_loss(logps, look.logps, look.advantages, self.clip)
        value = ppo.value_loss(values, look.values, look.returns, self.value_clip)
        loss = policy + self.value_coef * value
        parts = {
            "loss": loss.item(),
            "loss/policy_avg": policy.item(),
            "loss/value_avg": value.item(),
        }
        return loss, parts | ppo.ppo_metrics(logps.detach(), look.logps, self.clip)
