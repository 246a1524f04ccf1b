"""LLaVA-Bench (in the wild) and MMHal-Bench: the answers in the form that their judges' scripts
read.

Whether they are good is for those scripts to say, which ask another model; here only their length
is counted. A question that got no answer keeps an empty one, so that the judges' scripts find every
question at its place.
"""

import json
from pathlib import Path, PurePosixPath

from minialign.data.records import text_field
from minialign.errors import UserError
from minialign.evaluation.metrics import Counts, Figures
from minialign.evaluation.questions import Benchmark, Question, question_of, read_questions
from minialign.files import write_json, write_whole
from minialign.seeds import stable_seed

LENGTH: Figures = {"length": (("length",), ("answers",))}


def count_answer(question: Question, answer: str) -> Counts:
    """One answer and its words."""
    return {"answers": 1, "length": len(answer.split())}


def read_llava_bench(data: str, skip_bad: bool) -> Benchmark:
    """JSON Lines of question_id, image, text and category."""
    questions = read_questions(Path(data), llava_bench_question, skip_bad)
    return Benchmark(questions, count_answer, LENGTH)


def llava_bench_question(raw: object, identity: str) -> Question:
    """A question with the id by which the judge's script knows it."""
    question = question_of(raw, identity)
    if type(question.raw.get("question_id")) not in (int, str):
        raise UserError("field 'question_id' is missing, or neither a number nor a text")
    return question


def write_llava_bench(
    path: Path, questions: list[Question], found: dict[str, str], model_id: str
) -> None:
    """One line per question, in the order of the questions."""
    lines = []
    for question in questions:
        text = found.get(question.id, "")
        line = {
            "question_id": question.raw["question_id"],
            "prompt": question.text,
            "text": text,
            "answer_id": f"{stable_seed(model_id, question.id, text):016x}",
            "model_id": model_id,
            "metadata": {},
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def read_mmhal(data: str, images: str, skip_bad: bool) -> Benchmark:
    """Its response_template.json; a picture's file is named like the end of its image_src, or after
    its image_id.
    """

    def parse(raw: object, identity: str) -> Question:
        question = question_of(raw, identity, "image_src", "question")
        name, by_id = PurePosixPath(question.image).name, f"{text_field(raw, 'image_id')}.jpg"
        if not (Path(images) / name).exists() and (Path(images) / by_id).exists():
            name = by_id
        return Question(identity, name, question.text, question.raw)

    return Benchmark(read_questions(Path(data), parse, skip_bad), count_answer, LENGTH)


def write_mmhal(path: Path, questions: list[Question], found: dict[str, str]) -> None:
    """The array as it was, with `model_answer` filled."""
    items = [question.raw | {"model_answer": found.get(question.id, "")} for question in questions]
    write_json(path, items)
