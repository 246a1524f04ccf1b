"""PPO: a token is an action; GAE gives its advantage, and clipped losses let a rollout serve
several updates (Eq. 2, Sec. 5.5).

    python -m minialign.rlhf.ppo                                  # the embedded world's truth pays
    python -m minialign.rlhf.ppo --model DIR --data FILE --images DIR --reward DIR --out runs/ppo

A step: sample; look back, by the policy that has sampled, at log-probs, values and advantages;
whiten the advantages over the whole batch, of all processes; then --updates times go through its
parts. Where the KL to the reference passes --kl-stop, the run ends and says so.

What matters:
  value of a token  of the state before it: the head on the hidden state that predicts the token
  value head        on the policy's own body, which learns from its loss, too; it starts at zero,
                    so that the first advantages are rewards alone, without a random one's noise
  old log-probs     of the training pass, not of the sampler: in the first update the ratio is 1 to
                    the last bit
  sampling          temperature 1 and top-p 1: log-probs and their gradient are those of the plain
                    distribution
  reward            per token -beta log(pi / ref), and on the last the score, which a reward model
                    gives whitened, by the alignment data's own responses

Left out: a value network of its own (the paper trains adapters alone: a head costs one vector);
rewards whitened per batch; a value of the state behind a truncated response (it ends there, like
one that stops) and a penalty for it; stopping a rollout's updates at a KL; a ratio per response;
an entropy bonus; the mean per response before that over the batch (here a long one counts for
more, as every token is an action); dropout, which would make the ratio noisy.
Left in --out: what train_dpo.py leaves.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from minialign import edge
from minialign.align.logps import logps_of, predicting, summed, token_logps
from minialign.cli import require, require_at_least, run_main
from minialign.model.llava import Llava
from minialign.model.lora import adapters_off
from minialign.model.scalar_head import scalars
from minialign.rlhf.losses import gae, policy_loss, ppo_metrics, value_loss
from minialign.rlhf.rewards import Whitening, last_tokens, token_rewards
from minialign.rlhf.rollouts import Rollout, idle_rollout, sample_rollout
from minialign.rlhf.scorers import RewardModel
from minialign.rlhf.setup import check_rlhf, leave_results, prepare
from minialign.rlhf.whitening import WhitenedReward
from minialign.training import parallel
from minialign.training.flags import TrainingFlags, check_training, with_shape_of_adapter
from minialign.training.optimizer import (
    clip_gradients,
    lr_factor,
    make_optimizer,
    require_finite,
    set_learning_rate,
    trained_parameters,
)
from minialign.training.outputs import sampled_answers, save_weights
from minialign.training.parallel import sum_across_ranks, sum_gradients_across_ranks, unsharded
from minialign.training.progress import TrainingLog, require_run_folder

# What stands for a flag that is not given: the paper's value (Sec. 5.5), and the toy model's, which
# was chosen on validation images.
DEFAULTS = {
    "beta": (0.1, 0.05),
    "lr": (1.41e-5, 1e-4),
    # Differs from the paper: it trains adapters alone; the toy's projector learns, too.
    "projector_lr": (0.0, 3e-5),
    "lora_rank": (128, 64),
    "epochs": (3, 1),
    "batch_size": (32, 16),
    "warmup": (0.0, 0.1),
    "schedule": ("constant", "cosine"),
    "workers": (4, 0),
}


@dataclass(frozen=True)
class Config(TrainingFlags):
    """Flags of its own; minialign/training/flags.py has those of every training."""

    program: ClassVar[str] = "ppo"
    data: str | None = None  # records or pairs; without it the embedded world's
    out: str = "runs/ppo"  # folder to write
    # `oracle`, a reward model's folder, or FILE.py:FUNCTION(image, prompt, response)
    reward: str = "oracle"
    k: int = 1  # responses to a prompt
    beta: float | None = None  # Eq. 2: price of the KL to the reference
    # end where the KL to the reference passes so many nats per response
    kl_stop: float | None = None
    max_new_tokens: int = 128  # limit of a response; one that hits it is truncated
    updates: int = 4  # updates per rollout
    gae_lambda: float = 0.95  # 1 is the return less the value, 0 one step ahead
    ratio_clip: float = 0.2  # range of the ratio to the policy that has answered
    value_clip: float = 0.2  # by how much a value may move per rollout, in units of the reward
    value_coef: float = 0.1  # weight of the value loss


def check(config: Config) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    check_training(config)
    check_rlhf(config)
    require_at_least(config, k=1, updates=1)
    require(config.ratio_clip > 0, f"--ratio-clip {config.ratio_clip}: above 0")
    require(config.value_clip > 0, f"--value-clip {config.value_clip}: above 0")
    lam, coef = config.gae_lambda, config.value_coef
    require(0 <= lam <= 1, f"--gae-lambda {lam}: between 0 and 1")
    require(0 <= coef <= 1e6, f"--value-coef {coef}: 0 or more, at most a million")


@dataclass(frozen=True)
class PpoBatch:
    """A rollout as the policy that has sampled it sees it: flat, (branch tokens,) each, in the
    order of `token_logps`.
    """

    rollout: Rollout
    logps: Tensor
    values: Tensor
    advantages: Tensor
    # What the values should have been: advantages, before they are whitened, plus values.
    returns: Tensor

    @property
    def tokens(self) -> int:
        """How many actions count."""
        return len(self.logps) if self.rollout.prompts else 0


def logps_and_values(policy: Llava, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, branch and log-prob of every branch token, and the value of the state that it was drawn
    in: (branch tokens,) each.
    """
    row, branch, ids, hidden = predicting(policy, rollout.tree, rollout.features)
    return row, branch, logps_of(policy.lm_head, ids, hidden), scalars(policy, hidden)


@torch.no_grad()
def look_back(
    policy: Llava, rollout: Rollout, beta: float, gae_lambda: float, sums: Counter
) -> PpoBatch:
    """Log-probs, values and advantages of a rollout, before anything is learned from it. `sums`
    takes down, summed over responses, what is logged of them.
    """
    tree = rollout.tree
    with adapters_off(policy):
        _, _, ref_logps = token_logps(policy, tree, rollout.features)
    row, branch, logps, values = logps_and_values(policy, rollout)
    rewards = token_rewards(rollout.scores, row, branch, logps, ref_logps, beta)  # Eq. 2
    advantages = gae(rewards, values, last_tokens(row, branch), gamma=1.0, lam=gae_lambda)

    if rollout.prompts:
        of_responses = summed(tree, row, branch, logps)  # (B, k)
        ref_of_responses = summed(tree, row, branch, ref_logps)
        sums["objective/rlhf_reward"] += rewards.sum().item()
        sums["objective/kl"] += (of_responses - ref_of_responses).sum().item()
        sums["objective/entropy"] -= of_responses.sum().item()
    return PpoBatch(rollout, logps, values, advantages, returns=advantages + values)


def whitened(batches: list[PpoBatch]) -> list[PpoBatch]:
    """The batches with their advantages whitened over all of them, of all processes."""
    mine = [each for batch in batches if batch.tokens for each in batch.advantages.tolist()]
    everyone = sum(parallel.gather(mine), []) or [0.0]
    whitening = Whitening.of(torch.tensor(everyone, dtype=torch.float64))
    return [replace(batch, advantages=whitening(batch.advantages)) for batch in batches]


def main(config: Config) -> None:
    """Data, evaluation, training, evaluation, export, report."""
    config = edge.with_defaults(config, DEFAULTS)
    config = with_shape_of_adapter(config)
    check(config)
    require_run_folder(config)
    parallel.start(config.device)
    folder, out = edge.model_folder(config.model), Path(config.out)

    reward = edge.scorer_of(config.reward, config)
    records = edge.training_records(config)
    pictures = edge.picture_source(config.images)
    # Silent in the paper: values come from a head on the policy's own body, and the KL is taken off
    # token by token.
    setup = prepare(config, folder, records, pictures, head="value", reward=config.reward)
    assistant, policy = setup.assistant, setup.assistant.model
    if isinstance(reward, RewardModel):
        reward = WhitenedReward.on(reward, setup.loader, config.batch_size)
    benchmark = edge.benchmark_of(config.images, config.eval_split, config.eval_images)
    evaluations = {"before": benchmark.run(assistant, "before")} if benchmark else {}

    optimizer = make_optimizer(policy, config.lr, config.projector_lr)
    trained = trained_parameters(optimizer)
    idle = idle_rollout(assistant, setup.loader, config.k)
    with TrainingLog(policy, optimizer, config, config.kl_stop) as log:
        for step, batches in log.steps(setup.schedule, setup.loader):
            begun = time.perf_counter()
            sums: Counter = Counter()  # over the step's responses, of what is logged

            # 1. The policy answers every prompt k times, and is scored. Every process holds the
            # whole of it meanwhile.
            rollouts = []
            with unsharded(policy):
                for batch in batches:
                    rollouts.append(sample_rollout(assistant, reward, batch, config, step, sums))
            answered = time.perf_counter()

            # 2. It looks back at its answers, before it learns anything from them.
            looked = []
            for rollout in parallel.even(rollouts, idle):
                looked.append(look_back(policy, rollout, config.beta, config.gae_lambda, sums))
            looked = whitened(looked)
            prompts = sum(rollout.prompts for rollout in rollouts)
            tokens = sum(batch.tokens for batch in looked)
            total = sum_across_ranks({"prompts": prompts, "tokens": tokens})

            # 3. Some updates, all on these answers.
            factor = lr_factor(step, len(setup.schedule), config.warmup, config.schedule)
            set_learning_rate(optimizer, factor)
            metrics: Counter = Counter()  # the mean of all updates
            for _ in range(config.updates if total["tokens"] else 0):
                found: Counter = Counter()
                for batch in looked:
                    _, _, logps, values = logps_and_values(policy, batch.rollout)
                    actor = policy_loss(logps, batch.logps, batch.advantages, config.ratio_clip)
                    critic = value_loss(values, batch.values, batch.returns, config.value_clip)
                    loss = actor + config.value_coef * critic
                    share = batch.tokens / total["tokens"]
                    (loss * share).backward()

                    found["loss"] += share * loss.item()
                    found["loss/policy_avg"] += share * actor.item()
                    found["loss/value_avg"] += share * critic.item()
                    for name, value in ppo_metrics(logps, batch.logps, config.ratio_clip).items():
                        found[name] += share * value

                found = sum_across_ranks(found)
                sum_gradients_across_ranks(trained)
                found["grad_norm"] = clip_gradients(trained, config.clip)
                require_finite(step, found["loss"], found["grad_norm"])
                optimizer.step()
                optimizer.zero_grad()
                for name, value in found.items():
                    metrics[name] += value / config.updates

            responses = total["prompts"] * config.k
            means = {name: value / responses for name, value in sum_across_ranks(sums).items()}
            row = {"step": step + 1, **metrics, **means, "lr": factor * config.lr}
            row |= {"responses": responses, "time/sampling": answered - begun}
            row |= {"time/training": time.perf_counter() - answered}
            said = rollouts[0].example(score=rollouts[0].scores) if rollouts else None
            log.add(row, said)

    parallel.tell_left_out(setup.loader.left_out, "records")
    save_weights(policy, folder, config, out)  # without the head of values, which nobody needs now
    if benchmark:
        evaluations["after"] = benchmark.run(assistant, "after")
    sampled = sampled_answers(log.rows, pictures, edge.truth_of(config.images))
    leave_results("ppo", config, log, evaluations, sampled, edge.picture_to_ask(config.images))


if __name__ == "__main__":
    run_main(main, Config, __doc__, DEFAULTS)
