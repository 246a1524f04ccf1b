"""Records of the data sets in use: what a record is, and one parser per format.

`FORMATS` says which formats there are, by which fields a record of each is known, and what becomes
of them. Every parser hands its texts to `make_record`, the one place where roles, placeholders and
control tokens in texts are dealt with. Parsers raise `UserError` for a bad record and `LeftOut` for
a good one that there is no use for.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from minialign import fields
from minialign.data.tokenizer import Turn
from minialign.errors import UserError
from minialign.fields import shown

# What stands in a text for the picture, in LLaVA's data and in what follows it.
PLACEHOLDER = "<image>"

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# What a template, and no text, may hold. Written out in a text it would be read as those very
# characters, around which the template then puts its own.
MARKUP = re.compile(
    r"(?:USER|ASSISTANT|\bSYSTEM)[:：]"  # Vicuna's roles, anywhere
    r"|\A(?i:human|user|assistant|gpt|system)[:：]"  # anybody's, where a text begins
    r"|\n\n(?:Human|Assistant):"
    r"|(?i:\#\#\#\s*(?:human|user|assistant|gpt|system|instruction|response)\s*:)"
    r"|\[/?INST\]|<</?SYS>>"  # Llama-2's and Mistral's
    r"|<[|｜][^|｜<>\n]{1,40}[|｜]>"  # ChatML's, Llama-3's, DeepSeek's
    r"|</?s>|<(?:unk|pad|bos|eos|start_of_turn|end_of_turn)>"
    # Placeholders of other programs, and the one known here where none may stand.
    r"|(?i:</?(?:image|img|video|audio)(?:here|\d{0,3}|[_\- ][\w\-]{1,20})\s*/?>|<im_\w{1,10}>)"
)

# Of a pair's `bdhs`, what is used again.
BDHS = {
    "mask_seed": fields.whole(0, 2**31),
    "rho_th": fields.number(0, 1),
    "noise_steps": fields.whole(0, 1000),
    "iterations": fields.whole(1, 10**6),
    "similarity": fields.number(-1.01, 1.01),
    "guided": fields.flag(),
}

# Fields beside the conversation that would change what a model is asked.
UNKNOWN_HERE = ("system", "tools", "video", "videos", "audio", "audios")


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
    image_turn: int = 0  # the turn at whose head the image stands
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
        # Differs from the paper: pairs of one text are left out.
        raise LeftOut(f"chosen and {name} are the same text")


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
    require_writable(value, name)
    return value


def require_writable(value: object, name: str) -> None:
    """Refuse what cannot be written into a file again, as pairs and answers are: half of a
    surrogate pair, in any depth, and a nesting that Python reads but cannot write."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        message = f"field {name!r} holds half a surrogate pair, which no file can hold"
        raise UserError(message) from None
    except RecursionError:
        raise UserError(f"field {name!r} is nested too deep to be written again") from None


def identity(raw: dict) -> str:
    """The record's `id`, or `idx`; a number will do, and none, too."""
    name = "id" if raw.get("id") is not None else "idx"
    if raw.get(name) is None:
        return ""
    return str(raw[name]) if type(raw[name]) is int else text_field(raw, name)


# ---------------------------------------------------------------- pictures


def image_of(raw: dict, talks: tuple[object, ...] = ()) -> str:
    """The name of the record's one picture, however it is spelled: `image`, `images` or `img_path`,
    a name, a list of one, a dict of path and bytes, or part of a message in `talks` (TRL)."""
    given = {name: raw[name] for name in ("image", "images", "img_path") if name in raw}
    for talk in talks:
        messages = talk if isinstance(talk, list) else []
        parts = [value for message in messages for value in pictures_in(message)]
        if parts:
            given["content"] = parts
    if not given:
        raise UserError("field 'image' (or 'images') is missing")

    found = {name: names_in(value, name) for name, value in given.items()}
    found = {name: names for name, names in found.items() if names}
    if not found:
        raise LeftOut("text without an image")
    most = max(found.values(), key=len)
    if len(most) > 1:
        message = f"{len(most)} pictures to a record; a record has one here"
        raise UserError(f"{message}, so split it, or join its pictures into one")
    if any(names != most for names in found.values()):
        message = f"fields {' and '.join(map(repr, found))} name different pictures"
        raise UserError(f"{message}; a record has one here")
    return most[0]


def pictures_in(message: object) -> list:
    """The pictures that a message's content parts name; a part without one is a placeholder."""
    parts = message.get("content") if isinstance(message, dict) else None
    images = [part for part in parts if is_image(part)] if isinstance(parts, list) else []
    keys = ("image", "path", "url", "image_url")
    return [part[key] for part in images for key in keys if part.get(key)]


def is_image(part: object) -> bool:
    """Whether a content part stands for a picture."""
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def names_in(value: object, name: str) -> list[str]:
    """The names of the pictures that a field gives; none of an empty one."""
    if value in (None, "", []):
        return []
    if isinstance(value, list):
        return [found for each in value for found in names_in(each, name)]
    if isinstance(value, dict) and value.get("bytes"):
        message = f"field {name!r} holds a picture's bytes"
        raise UserError(f"{message}; name a file, as docs/running.md's program for parquet does")
    if isinstance(value, dict) and value.keys() & {"path", "bytes", "url"}:
        return names_in(value.get("path") or value.get("url"), name)
    if not isinstance(value, str):
        raise UserError(f"field {name!r} is not a text that names a picture's file")
    if re.match(r"\w+://|data:", value) or len(value) > 4096:
        message = f"field {name!r} is {shown(value)}, no name of a file"
        raise UserError(f"{message}; put the picture below --images and name it")
    return [text_field({name: value}, name)]


# ---------------------------------------------------------------- messages


def turn_of(message: object) -> Turn:
    """A message's role and text, by LLaVA's names (from, value) or OpenAI's (role, content).

    Content may be parts (TRL), of which one that is an image becomes the placeholder.
    """
    if not isinstance(message, dict):
        raise UserError("a message must be an object of role and content, or of from and value")
    if "from" in message:
        return text_field(message, "from"), text_field(message, "value")
    role, parts = text_field(message, "role"), message.get("content")
    if not isinstance(parts, list):
        return role, text_field(message, "content")
    texts = [PLACEHOLDER if is_image(part) else text_part(part) for part in parts]
    return role, text_field({"content": "\n".join(texts)}, "content")


def text_part(part: object) -> str:
    """The text of a content part; there is no use for other kinds, such as videos."""
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind != "text":
        raise UserError(f"field 'content' has a part of type {shown(kind)}, neither text nor image")
    return text_field(part, "text")


def turns_of(talk: object, name: str, first: str = "user") -> list[Turn]:
    """The turns of a list of messages, which alternate; `first` says whose the first is."""
    if not isinstance(talk, list):
        raise UserError(f"field {name!r} is {'missing' if talk is None else 'no list of messages'}")
    turns = []
    wanted = ("user", "assistant") if first == "user" else ("assistant", "user")
    for number, message in enumerate(talk):
        try:
            role, text = turn_of(message)
        except UserError as error:
            raise UserError(f"field {name!r}, turn {number + 1}: {error}") from None
        where = f"field {name!r}, turn {number + 1} is from {shown(role)}"
        if role == "system":
            said = "whose text is the template's own here"
            raise UserError(f"{where}, {said}; leave it out, or put it before the first question")
        if ROLES.get(role) != wanted[number % 2]:
            raise UserError(f"{where}; turns alternate, the {first}'s first")
        turns.append((ROLES[role], text))
    return turns


def conversation(raw: dict, name: str = "conversations") -> list[Turn]:
    """A talk that ends with an answer."""
    turns = turns_of(raw.get(name), name)
    if not turns or len(turns) % 2:
        raise UserError(f"field {name!r} must hold a question and end with an answer")
    return turns


def answer_of(raw: dict, name: str) -> tuple[list[Turn], str]:
    """An answer, and the turns before it where the field holds a whole conversation: it is a text,
    the assistant's message, or a list of messages that ends with it."""
    value = raw.get(name)
    if not isinstance(value, list | dict):
        return [], text_field(raw, name)
    talk = value if isinstance(value, list) else [value]
    turns = turns_of(talk, name, "assistant" if len(talk) == 1 else "user")
    if not turns or turns[-1][0] != "assistant":
        raise UserError(f"field {name!r} must be a text, or end with the assistant's message")
    return turns[:-1], turns[-1][1]


# ---------------------------------------------------------------- the record


def make_record(
    raw: dict,
    image: str,
    turns: list[Turn],
    chosen: str,
    rejected: str = "",
    external: str = "",
    bdhs: dict | None = None,
) -> Record:
    """The record of what a parser has found, its texts without white space around them.

    The placeholder, of which there is one or none, is taken out of its turn, at whose head the
    image then stands, as in LLaVA's training; without one it stands in the first. Roles and control
    tokens in texts are refused: see `MARKUP`.
    """
    for name in UNKNOWN_HERE:
        if raw.get(name):
            message = f"field {name!r} has no place here"
            raise UserError(f"{message} (system texts are the template's); leave it out")

    if len(turns) % 2 == 0:
        raise UserError("the prompt must end with the user's message")

    found = [text.count(PLACEHOLDER) if role == "user" else 0 for role, text in turns]
    if sum(found) > 1:
        message = f"{sum(found)} placeholders {PLACEHOLDER} for one picture"
        raise UserError(f"{message}; a record has one picture here, and its placeholder once")
    plain = []
    for number, (role, text) in enumerate(turns):
        text = text.replace(PLACEHOLDER, "") if found[number] else text
        plain.append((role, text_alone(text, f"turn {number + 1}")))
    return Record(
        id=identity(raw),
        image=image,
        turns=plain,
        chosen=text_alone(chosen, "the chosen response"),
        rejected=text_alone(rejected, "the rejected response") if rejected else "",
        external=text_alone(external, "the external response") if external else "",
        bdhs=bdhs or {},
        image_turn=found.index(1) if any(found) else 0,
    )


def text_alone(text: str, where: str) -> str:
    """A text without white space around it, and with nothing in it that is the template's."""
    text = text.strip()
    if not text:
        raise UserError(f"{where} is empty")
    markup = MARKUP.search(text)
    if markup:
        message = f"{where} holds {markup[0].strip()!r}, which is the template's to write"
        raise UserError(f"{message} and would be read as those characters; take it out of the text")
    return text


# ---------------------------------------------------------------- one parser per format


def pair_record(raw: dict) -> Record:
    """A pairs file's line, or a row of TRL's: `prompt` is a question or messages.

    Without it the answers are whole conversations, whose common beginning is the prompt.
    """
    bdhs = raw.get("bdhs") or {}  # how a pair came about; pairs from elsewhere lack it
    if not isinstance(bdhs, dict):
        raise UserError("field 'bdhs' must be an object")
    for name, rule in BDHS.items():
        if bdhs.get(name) is not None and not rule.fits(bdhs[name]):
            raise UserError(f"field 'bdhs': {name} is {shown(bdhs[name])}; {rule.rule}")
    image = image_of(raw, (raw.get("prompt"), raw.get("chosen")))
    before, chosen = answer_of(raw, "chosen")
    same, rejected = answer_of(raw, "rejected")
    _, external = answer_of(raw, "external") if raw.get("external") else ([], "")
    if before != same:
        message = "chosen and rejected differ before their last message"
        raise UserError(f"{message}; what comes before is their common prompt")

    if isinstance(raw.get("prompt"), list):
        turns = turns_of(raw["prompt"], "prompt")
    elif raw.get("prompt") is not None or not before:
        turns = [("user", text_field(raw, "prompt"))]
    else:
        turns = before
    if before not in ([], turns):
        raise UserError("field 'prompt' is not how chosen and rejected begin; leave one of them")
    return make_record(raw, image, turns, chosen, rejected, external, bdhs)


def talk_field(raw: dict) -> str:
    """The name of the field that holds the conversation."""
    return "messages" if "messages" in raw and "conversations" not in raw else "conversations"


def instruct_record(raw: dict) -> Record:
    """LLaVA-Instruct, 150k or the 665k mix: the last answer is y+, and there is no y-."""
    name = talk_field(raw)
    # A record of the mix without a picture has no field for it either.
    image = image_of({"image": None} | raw, (raw.get(name),))
    *turns, (_, chosen) = conversation(raw, name)
    return make_record(raw, image, turns, chosen)


def povid_record(raw: dict) -> Record:
    """POVID: the talk with its last answer spoilt stands beside it."""
    image = image_of(raw)
    *turns, (_, chosen) = conversation(raw)
    _, rejected = conversation(raw, "rejected_conversations")[-1]
    return make_record(raw, image, turns, chosen, rejected)


def llava_rlhf_record(raw: dict) -> Record:
    """LLaVA-RLHF: two outputs stand for the last answer; `preference` names the better, 1 or 2."""
    image = image_of(raw)
    turns = conversation(raw)[:-1]
    better = raw.get("preference")
    if type(better) is not int or better not in (1, 2):
        raise UserError(f"field 'preference' is {shown(better)}, neither 1 nor 2")
    chosen, rejected = (
        text_field(value_of(raw, f"output_{n}", dict, "an object"), "value")
        for n in (better, 3 - better)
    )
    return make_record(raw, image, turns, chosen, rejected)


def sharegpt_record(raw: dict) -> Record:
    """LLaMA-Factory's sharegpt preferences: a talk up to the question, and two answers to it."""
    name = talk_field(raw)
    image = image_of(raw, (raw.get(name),))
    answers = [answer_of(raw, answer) for answer in ("chosen", "rejected")]
    if any(before for before, _ in answers):
        raise UserError("fields 'chosen' and 'rejected' must hold one message each")
    (_, chosen), (_, rejected) = answers
    return make_record(raw, image, turns_of(raw.get(name), name), chosen, rejected)


def alpaca_record(raw: dict) -> Record:
    """LLaMA-Factory's alpaca preferences: `input`, if there is one, continues `instruction`, and
    `history` has the earlier questions and answers."""
    image = image_of(raw)
    question = text_field(raw, "instruction")
    if raw.get("input"):
        question += "\n" + text_field(raw, "input")
    history = raw.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(earlier, list) and len(earlier) == 2 for earlier in history
    )
    if not pairs:
        raise UserError("field 'history' must hold pairs of a question and its answer")
    turns = []
    for earlier in history:
        for role, text in zip(("user", "assistant"), earlier, strict=True):
            turns.append((role, text_field({"history": text}, "history")))
    turns.append(("user", question))
    return make_record(raw, image, turns, text_field(raw, "chosen"), text_field(raw, "rejected"))


def rlaif_v_record(raw: dict) -> Record:
    """RLAIF-V: question and both answers are columns."""
    turns = [("user", text_field(raw, "question"))]
    chosen, rejected = text_field(raw, "chosen"), text_field(raw, "rejected")
    return make_record(raw, image_of(raw), turns, chosen, rejected)


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

    An answer with a rating of N/A does not count. Where all are rated alike there is no y-.
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

    # (mean rating, answer) of those that are rated; the first of several that are rated alike.
    rated = [(mean_rating(answer), answer) for answer in answers]
    rated = [(rating, answer) for rating, answer in rated if rating is not None]
    if not rated:
        raise LeftOut("no answer is rated, as all have N/A")
    best, chosen = max(rated, key=lambda each: each[0])
    worst, rejected = min(rated, key=lambda each: each[0])
    return make_record(
        raw,
        image_of(raw),
        [("user", text_field(raw, "prompt"))],
        text_field(chosen, "response"),
        text_field(rejected, "response") if best > worst else "",
    )


def mean_rating(answer: object) -> float | None:
    """The mean of an answer's ratings, which are numbers as texts; None where one is N/A."""
    annotations = value_of(answer, "annotations", dict, "an object")
    if not annotations:
        raise UserError("field 'annotations' is empty")
    ratings = []
    for aspect, annotation in annotations.items():
        rating = annotation.get("Rating") if isinstance(annotation, dict) else None
        if rating == "N/A":
            return None
        try:
            number = float(rating)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            message = f"the Rating of {shown(aspect)} is {shown(rating)}, no number"
            raise UserError(f"field 'annotations': {message}")
        ratings.append(number)
    return sum(ratings) / len(ratings)


# ---------------------------------------------------------------- all formats


@dataclass(frozen=True)
class Format:
    """A form of record.

    parse     makes a `Record` of one
    known_by  sets of fields, any of which tells it
    what      where it is from, and what its fields become: docs/data.md has this text
    """

    parse: Callable[[dict], Record]
    known_by: tuple[str, ...]  # each the names of some fields, with spaces between
    what: str


FORMATS = {
    "pairs": Format(
        pair_record,
        ("prompt chosen rejected", "chosen rejected"),
        "What `sample_bdhs.py` writes, and TRL's rows: `prompt` a question or messages, `chosen` "
        "and `rejected` texts or messages; without `prompt` two conversations that begin alike.",
    ),
    "povid": Format(
        povid_record,
        ("conversations rejected_conversations",),
        "POVID: the last answers of `conversations` and `rejected_conversations`.",
    ),
    "llava-rlhf": Format(
        llava_rlhf_record,
        ("conversations output_1 output_2",),
        "LLaVA-RLHF: `output_1` and `output_2` stand for the last answer of `conversations`; "
        "`preference` (1 or 2) names the better.",
    ),
    "sharegpt": Format(
        sharegpt_record,
        ("conversations chosen rejected", "messages chosen rejected"),
        "LLaMA-Factory's sharegpt preferences: `conversations` (or `messages`) up to the question, "
        "`chosen` and `rejected` a message each.",
    ),
    "alpaca": Format(
        alpaca_record,
        ("instruction chosen rejected",),
        "LLaMA-Factory's alpaca preferences: `instruction` and `input` are the question, `history` "
        "the turns before it, `chosen` and `rejected` texts.",
    ),
    "instruct": Format(
        instruct_record,
        ("conversations", "messages"),
        "LLaVA-Instruct, 150k or the 665k mix: the last answer of `conversations` (or `messages`) "
        "is chosen; nothing is rejected, so `sample_bdhs.py` alone reads it.",
    ),
    "vlfeedback": Format(
        vlfeedback_record,
        ("completions",),
        "VLFeedback: the best and the worst of `completions` by mean rating; no ties; an answer "
        "with a rating of N/A does not count.",
    ),
    "rlaif-v": Format(
        rlaif_v_record,
        ("question chosen rejected",),
        "RLAIF-V, MMPR: `question`, `chosen` and `rejected` are texts.",
    ),
    "rlhf-v": Format(
        rlhf_v_record,
        ("text",),
        "RLHF-V: `text` is JSON of question, chosen and rejected.",
    ),
}
FormatName = Literal[*FORMATS]


def format_of(raw: dict) -> FormatName | None:
    """The format whose fields a record has, most of them if it is of several; None if of none."""
    known = [
        (len(names.split()), name)
        for name, form in FORMATS.items()
        for names in form.known_by
        if set(names.split()) <= raw.keys()
    ]
    return max(known, key=lambda each: each[0])[1] if known else None


def pair_fields(record: Record, answers: dict[str, str]) -> dict:
    """A pairs file's line: id, images, and the prompt and the answers as lists of messages, which
    is how TRL reads them.

    TRL puts a picture before the first user's text, and where content parts say: so those of a
    record whose picture comes later are all parts.
    """
    prompt = []
    for number, (role, text) in enumerate(record.turns):
        content = text
        if record.image_turn:
            here = [{"type": "image"}] if number == record.image_turn else []
            content = [*here, {"type": "text", "text": text}]
        prompt.append({"role": role, "content": content})
    fields = {"id": record.id, "images": [record.image], "prompt": prompt}
    for name, answer in answers.items():
        fields[name] = [{"role": "assistant", "content": answer}]
    return fields


def sharegpt_fields(pair: dict) -> dict:
    """A pairs file's line as a record of LLaMA-Factory's sharegpt preferences: `<image>` stands in
    the text of the turn that shows the picture, and the answers are one message each.
    """
    record = pair_record(pair)
    messages = []
    for number, (role, text) in enumerate(record.turns):
        shown = "<image>\n" if number == record.image_turn else ""
        messages.append({"role": role, "content": shown + text})
    answers = {"chosen": record.chosen, "rejected": record.rejected}
    fields = {"id": record.id, "images": [record.image], "messages": messages}
    return fields | {name: {"role": "assistant", "content": text} for name, text in answers.items()}
