"""RLOO: REINFORCE on whole responses (Eq. 2), the baseline of each being the mean reward of its
prompt's others (Sec. 5.5).

    python -m minialign.rlhf.rloo                                 # the embedded world's truth pays
    python -m minialign.rlhf.rloo --reward runs/reward/merged --kl-stop 20
    python -m minialign.rlhf.rloo --model DIR --data FILE --images DIR --reward DIR --out runs/rloo

A step: --k responses to every prompt, sampled as branches of one trunk and scored; then one update
by the policy that drew them, so that the ratio to it is 1 and there is nothing to clip. Sampling
has temperature 1 and top-p 1, as the gradient is that of the plain distribution; a reward model's
scores are whitened by those of the alignment data's own responses. Where the KL to the reference
passes --kl-stop, the run ends and says so.

Left out: several updates per rollout with a clipped ratio (per response), advantages divided by
their standard deviation (by the group's it would be GRPO, which weighs prompts by how little their
rewards differ), an entropy bonus. Left in --out: what train_dpo.py leaves.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from minialign import edge
from minialign.align.logps import branch_logps
from minialign.cli import require_at_least, run_main
from minialign.model.lora import adapters_off
from minialign.rlhf.losses import leave_one_out, rloo_loss
from minialign.rlhf.rewards import sequence_rewards
from minialign.rlhf.rollouts import idle_rollout, sample_rollout
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
    "beta": (0.4, 0.05),
    "lr": (3e-4, 5e-4),
    # Differs from the paper: it trains adapters alone; the toy's projector learns, too.
    "projector_lr": (0.0, 3e-5),
    "lora_rank": (128, 64),
    "epochs": (2, 1),
    "batch_size": (256, 16),
    "warmup": (0.1, 0.1),
    "schedule": ("cosine", "cosine"),
    "workers": (4, 0),
}


@dataclass(frozen=True)
class Config(TrainingFlags):
    """Flags of its own; minialign/training/flags.py has those of every training."""

    program: ClassVar[str] = "rloo"
    data: str | None = None  # records or pairs; without it the embedded world's
    out: str = "runs/rloo"  # folder to write
    # `oracle`, a reward model's folder, or FILE.py:FUNCTION(image, prompt, response)
    reward: str = "oracle"
    k: int = 4  # responses to a prompt
    beta: float | None = None  # Eq. 2: price of the KL to the reference
    # end where the KL to the reference passes so many nats per response
    kl_stop: float | None = None
    max_new_tokens: int = 128  # limit of a response; one that hits it is truncated


def main(config: Config) -> None:
    """Data, evaluation, training, evaluation, export, report."""
    config = edge.with_defaults(config, DEFAULTS)
    config = with_shape_of_adapter(config)
    check_training(config)
    check_rlhf(config)
    require_at_least(config, k=2)
    require_run_folder(config)
    parallel.start(config.device)
    folder, out = edge.model_folder(config.model), Path(config.out)

    reward = edge.scorer_of(config.reward, config)
    records = edge.training_records(config)
    pictures = edge.picture_source(config.images)
    setup = prepare(config, folder, records, pictures, reward=config.reward)
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

            # 2. It learns from that, in one update.
            prompts = sum(rollout.prompts for rollout in rollouts)
            prompts = sum_across_ranks({"prompts": prompts})["prompts"]
            metrics: Counter = Counter()
            said = None  # the answers to one prompt, for the report
            for rollout in parallel.even(rollouts, idle):
                # Log-probs of the responses, summed over their tokens: (B, k).
                with adapters_off(policy):
                    ref_logps = branch_logps(policy, rollout.tree, rollout.features)
                logps = branch_logps(policy, rollout.tree, rollout.features)

                # Eq. 2: what each response is paid, r - beta log(pi / ref), without a gradient; and
                # REINFORCE with what its prompt's others are paid as the baseline.
                rewards = sequence_rewards(rollout.scores, logps, ref_logps, config.beta)
                loss = rloo_loss(logps, rewards)
                share = rollout.prompts / prompts
                (loss * share).backward()

                metrics["loss"] += share * loss.item()
                if rollout.prompts:
                    sums["objective/rlhf_reward"] += rewards.sum().item()
                    sums["objective/kl"] += (logps - ref_logps).sum().item()
                    sums["objective/entropy"] -= logps.sum().item()
                    if said is None:
                        advantage = leave_one_out(rewards)
                        said = rollout.example(
                            score=rollout.scores, reward=rewards, advantage=advantage
                        )

            metrics = sum_across_ranks(metrics)
            factor = lr_factor(step, len(setup.schedule), config.warmup, config.schedule)
            if prompts:
                sum_gradients_across_ranks(trained)
                metrics["grad_norm"] = clip_gradients(trained, config.clip)
                require_finite(step, metrics["loss"], metrics["grad_norm"])
                set_learning_rate(optimizer, factor)
                optimizer.step()
                optimizer.zero_grad()

            responses = prompts * config.k
            means = {name: value / responses for name, value in sum_across_ranks(sums).items()}
            row = {"step": step + 1, **metrics, **means, "lr": factor * config.lr}
            row |= {"responses": responses, "time/sampling": answered - begun}
            log.add(row | {"time/training": time.perf_counter() - answered}, said)

    parallel.tell_left_out(setup.loader.left_out, "records")
    save_weights(policy, folder, config, out)
    if benchmark:
        evaluations["after"] = benchmark.run(assistant, "after")
    sampled = sampled_answers(log.rows, pictures, edge.truth_of(config.images))
    leave_results("rloo", config, log, evaluations, sampled, edge.picture_to_ask(config.images))


if __name__ == "__main__":
    run_main(main, Config, __doc__, DEFAULTS)
