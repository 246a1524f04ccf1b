"""Conversations to token ids: the one place where templates and tokenisation are.

Control tokens come from the template alone. Text is data: a user who types `</s>` or `<image>`
gets the ordinary pieces of those characters.
"""

import json
import math
import re
import secrets
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from minialign.errors import UserError
from minialign.files import read_json

Turn = tuple[str, str]  # ("user" | "assistant", text)


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text: `{}` stands for what is said, control tokens for
    themselves."""

    system: str
    user: str
    answer: str  # ends in the control token that ends an answer


def curious(who: str) -> str:
    """What stands before the first turn of LLaVA's conversations."""
    return (
        f"A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the {who}'s questions. "
    )


TEMPLATES = {
    "short": Template("", "USER: {} ASSISTANT:", " {}</s>"),  # the embedded world's
    "vicuna": Template(
        curious("human"), "USER: {} ASSISTANT:", " {}</s>"
    ),  # LLaVA-1.5, and 1.6 on Vicuna
    "llava_v1": Template(
        curious("user"), "USER: {} ASSISTANT:", " {}</s>"
    ),  # what these were trained with
    "mistral": Template("", "[INST] {} [/INST]", " {}</s>"),  # LLaVA-1.6 on Mistral
    "chatml": Template(  # LLaVA-1.6 34B
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        "{}<|im_end|>",
    ),
}
CONTROL = re.compile(r"</s>|<\|im_start\|>|<\|im_end\|>")  # in a template


def template_name(folder: Path, config: dict, fast: FastTokenizer, asked: str | None) -> str:
    """The template that was asked for, else the one in config.json, else the one of the model's
    family."""
    name = config.get("minialign_template") if asked is None else asked
    if name is None:
        text = config.get("text_config") or {}
        mistral = isinstance(text, dict) and text.get("model_type") == "mistral"
        return (
            "mistral"
            if mistral
            else "vicuna"
            if fast.token_to_id("<|im_start|>") is None
            else "chatml"
        )
    if not isinstance(name, str) or name not in TEMPLATES:
        where = (
            "--template" if asked is not None else f"{folder / 'config.json'}: minialign_template"
        )
        raise UserError(f"{where} {name!r} is none of {', '.join(TEMPLATES)}; name one")
    return name


@dataclass(frozen=True)
class Tokenizer:
    """tokenizer.json under a template.

    A whole conversation is encoded as one text, as transformers does, since tokenizers treat what
    follows a control token differently from what begins a text. Where a control token belongs, that
    text holds a mark: an added token with a random name, which nobody can type. `ids` says which
    control token each mark stands for."""

    fast: FastTokenizer
    template: Template
    image: str  # the mark of the image token
    ids: dict[int, int]
    bos: list[int]
    eos_id: int
    pad_id: int
    image_id: int
    name: str = ""  # of the template

    @staticmethod
    def from_folder(folder: Path, template: str | None = None) -> "Tokenizer":
        """Read tokenizer.json and the ids in config.json; `template` overrides the model's own."""
        fast, config = (
            read_tokenizer(folder),
            read_json(folder / "config.json", "a model folder needs config.json"),
        )
        name = template_name(folder, config, fast, template)
        chosen = TEMPLATES[name]
        image_id, pad_id = special_ids(folder, config, fast)
        tokens = sorted(set(CONTROL.findall(chosen.system + chosen.user + chosen.answer)))
        control = {token: fast.token_to_id(token) for token in tokens}
        if None in control.values():
            missing = next(token for token, i in control.items() if i is None)
            file = folder / "tokenizer.json"
            raise UserError(
                f"{file}: no {missing}, which the template needs; name another template"
            )
        marks = {token: f"\ue000{secrets.token_hex(8)}\ue001" for token in (*tokens, "image")}
        fast.add_tokens(
            [AddedToken(mark, special=False, normalized=False) for mark in marks.values()]
        )
        ids = {
            fast.token_to_id(marks[token]): i
            for token, i in (control | {"image": image_id}).items()
        }
        marked = [CONTROL.sub(lambda found: marks[found[0]], text) for text in astuple(chosen)]
        end = control[CONTROL.findall(chosen.answer)[-1]]
        # What the tokenizer itself puts before a text; the embedded world's has no rule for it.
        bos = fast.encode("").ids or [i for i in [fast.token_to_id("<s>")] if i is not None]
        return Tokenizer(
            fast, Template(*marked), marks["image"], ids, bos, end, pad_id, image_id, name
        )

    def encode(self, text: str) -> list[int]:
        """Text to ids; no control token but for a mark."""
        return [self.ids.get(i, i) for i in self.fast.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: list[int]) -> str:
        """Ids to text, control tokens left out."""
        shown = [
            i for i in ids if i != self.image_id and i not in self.ids
        ]  # a model may have more ids than these
        return self.fast.decode(shown, skip_special_tokens=True)

    def prompt(self, turns: list[Turn], image: bool = True) -> list[int]:
        """The ids of a conversation that ends with a user turn, up to where the answer begins.

        The image token stands once, at the head of the first user turn.
        """
        text = self.template.system
        for number, (role, said) in enumerate(turns):
            form = self.template.answer if role == "assistant" else self.template.user
            text += form.format(f"{self.image}\n{said}" if number == 0 and image else said)
        return self.bos + self.encode(text)

    @cached_property
    def lead(self) -> tuple[str, list[int]]:
        """What precedes an answer in the same piece of text, such as `ASSISTANT:`, and its ids.

        It may change how the answer begins; the image's mark keeps it from being the beginning of a
        text."""
        before = self.image + re.split("\ue001|{}", self.template.user)[-1]
        return before, self.encode(before)

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, or of its beginning, as they follow a prompt: without the end
        token."""
        if not text:
            return []
        (before, head), said = self.lead, self.template.answer.format(text)
        ids = self.encode(before + said)
        if ids[: len(head)] != head:  # its beginning has merged with what precedes it
            head, ids = [self.image_id], self.encode(self.image + said)
        return ids[len(head) : -1]

    @cached_property
    def sentence_ends(self) -> set[int]:
        """Tokens that end a sentence: every piece that ends in a full stop, and the end token."""
        vocabulary = self.fast.get_vocab(with_added_tokens=False)
        full_stops = {i for piece, i in vocabulary.items() if piece.endswith(".")}
        return full_stops | {self.eos_id}

    def response(self, text: str) -> list[int]:
        """The ids of an answer and its end token."""
        return [*self.answer(text), self.eos_id]


def special_ids(folder: Path, config: dict, fast: FastTokenizer) -> tuple[int, int]:
    """The ids of image and padding in config.json; all ids must be below the model's vocab_size."""
    text = config.get("text_config")
    size = text.get("vocab_size") if isinstance(text, dict) else None
    size = size if type(size) is int else math.inf  # read_config says what is wrong with it
    image, pad = config.get("image_token_index"), config.get("pad_token_id")
    image = config.get("image_token_id") if image is None else image
    image, pad = 32000 if image is None else image, 0 if pad is None else pad
    for name, value in (("image_token_index", image), ("pad_token_id", pad)):
        if type(value) is not int or not 0 <= value < size:
            raise UserError(
                f"{folder / 'config.json'}: {name} is {value!r}, no id below vocab_size {size}; mend it"
            )
    highest = max(fast.get_vocab().values(), default=0)
    if highest >= size:
        said = f"has ids up to {highest}, config.json a vocab_size of {size}; they must belong together"
        raise UserError(f"{folder / 'tokenizer.json'}: {said}")
    return image, pad


def read_tokenizer(folder: Path) -> FastTokenizer:
    """tokenizer.json, for which all text is data: typed control tokens are ordinary characters."""
    path = folder / "tokenizer.json"
    raw = read_json(path, "a model folder needs tokenizer.json")
    added = raw.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise UserError(
            f"{path}: added_tokens must be a list of objects; download the folder again"
        )
    for token in added:
        token["special"] = True  # else typed text could become a control token
    try:
        fast = FastTokenizer.from_str(json.dumps(raw))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: not a tokenizer ({error}); download the folder again") from None
    fast.encode_special_tokens = True
    fast.no_truncation()
    fast.no_padding()
    return fast
