"""Direct preference optimisation of a LLaVA on a pairs file: DPO (Eq. 3), IPO and SLiC (Sec. 5.7).

    python train_dpo.py                         # the whole road on the embedded world, in minutes
    python train_dpo.py --model DIR --pairs pairs.jsonl --images DIR --out runs/mine
    torchrun --nproc-per-node 8 train_dpo.py --model DIR ... --device cuda --dtype bfloat16 --shard full

Without --pairs the pairs are sampled first (sample_bdhs.py). Each pair is ONE sequence: image and
prompt once, then chosen and rejected as two branches (minialign/masks.py). The policy is the base
model with LoRA adapters and a trainable copy of the projector; with both switched off it is the
reference. The vision tower is frozen and sees each image once per step.

Left in --out: config.json, metrics.jsonl, result.json, adapter/ (PEFT), merged/ (Hugging Face),
checkpoint/ (--resume), report.html. `--loss sft` is the supervised control: its loss knows y+
alone, neither y- nor reference. `--loss reward` makes a reward model (Eq. 1) instead of a policy: a
head on each response's last token, kept in merged/; unless given, it has lr 2e-5, 4,000 steps of
32, 3 % warm-up, the projector as it is (toy: 1e-3, 500 steps of 16). `--rejected both` takes pairs
that sample_bdhs.py made of data with rejected responses; distorted is Sec. 3.3's loss.

Differs from the paper: AdamW without weight decay, warm-up and cosine decay by default (the paper
is silent)."""

import math
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import sample_bdhs
from minialign import flags, lora, parallel, resume
from minialign.chat import Tokenizer, announce
from minialign.checkpoint import fingerprint, resolve_model
from minialign.cli import fill, require, require_outside, run_main
from minialign.collate import PairBatch, PairCollator, StepLoader
from minialign.config import read_config
from minialign.data import Records, open_pairs, usable_pairs
from minialign.distortion import distorted_tree
from minialign.flags import COMPILE_OPTIONS
from minialign.heads import branch_rewards
from minialign.images import ImageProcessor
from minialign.llava import Llava
from minialign.loader import load_ahead
from minialign.losses import (
    branch_logps,
    preference_loss,
    preference_metrics,
    reference_logps,
    reward_metrics,
)
from minialign.optimizer import make_optimizer, update
from minialign.parallel import sum_across_ranks, unsharded
from minialign.reference import ReferenceCache
from minialign.results import save_results, save_weights
from minialign.reward_model import measure_rewards
from minialign.rewards import Whitening, reward_loss
from minialign.schedule import batches_of_run, learning_rate
from minialign.toybench import ToyBenchmark

# A reward model's own values (Sec. 5.5), where neither --steps nor --epochs is given; the paper
# trains adapters alone.
PAPER_REWARD = {"lr": 2e-5, "projector_lr": 0.0, "batch_size": 32, "warmup": 0.03, "steps": 4000}
TOY_REWARD = {"lr": 1e-3, "steps": 500}
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen")  # in the progress bar


@dataclass(frozen=True)
class Config(flags.TrainingFlags):
    """Flags of its own; flags.py has those of both training scripts, and what stands for those that
    are not given."""

    pairs: str | None = None  # pairs file; without it BDHS pairs are sampled into --out first
    out: str = "runs/dpo"  # folder to write
    # sft: supervised on y+ alone; reward: Eq. 1
    loss: Literal["dpo", "ipo", "slic", "sft", "reward"] = "dpo"
    # y-; both: and that of the data sampled from (Eq. 5)
    rejected: Literal["stored", "both", "distorted"] = "stored"
    gamma: float = 0.5  # Eq. 5: weight of the external y- (distorted: of the stored one)
    noise_steps: int = 500  # distorted: diffusion steps of the noisy picture (Eq. 9)
    # folder that keeps the reference's log-probs for later epochs and other runs
    ref_cache: str | None = None


def check(config: Config) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    flags.check_training(config)
    require(
        1 <= config.noise_steps <= 1000, f"--noise-steps {config.noise_steps}: between 1 and 1000"
    )
    require(
        config.adapter is None or config.pairs is not None,
        "--adapter: give --pairs too; none are sampled from it",
    )
    if config.ref_cache is not None:
        said = "these responses are made anew at every step, and none is met twice; leave one of the two out"
        require(
            "distorted" not in rejected_weights(config),
            f"--ref-cache with --rejected distorted: {said}",
        )
        said = f"--ref-cache with --loss {config.loss}: there is no reference; leave one of the two out"
        require(config.loss != "reward", said)
        folder = bool(config.ref_cache) and not Path(config.ref_cache).is_file()
        require(folder, f"--ref-cache {config.ref_cache!r}: is no folder; name one")


def pair_loss(
    model: Llava,
    batch: PairBatch,
    config: Config,
    length: float,
    cache: ReferenceCache | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The mean loss of a batch, and its metrics by TRL's names; `cache` may know what the reference
    says.

    `length` is for sft: the mean tokens of y+ in the whole step, of which `batch` is a part with
    --accumulate."""
    features = model.encode_images(batch.pixels)  # once, for policy and reference
    tree = batch.tree
    if batch.noisy is not None:
        tree = distorted_tree(model, batch.sequences, model.encode_images(batch.noisy))
    weights = torch.tensor(list(rejected_weights(config).values()), device=model.device)
    tree = tree.to(model.device)
    if config.loss == "reward":
        rewards = branch_rewards(model, tree, features)
        loss = (reward_loss(rewards[:, :1], rewards[:, 1:]) * weights).sum(1).mean()  # Eq. 1
        return loss, {"loss": loss.item()} | reward_metrics(rewards, weights)
    ref_logps = (
        cache.logps(model, batch.keys, tree, features)
        if cache
        else reference_logps(model, tree, features)
    )
    logps = branch_logps(model, tree, features)  # (B, 1 + K), as of the reference
    if config.loss == "sft":
        loss = -logps[:, 0].mean() / length  # mean over y+'s tokens
    else:
        loss = preference_loss(logps, ref_logps, config.loss, config.beta, weights)
    return loss, {"loss": loss.item()} | preference_metrics(logps, ref_logps, config.beta, weights)


def rejected_weights(config: Config) -> dict[str, float]:
    """Eq. 5: every kind of rejected response that is trained on, and its weight."""
    gamma = config.gamma
    weights = {
        "stored": {"rejected": 1.0},
        "both": {"external": gamma, "rejected": 1 - gamma},
        "distorted": {"rejected": gamma, "distorted": 1 - gamma},
    }[config.rejected]
    return {name: weight for name, weight in weights.items() if weight > 0}


def train(
    model: Llava, load: StepLoader, config: Config, out: Path, cache: ReferenceCache | None
) -> list[dict]:
    """The loop: from the first step, or from the last checkpoint with --resume; returns
    metrics.jsonl's rows."""
    optimizer = make_optimizer(model, config.lr, config.projector_lr)
    steps = batches_of_run(
        load.records.numbers, config.batch_size, config.seed, config.epochs, config.steps
    )
    run = resume.Run(out, model, optimizer, config.resume)
    mine = [parallel.shard_batch(batch) for batch in steps[run.start :]]
    idle, left_out = load.collate.idle(1 + len(load.collate.rejected)), []
    with run, closing(load_ahead(mine, load, config.workers)) as loads:
        bar = tqdm(
            loads,
            initial=run.start,
            total=len(steps),
            desc=config.loss,
            disable=parallel.rank() > 0,
        )
        for step, (parts, bad) in enumerate(bar, start=run.start):
            tokens = sum(part.chosen_tokens for part in parts)
            counts = sum_across_ranks({"pairs": sum(map(len, parts)), "tokens": tokens})
            pairs = counts[
                "pairs"
            ]  # of all processes; 0 where all are left out: nothing is learned
            metrics: dict[str, float] = {}
            for part in parallel.even(parts, idle):
                loss, part_metrics = pair_loss(
                    model, part, config, counts["tokens"] / max(1, pairs), cache
                )
                weight = len(part) / pairs
                (loss * weight).backward()
                for name, value in part_metrics.items():
                    metrics[name] = metrics.get(name, 0.0) + weight * value
            metrics = sum_across_ranks(metrics)
            share = learning_rate(step, len(steps), config.warmup, config.schedule)
            if pairs:
                metrics["grad_norm"] = update(
                    optimizer, share, config.clip, metrics["loss"], f"step {step + 1}"
                )
            facts = {"lr": share * config.lr, "pairs": pairs}
            save = (step + 1) % config.save_every == 0 or step + 1 == len(steps)
            run.add({"step": step + 1, **metrics, **facts}, save)
            left_out += bad
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in SHOWN if name in metrics})
    parallel.tell_left_out(left_out, "pairs")
    return run.rows


def main(config: Config) -> None:
    """Pairs, evaluation, training, evaluation, export, report."""
    base, reward = (flags.TOY, TOY_REWARD) if config.model == "toy" else (flags.PAPER, PAPER_REWARD)
    steps = reward["steps"] if config.epochs is None else None
    config = fill(config, base | (reward | {"steps": steps} if config.loss == "reward" else {}))
    config = fill(config, {"lora_alpha": 2.0 * config.lora_rank})
    check(config)
    require(
        config.pairs is not None or config.images == "toy",
        "--pairs is missing; make one with sample_bdhs.py",
    )
    parallel.start(config.device)
    folder, out = resolve_model(config.model), Path(config.out)
    require_outside(out, "the model", folder)
    config = replace(config, **flags.adapter_shape(config))
    resume.require_same_flags(out, config)
    pairs = Path(config.pairs) if config.pairs else sample_bdhs.sample_for(config, out)
    records = open_pairs(str(pairs), config.format)
    tokenizer, processor = (
        Tokenizer.from_folder(folder, config.template),
        ImageProcessor.from_folder(folder),
    )
    positions = read_config(folder).text.max_position_embeddings
    limits = config.max_response_tokens, positions, config.truncate
    kinds = list(rejected_weights(config))
    fields, noise = (
        tuple(k for k in kinds if k != "distorted"),
        config.noise_steps if "distorted" in kinds else 0,
    )
    keyed = config.ref_cache is not None
    means = {"keyed": keyed, "device": config.device}
    collate = PairCollator(tokenizer, processor, config.images, *limits, fields, noise, **means)
    records = usable_pairs(
        records, collate.check, config.limit, config.seed, config.skip_bad_records
    )
    head = "reward" if config.loss == "reward" else None
    model = lora.empty_policy(folder, config, head)  # names, shapes and types: no memory yet

    # torch.compile, one decoder layer at a time: all share the code.
    if config.compile:
        for layer in model.language_model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True, options=COMPILE_OPTIONS)

    # Of a layer its input alone is kept for the backward pass, which runs the layer again.
    if config.recompute:
        for layer in model.language_model.layers:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )

    # FSDP2: a process keeps its rows of every tensor, and a layer is gathered for its turn.
    if config.shard == "full":
        from torch.distributed.fsdp import fully_shard  # here, as it takes a second

        mesh = parallel.mesh(config.device)
        for unit in (*model.language_model.layers, model.vision_tower, model):
            fully_shard(unit, mesh=mesh)
        parallel.after_sharding(model)

    lora.load_policy_weights(model, folder, config, head)  # each process reads its rows
    announce(folder, model, tokenizer)
    cache = None
    if keyed:
        with unsharded(model):
            cache = ReferenceCache(Path(config.ref_cache), model)
    resume.begin(out, config, records, fingerprint(folder, config.adapter))

    benchmark = ToyBenchmark(config.eval_split, config.eval_images)
    evaluate = config.images == "toy" and config.eval_images > 0 and config.loss != "reward"
    counts = {}
    if evaluate:
        # Fresh adapters do nothing: switched off, they cost nothing.
        with unsharded(model), nullcontext() if config.adapter else lora.adapters_off(model):
            counts["before"] = benchmark.run(model, tokenizer, processor, "before")
    load = StepLoader(records, collate, config.accumulate, config.skip_bad_records)
    rows = train(model, load, config, out, cache)

    whitening = measure_rewards(model, load, config.batch_size) if config.loss == "reward" else None
    save_weights(model, folder, config, out, whitening)
    if evaluate:
        with unsharded(model):
            counts["after"] = benchmark.run(model, tokenizer, processor, "after")
    parallel.on_rank0(lambda: leave(rows, records, collate, counts, whitening, config, out))


def leave(
    rows: list[dict],
    records: Records,
    collate: PairCollator,
    counts: dict,
    whitening: Whitening | None,
    config: Config,
    out: Path,
) -> None:
    """Figures, report and a last word."""
    if whitening:
        last = [row["rewards/accuracies"] for row in rows[-50:] if row["pairs"]]
        right = sum(last) / max(1, len(last))
        facts = {
            "reward_mean": whitening.mean,
            "reward_std": whitening.std,
            "accuracy_of_last_steps": right,
        }
        said = f"of which the last {len(last)} steps ranked {right:.1%} right; "
        said += f"rewards {whitening.mean:.2f} on average, standard deviation {whitening.std:.2f}"
    else:
        first = rows[: math.ceil(len(records.numbers) / config.batch_size)]
        ranked = sum(row["pairs"] * row["logps/ref_accuracies"] for row in first if row["pairs"])
        ranked /= max(1, sum(row["pairs"] for row in first))
        facts, said = (
            {"base_preference_accuracy": ranked},
            f"of which the reference ranked {ranked:.1%} right",
        )
    shown = [collate.report_pair(records.parse(number)) for number in records.numbers[:8]]
    save_results(
        out,
        f"minialign: {config.loss} on {len(records.numbers)} pairs",
        config,
        shown,
        rows,
        counts,
        facts,
    )
    print(
        f"{len(rows)} steps on {len(records.numbers)} pairs, {said}; "
        f"{out}/adapter (PEFT), {out}/merged (Hugging Face), {out}/report.html (pairs and curves)"
    )


if __name__ == "__main__":
    run_main(main, Config, __doc__)
