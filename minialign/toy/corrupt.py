"""Rule-corrupted preference pairs of the embedded world: what an outsider makes who knows y+ and
the usual mistakes.

    python -m minialign.toy.corrupt --out pairs.jsonl

POVID had GPT-4V put errors into true answers; here rules do it. In a description one or two words
are changed, an object for one that is typical of the setting and absent, a colour or a place for
one that the object does not have; a yes or no is turned round. So y- is as long as y+, and wrong
where it differs: only where y+ is hearsay about an object and says Yes or No of it wrongly, y- is
right. No alignment answer says a number, so no rule changes one. An example's pair depends on
--seed and its id alone. The file, as sample_bdhs.py writes one, appears whole."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from minialign.cli import require, require_new_file, run_main
from minialign.data.record_files import read_records
from minialign.data.records import Record, preference_fields
from minialign.files import write_whole
from minialign.toy.drawing import COLOURS, OBJECTS, SETTINGS
from minialign.toy.edge import TOY_RECORDS
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


def pair_line(record: Record, seed: int) -> dict:
    """One line of the pairs file; the scene and not y+, which may be hearsay, says what is
    wrong."""
    wrong = corrupted(scene_of(record.image), record.chosen, random.Random(f"{seed} {record.id}"))
    answers = preference_fields(
        record.turns, {"chosen": record.chosen, "rejected": wrong}, messages=False
    )
    return {"id": record.id, "images": [record.image], **answers}


@dataclass(frozen=True)
class Config:
    """Flags."""

    out: str = "runs/corrupted/pairs.jsonl"  # pairs file to write
    # LLaVA-Instruct file on pictures of the embedded world; `toy`: its alignment split
    data: str = "toy"
    limit: int = TOY_RECORDS  # so many of its records, of the alignment split the first
    seed: int = 0  # where the errors are and what they are follows from it


def main(config: Config) -> None:
    """Write the pairs file."""
    require(config.limit >= 1, f"--limit {config.limit}: at least 1")
    require_new_file(Path(config.out))
    records = read_records(config.data, None, config.limit, config.seed)
    write_whole(
        Path(config.out),
        "".join(json.dumps(pair_line(record, config.seed)) + "\n" for record in records),
    )
    print(f"{config.out}: {len(records)} pairs")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
