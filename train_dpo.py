"""Direct preference optimisation of a LLaVA on a pairs file: DPO (Eq. 3), IPO and SLiC (Sec. 5.7).

    python train_dpo.py                         # the whole road on the embedded world, in minutes
    python train_dpo.py --model DIR --pairs pairs.jsonl --images DIR --out runs/mine
    torchrun --nproc-per-node 8 train_dpo.py --model DIR ... --device cuda --shard full

Without --pairs the pairs are sampled first (sample_bdhs.py). Each pair is ONE sequence: image and
prompt once, then chosen and rejected as two branches (minialign/model/masks.py). The policy is the
base model with LoRA adapters and a trainable copy of the projector; with both switched off it is
the reference. The vision tower is frozen and sees each image once per step.

Left in --out: config.json, metrics.jsonl, result.json, adapter/ (PEFT), merged/ (Hugging Face),
checkpoint/ (--resume), report.html. `--loss sft` is the supervised control: its loss knows y+
alone, neither y- nor reference. `--rejected both` takes pairs that sample_bdhs.py made of data with
rejected responses; distorted is Sec. 3.3's loss.
"""

import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch.utils.checkpoint import checkpoint

import sample_bdhs
from minialign import edge
from minialign.align.distortion import chosen_tree, distorted_logps
from minialign.align.logps import branch_lengths, branch_logps
from minialign.align.losses import BETAS, dpo_loss, ipo_loss, preference_metrics, slic_loss
from minialign.align.reference_cache import ReferenceCache
from minialign.claims import require_own_folder
from minialign.cli import require, run_main
from minialign.data.collate import PairCollator, StepLoader
from minialign.data.images import ImageProcessor
from minialign.data.record_files import open_pairs, usable_pairs
from minialign.data.tokenizer import Tokenizer
from minialign.model.hf_folder import fingerprint
from minialign.model.lora import adapters_off
from minialign.model.policy import empty_policy, load_policy_weights
from minialign.sampling.assistant import Assistant
from minialign.training import parallel
from minialign.training.flags import (
    COMPILE_OPTIONS,
    TrainingFlags,
    check_beta,
    check_training,
    with_shape_of_adapter,
)
from minialign.training.optimizer import (
    batches_of_run,
    clip_gradients,
    lr_factor,
    make_optimizer,
    require_finite,
    set_learning_rate,
    trained_parameters,
)
from minialign.training.outputs import (
    report_pairs,
    save_results,
    save_weights,
    say_what_is_left,
)
from minialign.training.parallel import sum_across_ranks, sum_gradients_across_ranks, unsharded
from minialign.training.progress import TrainingLog, begin, require_run_folder

# What stands for a flag that is not given: the paper's value (App. A), and the toy model's, which
# was chosen on validation images.
DEFAULTS = {
    "lr": (5e-7, 2e-4),
    "projector_lr": (2e-6, 3e-5),
    "lora_rank": (128, 64),
    "epochs": (3, 1),
    "batch_size": (16, 16),
    "warmup": (0.1, 0.1),
    "schedule": ("cosine", "cosine"),
    "workers": (4, 0),
}


@dataclass(frozen=True)
class Config(TrainingFlags):
    """Flags of its own; minialign/training/flags.py has those of every training."""

    program: ClassVar[str] = "train_dpo"
    pairs: str | None = None  # pairs file; without it BDHS pairs are sampled into --out first
    out: str | None = None  # folder to write; runs/LOSS if it is not given
    loss: Literal["dpo", "ipo", "slic", "sft"] = "dpo"  # sft: supervised on y+ alone
    # --loss ipo: of a response the mean of its tokens' log-probs, as in TRL, or their sum
    ipo: Literal["means", "sums"] = "means"
    beta: float | None = None  # strength of the pull to the reference; 0.1, for ipo 0.9
    # stored: the pairs' own y-; both: and the external one, of the data that they were sampled from
    # (Eq. 5); distorted: and what the policy makes of a noisy picture (Sec. 3.3)
    rejected: Literal["stored", "both", "distorted"] = "stored"
    gamma: float = 0.5  # Eq. 5: weight of the external y- (distorted: of the stored one)
    noise_steps: int = 500  # distorted: diffusion steps of the noisy picture (Eq. 9)
    # folder that keeps the reference's log-probs for later epochs and other runs
    ref_cache: str | None = None


def check(config: Config) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    check_training(config)
    check_beta(config.beta)
    require(0 <= config.gamma <= 1, f"--gamma {config.gamma}: between 0 and 1")
    steps = config.noise_steps
    require(1 <= steps <= 1000, f"--noise-steps {steps}: between 1 and 1000")
    none = "give --pairs too; none are sampled from it"
    require(config.adapter is None or config.pairs is not None, f"--adapter: {none}")
    missing = "--pairs is missing; make one with sample_bdhs.py"
    require(config.pairs is not None or config.images == "toy", missing)
    external = "there is no external response where pairs are sampled first; give --pairs"
    require(config.rejected != "both" or config.pairs is not None, f"--rejected both: {external}")
    if config.ref_cache is not None:
        anew = "these responses are made anew at every step, and none is met twice"
        message = f"--ref-cache with --rejected distorted: {anew}; leave one of the two out"
        require("distorted" not in rejected_weights(config), message)
        require_own_folder(config, "reference cache", "ref_cache")
        out, cache = (Path(os.path.realpath(place)) for place in (config.out, config.ref_cache))
        message = f"--ref-cache {config.ref_cache}: is --out, or holds it; name another folder"
        require(not out.is_relative_to(cache), message)


def rejected_weights(config: Config) -> dict[str, float]:
    """Eq. 5: every kind of rejected response that is trained on, and its weight."""
    gamma = config.gamma
    weights = {
        "stored": {"rejected": 1.0},
        "both": {"external": gamma, "rejected": 1 - gamma},
        "distorted": {"rejected": gamma, "distorted": 1 - gamma},
    }[config.rejected]
    return {kind: weight for kind, weight in weights.items() if weight > 0}


def main(config: Config) -> None:
    """Pairs, evaluation, training, evaluation, export, report."""
    config = edge.with_defaults(config, DEFAULTS)
    if config.beta is None:
        config = replace(config, beta=BETAS.get(config.loss, BETAS["dpo"]))
    config = with_shape_of_adapter(config)
    if config.out is None:
        config = replace(config, out=f"runs/{config.loss}")
    pictures = edge.picture_source(config.images)
    check(config)
    require_run_folder(config)
    parallel.start(config.device)
    folder, out = edge.model_folder(config.model), Path(config.out)

    pairs = Path(config.pairs) if config.pairs else sample_bdhs.sample_for(config, out)

    # The policy: a LLaVA with LoRA adapters and a trainable copy of its projector. At first names,
    # shapes and types alone (torch's meta device), no memory yet.
    policy = empty_policy(folder, config)
    assistant = Assistant(
        policy, Tokenizer.from_folder(folder, config.template), ImageProcessor.from_folder(folder)
    )

    # What makes token trees of pairs: image and prompt, then chosen and rejected as branches.
    kinds = rejected_weights(config)  # Eq. 5
    collate = PairCollator(
        assistant.tokenizer,
        assistant.processor,
        pictures,
        config.max_response_tokens,
        assistant.positions,
        config.truncate,
        rejected=tuple(kind for kind in kinds if kind != "distorted"),
        noise_steps=config.noise_steps if "distorted" in kinds else 0,
        seed=config.seed,
        keyed=config.ref_cache is not None,
        device=config.device,
    )
    records = open_pairs(str(pairs), config.format)
    records = usable_pairs(
        records, collate.check, config.limit, config.seed, config.skip_bad_records
    )
    loader = StepLoader(records, collate, config.accumulate, config.skip_bad_records)

    # torch.compile, one decoder layer at a time: all share the code.
    if config.compile:
        for layer in policy.language_model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True, options=COMPILE_OPTIONS)

    # Of a layer its input alone is kept for the backward pass, which runs the layer again.
    if config.recompute:
        for layer in policy.language_model.layers:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )

    # FSDP2: a process keeps its rows of every tensor, and a layer is gathered for its turn.
    if config.shard == "full":
        from torch.distributed.fsdp import fully_shard  # here, as it takes a second

        mesh = parallel.mesh(config.device)
        for unit in (*policy.language_model.layers, policy.vision_tower, policy):
            fully_shard(unit, mesh=mesh)
        parallel.after_sharding(policy)  # gradients are to be summed, not averaged

    # The weights, of which each process reads its rows; new adapters change nothing at first.
    load_policy_weights(policy, folder, config)
    assistant.announce(folder)
    cache = None  # of the reference's log-probs, for later epochs and other runs
    if config.ref_cache is not None:
        with unsharded(policy):
            cache = ReferenceCache(Path(config.ref_cache), policy)
    begin(config, records, fingerprint(folder, config.adapter))
    benchmark = edge.benchmark_of(config.images, config.eval_split, config.eval_images)
    evaluations = {}
    if benchmark:
        evaluations["before"] = benchmark.run(assistant, "before")

    # AdamW on adapters and projector; and the numbers of the records of every step.
    optimizer = make_optimizer(policy, config.lr, config.projector_lr)
    trained = trained_parameters(optimizer)
    schedule = batches_of_run(
        records.numbers, config.batch_size, config.seed, config.epochs, config.steps
    )
    weights = torch.tensor(list(kinds.values()), device=policy.device)  # (K,), of each y-
    idle = loader.idle()  # a batch that counts for nothing

    with TrainingLog(policy, optimizer, config) as log:
        for step, batches in log.steps(schedule, loader):
            # `batches` are this process's part of the step's pairs, split by --accumulate; a batch
            # counts by its share in the pairs of all processes.
            pairs_in_step = sum(len(batch) for batch in batches)
            chosen_tokens = sum(batch.chosen_tokens for batch in batches)
            total = sum_across_ranks({"pairs": pairs_in_step, "tokens": chosen_tokens})
            metrics: Counter = Counter()  # means over the step's pairs; `update` adds

            # Every process has as many batches: they go through the shards together.
            for batch in parallel.even(batches, idle):
                # What the frozen tower sees, (tiles, patches, D): once, for policy and reference.
                features = policy.encode_images(batch.pixels)

                # B sequences, each with 1 + K branches behind image and prompt. Log-probs of the
                # responses, summed over tokens, (B, 1 + K): chosen, then each rejected one. The
                # reference is the policy with adapters and trained projector switched off, without
                # gradients.
                tree = batch.tree.to(policy.device)
                if batch.noisy is not None:  # Sec. 3.3: y~- of a noisy picture is the last one
                    noisy_features = policy.encode_images(batch.noisy)
                    noisy_tree = chosen_tree(batch.sequences, collate.tokenizer.image_id)
                    noisy_tree = noisy_tree.to(policy.device)
                    with adapters_off(policy):
                        ref_logps = distorted_logps(
                            policy, tree, features, noisy_tree, noisy_features
                        )
                    logps = distorted_logps(policy, tree, features, noisy_tree, noisy_features)
                else:
                    if cache is None:
                        with adapters_off(policy):
                            ref_logps = branch_logps(policy, tree, features)
                    else:
                        ref_logps = cache.logps(policy, batch.keys, tree, features)
                    logps = branch_logps(policy, tree, features)
                chosen, rejected = logps[:, :1], logps[:, 1:]
                ref_chosen, ref_rejected = ref_logps[:, :1], ref_logps[:, 1:]

                if config.loss == "sft":
                    # The mean over all tokens of y+ in the step; the rest is not looked at.
                    loss = -chosen.mean() / (total["tokens"] / total["pairs"])
                else:
                    beta = config.beta
                    if config.loss == "dpo":  # Eq. 3
                        losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
                    elif config.loss == "ipo":  # Sec. 5.7
                        lengths = branch_lengths(tree) if config.ipo == "means" else None
                        if lengths is not None and batch.noisy is not None:
                            # y~- is as long as y+.
                            lengths = torch.cat([lengths, lengths[:, :1]], dim=1)
                        losses = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, lengths)
                    else:
                        losses = slic_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
                    loss = (losses * weights).sum(1).mean()  # Eq. 5; one y- of weight 1 is Eq. 3

                share = len(batch) / total["pairs"]
                (loss * share).backward()
                found = {"loss": loss.item()}
                if config.loss == "sft":  # which has no reference
                    found["logps/chosen"] = chosen.mean().item()
                else:
                    found |= preference_metrics(
                        chosen, rejected, ref_chosen, ref_rejected, config.beta, weights
                    )
                metrics.update({name: share * value for name, value in found.items()})

            # One update, at a share of the peak rates. Nothing is learned where every pair of the
            # step was left out.
            metrics = sum_across_ranks(metrics)
            factor = lr_factor(step, len(schedule), config.warmup, config.schedule)
            if total["pairs"]:
                sum_gradients_across_ranks(trained)  # those of shards are summed already
                metrics["grad_norm"] = clip_gradients(trained, config.clip)
                require_finite(step, metrics["loss"], metrics["grad_norm"])
                set_learning_rate(optimizer, factor)
                optimizer.step()
                optimizer.zero_grad()

            lr = factor * config.lr
            log.add({"step": step + 1, **metrics, "lr": lr, "pairs": total["pairs"]})

    # What the run leaves.
    parallel.tell_left_out(loader.left_out, "pairs")
    save_weights(policy, folder, config, out)
    if benchmark:
        evaluations["after"] = benchmark.run(assistant, "after")
    shown = report_pairs(records, assistant, pictures, edge.truth_of(config.images))
    title = f"minialign: {config.loss} on {len(records.numbers)} pairs"
    done, facts = f"{len(log.rows)} steps on {len(records.numbers)} pairs", {}
    if config.loss != "sft":
        ranked = base_accuracy(log.rows, len(records.numbers), config.batch_size)
        facts["base_preference_accuracy"] = ranked
        done += f", of which the reference ranked {ranked:.1%} right"
    parallel.on_rank0(
        lambda: save_results(out, title, config, evaluations, log.rows, facts, shown, [])
    )
    print(done)
    say_what_is_left(config.out, edge.picture_to_ask(config.images))


def base_accuracy(rows: list[dict], pairs: int, batch_size: int) -> float:
    """The share of the pairs that the reference ranks right, from the first epoch's rows."""
    first_epoch = [row for row in rows[: -(-pairs // batch_size)] if row["pairs"]]
    right = sum(row["pairs"] * row["logps/ref_accuracies"] for row in first_epoch)
    return right / max(1, sum(row["pairs"] for row in first_epoch))


if __name__ == "__main__":
    run_main(main, Config, __doc__, DEFAULTS)
