"""The annotator of online DPO: which of two responses is better?

A model is shown picture, question and both responses, and asked, in our words, what Table 14 asks.
verdicts.py has what becomes of that, by log-probs or by what the model says; claims.py asks about
one claim of a response at a time instead. The paper found no bias of position; the order is random
all the same, or both orders are asked, and a pair on which they differ is a tie. A reward model is
not asked: the response with the higher reward is the better one.

Whatever has `choose`, from comparisons to verdicts, is an annotator. Of a model in shards all
processes ask together and equally often: one that has nothing to compare calls `choose([])`.
"""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from minialign.align.claims import Claim, claims_of, denied_claims
from minialign.align.verdicts import NAMES, leads_by_logprobs, leads_in_words
from minialign.data.images import PreparedImage
from minialign.data.records import Record
from minialign.model.lora import adapters_off
from minialign.rlhf.scorers import RewardModel
from minialign.sampling.assistant import Assistant
from minialign.seeds import stable_seed
from minialign.training import parallel

INSTRUCTION = """\
Two responses to a question about this image are to be compared. The better one hallucinates less: \
whatever it says must be in the image, every object, attribute, colour and relation as it is \
there. What the image leaves open must not be stated as a fact. To a practical question a short \
and helpful response is better than a long one. All of this must be judged by the image alone.
Question: {question}
Response 1: {first}
Response 2: {second}
Which one is better? Begin with "Response 1" or "Response 2", then give the reason."""


@dataclass(frozen=True)
class Comparison:
    """Two responses to the prompt of a record, and its picture.

    seen  the picture and its features (tiles, patches, D), where the annotator is a model whose
          tower has seen it already
    """

    record: Record
    responses: tuple[str, str]
    picture: Image.Image | None = None
    seen: tuple[PreparedImage, Tensor] | None = None


@dataclass(frozen=True)
class Verdict:
    """Which of two responses is better."""

    better: int | None  # 0 or 1; None: neither
    # Why neither. No verdict: the answer was not understood, or the question leaves no room for
    # one.
    reason: Literal["", "tie", "no verdict"] = ""
    # whether the response that was shown first won, in the first order that was asked; None where
    # no order was shown
    first: bool | None = None


@dataclass(frozen=True)
class ModelAnnotator:
    """A LLaVA as the judge; with `adapters_off` it is a policy's own base, its adapters switched
    off.
    """

    assistant: Assistant
    verdict: Literal["logprobs", "generated", "claims"] = "logprobs"
    both_orders: bool = False
    seed: int = 0
    adapters_off: bool = False
    # A question and a response -> the claims that are asked about one by one.
    claims_of: Callable[[str, str], list[Claim]] = claims_of

    @torch.no_grad()
    def choose(self, comparisons: list[Comparison]) -> list[Verdict]:
        """A verdict on each; the same text twice is a tie."""
        if not comparisons and not parallel.units(self.assistant.model):
            return []
        asked = comparisons or [self.idle()]
        if asked[0].seen is None:
            images = [self.assistant.processor.prepare(each.picture) for each in asked]
            features = self.assistant.encode(images)
        else:
            images = [each.seen[0] for each in asked]
            features = torch.cat([each.seen[1] for each in asked])

        with adapters_off(self.assistant.model) if self.adapters_off else nullcontext():
            if self.verdict == "claims":
                verdicts = self.by_claims(asked, images, features)
            else:
                verdicts = self.side_by_side(asked, images, features)
        for number, (text, other) in enumerate(each.responses for each in comparisons):
            if text == other:
                verdicts[number] = Verdict(None, "tie")
        return verdicts[: len(comparisons)]

    def side_by_side(
        self, comparisons: list[Comparison], images: list[PreparedImage], features: Tensor
    ) -> list[Verdict]:
        """Both responses in one question, in one order or in both."""
        room = max(len(self.assistant.tokenizer.answer(name)) for name in NAMES)
        orders = [self.orders(comparison) for comparison in comparisons]
        questions, fit = [], []
        for comparison, image, shown in zip(comparisons, images, orders, strict=True):
            asked = [question(comparison, order) for order in shown]
            left = [self.assistant.positions_left([("user", text)], image) for text in asked]
            fit.append(min(left) >= room)
            questions.append(asked if fit[-1] else [""] * len(asked))

        ask = leads_by_logprobs if self.verdict == "logprobs" else leads_in_words
        leads = ask(self.assistant, images, features, questions)
        return [
            verdict_of(row, shown) if fits else Verdict(None, "no verdict")
            for row, shown, fits in zip(leads, orders, fit, strict=True)
        ]

    def by_claims(
        self, comparisons: list[Comparison], images: list[PreparedImage], features: Tensor
    ) -> list[Verdict]:
        """The response of which fewer claims are denied, so that one that claims nothing is never
        worse. A claim that both make is asked about once.
        """
        claims, asked = [], []
        for each in comparisons:
            two = [self.claims_of(each.record.asked, text) for text in each.responses]
            claims.append(two)
            asked.append(list(dict.fromkeys(two[0] + two[1])))

        verdicts = []
        found = denied_claims(self.assistant, images, features, asked)
        for two, denied in zip(claims, found, strict=True):
            if denied is None:
                verdicts.append(Verdict(None, "no verdict"))
                continue
            first, second = (sum(claim in denied for claim in made) for made in two)
            verdicts.append(better_of(-first, -second))
        return verdicts

    def orders(self, comparison: Comparison) -> list[tuple[int, int]]:
        """The orders in which the two responses are shown: both, or one at random."""
        if self.both_orders:
            return [(0, 1), (1, 0)]
        seed = stable_seed(self.seed, comparison.record.id, *comparison.responses)
        return [(1, 0) if random.Random(seed).random() < 0.5 else (0, 1)]

    def idle(self) -> Comparison:
        """A comparison that counts for nothing; a policy's own tower has seen its picture, too."""
        comparison = idle_comparison()
        if not self.adapters_off:
            return comparison
        image = self.assistant.processor.prepare(comparison.picture)
        features = self.assistant.no_features().expand(len(image.pixels), -1, -1)
        return replace(comparison, seen=(image, features))


def question(comparison: Comparison, order: tuple[int, int]) -> str:
    """What a model is asked; of several turns, all that was said before stands in the question."""
    first, second = (comparison.responses[i] for i in order)
    return INSTRUCTION.format(question=comparison.record.asked, first=first, second=second)


def verdict_of(leads: list[float | None], orders: list[tuple[int, int]]) -> Verdict:
    """The verdict of one lead per order; two orders must agree."""
    if None in leads:
        return Verdict(None, "no verdict")
    if 0 in leads:
        return Verdict(None, "tie")
    places = [int(lead < 0) for lead in leads]
    better = {order[place] for order, place in zip(orders, places, strict=True)}
    if len(better) == 2:
        return Verdict(None, "tie", first=places[0] == 0)
    return Verdict(better.pop(), first=places[0] == 0)


def better_of(first: float, second: float) -> Verdict:
    """The response with the higher score."""
    return Verdict(None, "tie") if first == second else Verdict(int(second > first))


def idle_comparison() -> Comparison:
    """What a process compares that goes with the others: two empty responses."""
    record = Record("idle", "", [("user", "")], "", "")
    return Comparison(record, ("", ""), Image.new("RGB", (64, 64)))


@dataclass(frozen=True)
class RewardAnnotator:
    """The response with the higher reward is the better one; the same text twice is a tie, whatever
    rounding says.
    """

    reward: RewardModel

    def choose(self, comparisons: list[Comparison]) -> list[Verdict]:
        """A verdict on each; the reward model's own tower looks at the pictures."""
        if not comparisons and not parallel.units(self.reward.assistant.model):
            return []
        asked = comparisons or [idle_comparison()]
        records = [each.record for each in asked]
        pictures = [each.picture for each in asked]
        texts = [each.responses for each in asked]

        verdicts = []
        scores = self.reward(records, pictures, texts).tolist()
        for (text, other), (score, other_score) in zip(texts, scores, strict=True):
            same = text == other
            verdicts.append(Verdict(None, "tie") if same else better_of(score, other_score))
        return verdicts[: len(comparisons)]
