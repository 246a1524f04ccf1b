"""POPE: is there such a thing in the picture? Yes or no, in three settings of absent things.

A file holds JSON Lines (also where its name ends in .json): {"question_id", "image", "text",
"label"}. The questions are asked as they stand there, without a request for one word behind them.
"""

import re
from pathlib import Path

from minialign.errors import UserError
from minialign.evaluation.metrics import (
    SETTINGS_OF_POPE,
    Counts,
    Figures,
    pope_figures,
    pope_verdict,
)
from minialign.evaluation.questions import Benchmark, Question, question_of, read_questions

YES_OR_NO = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)


def setting_of(path: Path) -> str:
    """The setting that a file's name tells, or ""."""
    return next((setting for setting in SETTINGS_OF_POPE if setting in path.name), "")


def pope_files(data: Path) -> dict[str, Path]:
    """{setting: file}: a file by itself, or the three of a folder."""
    if not data.is_dir():
        return {setting_of(data): data}
    files = sorted(path for path in data.iterdir() if path.suffix in (".json", ".jsonl"))
    found = {}
    for setting in SETTINGS_OF_POPE:
        named = [path for path in files if setting_of(path) == setting]
        if len(named) != 1:
            there = ", ".join(path.name for path in named) or "no file"
            message = f"--data {data}: for the {setting} setting there is {there}"
            raise UserError(f"{message}; give a folder with one file of each setting, or one file")
        found[setting] = named[0]
    return found


def read_pope(data: str, skip_bad: bool) -> Benchmark:
    """The questions of a POPE file or folder, and what an answer counts."""
    questions: list[Question] = []
    figures: Figures = {}
    overall: Figures = {}  # over all questions, whatever their setting
    files = pope_files(Path(data))
    for setting, path in files.items():
        of_file = read_questions(path, pope_question, skip_bad)
        for question in of_file:
            question.raw["setting"] = setting
        questions += of_file
        for name, (above, below) in pope_figures(setting).items():
            figures[name] = above, below
            name = name.replace(f"_{setting}", "", 1)
            all_above, all_below = overall.get(name, ((), ()))
            overall[name] = all_above + above, all_below + below
    if len(files) > 1:
        figures |= overall
    return Benchmark(questions, count_answer, figures)


def pope_question(raw: object, identity: str) -> Question:
    """A question that has its right answer beside it."""
    # Silent in the paper: the question is asked as it stands, without a request for one word.
    question = question_of(raw, identity)
    label = question.raw.get("label")
    if label not in ("yes", "no"):
        raise UserError(f"field 'label' is {str(label)[:40]!r}, neither 'yes' nor 'no'")
    return question


def count_answer(question: Question, answer: str) -> Counts:
    """One true or false yes or no, and whether it is neither in so many words."""
    setting = question.raw["setting"]
    yes = pope_verdict(answer)
    right = yes == (question.raw["label"] == "yes")
    kind = ("t" if right else "f") + ("p" if yes else "n")
    return {f"{setting}_{kind}": 1, f"{setting}_unclear": not YES_OR_NO.search(answer)}
