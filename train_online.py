"""Online alignment of a LLaVA: online DPO (Sec. 2.3), mixed DPO (Eq. 4), online BDHS (Eq. 5).

    python train_online.py                              # online BDHS on the embedded world
    python train_online.py --method online-dpo --annotator oracle
    python train_online.py --model DIR --data PAIRS --images DIR --method mixed-dpo --annotator DIR

In every step the current policy answers first; then it learns from its own words:
  online-dpo   two responses to a prompt, the annotator's choice is y+ and the other y- (Eq. 3)
  mixed-dpo    with probability --p the stored pair instead (Eq. 4): p = 1 is train_dpo.py, p = 0
               online DPO
  online-bdhs  y~- sampled by Algorithm 1; with --gamma the stored y- counts too (Eq. 5): gamma = 1
               is train_dpo.py

An image goes through the tower once per step, for sampling, annotator (if it is the policy's own
base), policy and reference. Every draw follows from --seed, the step and the record's id, so that
a resumed run goes on bit for bit. RLHF (Eq. 2) is in minialign/rlhf.

Left in --out: what train_dpo.py leaves.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sample_bdhs
from minialign import edge
from minialign.align.annotators import Comparison, Verdict
from minialign.align.logps import branch_lengths, branch_logps
from minialign.align.losses import BETAS, dpo_loss, ipo_loss, preference_metrics, slic_loss
from minialign.cli import require, run_main
from minialign.data.collate import Pair, PairCollator, StepLoader
from minialign.data.images import ImageProcessor
from minialign.data.record_files import open_records, usable_pairs
from minialign.data.tokenizer import Tokenizer
from minialign.model.hf_folder import fingerprint
from minialign.model.lora import adapters_off
from minialign.model.masks import Branch, Sequence, TokenTree
from minialign.model.policy import empty_policy, load_policy_weights
from minialign.sampling.assistant import Assistant
from minialign.sampling.generate import Sampling, generate
from minialign.sampling.similarity import WITHOUT_ENCODER, load_similarity
from minialign.seeds import stable_seed
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
    example,
    report_pairs,
    sampled_answers,
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
    "rho_th": (0.99, 0.7),
    "workers": (4, 0),
}

# What is logged of a step's sampling: name -> (numerator, denominator), both of them counts.
LOGGED = {
    "sampled/length": ("tokens", "responses"),
    "sampled/truncated": ("truncated", "responses"),
    "bdhs/iterations": ("iterations", "responses"),
    "annotator/dropped": ("dropped", "judged"),
    "annotator/agreement": ("decided", "asked twice"),  # of both orders
    "annotator/ties": ("tie", "judged"),
    "annotator/unparsable": ("no verdict", "judged"),
    "annotator/first": ("first", "judged"),
    # Of the policy's own pairs, per response: estimates of the KL to the reference, and entropy.
    "objective/kl": ("kl", "own"),
    "objective/entropy": ("entropy", "own"),
}


@dataclass(frozen=True)
class Config(TrainingFlags):
    """Flags of its own; minialign/training/flags.py has those of every training."""

    program: ClassVar[str] = "train_online"
    # records or pairs; without it the embedded world's, for mixed-dpo and --gamma BDHS pairs
    data: str | None = None
    out: str | None = None  # folder to write; runs/METHOD if it is not given
    method: Literal["online-dpo", "mixed-dpo", "online-bdhs"] = "online-bdhs"  # as listed above
    # `oracle` (embedded world; `oracle:0.1` errs in 10 %), `self` (the base, adapters off), or a
    # LLaVA or reward model folder
    annotator: str = "oracle"
    # how a LLaVA judges: by which response's name is likelier, by what it says, or by how many
    # claims of each response it denies (logprobs and claims take one forward pass)
    verdict: Literal["logprobs", "generated", "claims"] = "logprobs"
    # the order in which a LLaVA is shown the two responses (claims have none)
    orders: Literal["random", "both"] = "random"
    p: float = 0.5  # Eq. 4: probability of the stored pair
    gamma: float | None = None  # Eq. 5: weight of the stored y-; else the sampled one alone
    loss: Literal["dpo", "ipo", "slic"] = "dpo"  # Eq. 3, Sec. 5.7
    # --loss ipo: of a response the mean of its tokens' log-probs, as in TRL, or their sum
    ipo: Literal["means", "sums"] = "means"
    beta: float | None = None  # strength of the pull to the reference; 0.1, for ipo 0.9
    temperature: float = 1.0  # of sampling; 0 is greedy
    top_p: float = 1.0  # nucleus sampling
    # limit of a sampled response, or of a completion; one that hits it is truncated
    max_new_tokens: int = 128
    # online-bdhs, Eq. 6: an image token is hidden with this probability
    rho_th: float | None = None
    n_bdhs: int = 5  # online-bdhs: iterations at most; the last one is unguided
    eps_s: float = 0.97  # online-bdhs: a response this similar to y+ or more is sampled again
    noise_steps: int = 0  # online-bdhs: diffusion steps of Eq. 9, instead of the mask
    guided: bool = True  # online-bdhs: complete y+'s sentences (Eq. 7)
    # online-bdhs: sentence-transformers folder; without it a lexical cosine
    encoder: str | None = None


def check(config: Config) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    check_training(config)
    check_beta(config.beta)
    require(0 <= config.p <= 1, f"--p {config.p}: a probability between 0 and 1")
    gamma = config.gamma
    require(gamma is None or 0 <= gamma <= 1, f"--gamma {gamma}: between 0 and 1")
    weighs = "weighs the stored y- of online-bdhs; leave it out"
    require(
        gamma is None or config.method == "online-bdhs",
        f"--gamma with --method {config.method}: {weighs}",
    )
    sample_bdhs.check_sampling(config)
    oracle = config.annotator.partition(":")[0] == "oracle"
    known = oracle or config.annotator in ("self", "toy") or Path(config.annotator).is_dir()
    choices = "no such folder; give a LLaVA's or a reward model's, `self`, or `oracle`"
    require(known, f"--annotator {config.annotator}: {choices}")
    if oracle and config.method != "online-bdhs":
        edge.annotator_of(config.annotator, config)  # which may be refused
    require(
        config.data is not None or config.images == "toy",
        "--data is missing; name a file of records or pairs",
    )


@dataclass(frozen=True)
class Answered:
    """A batch of pairs, with the policy's own responses in place of some.

    pairs      records with their pictures, as they were loaded
    features   of each picture, (tiles, patches, D)
    asked      the rows whose responses are the policy's own
    sequences  of every row; `ranked_samples` puts None where neither response is to be preferred
    """

    pairs: list[Pair]
    features: list[Tensor]
    asked: list[int]
    sequences: list[Sequence | None]


@dataclass(frozen=True)
class Rollout:
    """Pairs that are learned from in one forward pass: chosen, then each rejected response."""

    tree: TokenTree
    features: Tensor  # (tiles, patches, D), of their pictures
    own: list[int]  # rows with the policy's own words alone, for the log
    pairs: int  # 0: an idle one, which counts for nothing


def two_samples(
    assistant: Assistant,
    pairs: list[Pair],
    features: list[Tensor],
    config: Config,
    step: int,
    counts: Counter,
) -> list[Sequence]:
    """Online DPO: two responses of the policy to each prompt, as branches of one trunk."""
    if not pairs:
        return []
    tokenizer = assistant.tokenizer
    forked = [replace(pair.sequence, branches=[Branch([]), Branch([])]) for pair in pairs]
    seeds = [[stable_seed(config.seed, step, pair.record.id, n) for n in (0, 1)] for pair in pairs]
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    stops, seen = {tokenizer.eos_id}, torch.cat(features)
    rows = generate(assistant.model, forked, seen, sampling, stops, seeds, tokenizer.pad_id)

    sequences = []
    for sequence, row in zip(forked, rows, strict=True):
        counts["responses"] += 2
        counts["tokens"] += sum(len(sample.ids) for sample in row)
        counts["truncated"] += sum(not sample.stopped for sample in row)
        sequences.append(replace(sequence, branches=[Branch(sample.ids) for sample in row]))
    return sequences


def comparisons_of(answered: Answered, tokenizer: Tokenizer, config: Config) -> list[Comparison]:
    """The policy's two responses to each prompt that it was asked, for the annotator."""
    comparisons = []
    for i in answered.asked:
        pair, features = answered.pairs[i], answered.features[i]
        texts = tuple(tokenizer.decode(branch.ids) for branch in answered.sequences[i].branches)
        # The policy's own base judges by features that are there already.
        seen = (pair.image, features) if config.annotator == "self" else None
        comparisons.append(Comparison(pair.record, texts, pair.picture, seen))
    return comparisons


def ranked_samples(
    answered: Answered,
    comparisons: list[Comparison],
    verdicts: list[Verdict],
    config: Config,
    counts: Counter,
    said: list[dict],
) -> None:
    """Online DPO: of the policy's two responses the one that the annotator prefers comes first, as
    chosen; where it prefers neither there is no sequence left. `counts` takes down all, `said` what
    the report may show."""
    for i, comparison, verdict in zip(answered.asked, comparisons, verdicts, strict=True):
        counts["judged"] += 1
        counts["first"] += bool(verdict.first)
        counts["dropped"] += verdict.better is None
        counts[verdict.reason or "decided"] += 1
        counts["asked twice"] += config.orders == "both" and verdict.first is not None

        # Silent in the paper: what is a tie, or is not understood, gives no pair.
        notes, ranked = [verdict.reason] * 2, None
        if verdict.better is not None:
            notes = ["preferred" if n == verdict.better else "not preferred" for n in (0, 1)]
            branches = answered.sequences[i].branches
            chosen, rejected = branches[verdict.better], branches[1 - verdict.better]
            ranked = replace(answered.sequences[i], branches=[chosen, rejected])
        answered.sequences[i] = ranked
        answers = list(zip(notes, comparison.responses, strict=True))
        said.append(example(comparison.record, answers))


def own_rejected(
    assistant: Assistant,
    similarity,
    pairs: list[Pair],
    features: list[Tensor],
    config: Config,
    step: int,
    counts: Counter,
    said: list[dict],
) -> list[Sequence | None]:
    """Online BDHS: the policy's own y~- (Algorithm 1) as one more branch behind the stored ones;
    None where it does not differ from y+. `counts` takes down all, `said` what the report may
    show."""
    if not pairs:
        return []
    examples = [sample_bdhs.Example(pair.record, pair.picture, pair.image) for pair in pairs]
    sampled = sample_bdhs.sample(assistant, similarity, examples, config, features, step)
    sequences: list[Sequence | None] = []
    for pair, result in zip(pairs, sampled, strict=True):
        ids = assistant.tokenizer.response(result.rejected)
        counts["responses"] += 1
        counts["tokens"] += len(ids)
        counts["truncated"] += result.truncated
        counts["iterations"] += result.iterations
        if result.rejected in ("", pair.record.chosen):
            sequences.append(None)
        else:
            branches = [*pair.sequence.branches, Branch(ids)]
            sequences.append(replace(pair.sequence, branches=branches))
        note = f"sampled as rejected in iteration {result.iterations}, phi {result.similarity:.3f}"
        answers = [("stored as chosen", pair.record.chosen), (note, result.rejected)]
        said.append(example(pair.record, answers))
    return sequences


def was_decided(example: dict) -> bool:
    """Whether the annotator has preferred one of two answers."""
    return example["answers"][0][0] not in ("tie", "no verdict")


def main(config: Config) -> None:
    """Data, evaluation, training, evaluation, export, report."""
    if config.noise_steps and config.rho_th is None:
        config = replace(config, rho_th=0.0)  # noise instead of the mask
    config = edge.with_defaults(config, DEFAULTS)
    if config.beta is None:
        config = replace(config, beta=BETAS[config.loss])
    config = with_shape_of_adapter(config)
    if config.out is None:
        config = replace(config, out=f"runs/{config.method}")
    pictures = edge.picture_source(config.images)
    check(config)
    require_run_folder(config)
    parallel.start(config.device)
    folder, out = edge.model_folder(config.model), Path(config.out)

    # The records: with a stored y- where one is wanted; a gamma of 0 gives it no weight.
    stored = ("rejected",) if config.method == "mixed-dpo" or config.gamma else ()
    if config.data is None and stored:
        sampled = sample_bdhs.sample_for(config, out)
        records = open_records(str(sampled), "--data", config.format, "give records or pairs")
    else:
        records = edge.training_records(config)

    # The policy: a LLaVA with LoRA adapters and a trainable copy of its projector. At first names,
    # shapes and types alone (torch's meta device), no memory yet.
    policy = empty_policy(folder, config)
    assistant = Assistant(
        policy, Tokenizer.from_folder(folder, config.template), ImageProcessor.from_folder(folder)
    )
    collate = PairCollator(
        assistant.tokenizer,
        assistant.processor,
        pictures,
        config.max_response_tokens,
        assistant.positions,
        # In online DPO nobody reads the stored response.
        truncate=config.truncate or config.method == "online-dpo",
        rejected=stored,
        device=config.device,
    )
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

    # Who ranks, or how similar is too similar.
    annotator = similarity = None
    if config.method == "online-bdhs":
        similarity = load_similarity(config.encoder, config.device)
        if config.encoder is None and config.model != "toy":
            print(WITHOUT_ENCODER)
    elif config.annotator == "self":
        annotator = edge.judge_of(assistant, config, adapters_off=True)
    else:  # in shards like the policy
        annotator = edge.annotator_of(config.annotator, config, config.shard == "full")

    begin(config, records, fingerprint(folder, config.adapter, config.annotator))
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
    # Eq. 4: how often a stored pair is taken as it is. In online BDHS never, but with a gamma of 1
    # always, as the sampled y~- then has no weight.
    p = config.p if config.method == "mixed-dpo" else float(config.gamma == 1)
    # Eq. 5: the weights (K,) of each y-, the stored one first.
    both = config.method == "online-bdhs" and config.gamma not in (None, 0, 1)
    weights = [config.gamma, 1 - config.gamma] if both else [1.0]
    weights = torch.tensor(weights, device=policy.device)

    # A rollout that counts for nothing, for a process that must go with the others.
    idle_tree = loader.idle(1 + len(weights)).tree.to(policy.device)
    idle = Rollout(idle_tree, assistant.no_features(), own=[], pairs=0)

    with TrainingLog(policy, optimizer, config) as log:
        for step, batches in log.steps(schedule, loader):
            begun, counts, said = time.perf_counter(), Counter(), []

            # 1. The policy answers. Meanwhile every process holds the whole of it.
            answered = []
            with unsharded(policy):
                for batch in batches:
                    # Once, for all that follows: (tiles, patches, D) of each picture.
                    tiles = [len(pair.image.pixels) for pair in batch.pairs]
                    features = policy.encode_images(batch.pixels).split(tiles)

                    # Eq. 4: alpha ~ Bernoulli(p), 1 for the stored pair, 0 for one of its own.
                    alphas = [
                        random.Random(f"{config.seed} {step} {pair.record.id}").random() < p
                        for pair in batch.pairs
                    ]
                    asked = [i for i, alpha in enumerate(alphas) if not alpha]
                    pairs = [batch.pairs[i] for i in asked]
                    seen = [features[i] for i in asked]
                    if config.method == "online-bdhs":  # Eq. 5: Algorithm 1, by the current policy
                        sampled = own_rejected(
                            assistant, similarity, pairs, seen, config, step, counts, said
                        )
                    else:  # Sec. 2.3: two samples, to be ranked
                        sampled = two_samples(assistant, pairs, seen, config, step, counts)

                    # Stored pairs as they are, and what was sampled.
                    sequences = list(batch.sequences)
                    for i, sequence in zip(asked, sampled, strict=True):
                        sequences[i] = sequence
                    answered.append(Answered(batch.pairs, features, asked, sequences))

            # 2. The annotator ranks. All processes go through its shards together, as often as the
            # one that has most to ask.
            if annotator is not None:
                compared = [comparisons_of(each, assistant.tokenizer, config) for each in answered]
                verdicts = [annotator.choose(each) for each in parallel.even(compared, [])]
                for each, comparisons, found in zip(answered, compared, verdicts, strict=False):
                    ranked_samples(each, comparisons, found, config, counts, said)

            # What is left of a batch passes through the policy together.
            rollouts = []
            for each in answered:
                kept = [i for i, sequence in enumerate(each.sequences) if sequence is not None]
                if kept:
                    tree = collate.tree([each.sequences[i] for i in kept]).to(policy.device)
                    features = torch.cat([each.features[i] for i in kept])
                    ranked = each.asked if annotator is not None else []
                    own = [row for row, i in enumerate(kept) if i in ranked]
                    rollouts.append(Rollout(tree, features, own, len(kept)))

            # 3. It learns from that: train_dpo.py's step.
            learning_since = time.perf_counter()
            pairs_in_step = sum(rollout.pairs for rollout in rollouts)
            pairs_in_step = sum_across_ranks({"pairs": pairs_in_step})["pairs"]
            metrics: Counter = Counter()  # means over the step's pairs; `update` adds
            for rollout in parallel.even(rollouts, idle) if pairs_in_step else ():
                # Summed over tokens. The reference is the policy with adapters and trained
                # projector switched off, without gradients.
                with adapters_off(policy):
                    ref_logps = branch_logps(policy, rollout.tree, rollout.features)
                logps = branch_logps(policy, rollout.tree, rollout.features)  # (B, 1 + K)
                chosen, rejected = logps[:, :1], logps[:, 1:]
                ref_chosen, ref_rejected = ref_logps[:, :1], ref_logps[:, 1:]

                beta = config.beta
                if config.loss == "dpo":  # Eq. 3
                    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
                elif config.loss == "ipo":  # Sec. 5.7
                    lengths = branch_lengths(rollout.tree) if config.ipo == "means" else None
                    losses = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, lengths)
                else:
                    losses = slic_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
                loss = (losses * weights).sum(1).mean()  # Eq. 5; one y- of weight 1 is Eq. 3

                share = rollout.pairs / pairs_in_step
                (loss * share).backward()
                found = {"loss": loss.item()}
                found |= preference_metrics(
                    chosen, rejected, ref_chosen, ref_rejected, beta, weights
                )
                metrics.update({name: share * value for name, value in found.items()})
                own_logps, own_ref_logps = logps[rollout.own], ref_logps[rollout.own]
                counts["kl"] += (own_logps - own_ref_logps).sum().item()
                counts["entropy"] += -own_logps.sum().item()
                counts["own"] += own_logps.numel()

            factor = lr_factor(step, len(schedule), config.warmup, config.schedule)
            if pairs_in_step:
                metrics = sum_across_ranks(metrics)
                sum_gradients_across_ranks(trained)  # those of shards are summed already
                metrics["grad_norm"] = clip_gradients(trained, config.clip)
                require_finite(step, metrics["loss"], metrics["grad_norm"])
                set_learning_rate(optimizer, factor)
                optimizer.step()
                optimizer.zero_grad()

            totals = sum_across_ranks(counts)
            sampled_metrics = {
                name: totals[what] / totals[of]
                for name, (what, of) in LOGGED.items()
                if what in totals and totals.get(of)
            }
            log.add(
                {
                    "step": step + 1,
                    **metrics,
                    **sampled_metrics,
                    "lr": factor * config.lr,
                    "pairs": pairs_in_step,
                    "time/sampling": learning_since - begun,
                    "time/training": time.perf_counter() - learning_since,
                },
                next(filter(was_decided, said), said[0] if said else None),
            )

    parallel.tell_left_out(loader.left_out, "records")
    save_weights(policy, folder, config, out)
    if benchmark:
        evaluations["after"] = benchmark.run(assistant, "after")
    truth = edge.truth_of(config.images)
    shown = report_pairs(records, assistant, pictures, truth) if stored else []
    said = sampled_answers(log.rows, pictures, truth)
    pairs = sum(row["pairs"] for row in log.rows)
    title = f"minialign: {config.method}"
    facts = {"pairs": pairs}
    parallel.on_rank0(
        lambda: save_results(out, title, config, evaluations, log.rows, facts, shown, said)
    )
    dropped = [row["annotator/dropped"] for row in log.rows if "annotator/dropped" in row]
    done = f"{len(log.rows)} steps, {pairs} pairs"
    if any(dropped):
        share = sum(dropped) / len(dropped)
        done += f"; {share:.0%} of the judged ones dropped, as metrics.jsonl says in annotator/..."
    print(done)
    say_what_is_left(config.out, edge.picture_to_ask(config.images))


if __name__ == "__main__":
    run_main(main, Config, __doc__, DEFAULTS)
