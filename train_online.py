"""Online alignment of a LLaVA: online DPO, mixed DPO (Eq. 4), online BDHS (Eq. 5), and RLHF (Eq. 2)
by RLOO or PPO.

    python train_online.py                              # online BDHS on the embedded world
    python train_online.py --method rloo --reward runs/reward/merged --kl-stop 20
    python train_online.py --model DIR --data PAIRS --images DIR --method mixed-dpo --annotator DIR --out runs/mixed

In every step the current policy answers first; then it learns from its own words (Sec. 2.3, 5.5,
5.6):
  online-dpo   two responses to a prompt, the annotator's choice is y+ and the other y- (Eq. 3)
  mixed-dpo    with probability --p the stored pair instead (Eq. 4): p = 1 is train_dpo.py, p = 0 online DPO
  online-bdhs  y~- sampled by Algorithm 1; with --gamma the stored y- counts too (Eq. 5): gamma = 1 is train_dpo.py
  rloo         --k responses to a prompt, each paid what the reward gives it beyond the mean of the others
  ppo          a token is an action: --updates clipped updates per rollout, and a head that learns values

An image goes through the tower once per step, for sampling, annotator (if it is the policy's own
base), policy and reference. Every draw follows from --seed, the step and the record's id, so that a
resumed run goes on bit for bit. Where RLHF moves further from the reference than --kl-stop, the run
ends and says so. Unless given, rloo has lr 3e-4, beta 0.4, 2 epochs of 256 prompts, --k 4 (toy:
5e-4, 0.05, 1 of 16), ppo lr 1.41e-5 all along, 3 epochs of 32 (toy: 1e-4, beta 0.05, 1 of 16), and
both leave the projector as it is (toy: 3e-5). Left in --out: what train_dpo.py leaves. Differs from
the paper: see train_dpo.py, minialign/bdhs.py, ppo.py, rloo.py."""

import random
import time
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import sample_bdhs
from minialign import flags, lora, parallel, resume, rollout, toyworld
from minialign.annotator import ModelAnnotator, load_annotator
from minialign.bdhs import Bdhs, BdhsConfig
from minialign.chat import Tokenizer, announce
from minialign.checkpoint import fingerprint, resolve_model
from minialign.cli import fill, require, require_outside, run_main
from minialign.collate import PairCollator, StepLoader
from minialign.config import read_config
from minialign.data import TOY_RECORDS, open_records, usable_pairs
from minialign.files import write_json
from minialign.flags import COMPILE_OPTIONS, RL
from minialign.generate import Sampling
from minialign.images import ImageProcessor
from minialign.learn import Ppo, Preferences, Rloo
from minialign.llava import Llava
from minialign.loader import load_ahead
from minialign.optimizer import make_optimizer, update
from minialign.parallel import sum_across_ranks, unsharded
from minialign.results import save_results, save_weights, told
from minialign.rollout import Answer, OwnRejected, RankedPairs, Sampler, Scored
from minialign.schedule import batches_of_run, learning_rate
from minialign.scoring import load_reward
from minialign.similarity import load_similarity
from minialign.toybench import ToyBenchmark

# What stands for a flag that is not given: the paper's value (App. A, Sec. 5.5), or the toy
# model's.
PAPER, TOY = flags.PAPER | {"rho_th": 0.99}, flags.TOY | {"rho_th": 0.7}
PAPER_RL = {
    "rloo": {"beta": 0.4, "lr": 3e-4, "projector_lr": 0.0, "epochs": 2, "batch_size": 256, "k": 4},
    "ppo": {
        "lr": 1.41e-5,
        "projector_lr": 0.0,
        "batch_size": 32,
        "k": 1,
        "warmup": 0.0,
        "schedule": "constant",
    },
}
TOY_RL = {"rloo": {"beta": 0.05, "lr": 5e-4, "k": 4}, "ppo": {"beta": 0.05, "lr": 1e-4, "k": 1}}
SHOWN = (
    "loss",
    "rewards/accuracies",
    "objective/scores",
    "objective/kl",
    "sampled/length",
)  # in the progress bar


@dataclass(frozen=True)
class Config(flags.TrainingFlags):
    """Flags of its own; flags.py has those of both training scripts."""

    # records or pairs; without it the embedded world's, for mixed-dpo and --gamma BDHS pairs
    data: str | None = None
    out: str = "runs/online"  # folder to write
    # as listed above
    method: Literal["online-dpo", "mixed-dpo", "online-bdhs", "rloo", "ppo"] = "online-bdhs"
    # `oracle` (embedded world), `self` (the base, adapters off), or a LLaVA folder
    annotator: str = "oracle"
    orders: Literal["random", "both"] = "random"  # in which a model sees the two responses
    p: float = 0.5  # Eq. 4: probability of the stored pair
    gamma: float | None = None  # Eq. 5: weight of the stored y-; else the sampled one alone
    loss: Literal["dpo", "ipo", "slic"] = "dpo"  # Eq. 3, Sec. 5.7
    reward: str = "oracle"  # rloo, ppo: `oracle`, a reward model's folder, or FILE.py:FUNCTION(image, prompt, response)
    k: int | None = None  # rloo, ppo: responses to a prompt (rloo: 4, ppo: 1)
    # rloo, ppo: end where the KL to the reference passes so many nats per response
    kl_stop: float | None = None
    updates: int = 4  # ppo: updates per rollout
    gae_lambda: float = 0.95  # ppo: 1 is the return less the value, 0 one step ahead
    ratio_clip: float = 0.2  # ppo: range of the ratio to the policy that has answered
    value_clip: float = 0.2  # ppo: by how much a value may move per rollout, in units of the reward
    value_coef: float = 0.1  # ppo: weight of the value loss
    temperature: float = 1.0  # of sampling; 0 is greedy
    top_p: float = 1.0  # nucleus sampling
    # limit of a sampled response, or of a completion; one that hits it is truncated
    max_new_tokens: int = 128
    # Eq. 6, online-bdhs: an image token is hidden with this probability (0.99; toy: 0.7)
    rho_th: float | None = None
    n_bdhs: int = 5  # online-bdhs: iterations at most; the last one is unguided
    eps_s: float = 0.97  # online-bdhs: a response this similar to y+ or more is sampled again
    noise_steps: int = 0  # online-bdhs: diffusion steps of Eq. 9, instead of the mask
    guided: bool = True  # online-bdhs: complete y+'s sentences (Eq. 7)
    # online-bdhs: sentence-transformers folder; without it a lexical cosine
    encoder: str | None = None


def check(config: Config) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    flags.check_training(config)
    require(0 <= config.p <= 1, f"--p {config.p}: a probability between 0 and 1")
    sample_bdhs.check_sampling(config)
    said = (
        f"--gamma with --method {config.method}: weighs the stored y- of online-bdhs; leave it out"
    )
    require(config.gamma is None or config.method == "online-bdhs", said)
    require(
        config.data is not None or config.images == "toy",
        "--data is missing; name a file of records or pairs",
    )
    flags.check_rlhf(config)


def make_respond(config: Config, model: Llava, tokenizer: Tokenizer, processor: ImageProcessor):
    """Who answers: the policy, with an annotator or a reward behind it, or Algorithm 1."""
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    if config.method == "online-bdhs":
        knobs = {
            f.name: getattr(config, f.name) for f in fields(BdhsConfig) if f.name != "sampling"
        }
        similarity = load_similarity(config.encoder, config.device)
        return OwnRejected(
            Bdhs(model, tokenizer, processor, similarity, BdhsConfig(**knobs, sampling=sampling))
        )
    sampler = Sampler(model, tokenizer, sampling, config.seed)
    if config.method in RL:
        return Scored(sampler, load_reward(config.reward, config), config.k)
    if config.annotator == "self":
        annotator = ModelAnnotator(
            model, tokenizer, processor, config.orders == "both", config.seed, policy_off=True
        )
    else:
        annotator = load_annotator(config.annotator, config)
    return RankedPairs(sampler, annotator)


def make_learner(config: Config, model: Llava):
    """How it learns; of pairs with the weights of what is rejected, the stored one first (Eq.
    5)."""
    if config.method == "rloo":
        return Rloo(model, config.beta, config.k)
    if config.method == "ppo":
        knobs = (
            config.updates,
            config.gae_lambda,
            config.ratio_clip,
            config.value_clip,
            config.value_coef,
        )
        return Ppo(model, config.beta, config.k, *knobs)
    both = config.method == "online-bdhs" and config.gamma not in (None, 0, 1)
    weights = torch.tensor(
        [config.gamma, 1 - config.gamma] if both else [1.0], device=config.device
    )
    return Preferences(model, config.loss, config.beta, weights)


def passed_kl_stop(rows: list[dict], kl_stop: float | None) -> str | None:
    """Why RLHF has to end, read from metrics.jsonl's rows so that a resumed run ends there, too:
    the KL of the latest step that sampled, in nats per response, is above --kl-stop. Else None."""
    kls = [(row["step"], row["objective/kl"]) for row in rows if "objective/kl" in row]
    if kl_stop is None or not kls or kls[-1][1] <= kl_stop:
        return None
    step, kl = kls[-1]
    return f"step {step}: a KL of {kl:.2f} nats per response, above --kl-stop {kl_stop}"


def train(
    model: Llava, respond, learner, load: StepLoader, config: Config, out: Path
) -> resume.Run:
    """The loop: from the first step, or from the last checkpoint with --resume; its `rows` are
    metrics.jsonl's."""
    optimizer = make_optimizer(model, config.lr, config.projector_lr)
    steps = batches_of_run(
        load.records.numbers, config.batch_size, config.seed, config.epochs, config.steps
    )
    # Of how many records the stored pair is taken as it is.
    p = {"mixed-dpo": config.p, "online-bdhs": float(config.gamma == 1)}.get(config.method, 0.0)
    watch = partial(passed_kl_stop, kl_stop=config.kl_stop)
    run = resume.Run(out, model, optimizer, config.resume, watch)
    mine, left_out = [parallel.shard_batch(batch) for batch in steps[run.start :]], []
    idle = rollout.idle_rollout(model, load.collate, learner.branches)
    with run, closing(load_ahead(mine, load, config.workers)) as loads:
        bar = tqdm(
            loads,
            initial=run.start,
            total=len(steps),
            desc=config.method,
            disable=parallel.rank() > 0,
        )
        for step, (parts, bad) in enumerate(bar, start=run.start):
            if run.stopped:
                break
            begin, counts, rollouts = time.perf_counter(), Counter(), []
            with unsharded(model):  # 1. the policy answers, and is judged
                for part in parts:
                    features = rollout.features_of(
                        model.encode_images(part.pixels), part.sequences
                    )  # once
                    draws = [
                        random.Random(f"{config.seed} {step} {record.id}").random()
                        for record in part.records
                    ]
                    alphas = [draw < p for draw in draws]  # Eq. 4: alpha ~ Bernoulli(p)
                    asked = [i for i, alpha in enumerate(alphas) if not alpha]
                    said = dict(
                        zip(asked, respond(part, asked, features, step, counts), strict=True)
                    )
                    answers = [
                        said.get(i, Answer(sequence)) for i, sequence in enumerate(part.sequences)
                    ]
                    own = (
                        set() if config.method == "online-bdhs" else said.keys()
                    )  # all branches are the policy's
                    rollouts += rollout.rollout_of(model, load.collate, answers, features, own)
            between, share = (
                time.perf_counter(),
                learning_rate(step, len(steps), config.warmup, config.schedule),
            )
            batches = learner.look(parallel.even(rollouts, idle), counts)  # 2. it learns from that
            rows, count = sum(each.count for each in rollouts), sum(each.count for each in batches)
            total = sum_across_ranks({"rows": rows, "count": count})
            metrics: Counter = Counter()
            for _ in range(learner.updates if total["count"] else 0):
                found: Counter = Counter()
                for batch in batches:
                    loss, of_batch = learner.loss(batch, counts)
                    weight = batch.count / total["count"]
                    (loss * weight).backward()
                    found.update({name: weight * value for name, value in of_batch.items()})
                found = sum_across_ranks(found)
                found["grad_norm"] = update(
                    optimizer, share, config.clip, found["loss"], f"step {step + 1}"
                )
                metrics.update({name: value / learner.updates for name, value in found.items()})
            seconds = {
                "time/sampling": between - begin,
                "time/training": time.perf_counter() - between,
            }
            facts = {"lr": share * config.lr, **learner.learned(total["rows"])} | seconds
            row = (
                {"step": step + 1}
                | metrics
                | rollout.shares(Counter(sum_across_ranks(counts)))
                | facts
            )
            run.add(row, (step + 1) % config.save_every == 0 or step + 1 == len(steps))
            left_out += bad
            bar.set_postfix({name: f"{row[name]:.3f}" for name in SHOWN if name in row})
    parallel.tell_left_out(left_out, "records")
    return run


def toy_data(config: Config, out: Path) -> Path:
    """The embedded world's records; with BDHS pairs of the base where a stored y- is wanted."""
    if config.method == "mixed-dpo" or config.gamma:
        return sample_bdhs.sample_for(config, out)
    records = toyworld.alignment_records(config.limit or TOY_RECORDS)
    parallel.on_rank0(lambda: write_json(out / "data.json", records))
    return out / "data.json"


def main(config: Config) -> None:
    """Data, evaluation, training, evaluation, export, report."""
    base, of_method = (TOY, TOY_RL) if config.model == "toy" else (PAPER, PAPER_RL)
    config = fill(config, base | of_method.get(config.method, {}))
    config = fill(config, {"lora_alpha": 2.0 * config.lora_rank})
    check(config)
    parallel.start(config.device)
    folder, out = resolve_model(config.model), Path(config.out)
    require_outside(out, "the model", folder)
    config = replace(config, **flags.adapter_shape(config))
    resume.require_same_flags(out, config)
    records = open_records(
        config.data or str(toy_data(config, out)), "--data", config.format, "give records or pairs"
    )
    tokenizer, processor = (
        Tokenizer.from_folder(folder, config.template),
        ImageProcessor.from_folder(folder),
    )
    stored = ("rejected",) if config.method == "mixed-dpo" or config.gamma else ()
    cut = config.truncate or config.method in (
        "online-dpo",
        *RL,
    )  # there nobody reads the stored response
    limits = config.max_response_tokens, read_config(folder).text.max_position_embeddings, cut
    carried = {"keep_pictures": True, "device": config.device}
    collate = PairCollator(tokenizer, processor, config.images, *limits, stored, **carried)
    records = usable_pairs(
        records, collate.check, config.limit, config.seed, config.skip_bad_records
    )
    head = "value" if config.method == "ppo" else None
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
    respond = make_respond(config, model, tokenizer, processor)
    resume.begin(out, config, records, fingerprint(folder, config.adapter, config.reward))
    benchmark = ToyBenchmark(config.eval_split, config.eval_images)
    evaluate = config.images == "toy" and config.eval_images > 0
    counts = {}
    if evaluate:
        # Fresh adapters do nothing: switched off, they cost nothing.
        with unsharded(model), nullcontext() if config.adapter else lora.adapters_off(model):
            counts["before"] = benchmark.run(model, tokenizer, processor, "before")
    load = StepLoader(records, collate, config.accumulate, config.skip_bad_records)
    run = train(model, respond, make_learner(config, model), load, config, out)
    save_weights(model, folder, config, out)
    if evaluate:
        with unsharded(model):
            counts["after"] = benchmark.run(model, tokenizer, processor, "after")
    shown = (
        [collate.report_pair(records.parse(number)) for number in records.numbers[:8]]
        if stored
        else []
    )
    facts = {
        unit: sum(row[unit] for row in run.rows)
        for unit in ("pairs", "responses")
        if unit in run.rows[0]
    }
    facts |= {"stopped": run.stopped} if run.stopped else {}
    title = f"minialign: {config.method}" + (f", ended early: {run.stopped}" if run.stopped else "")
    parallel.on_rank0(lambda: save_results(out, title, config, shown, run.rows, counts, facts))
    print(
        f"{told(run, facts)}; {out}/adapter (PEFT), {out}/merged (Hugging Face), {out}/report.html"
    )


if __name__ == "__main__":
    run_main(main, Config, __doc__)
