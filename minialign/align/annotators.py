"""The annotator of online DPO: which of two responses is better?

A model is shown picture, question and both responses, and asked in our own words for what Table 14
asks. Its verdict must begin with `Response 1` or `Response 2`; what does not is dropped and
counted. The paper found no bias of position; the order is random all the same, or both orders are
asked, and a pair on which they differ is a tie. A reward model is not asked: the response with the
higher reward is the better one.

Whatever has `choose`, from comparisons to verdicts, is an annotator.
"""

import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from torch import Tensor

from minialign.data.images import PreparedImage
from minialign.data.records import Record
from minialign.model.lora import adapters_off
from minialign.sampling.assistant import Assistant
from minialign.seeds import stable_seed

INSTRUCTION = """\
Two responses to a question about this image are to be compared. The better one hallucinates less: \
whatever it says must be in the image, every object, attribute, colour and relation as it is \
there. What the image leaves open must not be stated as a fact. To a practical question a short \
and helpful response is better than a long one. All of this must be judged by the image alone.
Question: {question}
Response 1: {first}
Response 2: {second}
Which one is better? Begin with "Response 1" or "Response 2", then give the reason."""
# `Response 1 & Response 2` is no verdict.
VERDICT = re.compile(r"\W*Response ([12])\b(?![*_\s]*(?:(?:and|or)\b|[&/]))")


@dataclass(frozen=True)
class Comparison:
    """Two responses to the prompt of a record, and its picture."""

    record: Record
    responses: tuple[str, str]
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Verdict:
    """Which of two responses is better."""

    better: int | None  # 0 or 1; None: there is no verdict
    reason: Literal["", "tie", "unparsable"] = ""  # why there is none
    first: bool | None = None  # whether the one that was shown first was chosen


@dataclass(frozen=True)
class ModelAnnotator:
    """A LLaVA as the judge; with `adapters_off` it is a policy's own base, its adapters switched
    off.
    """

    assistant: Assistant
    both_orders: bool = False
    seed: int = 0
    adapters_off: bool = False
    max_new_tokens: int = 16  # the verdict comes first

    def choose(
        self,
        comparisons: list[Comparison],
        seen: tuple[list[PreparedImage], Tensor] | None = None,
    ) -> list[Verdict]:
        """A verdict on each. seen: the pictures, and their features (tiles, patches, D), where this
        model's tower has seen them already.
        """
        if not comparisons:
            return []
        if seen is None:
            images = [self.assistant.processor.prepare(each.picture) for each in comparisons]
            features = self.assistant.encode(images)
        else:
            images, features = seen

        # A question that leaves no position for a verdict is not asked.
        orders = [self.orders(comparison) for comparison in comparisons]
        questions, too_long = [], []
        for comparison, image, shown in zip(comparisons, images, orders, strict=True):
            asked = [question(comparison, order) for order in shown]
            left = [self.assistant.positions_left([("user", text)], image) for text in asked]
            too_long.append(min(left) < 1)
            questions.append([""] * len(asked) if too_long[-1] else asked)

        with adapters_off(self.assistant.model) if self.adapters_off else nullcontext():
            answers = self.assistant.answers(features, images, questions, self.max_new_tokens)
        return [
            Verdict(None, "unparsable") if long else verdict_of(replies, shown)
            for replies, shown, long in zip(answers, orders, too_long, strict=True)
        ]

    def orders(self, comparison: Comparison) -> list[tuple[int, int]]:
        """The orders in which the two responses are shown: both, or one at random."""
        if self.both_orders:
            return [(0, 1), (1, 0)]
        seed = stable_seed(self.seed, comparison.record.id, *comparison.responses)
        return [(1, 0) if random.Random(seed).random() < 0.5 else (0, 1)]


def question(comparison: Comparison, order: tuple[int, int]) -> str:
    """What a model is asked; of several turns, all that was said before stands in the question."""
    first, second = (comparison.responses[i] for i in order)
    return INSTRUCTION.format(question=comparison.record.asked, first=first, second=second)


def verdict_of(answers: list[str], orders: list[tuple[int, int]]) -> Verdict:
    """What a model's answers say; where two orders were asked they must agree."""
    found = [VERDICT.match(answer) for answer in answers]
    if not all(found):
        return Verdict(None, "unparsable")
    places = [int(match[1]) - 1 for match in found]
    better = {order[place] for order, place in zip(orders, places, strict=True)}
    if len(better) == 2:
        return Verdict(None, "tie", first=places[0] == 0)
    return Verdict(better.pop(), first=places[0] == 0)


@dataclass(frozen=True)
class RewardAnnotator:
    """The response with the higher reward is the better one; the same text twice is a tie, whatever
    rounding says.
    """

    # Records, pictures and their two responses -> scores (B, 2): a reward model.
    reward: Callable[[list[Record], list[Image.Image], list[tuple[str, ...]]], Tensor]

    def choose(self, comparisons: list[Comparison]) -> list[Verdict]:
        """A verdict on each; the reward model's own tower looks at the pictures."""
        if not comparisons:
            return []
        records = [each.record for each in comparisons]
        pictures = [each.picture for each in comparisons]
        texts = [each.responses for each in comparisons]

        verdicts = []
        scores = self.reward(records, pictures, texts).tolist()
        for (text, other), (score, other_score) in zip(texts, scores, strict=True):
            if text == other or score == other_score:
                verdicts.append(Verdict(None, "tie"))
            else:
                verdicts.append(Verdict(int(other_score > score)))
        return verdicts
