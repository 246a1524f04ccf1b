"""The road that every benchmark on files takes: questions, answers saved as they come, counts per
image.

All questions about one picture are branches of one trunk, so that the picture is computed once.
Whole batches are appended to answers.jsonl, and a run that was killed asks only what has no answer
there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from minialign.data.images import PreparedImage
from minialign.data.prefetch import load_ahead
from minialign.data.record_files import collect, open_file
from minialign.data.records import text_field
from minialign.errors import UserError
from minialign.evaluation.metrics import Counts, Figures
from minialign.files import append_lines, read_lines, require_same_settings, write_json
from minialign.sampling.assistant import Assistant

FILES = ("config.json", "answers.jsonl", "result.json")  # what a run leaves
# What changes no answer, and so may change when a run is continued.
MAY_CHANGE = (
    "out", "limit", "batch_size", "workers", "skip_bad_records", "captions", "synonyms", "json",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    id: str  # no two are the same: where it stands in the data, as the data's own ids may repeat
    image: str  # its file, below --images
    text: str
    raw: dict = field(default_factory=dict)  # its record


@dataclass(frozen=True)
class Benchmark:
    """What is asked, what one answer counts, and the figures that the counts of an image become."""

    questions: list[Question]
    count: Callable[[Question, str], Counts]
    figures: Figures


def read_questions(
    path: Path, parse: Callable[[object, str], Question], skip_bad: bool
) -> list[Question]:
    """The questions of a data file; `parse` takes a record and its id, the file's name and the
    record's number.
    """
    file = open_file(str(path), "--data", "give the benchmark's own file of questions")
    places = ((file.place(number), number) for number in range(len(file)))

    def parse_number(number: int) -> Question:
        return parse(file[number], f"{path.name}:{number + 1}")

    return collect(places, parse_number, None, skip_bad)


def question_of(raw: object, identity: str, image: str = "image", text: str = "text") -> Question:
    """A record's question, by the names of the fields that hold the picture's name and the text."""
    if not isinstance(raw, dict):
        raise UserError("expected a JSON object")
    return Question(identity, text_field(raw, image), text_field(raw, text), raw)


def by_image(questions: list[Question], limit: int | None = None) -> dict[str, list[Question]]:
    """The questions about each picture, in the order in which pictures come up first; `limit`
    pictures only.
    """
    groups: dict[str, list[Question]] = {}
    for question in questions:
        if question.image in groups or limit is None or len(groups) < limit:
            groups.setdefault(question.image, []).append(question)
    return groups


def digest(questions: list[Question]) -> str:
    """A short name of what is asked: answers go with these questions and no others."""
    texts = []
    for question in questions:
        # image_src, as the file that MMHal-Bench's name stands for may come later.
        image = question.raw.get("image_src", question.image)
        texts.append((question.id, image, question.text))
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def answers_of_earlier_run(out: Path, settings: dict) -> dict[str, str]:
    """{question's id: answer} that an earlier run of the same settings left; any other folder is
    left alone.
    """
    if not any((out / name).exists() for name in FILES):
        return {}
    remedy = "name another --out"
    require_same_settings(out / "config.json", settings, MAY_CHANGE, remedy)
    lines = read_lines(out / "answers.jsonl", remedy)
    return {line["id"]: line["answer"] for line in lines}


def ask(
    assistant: Assistant,
    pictures: Callable[[str], Image.Image],
    groups: dict[str, list[Question]],
    out: Path,
    settings: dict,
    max_new_tokens: int,
    batch_size: int,
    workers: int,
    skip_bad: bool,
) -> dict[str, str]:
    """Answer the questions about some pictures, `batch_size` pictures at a time; {question's id:
    answer}.

    Every batch is appended to `out` as it is done, the first with the `settings` beside it. A
    picture that cannot be read, and a question that is too long, is a `UserError`, or left out.
    """

    def load(name: str) -> PreparedImage | UserError:
        """By a thread, ahead of its turn: so an error is kept until then."""
        try:
            return assistant.processor.prepare(pictures(name))
        except UserError as error:
            return error

    found: dict[str, str] = {}
    names = list(groups)
    total = sum(len(questions) for questions in groups.values())
    with (
        closing(load_ahead(names, load, workers)) as ahead,
        tqdm(total=total, desc="evaluate", unit="answer") as bar,
    ):
        for start in range(0, len(names), batch_size):
            part = names[start : start + batch_size]
            places = [f"question {groups[name][0].id}" for name in part]
            loaded = zip(part, islice(ahead, len(part)), strict=True)
            batch = collect(zip(places, loaded, strict=True), unless_refused, None, skip_bad)
            images, asked = [], []
            for name, image in batch:
                places = ((f"question {question.id}", question) for question in groups[name])
                short = collect(places, fitting(assistant, image), None, skip_bad)
                if short:
                    images.append(image)
                    asked.append(short)
            if images:
                lines = answer_batch(assistant, images, asked, max_new_tokens)
                if not (out / "answers.jsonl").exists():
                    write_json(out / "config.json", settings)
                append_lines(out / "answers.jsonl", lines)
                found |= {line["id"]: line["answer"] for line in lines}
            bar.update(sum(len(groups[name]) for name in part))
    return found


def unless_refused(loaded: tuple[str, PreparedImage | UserError]) -> tuple[str, PreparedImage]:
    """A picture and its name; what was wrong with it is raised here."""
    name, image = loaded
    if isinstance(image, UserError):
        raise image
    return name, image


def fitting(assistant: Assistant, image: PreparedImage) -> Callable[[Question], Question]:
    """Gives a question back that leaves an answer at least one position behind its picture."""

    def question_that_fits(question: Question) -> Question:
        assistant.require_positions([("user", question.text)], image, 1)
        return question

    return question_that_fits


def answer_batch(
    assistant: Assistant,
    images: list[PreparedImage],
    asked: list[list[Question]],
    max_new_tokens: int,
) -> list[dict]:
    """A line of answers.jsonl for every question about some pictures; no white space around an
    answer.
    """
    texts = [[question.text for question in questions] for questions in asked]
    answers = assistant.answers(assistant.encode(images), images, texts, max_new_tokens)
    lines = []
    for questions, replies in zip(asked, answers, strict=True):
        for question, reply in zip(questions, replies, strict=True):
            line = {"id": question.id, "image": question.image, "question": question.text}
            lines.append(line | {"answer": reply.strip()})
    return lines


def counts_per_image(
    benchmark: Benchmark, groups: dict[str, list[Question]], found: dict[str, str]
) -> list[Counts]:
    """What the answers about each picture count together; a picture without answers is left out."""
    counts = []
    for questions in groups.values():
        answered = [question for question in questions if question.id in found]
        together: Counter = Counter()
        for question in answered:
            together.update(benchmark.count(question, found[question.id]))
        if answered:
            counts.append(dict(together))
    return counts
