"""Online alignment of a LLaVA: online DPO, mixed DPO (Eq. 4) and online BDHS (Eq. 5), Sec. 2.3 and 5.6.

    python train_online.py                              # online BDHS on the embedded world
    python train_online.py --method online-dpo          # its exact truth ranks two sampled responses
    python train_online.py --model DIR --data FILE --images DIR --method mixed-dpo --annotator DIR --out runs/mixed

In every step the current policy answers first; then it learns from pairs that hold its own words:
  online-dpo   two responses to a prompt, the annotator's choice is y+ and the other y- (Eq. 3)
  mixed-dpo    with probability --p the stored pair instead (Eq. 4): p = 1 is train_dpo.py, p = 0 online DPO
  online-bdhs  y~- sampled by Algorithm 1; with --gamma the stored y- counts too (Eq. 5): gamma = 1 is train_dpo.py

An image goes through the tower once per step, for sampling, annotator (if it is the policy's own base), policy and
reference. Every draw follows from --seed, the step and the record's id, so that a resumed run goes on bit for bit.
Left in --out: what train_dpo.py leaves. Differs from the paper: see train_dpo.py and minialign/bdhs.py.
"""

import random
import time
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import sample_bdhs
from minialign import distributed, lora, resume, toyworld
from minialign.annotator import ModelAnnotator, load_annotator
from minialign.bdhs import Bdhs, BdhsConfig
from minialign.chat import Tokenizer, announce
from minialign.checkpoint import fingerprint, resolve_model
from minialign.cli import fill, parse_config, require, require_outside, run_main
from minialign.collate import PairCollator, StepLoader
from minialign.config import read_config
from minialign.data import TOY_RECORDS, open_records, usable_pairs
from minialign.distributed import added, gather, gathered
from minialign.files import write_json
from minialign.flags import adapter_shape, check_training
from minialign.generate import Sampling
from minialign.images import ImageProcessor
from minialign.llava import Llava
from minialign.loader import load_ahead
from minialign.losses import both_logps, count_objective, preference_loss, preference_metrics
from minialign.masks import build_tree
from minialign.optimizer import make_optimizer, update
from minialign.records import FormatName
from minialign.results import save_results, save_weights
from minialign.rollout import OwnRejected, RankedPairs, features_of, shares
from minialign.schedule import batches_of_run, learning_rate
from minialign.similarity import load_similarity
from minialign.toybench import ToyBenchmark

# What stands for a flag that is not given: the paper's value (App. A), or the toy model's, as in train_dpo.py.
PAPER = {"beta": 0.1, "lr": 5e-7, "projector_lr": 2e-6, "lora_rank": 128, "epochs": 3, "workers": 4, "rho_th": 0.99}
TOY = {"beta": 0.1, "lr": 2e-4, "projector_lr": 3e-5, "lora_rank": 64, "epochs": 1, "workers": 0, "rho_th": 0.7}
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "sampled/length")  # in the progress bar


@dataclass(frozen=True)
class Config:
    """Flags."""

    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    data: str | None = None  # records or pairs; without it the embedded world's, for mixed-dpo and --gamma BDHS pairs
    format: FormatName | None = None  # of the data file; else that of its first record
    images: str = "toy"  # folder of the pictures, or `toy`
    template: str | None = None  # vicuna, llava_v1, mistral, chatml or short; else the model's own
    adapter: str | None = None  # PEFT adapter folder that the policy starts from; its rank and alpha are kept
    reference: Literal["base", "adapter"] | None = None  # with --adapter: what the policy is held against
    out: str = "runs/online"  # folder to write
    method: Literal["online-dpo", "mixed-dpo", "online-bdhs"] = "online-bdhs"  # where the pairs come from
    annotator: str = "oracle"  # `oracle` (embedded world), `self` (the base, adapters off), or a LLaVA folder
    orders: Literal["random", "both"] = "random"  # in which a model sees the two responses
    p: float = 0.5  # Eq. 4: probability of the stored pair
    gamma: float | None = None  # Eq. 5: weight of the stored y-; else the sampled one alone
    loss: Literal["dpo", "ipo", "slic"] = "dpo"  # Eq. 3, Sec. 5.7
    beta: float | None = None  # strength of the pull to the reference (0.1)
    lr: float | None = None  # peak learning rate of the adapters (5e-7; toy: 2e-4)
    projector_lr: float | None = None  # peak learning rate of the projector (2e-6; toy: 3e-5)
    lora_rank: int | None = None  # rank of the adapters (128; toy: 64)
    lora_alpha: float | None = None  # updates are scaled by alpha / rank (twice the rank)
    epochs: int | None = None  # passes over the records (3; toy: 1)
    steps: int | None = None  # optimizer steps, instead of --epochs
    batch_size: int = 16  # records per optimizer step
    accumulate: int = 1  # split each batch into so many forward passes
    warmup: float = 0.1  # share of the steps in which the rate rises
    schedule: Literal["cosine", "linear"] = "cosine"  # how the rate falls to zero after that
    clip: float = 1.0  # gradient norm limit
    temperature: float = 1.0  # of sampling; 0 is greedy
    top_p: float = 1.0  # nucleus sampling
    max_new_tokens: int = 128  # limit of a sampled response, or of a completion; one that hits it is truncated
    rho_th: float | None = None  # Eq. 6, online-bdhs: an image token is hidden with this probability (0.99; toy: 0.7)
    n_bdhs: int = 5  # online-bdhs: iterations at most; the last one is unguided
    eps_s: float = 0.97  # online-bdhs: a response this similar to y+ or more is sampled again
    noise_steps: int = 0  # online-bdhs: diffusion steps of Eq. 9, instead of the mask
    guided: bool = True  # online-bdhs: complete y+'s sentences (Eq. 7)
    encoder: str | None = None  # online-bdhs: sentence-transformers folder; without it a lexical cosine
    max_response_tokens: int = 512  # longer stored responses are refused
    truncate: bool = False  # cut longer responses at their end instead
    limit: int | None = None  # a random subset of so many records, which follows from --seed
    save_every: int = 50  # steps between checkpoints
    seed: int = 0  # everything that is drawn follows from it
    eval_split: Literal["test", "validation"] = "test"  # choices are made on validation; test is looked at last
    eval_images: int = 500  # before and after, where --images is toy; 0 skips both
    resume: bool = False  # continue from --out/checkpoint
    device: str = "cpu"  # torch device
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen weights; adapters and losses are float32
    shard: Literal["none", "full"] = "none"  # under torchrun: a whole model per process, or FSDP2's shards of one
    recompute: bool = False  # keep no activations of the decoder's layers: the backward pass computes them again
    compile: bool = False  # run the decoder's layers compiled in training; the first steps wait a minute for it
    workers: int | None = None  # threads that read and decode pictures ahead (4; toy: 0)
    skip_bad_records: bool = False  # skip and count malformed records instead of stopping


def check(config: Config) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    check_training(config)
    require(0 <= config.p <= 1, f"--p {config.p}: a probability between 0 and 1")
    sample_bdhs.check_sampling(config)
    said = f"--gamma with --method {config.method}: weighs the stored y- of online-bdhs; leave it out"
    require(config.gamma is None or config.method == "online-bdhs", said)
    require(config.data is not None or config.images == "toy", "--data is missing; name a file of records or pairs")


def make_respond(config: Config, model: Llava, tokenizer: Tokenizer, processor: ImageProcessor):
    """Who answers: the policy twice with an annotator behind it, or Algorithm 1."""
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    if config.method == "online-bdhs":
        knobs = {f.name: getattr(config, f.name) for f in fields(BdhsConfig) if f.name != "sampling"}
        similarity = load_similarity(config.encoder, config.device)
        return OwnRejected(Bdhs(model, tokenizer, processor, similarity, BdhsConfig(**knobs, sampling=sampling)))
    if config.annotator == "self":
        both = config.orders == "both"
        annotator = ModelAnnotator(model, tokenizer, processor, both, config.seed, policy_off=True)
    else:
        annotator = load_annotator(config.annotator, config)
    return RankedPairs(model, tokenizer, annotator, sampling, config.seed)


def train(model: Llava, tokenizer: Tokenizer, respond, load: StepLoader, config: Config, out: Path) -> list[dict]:
    """The loop: from the first step, or from the last checkpoint with --resume; returns metrics.jsonl's rows."""
    optimizer = make_optimizer(model, config.lr, config.projector_lr)
    steps = batches_of_run(load.records.numbers, config.batch_size, config.seed, config.epochs, config.steps)
    # Of how many records the stored pair is taken as it is; the weights of what is rejected, the stored one first.
    p = {"online-dpo": 0.0, "mixed-dpo": config.p, "online-bdhs": float(config.gamma == 1)}[config.method]
    both = config.method == "online-bdhs" and config.gamma not in (None, 0, 1)
    weights = torch.tensor([config.gamma, 1 - config.gamma] if both else [1.0], device=config.device)
    run = resume.Run(out, model, optimizer, config.resume)
    mine = [distributed.share(batch) for batch in steps[run.start :]]
    blank, left_out = load.collate.idle(1 + len(weights)).sequences, []
    idle = blank, torch.zeros(1, blank[0].image_features, model.config.vision.hidden_size, device=config.device), [], 0
    with run, closing(load_ahead(mine, load, config.workers)) as loads:
        bar = tqdm(loads, initial=run.start, total=len(steps), desc=config.method, disable=distributed.rank() > 0)
        for step, (parts, bad) in enumerate(bar, start=run.start):
            begin, counts, batches = time.perf_counter(), Counter(), []
            with gathered(model):  # 1. the policy answers, and is judged
                for part in parts:
                    features = features_of(model.encode_images(part.pixels), part.sequences)  # once
                    draws = [random.Random(f"{config.seed} {step} {record.id}").random() for record in part.records]
                    alphas = [draw < p for draw in draws]  # Eq. 4: alpha ~ Bernoulli(p)
                    sampled = [i for i, alpha in enumerate(alphas) if not alpha]
                    answers = dict(zip(sampled, respond(part, sampled, features, step, counts), strict=True))
                    sequences = [answers.get(i, part.sequences[i]) for i in range(len(part))]
                    kept = [i for i, sequence in enumerate(sequences) if sequence is not None]
                    own = [row for row, i in enumerate(kept) if not alphas[i] and config.method != "online-bdhs"]
                    if kept:
                        seen = torch.cat([features[i] for i in kept])
                        batches.append(([sequences[i] for i in kept], seen, own, len(kept)))
            between, pairs = time.perf_counter(), added({"pairs": sum(count for *_, count in batches)})["pairs"]
            metrics: dict[str, float] = {}
            for sequences, features, own, count in distributed.even(batches, idle):  # 2. it learns from that
                tree = build_tree(sequences, tokenizer.image_id, tokenizer.pad_id).to(model.device)
                logps, ref_logps = both_logps(model, tree, features)
                loss, weight = preference_loss(logps, ref_logps, config.loss, config.beta, weights), count / pairs
                (loss * weight).backward()
                found = {"loss": loss.item()} | preference_metrics(logps, ref_logps, config.beta, weights)
                metrics |= {name: metrics.get(name, 0.0) + weight * value for name, value in found.items()}
                counts.update(count_objective(logps[own], ref_logps[own]))
            metrics, counts = added(metrics), Counter(added(counts))
            share = learning_rate(step, len(steps), config.warmup, config.schedule)
            if pairs:
                metrics["grad_norm"] = update(optimizer, share, config.clip, metrics["loss"], f"step {step + 1}")
            seconds = {"time/sampling": between - begin, "time/training": time.perf_counter() - between}
            row = {"step": step + 1, **metrics, **shares(counts), "lr": share * config.lr, "pairs": pairs, **seconds}
            run.add(row, (step + 1) % config.save_every == 0 or step + 1 == len(steps))
            left_out += bad
            bar.set_postfix({name: f"{row[name]:.3f}" for name in SHOWN if name in row})
    left_out = sum(gather(left_out), [])
    if left_out and distributed.rank() == 0:
        tqdm.write(f"{len(left_out)} records left out on the way, the first: {left_out[0]}")
    return run.rows


def toy_data(config: Config, out: Path) -> Path:
    """The embedded world's records; with BDHS pairs of the base where a stored y- is wanted."""
    if config.method == "mixed-dpo" or config.gamma:
        return sample_bdhs.sample_for(config, out)
    records = toyworld.alignment_records(config.limit or TOY_RECORDS)
    distributed.once(lambda: write_json(out / "data.json", records))
    return out / "data.json"


def main(config: Config) -> None:
    """Data, evaluation, training, evaluation, export, report."""
    config = fill(config, TOY if config.model == "toy" else PAPER)
    config = fill(config, {"lora_alpha": 2.0 * config.lora_rank})
    check(config)
    distributed.start(config.device)
    folder, out = resolve_model(config.model), Path(config.out)
    require_outside(out, "the model", folder)
    config = replace(config, **adapter_shape(config))
    resume.require_same_flags(out, config)
    records = open_records(config.data or str(toy_data(config, out)), "--data", config.format, "give records or pairs")
    tokenizer, processor = Tokenizer.from_folder(folder, config.template), ImageProcessor.from_folder(folder)
    positions = read_config(folder).text.max_position_embeddings
    stored = ("rejected",) if config.method == "mixed-dpo" or config.gamma else ()
    limits = config.max_response_tokens, positions, config.truncate
    collate = PairCollator(tokenizer, processor, config.images, *limits, stored, keep_pictures=True)
    records = usable_pairs(records, collate.check, config.limit, config.seed, config.skip_bad_records)
    model = distributed.load(config, lambda device: lora.load_policy(folder, config, device))
    model.language_model.in_training(config.recompute, config.compile)
    announce(folder, model, tokenizer)
    resume.begin(out, config, records, fingerprint(folder, config.adapter))

    respond = make_respond(config, model, tokenizer, processor)
    benchmark = ToyBenchmark(config.eval_split, config.eval_images)
    evaluate = config.images == "toy" and config.eval_images > 0
    counts = {}
    if evaluate:
        with gathered(model), nullcontext() if config.adapter else lora.adapters_off(model):  # fresh ones do nothing
            counts["before"] = benchmark.run(model, tokenizer, processor, "before")
    load = StepLoader(records, collate, config.accumulate, config.skip_bad_records)
    rows = train(model, tokenizer, respond, load, config, out)
    save_weights(model, folder, config, out)
    if evaluate:
        with gathered(model):
            counts["after"] = benchmark.run(model, tokenizer, processor, "after")
    shown = [collate.report_pair(records.parse(number)) for number in records.numbers[:8]] if stored else []
    learned = {"pairs": sum(row["pairs"] for row in rows)}
    distributed.once(lambda: save_results(out, f"minialign: {config.method}", config, shown, rows, counts, learned))
    none = "" if learned["pairs"] else " (nothing was learned: metrics.jsonl says why answers were dropped)"
    print(f"{len(rows)} steps, {learned['pairs']} pairs{none}; "
          f"{out}/adapter (PEFT), {out}/merged (Hugging Face), {out}/report.html")  # fmt: skip


if __name__ == "__main__":
    run_main(lambda: main(parse_config(Config, __doc__)))
