"""A scripted judge in a model's place, and what may be asked of it."""

from collections.abc import Callable

from minialign.sampling.assistant import Assistant
from minialign.toy import world
from minialign.toy.drawing import OBJECTS


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
