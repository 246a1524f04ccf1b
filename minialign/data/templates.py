"""The forms of a conversation, by LLaVA's names, and which of them a folder's model is asked in.

A form that has no name here is written into a JSON file (`--template FILE`) with the fields of
`Template`: the only way for a model such as BakLLaVA or one on Llama-3 whose form is its own.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minialign.errors import UserError
from minialign.fields import broken_rule, read_fields, shown, text
from minialign.files import read_json
from minialign.model.llava import LlavaConfig


@dataclass(frozen=True)
class Template:
    """How a conversation becomes one text: `{}` stands for what is said."""

    system: str  # what stands before the first turn
    user: str  # a question, and all that stands between it and the answer
    answer: str
    end: str  # the control token behind an answer


# What stands before the first turn of LLaVA's conversations.
SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {who}'s questions. "
)
TEMPLATES = {
    # The embedded world's.
    "short": Template("", "USER: {} ASSISTANT:", " {}", "</s>"),
    # LLaVA-1.5, and 1.6 on Vicuna: trained (`--version v1`) and evaluated in vicuna_v1, which is
    # their default here. The hub's pages of 1.6 show llava_v1.
    "vicuna_v1": Template(SYSTEM.format(who="user"), "USER: {} ASSISTANT:", " {}", "</s>"),
    "llava_v1": Template(SYSTEM.format(who="human"), "USER: {} ASSISTANT:", " {}", "</s>"),
    # LLaVA-1.6 on Mistral; a space stands before the end token, as in its training.
    "mistral": Template("", "[INST] {} [/INST]", " {} ", "</s>"),
    # LLaVA-1.6 34B.
    "chatml": Template(
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        "{}",
        "<|im_end|>",
    ),
}
NAMES = ", ".join(TEMPLATES)
FIELDS = {name: text() for name in ("system", "user", "answer", "end")}
KEY = "minialign_template"  # in config.json: a name, or the fields of a form without one
OWN_FORM = (
    "write the model's own form into a JSON file (system, user, answer, end; see docs/running.md) "
    "and give it with --template FILE"
)
# What a chat template has in it -> the form that it is of.
MARKERS = {"[INST]": "mistral", "<|im_start|>": "chatml", "ASSISTANT:": "vicuna_v1"}
# What is a control token in a form's text, besides those that the tokenizer calls so.
CONTROL = re.compile(r"<[^<>\s]+>")


@cache
def asked_form(asked: str | None) -> str | dict[str, str] | None:
    """What --template asks for: a name, or the fields of a file, which is read once."""
    if asked is None or asked in TEMPLATES:
        return asked
    if asked == "vicuna":
        message = "is called llava_v1 now, as in LLaVA, and what was llava_v1 is vicuna_v1"
        raise UserError(f"--template {asked!r} {message}; name one of {NAMES}")
    path = Path(asked)
    if not path.is_file():
        message = f"is none of {NAMES}, and no such file; name one"
        raise UserError(f"--template {asked!r} {message}, or {OWN_FORM}")
    return form_of(path, read_json(path, OWN_FORM))


def form_of(where: Path, raw: dict) -> dict[str, str]:
    """The fields of a form that stands at `where`; one that cannot be meant so is refused."""
    form = read_fields(where, raw, FIELDS)
    if extra := raw.keys() - FIELDS.keys():
        raise broken_rule(where, min(extra), raw[min(extra)], f"there are {', '.join(FIELDS)}")
    for name, count in {"system": 0, "user": 1, "answer": 1, "end": 0}.items():
        if form[name].count("{}") != count:
            rule = "{} stands once in user for the question, and once in answer for the answer"
            raise broken_rule(where, name, form[name], rule)
    if form["user"].endswith(" "):  # ` A` is one token, a space and `A` are two
        rule = "a space that stands before an answer begins `answer`"
        raise broken_rule(where, "user", form["user"], rule)
    return form


def template_of(
    folder: Path, config: LlavaConfig, chatml: bool, asked: str | None
) -> tuple[str, Template]:
    """The form that a folder's model is asked in, and its name.

    It is that of --template, else config.json's own, else that of the folder's chat template, else
    the family's: Mistral's, chatml where the tokenizer has its tokens (`chatml`), vicuna_v1.
    """
    where = folder / f"config.json: {KEY}"
    given = config.raw.get(KEY)
    if asked is not None:
        given = asked_form(asked)
    elif isinstance(given, dict):
        given = form_of(where, given)
    elif given is not None and (not isinstance(given, str) or given not in TEMPLATES):
        raise UserError(f"{where} is {shown(given)}, none of {NAMES}; name one")

    if isinstance(given, dict):
        return asked or "of its own", Template(**given)
    family = (config.raw.get("text_config") or {}).get("model_type")
    usual = "mistral" if family == "mistral" else "chatml" if chatml else "vicuna_v1"
    name = given or form_of_chat_template(folder) or usual
    return name, TEMPLATES[name]


def form_of_chat_template(folder: Path) -> str | None:
    """The form whose markers a folder's chat template has; None where there is no chat template.

    Its system text need not be the form's: those of the hub's LLaVA-1.5 and 1.6 on Vicuna leave out
    the one that these models were trained with. It only tells LLaVA's two forms for Vicuna apart.
    """
    for path, found in chat_templates(folder):
        names = {name for marker, name in MARKERS.items() if marker in found}
        if len(names) != 1:
            message = f"its chat template is of none of the forms {NAMES}, or of several"
            raise UserError(f"{path}: {message}; name one with --template, or {OWN_FORM}")
        name = names.pop()
        return "llava_v1" if name == "vicuna_v1" and "curious human" in found else name
    return None


def chat_templates(folder: Path) -> Iterable[tuple[Path, str]]:
    """The chat templates of a folder with the files that they stand in, the processor's first."""
    path = folder / "chat_template.jinja"
    try:
        if path.exists():
            yield path, path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); download the folder again") from None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            found = read_json(path, "download the folder again").get("chat_template")
            if found is not None:  # a text, or several under their names
                yield path, found if isinstance(found, str) else json.dumps(found)


def control_tokens(
    path: Path, name: str, form: Template, known: Iterable[str], vocabulary: dict[str, int]
) -> tuple[re.Pattern[str], dict[str, int]]:
    """What matches the control tokens in a form's text, and the id of each.

    They are those that the tokenizer (`path`) knows, the longest first, and whatever looks like
    one. Refuses a form that has some that the tokenizer lacks, or that ends an answer with none.
    """
    longest = sorted(filter(None, known), key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, longest), CONTROL.pattern]))
    if not pattern.fullmatch(form.end):
        message = f"the form {name} ends an answer with {form.end!r}, which is no control token"
        raise UserError(f"{path}: {message}; {OWN_FORM}")
    ids = {}
    for token in sorted(set(pattern.findall(form.system + form.user + form.answer + form.end))):
        if token not in vocabulary:
            message = f"no {token}, which the form of conversation {name} needs"
            raise UserError(f"{path}: {message}; {OWN_FORM}")
        ids[token] = vocabulary[token]
    return pattern, ids
