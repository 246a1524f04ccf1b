"""A few records in the true schema of every data set, on photographs, and what must be read of
them.
"""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from minialign.data.records import Record

PHOTOGRAPHS = {  # file name -> (scikit-image's picture, width and height that it is fitted into)
    "coco/COCO_train2014_000000353952.jpg": ("coffee.png", (120, 80)),
    "coco/COCO_train2014_000000353953.jpg": ("chelsea.png", (90, 130)),
    "astronaut.png": ("astronaut.png", (64, 64)),
    "rocket.jpg": ("rocket.jpg", (150, 40)),
}
NAMES = list(PHOTOGRAPHS)
QUESTION, CHOSEN, REJECTED = (
    "What is on the table?",
    "A cup of coffee.\nIt is full.",
    "A cup of tea. Two spoons.",
)


def photograph(name: str) -> Image.Image:
    """One of scikit-image's own."""
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    with Image.open(folder / name) as picture:
        return picture.convert("RGB")


def random_picture(rng: random.Random, mode: str = "RGB", longest: int = 500) -> Image.Image:
    """Noise over a gradient, of any size."""
    width, height = rng.randrange(1, longest), rng.randrange(1, longest)
    noise = np.random.default_rng(rng.randrange(2**32))
    values = noise.integers(0, 128, (height, width, 3)) + np.linspace(0, 127, width)[None, :, None]
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


def photographs(folder: Path) -> Path:
    """The folder of the pictures that the records below are about."""
    for name, (source, size) in PHOTOGRAPHS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture = photograph(source)
        picture.thumbnail(size)
        picture.save(folder / name)
    return folder


def talk(*texts: str) -> list[dict]:
    """LLaVA's form of a conversation."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def answer(text: str, ratings: list[str]) -> dict:
    """VLFeedback's form of a rated answer."""
    aspects = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
    annotations = {
        a: {"Rating": r, "Rationale": "Because."} for a, r in zip(aspects, ratings, strict=True)
    }
    return {"model": "some-model", "response": text, "annotations": annotations}


RATED = [
    answer("Middling.", ["3", "3", "5"]),
    answer(f" {CHOSEN}", ["5", "5", "5"]),
    answer(REJECTED, ["1", "2", "5"]),
    answer("Another.", ["4", "2", "5"]),
]
TIED = [answer("One.", ["4", "5", "3"]), answer("Two.", ["5", "4", "3"])]
EARLIER = [("user", "Is there a cup?"), ("assistant", "Yes.")]
LONG_TALK = talk("<image>\nIs there a cup?", "Yes.", QUESTION, CHOSEN)
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a cup?"}]},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": QUESTION},
]

# Format -> its records. Each set has a plain record first and one of several turns where the form
# has them.
RAW: dict[str, list[dict]] = {
    "povid": [
        {
            "id": "000000353952",
            "image": f"./{NAMES[0]}",
            "conversations": talk(f"<image>\n{QUESTION}", CHOSEN),
            "rejected_conversations": talk(f"<image>\n{QUESTION}", REJECTED),
        },
        {
            "id": "000000353953",
            "image": f"./{NAMES[1]}",
            "conversations": LONG_TALK,
            "rejected_conversations": [*LONG_TALK[:3], *talk("", REJECTED)[1:]],
        },
    ],
    "instruct": [
        {
            "id": "000000353952",
            "image": NAMES[0],
            "conversations": talk(f"{QUESTION}\n<image>", CHOSEN),
        },
        {"id": "000000353953", "image": NAMES[1], "conversations": LONG_TALK},
        # In the 665k mix.
        {"id": "text-1", "model": "", "conversations": talk("Write a poem.", "No.")},
    ],
    "llava-rlhf": [
        {
            "id": "a",
            "image": NAMES[2],
            "conversations": talk(f"<image>\n{QUESTION}", "Neither."),
            "output_1": {"from": "llava", "value": CHOSEN},
            "output_2": {"from": "llava", "value": REJECTED},
            "preference": 1,
            "hallucination": True,
        },
        {
            "id": "b",
            "image": NAMES[3],
            "conversations": [*LONG_TALK[:3], *talk("", "Neither.")[1:]],
            "output_1": {"from": "llava", "value": REJECTED},
            "output_2": {"from": "llava", "value": CHOSEN},
            "preference": 2,
            "hallucination": False,
        },
    ],
    "rlhf-v": [
        {
            "ds_name": "RLHF-V",
            "image": name,
            "origin_dataset": "x",
            "idx": i,
            "image_path": name,
            "text": json.dumps({"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}),
        }
        for i, name in enumerate(NAMES[2:])
    ],
    "rlaif-v": [
        {
            "ds_name": "RLAIF-V",
            "image": name,
            "question": QUESTION,
            "chosen": CHOSEN,
            "rejected": REJECTED,
            "origin_dataset": "x",
            "origin_split": "y",
            "idx": i,
            "image_path": name,
        }
        for i, name in enumerate(NAMES[2:])
    ],
    "vlfeedback": [
        {"id": "v1", "prompt": QUESTION, "img_path": NAMES[0], "models": [], "completions": RATED},
        {
            "id": "v2",
            "prompt": QUESTION,
            "img_path": NAMES[1],
            "models": [],
            "completions": {key: [each[key] for each in RATED] for key in RATED[0]},
        },
        {"id": "tie", "prompt": QUESTION, "img_path": NAMES[1], "models": [], "completions": TIED},
    ],
    "pairs": [
        {
            "id": "p",
            "images": [NAMES[0]],
            "prompt": QUESTION,
            "chosen": CHOSEN,
            "rejected": REJECTED,
        },
        # TRL's rows: no id.
        {
            "images": [NAMES[3]],
            "prompt": MESSAGES,
            "chosen": [{"role": "assistant", "content": CHOSEN}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": REJECTED}]}],
        },
    ],
    "sharegpt": [
        {
            "conversations": talk(f"<image>{QUESTION}"),
            "chosen": {"from": "gpt", "value": CHOSEN},
            "rejected": {"from": "gpt", "value": REJECTED},
            "images": [NAMES[2]],
        },
        {
            "messages": MESSAGES,
            "chosen": {"role": "assistant", "content": CHOSEN},
            "rejected": {"role": "assistant", "content": REJECTED},
            "images": [{"path": NAMES[3], "bytes": None}],
            "system": "",
        },
    ],
    "alpaca": [
        {
            "instruction": "What is",
            "input": "on the table?",
            "chosen": CHOSEN,
            "rejected": REJECTED,
            "images": [NAMES[2]],
        },
        {
            "instruction": QUESTION,
            "input": "",
            "history": [["<image>Is there a cup?", "Yes."]],
            "chosen": CHOSEN,
            "rejected": REJECTED,
            "images": NAMES[3],
        },
    ],
}
ARRAYS = ("povid", "instruct", "llava-rlhf")  # as they are published; the others as JSON Lines


def write(folder: Path, form: str) -> str:
    """The data set's file."""
    raws = RAW[form]
    text = (
        json.dumps(raws, indent=2)
        if form in ARRAYS
        else "".join(json.dumps(raw) + "\n" for raw in raws)
    )
    path = folder / f"{form}.json"
    path.write_text(text)
    return str(path)


def expected(form: str) -> list[Record]:
    """The pairs that must be read of it, by hand; of `instruct` without y-."""
    ids = {
        "povid": ["000000353952", "000000353953"],
        "instruct": ["000000353952", "000000353953"],
        "llava-rlhf": ["a", "b"],
        "rlhf-v": ["0", "1"],
        "rlaif-v": ["0", "1"],
        "vlfeedback": ["v1", "v2"],
        "pairs": ["p", "2"],
    }.get(form, ["1", "2"])
    images = {
        "povid": [f"./{NAMES[0]}", f"./{NAMES[1]}"],
        "instruct": NAMES[:2],
        "vlfeedback": NAMES[:2],
        "pairs": [NAMES[0], NAMES[3]],
    }.get(form, NAMES[2:])
    last = [("user", QUESTION)]
    turns = [last, last if form in ("rlhf-v", "rlaif-v", "vlfeedback") else EARLIER + last]
    if form == "alpaca":
        turns[0] = [("user", "What is\non the table?")]
    rejected = "" if form == "instruct" else REJECTED
    return [Record(*each, CHOSEN, rejected) for each in zip(ids, images, turns, strict=True)]
