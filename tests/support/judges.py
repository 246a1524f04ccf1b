"""A scripted judge in a model's place, what may be asked of it, and a real one in shards.

Run as a program, with a model's folder and a way to give verdicts, this file is one of several
processes that judge together.
"""

import json
import sys
import zlib
from argparse import Namespace
from collections.abc import Callable
from unittest import mock

from minialign import edge
from minialign.align import verdicts
from minialign.align.annotators import Comparison
from minialign.data.records import Record
from minialign.sampling.assistant import Assistant
from minialign.toy import world
from minialign.toy.drawing import OBJECTS
from minialign.training import parallel


def absent_objects(scene: world.Scene) -> list[str]:
    """What may be hallucinated of a scene."""
    return [name for name in OBJECTS if name not in scene.objects]


def script(monkeypatch, say: Callable[[str, int], str]) -> list[list[str]]:
    """Every assistant says what `say(question, number of the question)` gives; returns the
    questions asked so far.
    """
    asked: list[list[str]] = []

    def answers(assistant, features, images, questions, limit):
        assert len(images) == len(questions) and limit == 64
        asked.extend(questions)
        return [[say(question, number) for number, question in enumerate(row)] for row in questions]

    monkeypatch.setattr(Assistant, "answers", answers)
    return asked


def shown(question: str) -> tuple[str, str]:
    """The responses as they stand in a question."""
    return tuple(question.split(f"Response {n}: ")[1].split("\n")[0] for n in (1, 2))


# ---------------------------------------------------------------- in shards


def descriptions(count: int) -> list[Comparison]:
    """Two descriptions of each of some scenes, one of them another scene's."""
    comparisons = []
    for index in range(count):
        name = world.image_name("validation", index)
        record = Record(f"id-{index}", name, [("user", "What do you see?")], "", "")
        texts = []
        for other in (index, index + 1) if index % 2 else (index + 1, index):
            cells = world.make_scene("validation", other).cells.items()
            texts.append(" ".join(world.SENTENCE.format(world.POSITIONS[c], *o) for c, o in cells))
        comparisons.append(Comparison(record, tuple(texts), world.open_picture(name)))
    return comparisons


def judged(folder: str, verdict: str, shard: bool, count: int = 3) -> tuple[list, list[float]]:
    """What a folder's model says of `descriptions`, one after another, dealt out to all processes,
    and which share of its numbers each process held at first.

    In words the toy says nothing that could be understood: any words count as one of the two.
    """
    config = Namespace(images="toy", template=None, verdict=verdict, orders="random", seed=0)
    config.device, config.dtype = "cpu", "float32"
    annotator = edge.annotator_of(folder, config, shard)
    assistant = getattr(annotator, "assistant", None) or annotator.reward.assistant
    held = [getattr(p, "to_local", lambda p=p: p)() for p in assistant.model.parameters()]
    share = sum(p.numel() for p in held) / sum(p.numel() for p in assistant.model.parameters())

    calls = [[each] for each in parallel.shard_batch(descriptions(count))]
    with mock.patch.object(verdicts, "lead_of", lambda text: zlib.crc32(text.encode()) % 3 - 1):
        found = [annotator.choose(each) for each in parallel.even(calls, [])]
    said = [[(v.better, v.reason, v.first) for v in each] for each in found]
    return parallel.gather(said), parallel.gather(share)


def main(folder: str, verdict: str) -> None:
    """Judge as one of several processes; the first one prints it."""
    parallel.start("cpu")
    print(json.dumps(judged(folder, verdict, shard=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
