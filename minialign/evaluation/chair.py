"""CHAIR on COCO: which objects a description names, and which of them are not in the picture.

In the picture is what its instances or its five captions name. CHAIR_i: hallucinated mentions /
mentions; CHAIR_s: descriptions with at least one / descriptions; recall: objects of the picture
that are named / objects of the picture. A description is read word by word: singular, names of
several words joined, then by the synonyms, of which the first of a line stands for all.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minialign.data.record_files import collect
from minialign.data.records import text_field
from minialign.errors import UserError
from minialign.evaluation.metrics import CHAIR, Counts
from minialign.evaluation.questions import Benchmark, Question
from minialign.files import read_json

# Words that are something else together than apart; what stands for them need not be an object.
ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)  # fmt: skip
TOGETHER = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal",
    "stop light", "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball",
    "baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone",
    "mobile phone", "teddy bear", "hair drier", "potted plant", "laptop computer", "home plate",
    "train track",
)  # fmt: skip
MEANT = {name: name for name in TOGETHER} | {"bow tie": "tie", "toilet seat": "toilet"}
MEANT |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
MEANT |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}

IRREGULAR = {
    "people": "person",
    "children": "child",
    "grandchildren": "grandchild",
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
}
# A plural's end and its singular's, in the order in which they are tried.
ENDINGS = (
    ("men", "man"), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("s", ""), ("zzes", "z"),
    ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("oes", "o"),
)  # fmt: skip
WORD = re.compile(r"\w+(?:-\w+)*")


@dataclass(frozen=True)
class ObjectWords:
    """The objects that a text names."""

    canonical: dict[str, str]  # name -> object
    joined: dict[str, str]  # names of several words -> what stands for them
    known: frozenset[str]  # every word of a name
    longest: int  # words of the longest name

    @staticmethod
    def of(synonyms: list[list[str]]) -> "ObjectWords":
        """From lines of synonyms; the first of a line is the object."""
        canonical = {name: names[0] for names in synonyms for name in names}
        # In the official code the list of names to join is fixed; here the table's own join it.
        joined = {name: name for name in canonical if " " in name} | MEANT
        known = frozenset(word for name in [*canonical, *joined] for word in name.split())
        return ObjectWords(canonical, joined, known, max(len(name.split()) for name in joined))

    def singular(self, word: str) -> str:
        """The word of a name that this is the plural of; any other word stays as it is."""
        # Differs from the paper: CHAIR's code makes the singular of every word with pattern.en,
        # right or not. Words that no name has change nothing, so the names say which singular is
        # meant (collies: collie; ponies: pony).
        if word in self.known:
            return word
        forms = [word.removesuffix(end) + put for end, put in ENDINGS if word.endswith(end)]
        return next((form for form in [IRREGULAR.get(word), *forms] if form in self.known), word)

    def objects(self, text: str) -> list[str]:
        """Every mention of an object, in order."""
        # Differs from the official code, which takes NLTK's words: `cat/dog` are two words here.
        words = [self.singular(word) for word in WORD.findall(text.lower())]
        found = []
        while words:
            size = self.longest
            while size > 1 and " ".join(words[:size]) not in self.joined:
                size -= 1
            name = " ".join(words[:size])
            found.append(self.joined.get(name, name))
            words = words[size:]

        if "toilet" in found:  # its seat is no chair
            found = [name for name in found if name != "seat"]
        return [self.canonical[name] for name in found if name in self.canonical]


def read_synonyms(path: str) -> ObjectWords:
    """Lines of comma-separated names, the object's own first."""
    remedy = "give CHAIR's synonyms.txt, 80 lines of names"
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"--synonyms {path}: no such file; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--synonyms {path}: not readable as text ({error}); {remedy}") from None

    table: list[list[str]] = []
    owner: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        # Differs from the official code, which keeps capitals, and so never finds `iPhone`.
        names = [" ".join(name.lower().split()) for name in line.split(",") if name.strip()]
        for name in names:
            if owner.setdefault(name, names[0]) != names[0]:
                message = f"{path}, line {number}: {name!r} stands for {owner[name]!r} already"
                raise UserError(f"{message}; drop it from one")
        if names:
            table.append(names)
    if not table:
        raise UserError(f"--synonyms {path}: no names in it; {remedy}")
    return ObjectWords.of(table)


def number_field(raw: object, name: str) -> int:
    """`raw[name]`, which must be a whole number."""
    value = raw.get(name) if isinstance(raw, dict) else None
    if type(value) is not int:
        raise UserError(f"field {name!r} is {'missing' if value is None else 'not a whole number'}")
    return value


@dataclass(frozen=True)
class CocoFile:
    """One of COCO's JSON files: an object of lists of records."""

    path: str
    flag: str
    raw: dict
    skip_bad: bool

    @staticmethod
    def read(path: str, flag: str, name: str, skip_bad: bool) -> "CocoFile":
        """The file, read as a whole."""
        tqdm.write(f"reading {path}")
        raw = read_json(Path(path), f"give {flag} COCO's {name}")
        return CocoFile(path, flag, raw, skip_bad)

    def part(self, name: str, parse: Callable) -> list:
        """One of its lists, record by record."""
        records = self.raw.get(name)
        if not isinstance(records, list) or not records:
            message = f"{self.flag} {self.path}: field {name!r} must be a list"
            raise UserError(f"{message} with something in it; give COCO's file")
        numbered = enumerate(records, start=1)
        places = ((f"{self.path}, {name}, record {n}", record) for n, record in numbered)
        shown = tqdm(places, desc=name, total=len(records), leave=False)
        return collect(shown, parse, None, self.skip_bad)


def read_instances(
    path: str, words: ObjectWords, skip_bad: bool
) -> tuple[dict[int, str], dict[int, set[str]]]:
    """{image's id: its file} and {image's id: its objects} of an instances file."""
    file = CocoFile.read(path, "--data", "instances_val2014.json", skip_bad)

    def category(record: object) -> tuple[int, str]:
        number, name = number_field(record, "id"), text_field(record, "name")
        if name.lower() not in words.canonical:
            message = f"field 'name' is {name!r}, which no line of --synonyms has"
            raise UserError(f"{message}; add it there")
        return number, words.canonical[name.lower()]

    def image(record: object) -> tuple[int, str]:
        return number_field(record, "id"), text_field(record, "file_name")

    def annotation(record: object) -> tuple[int, str]:
        number, kind = number_field(record, "image_id"), number_field(record, "category_id")
        if kind not in categories:
            raise UserError(f"field 'category_id' is {kind}, which is none of the categories")
        return number, categories[kind]

    categories = dict(file.part("categories", category))
    files = dict(file.part("images", image))
    there: dict[int, set[str]] = defaultdict(set)
    for number, name in file.part("annotations", annotation):
        there[number].add(name)
    return files, there


def read_captions(path: str, words: ObjectWords, skip_bad: bool) -> list[tuple[int, list[str]]]:
    """(image's id, objects that a caption names) of a captions file."""

    def caption(record: object) -> tuple[int, list[str]]:
        return number_field(record, "image_id"), words.objects(text_field(record, "caption"))

    file = CocoFile.read(path, "--captions", "captions_val2014.json", skip_bad)
    return file.part("annotations", caption)


def read_chair(
    data: str, captions: str, synonyms: str, question: str, seed: int, skip_bad: bool
) -> Benchmark:
    """One question for every image, in the random order that the seed gives; the first so many are
    a random subset.
    """
    words = read_synonyms(synonyms)
    files, there = read_instances(data, words, skip_bad)
    captioned = read_captions(captions, words, skip_bad)
    for number, names in captioned:
        there[number].update(names)
    if not files.keys() & {number for number, _ in captioned}:
        message = f"--captions {captions}: no caption of an image of {data}"
        raise UserError(f"{message}; give the files of one split")

    numbers = sorted(files)
    random.Random(seed).shuffle(numbers)
    questions = []
    for number in numbers:
        raw = {"objects": there[number]}
        questions.append(Question(str(number), files[number], question, raw))

    def count(asked: Question, answer: str) -> Counts:
        counts = count_caption(words.objects(answer), asked.raw["objects"])
        return counts | {"length": len(answer.split())}

    return Benchmark(questions, count, CHAIR | {"length": (("length",), ("images",))})


def count_caption(named: list[str], there: set[str]) -> Counts:
    """What one description counts, from its mentions and the objects of its picture."""
    wrong = sum(name not in there for name in named)
    return {
        "images": 1,
        "mentioned": len(named),
        "hallucinated": wrong,
        "hallucinating": wrong > 0,
        "objects": len(there),
        "found": len(there & set(named)),
    }
