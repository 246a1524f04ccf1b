"""Small benchmark files, and `python -m minialign.evaluate` run on them from flags."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

from data_sets import photograph

from minialign import evaluate
from minialign.cli import parse_config
from minialign.toy import world
from minialign.toy.benchmark import pope_questions

NAMES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
ASKED = [f"Is there a {name} in the image?" for name in ("cat", "cup", "dog")]


def run(*argv: object, **flags: object) -> dict:
    """What the program prints with --json, by words of a command line or flags by name; pictures
    are decoded in this process.
    """
    words = [str(word) for word in argv]
    for name, value in flags.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    if "--workers" not in words and "--benchmark" in words:
        words += ["--workers", "0"]
    shown = io.StringIO()
    with redirect_stdout(shown):
        evaluate.main(parse_config(evaluate.Config, "", [*words, "--json"]))
    return json.loads(shown.getvalue())


def write_lines(path: Path, raws: list) -> Path:
    """JSON Lines; a text is a line as it is."""
    texts = [raw if isinstance(raw, str) else json.dumps(raw) for raw in raws]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def photographs(folder: Path) -> Path:
    """Four photographs, made small."""
    folder.mkdir()
    for name in NAMES:
        photograph(name).resize((60, 48)).save(folder / name)
    return folder


def without_none(raw: dict) -> dict:
    """A record without the fields that are None."""
    return {name: value for name, value in raw.items() if value is not None}


def pope_line(number: int = 1, **changes) -> dict:
    """A line of POPE's files; None deletes a field."""
    raw = {"question_id": number, "image": NAMES[0], "text": ASKED[0], "label": "no"}
    return without_none(raw | changes)


def pope_photographs(path: Path) -> Path:
    """Three questions about each photograph; the questions about one do not stand together."""
    lines = []
    for text in ASKED:
        for name in NAMES:
            number = len(lines) + 1
            label = "yes" if number % 2 else "no"
            lines.append(pope_line(number, image=name, text=text, label=label))
    return write_lines(path, lines)


def bench_line(number: int = 1, **changes) -> dict:
    """A line of LLaVA-Bench's questions; None deletes a field."""
    raw = {"question_id": number, "image": NAMES[0], "text": "What is there?", "category": "conv"}
    return without_none(raw | changes)


def mmhal_item(name: str = NAMES[0], **changes) -> dict:
    """An item of MMHal-Bench's template; None deletes a field."""
    raw = {
        "question_type": "attribute",
        "image_id": Path(name).stem,
        "image_src": f"https://example.org/a/{name}",
        "question": "What is there?",
        "gt_answer": "A thing.",
        "image_content": ["Thing"],
        "model_answer": "",
    }
    return without_none(raw | changes)


def coco(files: dict[int, str], instances: list[tuple[int, str]], names: list[str]) -> dict:
    """An instances file: the images, and which image has which object."""
    numbers = {name: 10 + number for number, name in enumerate(names)}
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    annotations = []
    for image, name in instances:
        annotations.append({"image_id": image, "category_id": numbers[name], "bbox": [0, 0, 1, 1]})
    images = [{"id": number, "file_name": file} for number, file in files.items()]
    return {"images": images, "categories": categories, "annotations": annotations}


def captions(texts: list[tuple[int, str]]) -> dict:
    """A captions file: (image, caption) each."""
    annotations = []
    for number, (image, text) in enumerate(texts):
        annotations.append({"image_id": image, "id": number, "caption": text})
    return {"annotations": annotations}


def chair_photographs(folder: Path) -> list:
    """The flags of a CHAIR run on the photographs; the objects are words of the embedded world."""
    folder.mkdir()
    files = dict(enumerate(NAMES, start=7))
    there = [(7, "cup"), (8, "cup"), (8, "dog"), (10, "boat")]
    instances, synonyms = folder / "instances.json", folder / "synonyms.txt"
    instances.write_text(json.dumps(coco(files, there, ["cup", "dog", "boat"])))
    texts = [(7, "A cup."), (9, "Two dogs."), (10, "The sea.")]
    (folder / "captions.json").write_text(json.dumps(captions(texts)))
    synonyms.write_text("cup, mug\ndog, puppy\nboat, ship\n")
    flags = ["--data", instances, "--captions", folder / "captions.json"]
    return [*flags, "--synonyms", synonyms]


def toy_pictures(folder: Path, count: int) -> Path:
    """Test pictures of the embedded world as PNG."""
    folder.mkdir()
    for number in range(count):
        name = world.image_name("test", number)
        world.open_picture(name).save(folder / name)
    return folder


def toy_pope(folder: Path, count: int) -> Path:
    """The embedded world's questions as the three files of POPE."""
    folder.mkdir()
    for setting in ("random", "popular", "adversarial"):
        lines = []
        for number in range(count):
            asked = pope_questions(world.make_scene("test", number))
            image = world.image_name("test", number)
            for label, names in (("yes", asked["present"]), ("no", asked[setting])):
                for name in names:
                    text = world.EXISTS[1].format(world.with_article(name))
                    lines.append(pope_line(len(lines) + 1, image=image, text=text, label=label))
        write_lines(folder / f"coco_pope_{setting}.json", lines)
    return folder
