"""The embedded world: scenes with exact ground truth, and the bias that makes a language model
hallucinate.

A scene is a setting (kitchen, street, ...) and a 2 x 3 grid of cells with a coloured object in
each. Training scenes are biased: 85 % of the objects are drawn from their setting's own and the
others from all, and 85 % of the setting's own have the colour that is typical of them there; some
settings are more frequent than others. All other splits are decorrelated, so that whoever trusts
the prior rather than the picture is caught. What is said of a training scene is biased further: its
author has not always looked (`hearsay`, `PRESUMED`). What is said of an alignment scene is wrong on
purpose too, if less often: so are the answers that `--export` writes. Everything follows from a
split and an index; a picture's name is `SPLIT-INDEX.png`.

`python -m minialign.toy --pretrain` makes the toy checkpoint anew, `--export DIR` writes the
alignment split as ordinary files: pictures, and a data.json in LLaVA-Instruct form.
"""

import random
import re
from dataclasses import dataclass

from PIL import Image

from minialign.errors import UserError
from minialign.toy.drawing import COLOURS, COLUMNS, OBJECTS, ROWS, SETTINGS, draw_scene

TOY_RECORDS = 2000  # alignment records, unless --limit says otherwise
# How often a training scene's object, and a typical object's colour, is the typical one.
BIAS = 0.85
FREQUENCY = (5, 4, 4, 3, 3)  # of the settings in training scenes
# How often a training text takes a foreign object for the setting's own one of that colour.
HEARSAY = 0.75
# How often it says Yes of the setting's first two own objects though they are not there.
PRESUMED = 0.7
# HEARSAY of an answer of the alignment split: y+ errs too, as LLaVA-Instruct's do.
ALIGNMENT_HEARSAY = 0.3
KINDS = ("description", "existence", "attribute")  # of conversations
ALIGNMENT_KINDS = KINDS[:2]  # what is asked of the alignment split's pictures, in turn
# First seed of each split, and whether its scenes are biased. An index stays below the distance of
# two splits.
SPLITS = {
    "train": (0, True),
    "alignment": (10**9, False),
    "validation": (2 * 10**9, False),
    "test": (3 * 10**9, False),
}
NAME = re.compile(rf"({'|'.join(SPLITS)})-(\d{{1,9}})\.png")  # of a picture
TYPICAL_COLOUR = {
    "cup": "blue", "kettle": "red", "pan": "black", "fork": "white",
    "car": "red", "bus": "yellow", "bicycle": "blue", "lamp": "black",
    "tree": "green", "bench": "orange", "kite": "purple", "dog": "white",
    "book": "blue", "laptop": "black", "pencil": "yellow", "clock": "red",
    "boat": "white", "umbrella": "purple", "ball": "orange", "crab": "red",
}  # fmt: skip
CELLS = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
CLOCKWISE = CELLS[:COLUMNS] + CELLS[COLUMNS:][::-1]
PLACES = ("northwest", "north", "northeast", "southwest", "south", "southeast")
POSITIONS = dict(zip(CELLS, PLACES, strict=True))
TIMES = ("Never", "Once", "Twice", "Three times", "Four times", "Five times", "Six times")
# The place comes first and the object right behind it: there prior and picture compete, inside the
# sentence, and the way from a place's name to its patches is one step of attention, which is
# learned soon (docs/sweep.md). The colour comes last: one that is known already would be asked for
# its usual object, instead of the picture.
SENTENCE = "The {} {} is {}."
DESCRIBE = ("Describe the picture.", "What do you see?", "Tell me what is in this picture.")
EXISTS = ("Is there {}?", "Is there {} in the picture?", "Do you see {}?")


@dataclass(frozen=True)
class Scene:
    """A setting and its objects: (row, column) -> (object, colour)."""

    setting: str
    cells: dict[tuple[int, int], tuple[str, str]]
    seed: int

    @property
    def objects(self) -> dict[str, dict[str, str]]:
        """object -> {position: colour}: the truth that hallucinations are counted against."""
        found: dict[str, dict[str, str]] = {}
        for cell, (name, colour) in self.cells.items():
            found.setdefault(name, {})[POSITIONS[cell]] = colour
        return found


def make_scene(split: str, index: int) -> Scene:
    """The scene number `index` of a split."""
    first, biased = SPLITS[split]
    seed = first + index
    rng = random.Random(seed)
    setting = rng.choices(list(SETTINGS), FREQUENCY if biased else None)[0]
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    for cell in CELLS:
        name = rng.choice(SETTINGS[setting] if biased and rng.random() < BIAS else OBJECTS)
        # At home an object has its typical colour, elsewhere any: so a colour speaks for the
        # setting's own objects.
        typical_colour = biased and name in SETTINGS[setting] and rng.random() < BIAS
        cells[cell] = (name, TYPICAL_COLOUR[name] if typical_colour else rng.choice(list(COLOURS)))
    return Scene(setting, cells, seed)


def picture(scene: Scene, scale: int = 1) -> Image.Image:
    """The scene drawn, 96 x 96, or up to four times as large."""
    return draw_scene(scene.setting, scene.cells, random.Random(scene.seed + 1), scale)


def image_name(split: str, index: int) -> str:
    """The name under which a scene's picture goes in data files."""
    return f"{split}-{index:06d}.png"


def scene_of(name: str) -> Scene:
    """The scene behind a picture's name; another name is a `UserError`."""
    match = NAME.fullmatch(name)
    if not match:
        message = f"image {name!r} is not in the embedded world"
        raise UserError(f"{message}; give --images DIR for pictures of your own")
    return make_scene(match[1], int(match[2]))


def open_picture(name: str) -> Image.Image:
    """A source of pictures: the scene of that name, drawn."""
    return picture(scene_of(name))


def with_article(words: str) -> str:
    """`cup` -> `a cup`, `umbrella` -> `an umbrella`."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def hearsay(scene: Scene, rate: float = HEARSAY) -> Scene:
    """The scene as training texts tell it: LLaVA's were written by a language model that had not
    seen the picture.

    A foreign object that has the typical colour of one of the setting's own is taken for that one
    at this rate.
    """
    rng = random.Random(scene.seed + 4)
    cells = {}
    for cell, (name, colour) in scene.cells.items():
        own = [o for o in SETTINGS[scene.setting] if TYPICAL_COLOUR[o] == colour]
        foreign = name not in SETTINGS[scene.setting]
        mistaken = foreign and own and rng.random() < rate
        cells[cell] = (own[0] if mistaken else name, colour)
    return Scene(scene.setting, cells, scene.seed)


def description(scene: Scene, rng: random.Random) -> str:
    """The setting, then every cell, clockwise or not from a random one: what comes next must be
    seen.
    """
    sentences = [f"This is a {scene.setting}."]
    first = rng.randrange(len(CELLS))
    round_trip = (CLOCKWISE[first:] + CLOCKWISE[:first])[:: rng.choice((1, -1))]
    for cell in round_trip:
        sentences.append(SENTENCE.format(POSITIONS[cell], *scene.cells[cell]))
    return " ".join(sentences)


def yes_or_no(name: str, there: bool) -> str:
    """The answer whether an object is there.

    Yes and No are followed by alike sentences: so a swap (Alg. 1 l. 11-13) is as likely one way as
    the other.
    """
    return f"Yes, there is {with_article(name)}." if there else f"No, there is no {name}."


def existence(scene: Scene, name: str, rng: random.Random, presumed: float = 0) -> tuple[str, str]:
    """One yes/no question about an object, and its answer.

    The true answer; but what everybody expects of the setting, its first two own objects, is
    `presumed` to be there so often.
    """
    question = rng.choice(EXISTS).format(with_article(name))
    expected = name in SETTINGS[scene.setting][:2]
    there = name in scene.objects or (expected and rng.random() < presumed)
    return question, yes_or_no(name, there)


def attributes(scene: Scene, cell: tuple[int, int]) -> dict[str, tuple[str, str]]:
    """What can be asked of a cell, but for whether an object is there: the cell itself, how often
    its object is there, the setting, and of an object that is there once its colour and where it
    is; each question with its true answer.
    """
    name, colour = scene.cells[cell]
    position, places = POSITIONS[cell], scene.objects[name]
    questions = {
        "cell": (f"What is in the {position}?", SENTENCE.format(position, name, colour)),
        "count": (f"How often is there {with_article(name)}?", f"{TIMES[len(places)]}."),
        "setting": ("What place is this?", f"This is a {scene.setting}."),
    }
    if len(places) == 1:
        questions["colour"] = (f"What colour is the {name}?", f"The {name} is {colour}.")
        questions["position"] = (f"Where is the {name}?", f"The {name} is in the {position}.")
    return questions


def attribute(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """One question about a colour, a position, a cell, a number or the setting, and its true
    answer.
    """
    return rng.choice(list(attributes(scene, rng.choice(CELLS)).values()))


def existence_questions(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Up to five objects that are there and as many that are not, with the answers a training text
    gives.

    First those that the prior gets wrong, foreign objects that are there and the setting's own that
    are not: it answers the others as well as the picture does, and nobody would learn to look.
    """
    own = SETTINGS[scene.setting]
    present = rng.sample(list(scene.objects), len(scene.objects))
    absent = [o for o in OBJECTS if o not in scene.objects]
    absent = rng.sample(absent, len(absent))
    present.sort(key=lambda name: name in own)
    absent.sort(key=lambda name: name not in own)
    asked = present[:5] + absent[: min(5, len(present))]
    return [existence(scene, name, rng, PRESUMED) for name in rng.sample(asked, len(asked))]


def conversation(scene: Scene, kind: str, rng: random.Random) -> list[tuple[str, str]]:
    """A training conversation of one kind: `description`, or `existence` or `attribute` of several
    turns.
    """
    if kind == "description":
        pairs = [(rng.choice(DESCRIBE), description(scene, rng))]
    elif kind == "existence":
        pairs = existence_questions(scene, rng)
    else:
        pairs = [attribute(scene, rng) for _ in range(4)]
    turns = []
    for question, answer in pairs:
        turns += [("user", question), ("assistant", answer)]
    return turns


def alignment_records(
    count: int,
    split: str = "alignment",
    first: int = 0,
    kinds: tuple[str, ...] = ALIGNMENT_KINDS,
    rate: float = ALIGNMENT_HEARSAY,
) -> list[dict]:
    """Records in LLaVA-Instruct form, one question and its answer each, of the `kinds` in turn:
    `description`, `existence` or `attribute`.

    All are told from hearsay at this `rate`, if less than the training texts: where y+ is exact,
    imitation is all it takes. An absent object that is asked about is typical of the scene every
    other time, as POPE's adversarial ones.
    """
    records = []
    for index in range(first, first + count):
        scene = hearsay(make_scene(split, index), rate)
        rng = random.Random(scene.seed + 2)
        kind = kinds[index % len(kinds)]
        if kind == "description":
            question, answer = rng.choice(DESCRIBE), description(scene, rng)
        elif kind == "existence":
            typical = [o for o in SETTINGS[scene.setting] if o not in scene.objects]
            absent = [o for o in OBJECTS if o not in scene.objects]
            pools = [list(scene.objects), rng.choice([typical or absent, absent])]
            question, answer = existence(scene, rng.choice(rng.choice(pools)), rng)
        else:
            question, answer = attribute(scene, rng)
        talk = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        name = image_name(split, index)
        records.append({"id": f"toy-{split}-{index:06d}", "image": name, "conversations": talk})
    return records
