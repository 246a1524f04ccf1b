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

import torch
from tqdm import tqdm

from minialign.chat import Tokenizer
from minialign.data import collect, open_file
from minialign.errors import UserError
from minialign.files import append_lines, read_lines
from minialign.generate import Sampling, generate
from minialign.images import ImageProcessor, open_image
from minialign.llava import Llava
from minialign.loader import load_ahead
from minialign.masks import Branch, Sequence
from minialign.metrics import Counts, Figures
from minialign.records import text_field
from minialign.resume import require_same_settings

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


@dataclass(frozen=True)
class Asking:
    """How answers are come by: the model and what belongs to it."""

    model: Llava
    tokenizer: Tokenizer
    processor: ImageProcessor
    max_new_tokens: int


def answers(
    model, tokenizer, features, layouts, questions: list[list[str]], limit: int
) -> list[list[str]]:
    """Greedy answers to several questions per image: the image is the trunk, each question a
    branch.

    features (tiles, patches, D_vision) of all images; layouts are `ImageProcessor.layout`'s, one
    per image."""
    sequences = []
    for asked, (patches, packing) in zip(questions, layouts, strict=True):
        prompts = [tokenizer.prompt([("user", question)]) for question in asked]
        shared = prompts[0].index(tokenizer.image_id) + 1
        branches = [Branch(prompt[shared:]) for prompt in prompts]
        sequences.append(Sequence(prompts[0][:shared], branches, patches, packing=packing))
    done = generate(
        model,
        sequences,
        features,
        Sampling(limit, 0.0),
        {tokenizer.eos_id},
        pad_id=tokenizer.pad_id,
    )
    return [[tokenizer.decode(completion.ids) for completion in row] for row in done]


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
    named = (
        (question.id, question.raw.get("image_src", question.image), question.text)
        for question in questions
    )
    texts = json.dumps(
        list(named)
    )  # image_src: the file that MMHal-Bench's name stands for may come later
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def answers_of_earlier_run(out: Path, settings: dict, questions: list[Question]) -> dict[str, str]:
    """{question's id: answer} that an earlier run of the same settings left; any other folder is
    left alone."""
    if not any((out / name).exists() for name in FILES):
        return {}
    remedy = "name another --out"
    require_same_settings(out / "config.json", settings, MAY_CHANGE, remedy)
    known, found, file = {question.id for question in questions}, {}, out / "answers.jsonl"
    for number, line in enumerate(read_lines(file, remedy), start=1):
        identity, answer = line.get("id"), line.get("answer")
        if (
            not isinstance(identity, str)
            or not isinstance(answer, str)
            or identity not in known
            or identity in found
        ):
            raise UserError(
                f"{file}, line {number}: no answer to one of the questions, or a second one; {remedy}"
            )
        found[identity] = answer
    return found


def ask(
    asking: Asking,
    groups: dict[str, list[Question]],
    out: Path,
    images: str,
    batch_size: int,
    workers: int,
    skip_bad: bool,
) -> dict[str, str]:
    """Answer the questions about some pictures, `batch_size` pictures at a time; {question's id:
    answer}.

    Every batch is appended to `out` as it is done. A picture that cannot be read is a `UserError`,
    or left out."""

    def load(image: str):
        try:
            picture = open_image(images, image)
            return image, asking.processor(picture), asking.processor.layout(picture)
        except UserError as error:
            return image, error, None

    def opened(loaded):
        if isinstance(loaded[1], UserError):
            raise loaded[1]
        return loaded

    found: dict[str, str] = {}
    ahead = load_ahead(list(groups), load, workers)
    with (
        closing(ahead),
        tqdm(total=sum(map(len, groups.values())), desc="evaluate", unit="answer") as bar,
    ):
        while part := list(islice(ahead, batch_size)):
            places = ((f"question {groups[image][0].id}", (image, *rest)) for image, *rest in part)
            batch = collect(places, opened, None, skip_bad)
            if batch:
                lines = answer_batch(asking, batch, [groups[image] for image, _, _ in batch])
                append_lines(out / "answers.jsonl", lines)
                found |= {line["id"]: line["answer"] for line in lines}
            bar.update(sum(len(groups[image]) for image, _, _ in part))
    return found


def answer_batch(asking: Asking, batch: list[tuple], asked: list[list[Question]]) -> list[dict]:
    """A line of answers.jsonl for every question about some loaded pictures; no white space around
    an answer."""
    features = asking.model.encode_images(torch.cat([pixels for _, pixels, _ in batch]))
    texts = [[question.text for question in row] for row in asked]
    layouts = [layout for _, _, layout in batch]
    said = answers(asking.model, asking.tokenizer, features, layouts, texts, asking.max_new_tokens)
    return [
        {
            "id": question.id,
            "image": question.image,
            "question": question.text,
            "answer": text.strip(),
        }
        for row, replies in zip(asked, said, strict=True)
        for question, text in zip(row, replies, strict=True)
    ]


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
