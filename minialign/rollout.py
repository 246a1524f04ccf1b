"""Sequences that hold the current policy's own words: two of its responses, ranked, or y+ and its hallucination.

Two responses to one prompt are two branches of one trunk, sampled from one prefill. What the tower has seen of the
pictures is given to sampling, and to an annotator that is the policy's own base, so that it looks once per step.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minialign.annotator import Comparison, ModelAnnotator, OracleAnnotator
from minialign.bdhs import Bdhs, Example
from minialign.chat import Tokenizer
from minialign.collate import PairBatch
from minialign.generate import Sampling, generate, stable_seed
from minialign.llava import Llava
from minialign.masks import Branch, Sequence

# What is logged of a step's sampling: name -> (what is counted, of what).
LOGGED = {
    "sampled/length": ("tokens", "responses"),
    "sampled/truncated": ("truncated", "responses"),
    "bdhs/iterations": ("iterations", "responses"),
    "annotator/dropped": ("dropped", "judged"),
    "annotator/agreement": ("decided", "asked twice"),  # of both orders
    "annotator/ties": ("tie", "judged"),
    "annotator/unparsable": ("unparsable", "judged"),
    "annotator/first": ("first", "judged"),
    "objective/kl": ("kl", "answers"),
    "objective/entropy": ("entropy", "answers"),
}
Sampled = list[Sequence | None]  # None where there is nothing to learn


def features_of(features: Tensor, sequences: list[Sequence]) -> list[Tensor]:
    """The tower's features (tiles, patches, D) of a batch, picture by picture."""
    return list(features.split([sequence.image_features // features.shape[1] for sequence in sequences]))


def shares(counts: Counter) -> dict[str, float]:
    """What is logged of a step's sampling."""
    return {name: counts[what] / counts[of] for name, (what, of) in LOGGED.items() if what in counts and counts[of]}


@dataclass(frozen=True)
class RankedPairs:
    """Online DPO (Sec. 2.3): two responses to each prompt, of which the annotator prefers one."""

    model: Llava
    tokenizer: Tokenizer
    annotator: OracleAnnotator | ModelAnnotator
    sampling: Sampling
    seed: int

    def __call__(self, part: PairBatch, rows: list[int], features: list[Tensor], step: int, counts: Counter) -> Sampled:
        """The sequences for some rows, y+ first; a pair without a verdict is dropped. `counts` takes down all."""
        if not rows:
            return []
        records, prompts = [part.records[i] for i in rows], [part.sequences[i] for i in rows]
        seen = torch.cat([features[i] for i in rows])
        forked = [replace(prompt, branches=[Branch([]), Branch([])]) for prompt in prompts]
        seeds = [[stable_seed(self.seed, step, record.id, k) for k in range(2)] for record in records]
        stops, pad_id = {self.tokenizer.eos_id}, self.tokenizer.pad_id
        done = generate(self.model, forked, seen, self.sampling, stops, seeds, pad_id)
        texts = [tuple(self.tokenizer.decode(completion.ids) for completion in row) for row in done]
        asked = [Comparison(record, two, part.pictures[i]) for record, two, i in zip(records, texts, rows, strict=True)]
        verdicts = self.annotator.choose(asked, seen if self.annotator.policy_off else None)
        sequences: Sampled = []
        for prompt, row, verdict in zip(prompts, done, verdicts, strict=True):
            counts.update(judged=1, responses=2, tokens=sum(len(completion.ids) for completion in row))
            counts["truncated"] += sum(not completion.stopped for completion in row)
            counts["first"] += bool(verdict.first)
            counts["dropped"] += verdict.better is None
            counts[verdict.reason or "decided"] += 1
            counts["asked twice"] += self.annotator.both_orders and verdict.reason != "unparsable"
            order = () if verdict.better is None else (verdict.better, 1 - verdict.better)
            branches = [Branch(row[i].ids) for i in order]
            sequences.append(replace(prompt, branches=branches) if branches else None)
        return sequences


@dataclass(frozen=True)
class OwnRejected:
    """Online BDHS (Eq. 5, Algorithm 1): the policy's own y~- as one more branch behind those that are stored."""

    bdhs: Bdhs

    def __call__(self, part: PairBatch, rows: list[int], features: list[Tensor], step: int, counts: Counter) -> Sampled:
        """The sequences for some rows; one without a y~- that differs from y+ is dropped."""
        if not rows:
            return []
        examples = [Example(r.id, part.pictures[i], r.turns, r.chosen) for i in rows for r in [part.records[i]]]
        sequences: Sampled = []
        for i, own in zip(rows, self.bdhs.sample(examples, [features[i] for i in rows], step), strict=True):
            ids = self.bdhs.tokenizer.response(own.rejected)
            counts.update(responses=1, tokens=len(ids), truncated=own.truncated, iterations=own.iterations)
            branches = [*part.sequences[i].branches, Branch(ids)]
            useful = own.rejected not in ("", part.records[i].chosen)
            sequences.append(replace(part.sequences[i], branches=branches) if useful else None)
        return sequences
