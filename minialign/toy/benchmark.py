"""The embedded world's benchmark: descriptions and answers, counted against exact ground truth.

Direct questions are those of training conversations, which no pair of the alignment split asks:
what is in a cell, a colour, a place, a number, the setting; an answer is right word for word.
POPE's questions ask for three objects that are there and three that are not: random, popular
(frequent in the training split) or adversarial (typical of the setting; where fewer than three of
its four objects are missing, others fill up).
"""

import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Literal

from tqdm import tqdm

from minialign.evaluation.metrics import (
    SETTINGS_OF_POPE,
    Counts,
    pope_verdict,
)
from minialign.evaluation.report import Answer, Evaluation
from minialign.sampling.assistant import Assistant
from minialign.sampling.bdhs import split_sentences
from minialign.toy.drawing import COLOURS, OBJECTS, SETTINGS
from minialign.toy.world import (
    CELLS,
    DESCRIBE,
    EXISTS,
    POSITIONS,
    Scene,
    attributes,
    make_scene,
    picture,
    with_article,
)
from minialign.training.parallel import gather, rank, shard_batch, unsharded

SHOWN = 6  # answers that are kept to be read
MENTION = re.compile(rf"\b({'|'.join(OBJECTS)})\b(?: is ({'|'.join(COLOURS)})\b)?")
SETTING = re.compile(rf"\bThis is a ({'|'.join(SETTINGS)})\b")
POSITION = re.compile(rf"\b({'|'.join(POSITIONS.values())})\b")

# `there is no cup`, `no red cup`: mentions none.
DENIED = re.compile(rf"\bno (?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(OBJECTS)})\b", re.IGNORECASE)


@cache
def popular_objects() -> tuple[str, ...]:
    """The objects in order of their frequency in the first 2,000 training scenes."""
    counts = Counter(name for i in range(2000) for name in make_scene("train", i).objects)
    return tuple(name for name, _ in counts.most_common())


def pope_questions(scene: Scene) -> dict[str, list[str]]:
    """Up to three present objects, and as many absent ones for each of POPE's three settings."""
    rng = random.Random(scene.seed + 3)
    absent = [o for o in OBJECTS if o not in scene.objects]
    typical = [o for o in absent if o in SETTINGS[scene.setting]]
    others = [o for o in absent if o not in typical]
    present = rng.sample(list(scene.objects), min(3, len(scene.objects)))
    n = len(present)
    adversarial = rng.sample(typical, len(typical)) + rng.sample(others, len(others))
    popular = [o for o in popular_objects() if o in absent]
    return {
        "present": present,
        "random": rng.sample(absent, n),
        "popular": popular[:n],
        "adversarial": adversarial[:n],
    }


def direct_questions(scene: Scene) -> dict[str, tuple[str, str]]:
    """One question of each kind and its true answer, about the first of the cells, in a random
    order, whose object is there once: of it most can be asked.
    """
    cells = random.Random(scene.seed + 5).sample(CELLS, len(CELLS))
    return max((attributes(scene, cell) for cell in cells), key=len)


def count_description(scene: Scene, text: str) -> Counts:
    """What one description says, against what is there; what is denied is not said to be there."""
    counts = Counter({"images": 1, "length": len(text.split()), "objects": len(scene.objects)})
    text = DENIED.sub("", text)
    for sentence in re.split(r"(?<=\.)\s", text):
        place = POSITION.search(sentence)
        for name, colour in MENTION.findall(sentence):
            counts["mentioned"] += 1
            if name not in scene.objects:
                counts["hallucinated"] += 1
                counts["typical"] += name in SETTINGS[scene.setting]
                continue
            places = scene.objects[name]  # {position: colour}
            here = places.get(place[1]) if place else None
            counts["true"] += 1
            counts["placed"] += bool(place)
            counts["coloured"] += bool(colour)
            counts["wrong_place"] += bool(place) and here is None
            right = [here] if here else places.values()
            counts["wrong_colour"] += bool(colour) and colour not in right
    named = SETTING.findall(text)
    counts["settings"] = len(named)
    counts["wrong_setting"] = sum(name != scene.setting for name in named)
    counts["hallucinating"] = counts["hallucinated"] > 0
    counts["found"] = sum(bool(re.search(rf"\b{name}\b", text)) for name in scene.objects)
    return counts


def false_words(scene: Scene, text: str) -> list[tuple[int, int]]:
    """Where the words are that are not true of the scene, as `count_description` counts them:
    objects that are not there, or not at the place that is named, colours, and the setting. What is
    denied is not said to be there.
    """
    text = DENIED.sub(lambda denied: " " * len(denied[0]), text)
    wrong = [match.span(1) for match in SETTING.finditer(text) if match[1] != scene.setting]
    for start, end in split_sentences(text):
        place = POSITION.search(text, start, end)
        for found in MENTION.finditer(text, start, end):
            places = scene.objects.get(found[1], {})
            here = places.get(place[1]) if place else None
            if not places or (place and here is None):
                wrong.append(found.span(1))
            if places and found[2] and found[2] not in ([here] if here else places.values()):
                wrong.append(found.span(2))
    return wrong


def count_pope(questions: dict[str, list[str]], answers: dict[tuple[str, str], str]) -> Counts:
    """True and false yeses and noes of one image, for each of POPE's settings."""
    yes = {key: pope_verdict(answer) for key, answer in answers.items()}
    present = questions["present"]
    tp = sum(yes["present", name] for name in present)
    counts: Counts = {}
    for setting in SETTINGS_OF_POPE:
        absent = questions[setting]
        fp = sum(yes[setting, name] for name in absent)
        counts |= {f"{setting}_tp": tp, f"{setting}_fn": len(present) - tp}
        counts |= {f"{setting}_fp": fp, f"{setting}_tn": len(absent) - fp}
    return counts


def count_direct(questions: dict[str, tuple[str, str]], answers: dict[str, str]) -> Counts:
    """Which direct questions about one image are answered right."""
    counts = Counter()
    for kind, (_, truth) in questions.items():
        counts[f"asked_{kind}"] += 1
        counts[f"right_{kind}"] += answers[kind] == truth
    return counts


@dataclass(frozen=True)
class ToyBenchmark:
    """The embedded world's test or validation images, described and questioned."""

    split: Literal["test", "validation"] = "test"
    images: int = 500
    batch_size: int = 50

    def run(self, assistant: Assistant, title: str = "evaluate") -> Evaluation:
        """Greedy answers for every image, counted against its scene; `with_intervals` makes figures
        of the counts. Of a model in shards every process holds the whole meanwhile.
        """
        found: dict[int, list[tuple[Counts, str]]] = {}  # by the first image of a batch
        firsts = shard_batch([*range(0, self.images, self.batch_size)])
        with unsharded(assistant.model):
            for first in tqdm(firsts, desc=title, leave=False, disable=rank() > 0):
                last = min(first + self.batch_size, self.images)
                scenes = [make_scene(self.split, index) for index in range(first, last)]
                found[first] = self.count_batch(assistant, scenes)
        batches = {first: batch for each in gather(found) for first, batch in each.items()}
        images = [each for first in sorted(batches) for each in batches[first]]

        answers = []
        for index, (_, text) in enumerate(images[:SHOWN]):
            scene = make_scene(self.split, index)
            answers.append(Answer(picture(scene), DESCRIBE[0], text, false_words(scene, text)))
        return Evaluation([counts for counts, _ in images], answers)

    def count_batch(self, assistant: Assistant, scenes: list[Scene]) -> list[tuple[Counts, str]]:
        """A description of each scene, the answers to POPE's and to direct questions, counted, and
        the description itself.
        """
        images = [assistant.processor.prepare(picture(scene)) for scene in scenes]
        features = assistant.encode(images)
        described = [[DESCRIBE[0]] for _ in scenes]
        texts = assistant.answers(features, images, described, max_new_tokens=128)

        objects = [pope_questions(scene) for scene in scenes]  # by what they are asked for
        keys = [[(kind, name) for kind, names in q.items() for name in names] for q in objects]
        direct = [direct_questions(scene) for scene in scenes]
        asked = []
        for i in range(len(scenes)):
            pope = [EXISTS[1].format(with_article(name)) for _, name in keys[i]]
            asked.append(pope + [question for question, _ in direct[i].values()])
        replies = assistant.answers(features, images, asked, max_new_tokens=16)

        found = []
        for i, scene in enumerate(scenes):
            pope, rest = replies[i][: len(keys[i])], replies[i][len(keys[i]) :]
            counts = {
                **count_description(scene, texts[i][0]),
                **count_pope(objects[i], dict(zip(keys[i], pope, strict=True))),
                **count_direct(direct[i], dict(zip(direct[i], rest, strict=True))),
            }
            found.append((counts, texts[i][0]))
        return found
