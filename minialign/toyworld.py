"""The embedded world: scenes with exact ground truth, and the bias that makes a language model hallucinate.

A scene is a setting (kitchen, street, ...) and a 2 x 3 grid of cells, each empty or holding one object.
Training scenes are biased: 85 % of the objects are typical of their setting, 85 % have their typical colour.
All other splits are decorrelated, so that whoever trusts the prior rather than the picture is caught.
Everything follows from a split and an index; a picture's name is `SPLIT-INDEX.png`.

`python -m minialign.toyworld --pretrain` makes the toy checkpoint, `--export DIR` writes pictures and texts.
"""

import random
import re
from dataclasses import dataclass

from PIL import Image

from minialign.errors import UserError
from minialign.toydraw import COLOURS, COLUMNS, OBJECTS, ROWS, SETTINGS, draw_scene

BIAS = 0.85  # how often a training scene's object, and its colour, is the typical one
# First seed of each split, and whether its scenes are biased. An index stays below the distance of two splits.
SPLITS = {"train": (0, True), "alignment": (10**9, False), "validation": (2 * 10**9, False), "test": (3 * 10**9, False)}
NAME = re.compile(rf"({'|'.join(SPLITS)})-(\d{{1,9}})\.png")  # of a picture
TYPICAL_COLOUR = {
    "cup": "blue", "kettle": "red", "pan": "black", "fork": "white",
    "car": "red", "bus": "yellow", "bicycle": "blue", "lamp": "black",
    "tree": "green", "bench": "orange", "kite": "purple", "dog": "white",
    "book": "blue", "laptop": "black", "pencil": "yellow", "clock": "red",
    "boat": "white", "umbrella": "purple", "ball": "orange", "crab": "red",
}  # fmt: skip
CELLS = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
POSITIONS = dict(zip(CELLS, ["top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right"],
                     strict=True))  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
# Every opener can be followed by an object or by `nothing`: prior and picture compete inside the sentence.
OPENERS = ("At the {} is", "The {} shows", "In the {} there is")
DESCRIBE = ("Describe the picture.", "What do you see?", "Tell me what is in this picture.")
EXISTS = ("Is there {}?", "Is there {} in the picture?", "Do you see {}?")


@dataclass(frozen=True)
class Scene:
    """A setting and its objects: (row, column) -> (object, colour). Objects of one scene are distinct."""

    setting: str
    cells: dict[tuple[int, int], tuple[str, str]]
    seed: int

    @property
    def objects(self) -> dict[str, tuple[str, str]]:
        """object -> (colour, position): the ground truth that hallucinations are counted against."""
        return {name: (colour, POSITIONS[cell]) for cell, (name, colour) in self.cells.items()}


def make_scene(split: str, index: int) -> Scene:
    """The scene number `index` of a split."""
    first, biased = SPLITS[split]
    seed = first + index
    rng = random.Random(seed)
    setting = rng.choice(list(SETTINGS))
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    used: set[str] = set()
    for cell in rng.sample(CELLS, rng.choice((2, 3, 4))):
        pool = SETTINGS[setting] if biased and rng.random() < BIAS else OBJECTS
        name = rng.choice([o for o in pool if o not in used] or [o for o in OBJECTS if o not in used])
        typical_colour = biased and rng.random() < BIAS
        used.add(name)
        cells[cell] = (name, TYPICAL_COLOUR[name] if typical_colour else rng.choice(list(COLOURS)))
    return Scene(setting, cells, seed)


def picture(scene: Scene) -> Image.Image:
    """The scene drawn, 96 x 96."""
    return draw_scene(scene.setting, scene.cells, random.Random(scene.seed + 1))


def image_name(split: str, index: int) -> str:
    """The name under which a scene's picture goes in data files."""
    return f"{split}-{index:06d}.png"


def scene_of(name: str) -> Scene:
    """The scene behind a picture's name; another name is a `UserError`."""
    match = NAME.fullmatch(name)
    if not match:
        raise UserError(f"image {name!r} is not in the embedded world; give --images DIR for pictures of your own")
    return make_scene(match[1], int(match[2]))


def with_article(words: str) -> str:
    """`red cup` -> `a red cup`, `orange cup` -> `an orange cup`."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def description(scene: Scene, rng: random.Random) -> str:
    """The setting, then every cell in random order: the next sentence is not given away by the last."""
    sentences = [f"This is a {scene.setting}."]
    for cell in rng.sample(CELLS, len(CELLS)):
        content = with_article("{1} {0}".format(*scene.cells[cell])) if cell in scene.cells else "nothing"
        sentences.append(f"{rng.choice(OPENERS).format(POSITIONS[cell])} {content}.")
    return " ".join(sentences)


def existence(scene: Scene, name: str, rng: random.Random) -> tuple[str, str]:
    """One yes/no question about an object, and its true answer."""
    question = rng.choice(EXISTS).format(with_article(name))
    if name not in scene.objects:
        return question, f"No, there is no {name}."
    colour, position = scene.objects[name]
    return question, f"Yes, {with_article(f'{colour} {name}')} is at the {position}."


def attribute(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """One question about a colour, a position, a cell, the count or the setting, and its true answer."""
    name, (colour, position) = rng.choice(list(scene.objects.items()))
    cell = rng.choice(CELLS)
    content = with_article("{1} {0}".format(*scene.cells[cell])) if cell in scene.cells else "nothing"
    return rng.choice([
        (f"What colour is the {name}?", f"The {name} is {colour}."),
        (f"Where is the {name}?", f"The {name} is at the {position}."),
        (f"What is at the {POSITIONS[cell]}?", f"At the {POSITIONS[cell]} is {content}."),
        ("How many things are there?", f"There are {NUMBERS[len(scene.cells)]} things."),
        ("What place is this?", f"This is a {scene.setting}."),
    ])  # fmt: skip


def conversation(scene: Scene, kind: str, rng: random.Random) -> list[tuple[str, str]]:
    """A training conversation of one kind: `description`, `existence` (multi-turn) or `attribute` (multi-turn)."""
    if kind == "description":
        pairs = [(rng.choice(DESCRIBE), description(scene, rng))]
    elif kind == "existence":
        present = rng.sample(list(scene.objects), min(3, len(scene.objects)))
        absent = rng.sample([o for o in OBJECTS if o not in scene.objects], len(present))
        pairs = [existence(scene, name, rng) for name in rng.sample(present + absent, 2 * len(present))]
    else:
        pairs = [attribute(scene, rng) for _ in range(4)]
    return [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]


def alignment_records(count: int, split: str = "alignment", first: int = 0) -> list[dict]:
    """Records in LLaVA-Instruct form, one question and its true answer each: half descriptions, half existence.

    An absent object that is asked about is typical of the scene every other time, as POPE's adversarial ones.
    """
    records = []
    for index in range(first, first + count):
        scene = make_scene(split, index)
        rng = random.Random(scene.seed + 2)
        if index % 2 == 0:
            question, answer = rng.choice(DESCRIBE), description(scene, rng)
        else:
            typical = [o for o in SETTINGS[scene.setting] if o not in scene.objects]
            absent = [o for o in OBJECTS if o not in scene.objects]
            pools = [list(scene.objects), rng.choice([typical or absent, absent])]
            question, answer = existence(scene, rng.choice(rng.choice(pools)), rng)
        records.append({
            "id": f"toy-{split}-{index:06d}",
            "image": image_name(split, index),
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        })  # fmt: skip
    return records
