"""The reward model of RLHF (Eq. 1): a LLaVA with a head on each response's last token, trained on
preference pairs (Sec. 5.5).

    python -m minialign.rlhf.reward_model                         # rule-corrupted pairs of the toy
    python -m minialign.rlhf.reward_model --model DIR --pairs FILE --images DIR --out runs/reward

A pair is one sequence, as in train_dpo.py: chosen and rejected are two branches of one trunk.

Unless --steps or --epochs is given, it is 4,000 steps (toy: 500). No benchmark is run, before or
after. Left in --out: what train_dpo.py leaves; `merged` is the reward model, for --reward of rloo
and ppo and for --annotator.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from minialign import edge
from minialign.align.losses import reward_metrics
from minialign.cli import run_main
from minialign.model.lora import adapter_state
from minialign.model.scalar_head import HEAD, branch_rewards
from minialign.rlhf.rewards import reward_loss
from minialign.rlhf.scorers import save_head
from minialign.rlhf.setup import prepare
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
from minialign.training.outputs import report_pairs, save_results, save_weights
from minialign.training.parallel import sum_across_ranks, sum_gradients_across_ranks, whole
from minialign.training.progress import TrainingLog, require_run_folder

# What stands for a flag that is not given: the paper's value (Sec. 5.5), and the toy model's, which
# was chosen on validation images.
DEFAULTS = {
    "lr": (2e-5, 3e-4),
    # Differs from the paper: it trains adapters alone; the toy's projector learns, too.
    "projector_lr": (0.0, 3e-5),
    "lora_rank": (128, 64),
    "batch_size": (32, 16),
    "warmup": (0.03, 0.1),
    "schedule": ("constant", "cosine"),
    "workers": (4, 0),
}
STEPS = (4000, 500)  # unless --steps or --epochs is given


@dataclass(frozen=True)
class Config(TrainingFlags):
    """Flags of its own; minialign/training/flags.py has those of every training."""

    program: ClassVar[str] = "reward_model"
    pairs: str | None = None  # preference pairs; without them rule-corrupted ones of the toy
    out: str = "runs/reward"  # folder to write


def main(config: Config) -> None:
    """Pairs, training, measuring, export, report."""
    steps = {"steps": STEPS} if config.epochs is None else {}
    config = edge.with_defaults(config, DEFAULTS | steps)
    config = with_shape_of_adapter(config)
    check_training(config)
    require_run_folder(config)
    parallel.start(config.device)
    folder, out = edge.model_folder(config.model), Path(config.out)

    records = edge.training_pairs(config)
    pictures = edge.picture_source(config.images)
    setup = prepare(config, folder, records, pictures, head="reward")
    assistant, policy, loader = setup.assistant, setup.assistant.model, setup.loader

    optimizer = make_optimizer(policy, config.lr, config.projector_lr)
    trained = trained_parameters(optimizer)
    one = torch.ones(1, device=config.device)  # the weight of the one rejected response
    idle = loader.idle()
    with TrainingLog(policy, optimizer, config) as log:
        for step, batches in log.steps(setup.schedule, loader):
            # A step's pairs, dealt out to all processes, in --accumulate batches.
            pairs_in_step = sum(len(batch) for batch in batches)
            pairs_in_step = sum_across_ranks({"pairs": pairs_in_step})["pairs"]
            metrics: Counter = Counter()

            for batch in parallel.even(batches, idle):
                features = policy.encode_images(batch.pixels)
                rewards = branch_rewards(policy, batch.tree.to(policy.device), features)  # (B, 2)
                chosen, rejected = rewards[:, :1], rewards[:, 1:]

                loss = reward_loss(chosen, rejected).mean()  # Eq. 1
                share = len(batch) / pairs_in_step
                (loss * share).backward()
                found = {"loss": loss.item()} | reward_metrics(chosen, rejected, one)
                metrics.update({name: share * value for name, value in found.items()})

            metrics = sum_across_ranks(metrics)
            factor = lr_factor(step, len(setup.schedule), config.warmup, config.schedule)
            if pairs_in_step:
                sum_gradients_across_ranks(trained)
                metrics["grad_norm"] = clip_gradients(trained, config.clip)
                require_finite(step, metrics["loss"], metrics["grad_norm"])
                set_learning_rate(optimizer, factor)
                optimizer.step()
                optimizer.zero_grad()

            lr = factor * config.lr
            log.add({"step": step + 1, **metrics, "lr": lr, "pairs": pairs_in_step})

    parallel.tell_left_out(loader.left_out, "pairs")
    head = whole({HEAD: adapter_state(policy)[HEAD]}).get(HEAD)  # of rank 0
    save_weights(policy, folder, config, out, add=lambda merged: save_head(head, merged))

    last = [row["rewards/accuracies"] for row in log.rows[-50:] if row["pairs"]]
    right = sum(last) / max(1, len(last))
    facts = {"accuracy_of_last_steps": right}
    shown = report_pairs(setup.records, assistant, pictures, edge.truth_of(config.images))
    count = len(setup.records.numbers)
    title = f"minialign: reward model on {count} pairs"
    parallel.on_rank0(lambda: save_results(out, title, config, {}, log.rows, facts, shown, []))
    print(
        f"{len(log.rows)} steps on {count} pairs, of which the last {len(last)} steps ranked "
        f"{right:.1%} right; {out}/merged (the reward model), {out}/report.html"
    )


if __name__ == "__main__":
    run_main(main, Config, __doc__, DEFAULTS)
