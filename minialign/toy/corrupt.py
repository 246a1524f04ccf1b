"""Rule-corrupted preference pairs of the embedded world: what an outsider makes who knows y+ and
the usual mistakes.

    python -m minialign.toy --corrupted pairs.jsonl

POVID had GPT-4V put errors into true answers; here rules do it. In a description one or two words
are changed, an object for one that is typical of the setting and absent, a colour or a place for
one that the object does not have; a yes or no is turned round. So y- is as long as y+, and wrong
where it differs: only where y+ is hearsay about an object and says Yes or No of it wrongly, y- is
right. No alignment answer says a number, so no rule changes one. An example's pair depends on
the seed and its id alone.
"""

import random
import re

from minialign.data.records import Record, preference_fields
from minialign.toy.drawing import COLOURS, OBJECTS, SETTINGS
from minialign.toy.world import POSITIONS, SENTENCE, Scene, scene_of, yes_or_no

WORDS = {"place": tuple(POSITIONS.values()), "object": OBJECTS, "colour": tuple(COLOURS)}
SAID = re.compile(
    SENTENCE.format(*(rf"(?P<{kind}>{'|'.join(words)})" for kind, words in WORDS.items()))
)


def wrong_words(scene: Scene, kind: str, said: re.Match) -> list[str]:
    """What a sentence could say instead of its place, object or colour, and be wrong of this
    scene."""
    there = scene.objects.get(said["object"], {})  # {position: colour}
    pool, true = {
        "place": (WORDS["place"], there.keys()),
        "object": (SETTINGS[scene.setting], scene.objects.keys()),
        "colour": (WORDS["colour"], there.values()),
    }[kind]
    return [word for word in pool if word not in true and word != said[kind]]


def corrupted(scene: Scene, answer: str, rng: random.Random) -> str:
    """An answer with one or two errors in it, or turned round where it is a yes or no."""
    if answer.startswith(("Yes,", "No,")):
        return yes_or_no(answer.rstrip(".").split()[-1], there=answer.startswith("No,"))
    found = [
        (said.span(kind), wrong_words(scene, kind, said))
        for said in SAID.finditer(answer)
        for kind in WORDS
    ]
    changes = rng.sample([(span, words) for span, words in found if words], rng.choice((1, 2)))
    for (start, end), words in sorted(
        changes, reverse=True
    ):  # from the end, so that the spans stay right
        answer = answer[:start] + rng.choice(words) + answer[end:]
    return answer


def corrupted_pair(record: Record, seed: int) -> dict:
    """One line of the pairs file; the scene and not y+, which may be hearsay, says what is
    wrong."""
    wrong = corrupted(scene_of(record.image), record.chosen, random.Random(f"{seed} {record.id}"))
    answers = preference_fields(
        record.turns, {"chosen": record.chosen, "rejected": wrong}, messages=False
    )
    return {"id": record.id, "images": [record.image], **answers}
