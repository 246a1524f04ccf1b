"""The road that every benchmark on files takes: questions, answers saved as they come, counts per
image.

All questions about one picture are branches of one trunk, so that the picture is computed once.
Whole batches are appended to answers.jsonl, and a run that was killed asks only what has no answer
there."""

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
from minialign.files import append_lines, read_lines
from minialign.sampling.assistant import Assistant
from minialign.training.progress import require_same_settings

FILES = ("config.json", "answers.jsonl", "result.json")  # what a run leaves
# When a run is continued.
MAY_CHANGE = (
    "out",
    "limit",
    "batch_size",
    "workers",
    "skip_bad_records",
    "captions",
    "synonyms",
    "json",
)


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
    path: Path, parse: Callable[[object, int], Question], skip_bad: bool
) -> list[Question]:
    """The questions of a data file; `parse` takes a record and its number, beginning with 1."""
    file = open_file(str(path), "--data", "give the benchmark's own file of questions")
    numbered = ((file.place(number), number) for number in range(len(file)))
    return collect(numbered, lambda number: parse(file[number], number + 1), None, skip_bad)


def question_of(raw: object, identity: str, image: str = "image", text: str = "text") -> Question:
    """A record's question, by the names of the fields that hold the picture's name and the text."""
    if not isinstance(raw, dict):
        raise UserError("expected a JSON object")
    return Question(identity, text_field(raw, image), text_field(raw, text), raw)


def by_image(questions: list[Question], limit: int | None = None) -> dict[str, list[Question]]:
    """The questions about each picture, in the order in which pictures come up first; `limit`
    pictures only."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        if question.image in groups or limit is None or len(groups) < limit:
            groups.setdefault(question.image, []).append(question)
    return groups


def digest(questions: list[Question]) -> str:
    """A short name of what is asked: answers go with these questions and no others."""
    # image_src, as the file that MMHal-Bench's name stands for may come later.
    texts = [
        (question.id, question.raw.get("image_src", question.image), question.text)
        for question in questions
    ]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def answers_of_earlier_run(out: Path, settings: dict) -> dict[str, str]:
    """{question's id: answer} that an earlier run of the same settings left; any other folder is
    left alone."""
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
    max_new_tokens: int,
    batch_size: int,
    workers: int,
    skip_bad: bool,
) -> dict[str, str]:
    """Answer the questions about some pictures, `batch_size` pictures at a time; {question's id:
    answer}.

    Every batch is appended to `out` as it is done. A picture that cannot be read is a `UserError`,
    or left out.
    """

    def load(image: str) -> PreparedImage | UserError:
        try:
            return assistant.processor.prepare(pictures(image))
        except UserError as error:
            return error

    def opened(loaded: tuple[str, PreparedImage | UserError]) -> tuple[str, PreparedImage]:
        if isinstance(loaded[1], UserError):
            raise loaded[1]
        return loaded

    found: dict[str, str] = {}
    ahead = load_ahead(list(groups), load, workers)
    total = sum(map(len, groups.values()))
    with closing(ahead), tqdm(total=total, desc="evaluate", unit="answer") as bar:
        names = iter(groups)
        while part := list(zip(islice(names, batch_size), ahead, strict=False)):
            places = ((f"question {groups[name][0].id}", (name, image)) for name, image in part)
            batch = collect(places, opened, None, skip_bad)
            if batch:
                asked = [groups[name] for name, _ in batch]
                images = [image for _, image in batch]
                lines = answer_batch(assistant, images, asked, max_new_tokens)
                append_lines(out / "answers.jsonl", lines)
                found |= {line["id"]: line["answer"] for line in lines}
            bar.update(sum(len(groups[name]) for name, _ in part))
    return found


def answer_batch(
    assistant: Assistant,
    images: list[PreparedImage],
    asked: list[list[Question]],
    max_new_tokens: int,
) -> list[dict]:
    """A line of answers.jsonl for every question about some pictures; no white space around an
    answer."""
    texts = [[question.text for question in questions] for questions in asked]
    answers = assistant.answers(assistant.encode(images), images, texts, max_new_tokens)
    lines = []
    for questions, replies in zip(asked, answers, strict=True):
        for question, reply in zip(questions, replies, strict=True):
            lines.append(
                {
                    "id": question.id,
                    "image": question.image,
                    "question": question.text,
                    "answer": reply.strip(),
                }
            )
    return lines


def counts_per_image(
    benchmark: Benchmark, groups: dict[str, list[Question]], found: dict[str, str]
) -> list[Counts]:
    """What the answers about each picture count together; a picture without answers is left out."""
    counts = []
    for questions in groups.values():
        answered = [question for question in questions if question.id in found]
        if answered:
            together: Counter = Counter()
            for question in answered:
                together.update(benchmark.count(question, found[question.id]))
            counts.append(dict(together))
    return counts
