"""Records of the data sets in use: what a record is, and one parser per format.

Fields as the data sets' own files have them (POVID, LLaVA-Instruct, RLHF-V, RLAIF-V, VLFeedback,
LLaVA-RLHF) and as TRL has its rows for image models, which is also the form of our own pairs files.
Parsers raise `UserError` for a bad record and `LeftOut` for a good one that there is no use for.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from minialign.data.tokenizer import Turn
from minialign.errors import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class LeftOut(UserError):
    """Not bad, but of no use: counted and left out, with or without --skip-bad-records."""


@dataclass(frozen=True)
class Record:
    """One example: its image's name, the conversation before the answer, y+ and, in a pair, y-."""

    id: str  # empty where the file has none: whoever reads the file numbers it
    image: str
    turns: list[Turn]
    chosen: str
    rejected: str = ""
    external: str = ""  # of a pair that was sampled here: the y- that its record had come with
    bdhs: dict = field(default_factory=dict)
    place: str = field(default="", compare=False)  # where it stands, for people

    @property
    def asked(self) -> str:
        """All that was said before the answer, a line each."""
        return "\n".join(text for _, text in self.turns)


def require_different(record: Record, name: str = "rejected") -> None:
    """Leave a pair out whose chosen and `name` responses do not differ: nothing is preferred."""
    if not getattr(record, name):
        raise LeftOut(f"no {name} response (of answers with ratings: none is rated below another)")
    if record.chosen == getattr(record, name):
        raise LeftOut("chosen and rejected are the same text")


# ---------------------------------------------------------------- fields


def value_of(raw: object, name: str, kind: type, what: str):
    """`raw[name]`, which must be a `kind`; `what` names that in words."""
    value = raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(value, kind):
        raise UserError(f"field {name!r} is {'missing' if value is None else 'not ' + what}")
    return value


def text_field(raw: object, name: str) -> str:
    """`raw[name]`, which must be a text with something in it."""
    value = value_of(raw, name, str, "a text")
    if not value.strip():
        raise UserError(f"field {name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        message = f"field {name!r} holds half a surrogate pair, which no file can hold"
        raise UserError(message) from None
    return value


def identity(raw: dict) -> str:
    """The record's `id`, or `idx`; a number will do, and none, too."""
    name = "id" if raw.get("id") is not None else "idx"
    if raw.get(name) is None:
        return ""
    return str(raw[name]) if type(raw[name]) is int else text_field(raw, name)


def role_of(turn: dict, name: str, number: int) -> str:
    """A turn's role; turns alternate and begin with the user."""
    role = ROLES.get(text_field(turn, name))
    if role != ("user", "assistant")[number % 2]:
        message = f"turn {number + 1} is from {turn[name]!r}"
        raise UserError(f"{message}; turns alternate, the user's first")
    return role


def conversation(raw: dict, name: str = "conversations") -> list[Turn]:
    """LLaVA's form of a talk, which must end with an answer; `<image>` is taken out."""
    talk = raw.get(name)
    if not isinstance(talk, list) or len(talk) < 2:
        raise UserError(f"field {name!r} must hold a question and its answer")
    turns = []
    for number, turn in enumerate(talk):
        text = text_field(turn, "value")
        if number == 0:  # the placeholder's place is the template's choice
            text = re.sub(r"<image>\n|\n<image>|<image>", "", text, count=1)
            text = text_field({"value": text}, "value")
        turns.append((role_of(turn, "from", number), text.strip()))
    if len(turns) % 2:
        raise UserError(f"field {name!r} must end with an answer")
    return turns


def message_text(message: object) -> str:
    """What a chat message says: `content` is a text, or parts of which the texts count (TRL)."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list):
        return text_field(message, "content")
    said = [part for part in parts if isinstance(part, dict) and part.get("type") != "image"]
    texts = [text_field(part, "text") for part in said]
    return text_field({"content": "\n".join(texts)}, "content")


def answer_field(raw: dict, name: str) -> str:
    """An answer: a text, or a list of one message by the assistant."""
    value = raw.get(name)
    if not isinstance(value, list):
        return text_field(raw, name)
    if len(value) != 1:
        raise UserError(f"field {name!r} must be a text, or a list of one message")
    role_of(value[0], "role", 1)
    return message_text(value[0])


# ---------------------------------------------------------------- one parser per format


def pair_record(raw: dict) -> Record:
    """A pairs file's line; `prompt` is a question, or messages, and then so are the answers."""
    images = raw.get("images")
    if not isinstance(images, list) or len(images) != 1:
        raise UserError("field 'images' must be a list of one path")
    bdhs = raw.get("bdhs") or {}  # how a pair came about; pairs from elsewhere lack it
    if not isinstance(bdhs, dict):
        raise UserError("field 'bdhs' must be an object")
    prompt = raw.get("prompt")
    if isinstance(prompt, list):
        turns = [(role_of(turn, "role", n), message_text(turn)) for n, turn in enumerate(prompt)]
        if len(turns) % 2 == 0:
            raise UserError("field 'prompt' must end with the user's message")
    else:
        turns = [("user", text_field(raw, "prompt"))]
    return Record(
        id=identity(raw),
        image=text_field({"images": images[0]}, "images"),
        turns=turns,
        chosen=answer_field(raw, "chosen"),
        rejected=answer_field(raw, "rejected"),
        external=answer_field(raw, "external") if raw.get("external") else "",
        bdhs=bdhs,
    )


def instruct_record(raw: dict) -> Record:
    """LLaVA-Instruct, 150k or the 665k mix: the last answer is y+, and there is no y-."""
    if raw.get("image") is None:
        raise LeftOut("text without an image, as in the 665k mix")
    turns = conversation(raw)
    return Record(identity(raw), text_field(raw, "image"), turns[:-1], turns[-1][1])


def povid_record(raw: dict) -> Record:
    """POVID: the talk with its last answer spoilt stands beside it."""
    image = text_field(raw, "image")
    turns = conversation(raw)
    _, rejected = conversation(raw, "rejected_conversations")[-1]
    return Record(identity(raw), image, turns[:-1], turns[-1][1], rejected)


def llava_rlhf_record(raw: dict) -> Record:
    """LLaVA-RLHF: two outputs stand for the last answer; `preference` names the better, 1 or 2."""
    image = text_field(raw, "image")
    turns = conversation(raw)
    better = raw.get("preference")
    if type(better) is not int or better not in (1, 2):
        raise UserError(f"field 'preference' is {str(better)[:40]!r}, neither 1 nor 2")
    chosen, rejected = (
        text_field(value_of(raw, f"output_{n}", dict, "an object"), "value").strip()
        for n in (better, 3 - better)
    )
    return Record(identity(raw), image, turns[:-1], chosen, rejected)


def rlaif_v_record(raw: dict) -> Record:
    """RLAIF-V: question and both answers are columns."""
    question = text_field(raw, "question").strip()
    chosen = text_field(raw, "chosen").strip()
    rejected = text_field(raw, "rejected").strip()
    return Record(identity(raw), text_field(raw, "image"), [("user", question)], chosen, rejected)


def rlhf_v_record(raw: dict) -> Record:
    """RLHF-V: the columns of RLAIF-V, as a JSON text within the record."""
    try:
        inner = json.loads(text_field(raw, "text"))
    except (ValueError, RecursionError) as error:
        message = f"field 'text' is not JSON of question, chosen and rejected ({error})"
        raise UserError(message) from None
    if not isinstance(inner, dict):
        raise UserError("field 'text' is not a JSON object of question, chosen and rejected")
    columns = {name: inner.get(name) for name in ("question", "chosen", "rejected")}
    return rlaif_v_record(raw | columns)


def vlfeedback_record(raw: dict) -> Record:
    """VLFeedback: of its rated answers the best and the worst by mean rating.

    Where all are rated alike there is no y-.
    """
    answers = raw.get("completions")
    if isinstance(answers, dict):  # columns, as `datasets` writes a list of objects
        columns = list(answers.values())
        if not all(isinstance(each, list) and len(each) == len(columns[0]) for each in columns):
            message = "field 'completions' must be a list, or an object of lists of one length"
            raise UserError(message)
        answers = [dict(zip(answers, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(answers, list) or not answers:
        raise UserError("field 'completions' must hold the rated answers")

    ratings = [mean_rating(answer) for answer in answers]
    texts = [text_field(answer, "response").strip() for answer in answers]
    best, worst = max(ratings), min(ratings)
    chosen = texts[ratings.index(best)]
    rejected = texts[ratings.index(worst)] if best > worst else ""
    question = text_field(raw, "prompt").strip()
    image = text_field(raw, "image" if "image" in raw and "img_path" not in raw else "img_path")
    return Record(identity(raw), image, [("user", question)], chosen, rejected)


def mean_rating(answer: object) -> float:
    """The mean of an answer's ratings, which are numbers as texts."""
    annotations = value_of(answer, "annotations", dict, "an object")
    if not annotations:
        raise UserError("field 'annotations' is empty")
    ratings = []
    for aspect, annotation in annotations.items():
        rating = annotation.get("Rating") if isinstance(annotation, dict) else None
        try:
            number = float(rating)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            message = f"the Rating of {aspect[:40]!r} is {str(rating)[:40]!r}, no number"
            raise UserError(f"field 'annotations': {message}")
        ratings.append(number)
    return sum(ratings) / len(ratings)


FormatName = Literal["pairs", "povid", "llava-rlhf", "instruct", "vlfeedback", "rlaif-v", "rlhf-v"]
# Format -> the fields by which a record is known (the first that fits counts), and the parser.
FORMATS: dict[FormatName, tuple[set[str], Callable[[dict], Record]]] = {
    "pairs": ({"images", "chosen", "rejected"}, pair_record),
    "povid": ({"conversations", "rejected_conversations"}, povid_record),
    "llava-rlhf": ({"conversations", "output_1", "output_2"}, llava_rlhf_record),
    "instruct": ({"conversations"}, instruct_record),
    "vlfeedback": ({"completions"}, vlfeedback_record),
    "rlaif-v": ({"question", "chosen", "rejected"}, rlaif_v_record),
    "rlhf-v": ({"text"}, rlhf_v_record),
}


def preference_fields(turns: list[Turn], answers: dict[str, str], messages: bool) -> dict:
    """`prompt` and the answers of a pairs file: bare texts, or messages where there are earlier
    turns.

    A file keeps to one form, as its readers (datasets, TRL) want one type per field.
    """
    if not messages:
        return {"prompt": turns[-1][1]} | answers
    fields = {"prompt": [{"role": role, "content": text} for role, text in turns]}
    for name, answer in answers.items():
        fields[name] = [{"role": "assistant", "content": answer}]
    return fields
