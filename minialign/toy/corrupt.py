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

from minialign.data.records import Record, pair_fields
from minialign.errors import UserError
from minialign.toy.drawing import COLOURS, OBJECTS, SETTINGS
from minialign.toy.world import POSITIONS, SENTENCE, Scene, scene_of, yes_or_no

WORDS = {"place": tuple(POSITIONS.values()), "object": OBJECTS, "colour": tuple(COLOURS)}
GROUPS = [rf"(?P<{kind}>{'|'.join(words)})" for kind, words in WORDS.items()]
STATEMENT = re.compile(SENTENCE.format(*GROUPS))


def wrong_words(scene: Scene, kind: str, statement: re.Match) -> list[str]:
    """What a sentence could say instead of its place, object or colour, and be wrong of this
    scene.
    """
    there = scene.objects.get(statement["object"], {})  # {position: colour}
    if kind == "place":
        pool, true = WORDS["place"], there.keys()
    elif kind == "object":
        pool, true = SETTINGS[scene.setting], scene.objects.keys()
    else:
        pool, true = WORDS["colour"], there.values()
    return [word for word in pool if word not in true and word != statement[kind]]


def corrupted(scene: Scene, answer: str, rng: random.Random) -> str:
    """An answer with one or two errors in it, or turned round where it is a yes or no."""
    if answer.startswith(("Yes,", "No,")):
        return yes_or_no(answer.rstrip(".").split()[-1], there=answer.startswith("No,"))
    possible = []
    for statement in STATEMENT.finditer(answer):
        for kind in WORDS:
            words = wrong_words(scene, kind, statement)
            if words:
                possible.append((statement.span(kind), words))
    if len(possible) < 2:
        message = f"answer {answer[:40]!r} is no yes, no no and none of the embedded world's"
        message += " descriptions; give records of `python -m minialign.toy --export DIR`"
        raise UserError(f"{message}, without --kinds attribute")
    changes = rng.sample(possible, rng.choice((1, 2)))
    for (start, end), words in sorted(changes, reverse=True):  # from the end: spans stay right
        answer = answer[:start] + rng.choice(words) + answer[end:]
    return answer


def corrupted_pair(record: Record, seed: int) -> dict:
    """A line of the pairs file; the scene and not y+, which may be hearsay, says what is wrong."""
    rng = random.Random(f"{seed} {record.id}")
    wrong = corrupted(scene_of(record.image), record.chosen, rng)
    return pair_fields(record, {"chosen": record.chosen, "rejected": wrong})
