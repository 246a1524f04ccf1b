"""Small benchmark files, and `python -m minialign.evaluate` run on them from flags."""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from data_sets import photograph

from minialign import evaluate
from minialign.cli import parse_config
from minialign.toy import world
from minialign.toy.benchmark import pope_questions

NAMES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
ASKED = (
    "Is there a cat in the image?",
    "Is there a cup in the image?",
    "Is there a dog in the image?",
)


def run(*argv: object) -> dict:
    """What the program prints with --json; pictures are decoded in this process."""
    before, shown = sys.argv, io.StringIO()
    on_files = [] if "--workers" in argv or "--benchmark" not in argv else ["--workers", "0"]
    sys.argv = ["evaluate", *map(str, argv), *on_files, "--json"]
    try:
        with redirect_stdout(shown):
            evaluate.main(parse_config(evaluate.Config, ""))
    finally:
        sys.argv = before
    return json.loads(shown.getvalue())


def write_lines(path: Path, raws: list) -> Path:
    path.write_text(
        "".join((raw if isinstance(raw, str) else json.dumps(raw)) + "\n" for raw in raws)
    )
    return path


def photographs(folder: Path) -> Path:
    """Four photographs, made small."""
    folder.mkdir()
    for name in NAMES:
        photograph(name).resize((60, 48)).save(folder / name)
    return folder


def pope_line(number: int = 1, **changes) -> dict:
    raw = {"question_id": number, "image": NAMES[0], "text": ASKED[0], "label": "no"} | changes
    return {name: value for name, value in raw.items() if value is not None}


def pope_photographs(path: Path) -> Path:
    """Three questions about each photograph; the questions about one do not stand together."""
    return write_lines(
        path,
        [
            pope_line(number, image=name, text=text, label="yes" if number % 2 else "no")
            for number, (text, name) in enumerate(
                ((text, name) for text in ASKED for name in NAMES), start=1
            )
        ],
    )


def bench_line(number: int = 1, **changes) -> dict:
    raw = {
        "question_id": number,
        "image": NAMES[0],
        "text": "What is there?",
        "category": "conv",
    } | changes
    return {name: value for name, value in raw.items() if value is not None}


def mmhal_item(name: str = NAMES[0], **changes) -> dict:
    stem = Path(name).stem
    raw = {
        "question_type": "attribute",
        "image_id": stem,
        "image_src": f"https://example.org/a/{name}",
        "question": "What is there?",
        "gt_answer": "A thing.",
        "image_content": ["Thing"],
        "model_answer": "",
    } | changes
    return {name: value for name, value in raw.items() if value is not None}


def coco(files: dict[int, str], instances: list[tuple[int, str]], names: list[str]) -> dict:
    """An instances file: the images, and which image has which object."""
    numbers = {name: 10 + number for number, name in enumerate(names)}
    return {
        "images": [{"id": number, "file_name": file} for number, file in files.items()],
        "categories": [
            {"id": number, "name": name, "supercategory": "thing"}
            for name, number in numbers.items()
        ],
        "annotations": [
            {"image_id": number, "category_id": numbers[name], "bbox": [0, 0, 1, 1]}
            for number, name in instances
        ],
    }


def captions(said: list[tuple[int, str]]) -> dict:
    return {
        "annotations": [
            {"image_id": number, "id": i, "caption": text} for i, (number, text) in enumerate(said)
        ]
    }


def chair_photographs(folder: Path) -> list:
    """The flags of a CHAIR run on the photographs; the objects are words of the embedded world."""
    folder.mkdir()
    files = dict(enumerate(NAMES, start=7))
    instances = coco(
        files, [(7, "cup"), (8, "cup"), (8, "dog"), (10, "boat")], ["cup", "dog", "boat"]
    )
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(
        json.dumps(captions([(7, "A cup."), (9, "Two dogs."), (10, "The sea.")]))
    )
    (folder / "synonyms.txt").write_text("cup, mug\ndog, puppy\nboat, ship\n")
    return [
        "--data",
        folder / "instances.json",
        "--captions",
        folder / "captions.json",
        "--synonyms",
        folder / "synonyms.txt",
    ]


def toy_pictures(folder: Path, count: int) -> Path:
    """Test pictures of the embedded world as PNG."""
    folder.mkdir()
    for number in range(count):
        world.picture(world.make_scene("test", number)).save(
            folder / world.image_name("test", number)
        )
    return folder


def toy_pope(folder: Path, count: int) -> Path:
    """The embedded world's questions as the three files of POPE."""
    folder.mkdir()
    for setting in ("random", "popular", "adversarial"):
        lines = []
        for number in range(count):
            asked = pope_questions(world.make_scene("test", number))
            for label, names in (("yes", asked["present"]), ("no", asked[setting])):
                texts = [world.EXISTS[1].format(world.with_article(name)) for name in names]
                image = world.image_name("test", number)
                lines += [
                    pope_line(len(lines) + 1, image=image, text=text, label=label) for text in texts
                ]
        write_lines(folder / f"coco_pope_{setting}.json", lines)
    return folder
