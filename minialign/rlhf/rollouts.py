"""Rollouts of RLHF: k responses of the policy to each prompt, and what the reward says of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minialign.data.collate import PairBatch, StepLoader
from minialign.data.records import Record
from minialign.model.masks import Branch, TokenTree, build_tree
from minialign.sampling.assistant import Assistant
from minialign.sampling.generate import Sampling, generate
from minialign.seeds import stable_seed
from minialign.training.outputs import example


@dataclass(frozen=True)
class Rollout:
    """k responses to each of B prompts, which are learned from in one forward pass."""

    tree: TokenTree
    features: Tensor  # (tiles, patches, D), of the prompts' pictures
    scores: Tensor  # (B, k)
    prompts: int  # B; 0: an idle one, which counts for nothing
    # Of the prompts, and the responses to each: for the log.
    records: Sequence[Record] = ()
    texts: Sequence[tuple[str, ...]] = ()

    def example(self, **figures: Tensor) -> dict:
        """The responses to a prompt, if there is one whose scores differ, each with its figures:
        (B, k) of every name.
        """
        differ = (self.scores != self.scores[:, :1]).any(1)
        row = int(differ.int().argmax())
        answers = []
        for n, text in enumerate(self.texts[row]):
            note = ", ".join(f"{name} {each[row, n]:.2f}" for name, each in figures.items())
            answers.append((note, text))
        return example(self.records[row], answers)


def sample_rollout(
    assistant: Assistant, reward: Callable, batch: PairBatch, config, step: int, sums: Counter
) -> Rollout:
    """k responses to every prompt of a batch, by the policy as it is, and their scores.

    config: has k, max_new_tokens and seed. What is drawn follows from the seed, the step and the
    record; temperature and top-p are 1, since the gradient is that of the plain distribution.
    sums: takes down, summed over responses, what is logged of them.
    """
    model, tokenizer = assistant.model, assistant.tokenizer
    features = model.encode_images(batch.pixels)
    records = [pair.record for pair in batch.pairs]

    # The responses to one prompt are branches of one trunk.
    prompts = [replace(pair.sequence, branches=[Branch([])] * config.k) for pair in batch.pairs]
    seeds = []
    for record in records:
        seeds.append([stable_seed(config.seed, step, record.id, n) for n in range(config.k)])
    sampling = Sampling(config.max_new_tokens)
    stops = {tokenizer.eos_id}
    samples = generate(model, prompts, features, sampling, stops, seeds, tokenizer.pad_id)

    texts = [tuple(tokenizer.decode(sample.ids) for sample in row) for row in samples]
    scores = reward(records, [pair.picture for pair in batch.pairs], texts)  # (B, k)
    sums["objective/scores"] += scores.sum().item()
    for row in samples:
        sums["sampled/length"] += sum(len(sample.ids) for sample in row)
        sums["sampled/truncated"] += sum(not sample.stopped for sample in row)

    sequences = []
    for prompt, row in zip(prompts, samples, strict=True):
        sequences.append(replace(prompt, branches=[Branch(sample.ids) for sample in row]))
    tree = build_tree(sequences, tokenizer.image_id, tokenizer.pad_id).to(model.device)
    scores = scores.to(model.device)
    return Rollout(tree, features, scores, len(batch), records, texts)


def idle_rollout(assistant: Assistant, loader: StepLoader, k: int) -> Rollout:
    """One row that counts for nothing, for a process that must go with the others."""
    device = assistant.model.device
    scores = torch.zeros(1, k, device=device)
    tree = loader.idle(k).tree.to(device)
    return Rollout(tree, assistant.no_features(), scores, prompts=0)
