"""The policy answers: two responses that are ranked, k that are scored, or y+ and its own
hallucination beside it.

The responses to one prompt are branches of one trunk, sampled from one prefill. What the tower has
seen of the pictures is given to sampling, and to an annotator that is the policy's own base, so
that it looks once per step."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minialign.annotator import Comparison, ModelAnnotator, OracleAnnotator, Verdict
from minialign.bdhs import Bdhs, Example
from minialign.chat import Tokenizer
from minialign.collate import PairBatch, PairCollator
from minialign.generate import Completion, Sampling, generate, stable_seed
from minialign.llava import Llava
from minialign.masks import Branch, Sequence, TokenTree

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
    "objective/scores": ("score", "scored"),
    "objective/rlhf_reward": ("rlhf", "scored"),
    "objective/kl": ("kl", "answers"),
    "objective/entropy": ("entropy", "answers"),
}


@dataclass(frozen=True)
class Answer:
    """A sequence that holds the policy's own words, and of k responses their scores r(x, y)."""

    sequence: Sequence
    scores: tuple[float, ...] = ()


Answers = list[Answer | None]  # None where there is nothing to learn


@dataclass(frozen=True)
class Rollout:
    """Answers that are learned from in one forward pass."""

    tree: TokenTree
    features: Tensor  # of their pictures, by the tower
    scores: Tensor  # (B, k), of the responses
    own: list[int]  # rows in which every response is the policy's own
    count: int  # rows; 0: an idle one, which counts for nothing


def features_of(features: Tensor, sequences: list[Sequence]) -> list[Tensor]:
    """The tower's features (tiles, patches, D) of a batch, picture by picture."""
    return list(
        features.split([sequence.image_features // features.shape[1] for sequence in sequences])
    )


def shares(counts: Counter) -> dict[str, float]:
    """What is logged of a step's sampling."""
    return {
        name: counts[what] / counts[of]
        for name, (what, of) in LOGGED.items()
        if what in counts and counts[of]
    }


def rollout_of(
    model: Llava,
    collate: PairCollator,
    answers: Answers,
    features: list[Tensor],
    own: Collection[int],
) -> list[Rollout]:
    """The answers of a part of a step as one rollout; none where nothing is left. `own` as in it,
    before some go."""
    kept = [i for i, answer in enumerate(answers) if answer is not None]
    if not kept:
        return []
    tree = collate.tree([answers[i].sequence for i in kept]).to(model.device)
    scores = torch.tensor([answers[i].scores for i in kept], device=model.device)
    seen = torch.cat([features[i] for i in kept])
    return [Rollout(tree, seen, scores, [row for row, i in enumerate(kept) if i in own], len(kept))]


def idle_rollout(model: Llava, collate: PairCollator, branches: int) -> Rollout:
    """One row that counts for nothing, for a process that must go with the others."""
    [sequence] = collate.idle(branches).sequences
    features = torch.zeros(
        1, sequence.image_features, model.config.vision.hidden_size, device=model.device
    )
    scores = torch.zeros(1, branches, device=model.device)
    return Rollout(collate.tree([sequence]).to(model.device), features, scores, [], 0)


@dataclass(frozen=True)
class Sampler:
    """k responses to each prompt from the current policy. Their draws follow from the seed, the
    step and the record."""

    model: Llava
    tokenizer: Tokenizer
    sampling: Sampling
    seed: int

    def __call__(
        self, part: PairBatch, rows: list[int], seen: Tensor, step: int, k: int, counts: Counter
    ) -> tuple[list[list[Completion]], list[tuple[str, ...]]]:
        """The completions [row][response] and their texts; `seen` are the tower's features of these
        rows' pictures."""
        forked = [replace(part.sequences[i], branches=[Branch([]) for _ in range(k)]) for i in rows]
        seeds = [
            [stable_seed(self.seed, step, part.records[i].id, n) for n in range(k)] for i in rows
        ]
        stops, pad_id = {self.tokenizer.eos_id}, self.tokenizer.pad_id
        done = generate(self.model, forked, seen, self.sampling, stops, seeds, pad_id)
        for row in done:
            counts.update(responses=k, tokens=sum(len(completion.ids) for completion in row))
            counts["truncated"] += sum(not completion.stopped for completion in row)
        return done, [
            tuple(self.tokenizer.decode(completion.ids) for completion in row) for row in done
        ]


@dataclass(frozen=True)
class RankedPairs:
    """Online DPO (Sec. 2.3): two responses to each prompt, of which the annotator prefers one."""

    sample: Sampler
    annotator: OracleAnnotator | ModelAnnotator

    def __call__(
        self, part: PairBatch, rows: list[int], features: list[Tensor], step: int, counts: Counter
    ) -> Answers:
        """The sequences for some rows, y+ first; a pair without a verdict is dropped. `counts`
        takes down all."""
        if not rows:
            return []
        seen = torch.cat([features[i] for i in rows])
        done, texts = self.sample(part, rows, seen, step, 2, counts)
        asked = [
            Comparison(part.records[i], two, part.pictures[i])
            for i, two in zip(rows, texts, strict=True)
        ]
        verdicts = self.annotator.choose(asked, seen if self.annotator.policy_off else None)
        verdicts = [
            Verdict(None, "tie") if a == b else v for v, (a, b) in zip(verdicts, texts, strict=True)
        ]
        answers: Answers = []
        for i, row, verdict in zip(rows, done, verdicts, strict=True):
            counts.update(judged=1)
            counts["first"] += bool(verdict.first)
            counts["dropped"] += verdict.better is None
            counts[verdict.reason or "decided"] += 1
            counts["asked twice"] += self.annotator.both_orders and verdict.reason != "unparsable"
            order = () if verdict.better is None else (verdict.better, 1 - verdict.better)
            branches = [Branch(row[n].ids) for n in order]
            answers.append(
                Answer(replace(part.sequences[i], branches=branches)) if branches else None
            )
        return answers


@dataclass(frozen=True)
class Scored:
    """RLOO and PPO (Sec. 5.5): k responses to each prompt, and what the reward says of them."""

    sample: Sampler
    reward: Callable  # see scoring.py
    k: int

    def __call__(
        self, part: PairBatch, rows: list[int], features: list[Tensor], step: int, counts: Counter
    ) -> Answers:
        """The sequences for some rows, with their scores."""
        if not rows:
            return []
        seen = torch.cat([features[i] for i in rows])
        done, texts = self.sample(part, rows, seen, step, self.k, counts)
        records, pictures = [part.records[i] for i in rows], [part.pictures[i] for i in rows]
        scores = self.reward(records, pictures, texts)
        counts.update(scored=scores.numel(), score=scores.sum().item())
        answers: Answers = []
        for i, row, each in zip(rows, done, scores.tolist(), strict=True):
            branches = [Branch(completion.ids) for completion in row]
            answers.append(Answer(replace(part.sequences[i], branches=branches), tuple(each)))
        return answers


@dataclass(frozen=True)
class OwnRejected:
    """Online BDHS (Eq. 5, Algorithm 1): the policy's own y~- as one more branch behind those that
    are stored."""

    bdhs: Bdhs

    def __call__(
        self, part: PairBatch, rows: list[int], features: list[Tensor], step: int, counts: Counter
    ) -> Answers:
        """The sequences for some rows; one without a y~- that differs from y+ is dropped."""
        if not rows:
            return []
        examples = [
            Example(r.id, part.pictures[i], r.turns, r.chosen)
            for i in rows
            for r in [part.records[i]]
        ]
        answers: Answers = []
        for i, own in zip(
            rows, self.bdhs.sample(examples, [features[i] for i in rows], step), strict=True
        ):
            ids = self.bdhs.tokenizer.response(own.rejected)
            counts.update(
                responses=1, tokens=len(ids), truncated=own.truncated, iterations=own.iterations
            )
            branches = [*part.sequences[i].branches, Branch(ids)]
            useful = own.rejected not in ("", part.records[i].chosen)
            answers.append(
                Answer(replace(part.sequences[i], branches=branches)) if useful else None
            )
        return answers
