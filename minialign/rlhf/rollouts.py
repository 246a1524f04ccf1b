"""Rollouts of RLHF: k responses of the policy to each prompt, and what the reward says of them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minialign.cli import require, require_outside
from minialign.data.collate import PairBatch, StepLoader
from minialign.model.masks import Branch, TokenTree, build_tree
from minialign.sampling.assistant import Assistant
from minialign.sampling.generate import Sampling, generate
from minialign.seeds import stable_seed
from minialign.training.progress import TrainingLog

# What is logged of a step's sampling: name -> (what is counted, of what).
LOGGED = {
    "sampled/length": ("tokens", "responses"),
    "sampled/truncated": ("truncated", "responses"),
    "objective/scores": ("score", "scored"),
    "objective/rlhf_reward": ("rlhf", "scored"),  # Eq. 2
    "objective/kl": ("kl", "answers"),
    "objective/entropy": ("entropy", "answers"),
}


@dataclass(frozen=True)
class Rollout:
    """k responses to each of B prompts, which are learned from in one forward pass."""

    tree: TokenTree
    features: Tensor  # (tiles, patches, D), of the prompts' pictures
    scores: Tensor  # (B, k)
    count: int  # B; 0: an idle one, which counts for nothing


def sample_rollout(
    assistant: Assistant,
    reward: Callable,
    batch: PairBatch,
    k: int,
    max_new_tokens: int,
    seed: int,
    step: int,
    counts: Counter,
) -> Rollout:
    """k responses to every prompt of a batch, by the policy as it is, and their scores. `counts`
    takes down what is logged.

    Temperature and top-p are 1, since the gradient is that of the plain distribution. What is drawn
    follows from the seed, the step and the record.
    """
    model, tokenizer = assistant.model, assistant.tokenizer
    features = model.encode_images(batch.pixels)
    records = [pair.record for pair in batch.pairs]

    # The responses to one prompt are branches of one trunk.
    prompts = [replace(pair.sequence, branches=[Branch([])] * k) for pair in batch.pairs]
    seeds = [[stable_seed(seed, step, record.id, n) for n in range(k)] for record in records]
    samples = generate(
        model,
        prompts,
        features,
        Sampling(max_new_tokens),
        {tokenizer.eos_id},
        seeds,
        tokenizer.pad_id,
    )

    texts = [tuple(tokenizer.decode(sample.ids) for sample in row) for row in samples]
    scores = reward(records, [pair.picture for pair in batch.pairs], texts)  # (B, k)
    for row in samples:
        counts["responses"] += k
        counts["tokens"] += sum(len(sample.ids) for sample in row)
        counts["truncated"] += sum(not sample.stopped for sample in row)
    counts["scored"] += scores.numel()
    counts["score"] += scores.sum().item()

    sequences = [
        replace(prompt, branches=[Branch(sample.ids) for sample in row])
        for prompt, row in zip(prompts, samples, strict=True)
    ]
    tree = build_tree(sequences, tokenizer.image_id, tokenizer.pad_id).to(model.device)
    return Rollout(tree, features, scores.to(model.device), len(batch))


def idle_rollout(assistant: Assistant, loader: StepLoader, k: int) -> Rollout:
    """One row that counts for nothing, for a process that must go with the others."""
    device = assistant.model.device
    width = assistant.model.config.vision.hidden_size
    features = torch.zeros(1, assistant.processor.patches, width, device=device)
    scores = torch.zeros(1, k, device=device)
    return Rollout(loader.idle(k).tree.to(device), features, scores, 0)


def logged(totals: dict[str, float]) -> dict[str, float]:
    """What is logged of a step's sampling, from the sums over all processes."""
    return {
        name: totals[what] / totals[of]
        for name, (what, of) in LOGGED.items()
        if what in totals and totals.get(of)
    }


def check_rlhf(config) -> None:
    """The flags of RLOO and PPO that make no sense."""
    beta, kl_stop = config.beta, config.kl_stop
    # 0: rewards alone, without a pull to the reference.
    require(0 <= beta <= 1e30, f"--beta {beta}: 0 or more, at most 1e30")
    require(kl_stop is None or kl_stop > 0, f"--kl-stop {kl_stop}: above 0")
    limit = config.max_new_tokens
    require(limit >= 1, f"--max-new-tokens {limit}: at least 1")
    missing = "--data is missing; name a file of records or pairs"
    require(config.data is not None or config.images == "toy", missing)
    choices = "no such folder of a reward model, and no FILE.py:FUNCTION or `oracle`"
    file = config.reward.rpartition(":")[0]
    folder = config.reward != "" and Path(config.reward).is_dir()
    known = config.reward == "oracle" or folder or Path(file).is_file()
    require(known, f"--reward {config.reward}: {choices}; give one of these")
    if folder:
        require_outside(Path(config.out), "--reward", Path(config.reward))


def last_word(log: TrainingLog, out: Path) -> None:
    """How far a run came, what was learned from, and where the scores went."""
    if log.stopped:
        print(f"ended early, {log.stopped}; --resume with another --kl-stop goes on")
    rows, count = log.rows, sum(row["responses"] for row in log.rows)
    message = f"{len(rows)} steps, {count} responses"
    if count:
        first, last = rows[0], rows[-1]
        for name, key in (("score", "objective/scores"), ("KL", "objective/kl")):
            message += f", {name} {first[key]:.2f} -> {last[key]:.2f}"
    else:
        message += " (nothing was learned)"
    print(f"{message}; {out}/adapter (PEFT), {out}/merged (Hugging Face), {out}/report.html")
