"""The embedded world's exact truth, as an annotator and as a reward."""

import random
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minialign.align.annotators import Comparison, Verdict
from minialign.data.records import Record
from minialign.seeds import stable_seed
from minialign.toy.benchmark import count_description
from minialign.toy.world import Scene, scene_of


def truth(scene: Scene, text: str) -> tuple[float, float, float]:
    """How true a text is of a scene, the higher the better: hallucinated objects and wrong
    attributes, which count against it, then the scene's objects that it names.
    """
    counts = count_description(scene, text)
    wrong_attributes = counts["wrong_colour"] + counts["wrong_place"]
    return -counts["hallucinated"], -wrong_attributes, counts["found"]


@dataclass(frozen=True)
class OracleAnnotator:
    """Fewer hallucinated objects, then fewer wrong attributes, then more recall.

    errs: the share of verdicts that are turned round, as those of models are wrong; ties stay.
    """

    errs: float = 0.0

    def choose(self, comparisons: list[Comparison]) -> list[Verdict]:
        """A verdict on each; responses that are equally true are a tie. Which ones are turned round
        follows from record and responses.
        """
        verdicts = []
        for comparison in comparisons:
            scene = scene_of(comparison.record.image)
            first, second = (truth(scene, text) for text in comparison.responses)
            rng = random.Random(stable_seed("errs", comparison.record.id, *comparison.responses))
            wrong = rng.random() < self.errs
            tie = Verdict(None, "tie")
            verdicts.append(tie if first == second else Verdict(int((second > first) != wrong)))
        return verdicts


def oracle_reward(
    records: list[Record], pictures: list[Image.Image], texts: list[tuple[str, ...]]
) -> Tensor:
    """Scores (B, k) of k texts for each record, in objects: those named that are there, less those
    that are not and wrong attributes.

    So an object is worth naming from one chance in two on, and silence is worth nothing.
    """
    scores = []
    for record, responses in zip(records, texts, strict=True):
        scene = scene_of(record.image)
        scores.append([float(sum(truth(scene, text))) for text in responses])
    return torch.tensor(scores)
