"""Conversations to token ids: the one place where templates and tokenisation are.

Control tokens come from the template alone. Text is data: a user who types `</s>` or `<image>`
gets the ordinary pieces of those characters.
"""

import json
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from minialign.errors import UserError
from minialign.files import read_json
from minialign.model.config import read_config
from minialign.model.llava import LlavaConfig

Turn = tuple[str, str]  # ("user" | "assistant", text)


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text: `{}` stands for what is said."""

    system: str
    user: str
    answer: str  # ends in the control token that ends an answer


# What stands before the first turn of LLaVA's conversations.
SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {who}'s questions. "
)
TEMPLATES = {
    # The embedded world's.
    "short": Template("", "USER: {} ASSISTANT:", " {}</s>"),
    # LLaVA-1.5, and 1.6 on Vicuna, as the hub's folders have it; llava_v1 is what they were trained
    # with.
    "vicuna": Template(SYSTEM.format(who="human"), "USER: {} ASSISTANT:", " {}</s>"),
    "llava_v1": Template(SYSTEM.format(who="user"), "USER: {} ASSISTANT:", " {}</s>"),
    # LLaVA-1.6 on Mistral.
    "mistral": Template("", "[INST] {} [/INST]", " {}</s>"),
    # LLaVA-1.6 34B.
    "chatml": Template(
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        "{}<|im_end|>",
    ),
}
CONTROL = re.compile(r"</s>|<\|im_start\|>|<\|im_end\|>")  # in a template


def template_name(folder: Path, config: LlavaConfig, fast: FastTokenizer, asked: str | None) -> str:
    """The template that was asked for, else config.json's, else that of the model's family."""
    name = config.raw.get("minialign_template") if asked is None else asked
    if name is None:
        text = config.raw.get("text_config") or {}
        if text.get("model_type") == "mistral":
            return "mistral"
        return "vicuna" if fast.token_to_id("<|im_start|>") is None else "chatml"
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
    control token each mark stands for.
    """

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
        fast = read_tokenizer(folder)
        config = read_config(folder)
        pad_id = padding_id(folder, config)
        require_vocabulary(folder, config, fast)
        name = template_name(folder, config, fast, template)
        chosen = TEMPLATES[name]

        # Control token -> its id, and the mark that stands for it in a text.
        control = {}
        for token in sorted(set(CONTROL.findall(chosen.system + chosen.user + chosen.answer))):
            control[token] = fast.token_to_id(token)
            if control[token] is None:
                message = f"no {token}, which the template needs; name another template"
                raise UserError(f"{folder / 'tokenizer.json'}: {message}")
        control["image"] = config.image_token_id
        marks = {token: f"\ue000{secrets.token_hex(8)}\ue001" for token in control}
        added = [AddedToken(mark, special=False, normalized=False) for mark in marks.values()]
        fast.add_tokens(added)
        ids = {fast.token_to_id(mark): control[token] for token, mark in marks.items()}

        # What the tokenizer itself puts before a text; the embedded world's has no rule for it.
        bos = fast.encode("").ids
        if not bos and fast.token_to_id("<s>") is not None:
            bos = [fast.token_to_id("<s>")]
        return Tokenizer(
            fast=fast,
            template=Template(
                system=with_marks(chosen.system, marks),
                user=with_marks(chosen.user, marks),
                answer=with_marks(chosen.answer, marks),
            ),
            image=marks["image"],
            ids=ids,
            bos=bos,
            eos_id=control[CONTROL.findall(chosen.answer)[-1]],
            pad_id=pad_id,
            image_id=config.image_token_id,
            name=name,
        )

    def encode(self, text: str) -> list[int]:
        """Text to ids; no control token but for a mark."""
        return [self.ids.get(i, i) for i in self.fast.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: list[int]) -> str:
        """Ids to text, control tokens left out."""
        # A model may have more ids than the tokenizer: some are the marks'.
        shown = [i for i in ids if i != self.image_id and i not in self.ids]
        return self.fast.decode(shown, skip_special_tokens=True)

    def prompt(self, turns: list[Turn], image: bool = True, image_turn: int = 0) -> list[int]:
        """The ids of a conversation that ends with a user turn, up to where the answer begins.

        The image token stands once, at the head of the turn of that number, a user's.
        """
        text = self.template.system
        for number, (role, said) in enumerate(turns):
            if number == image_turn and image:
                said = f"{self.image}\n{said}"
            form = self.template.answer if role == "assistant" else self.template.user
            text += form.format(said)
        return self.bos + self.encode(text)

    @cached_property
    def lead(self) -> tuple[str, list[int]]:
        """What precedes an answer in the same piece of text, such as `ASSISTANT:`, and its ids.

        It may change how the answer begins; the image's mark keeps it from being the beginning of a
        text.
        """
        before = self.image + re.split("\ue001|{}", self.template.user)[-1]
        return before, self.encode(before)

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, or its beginning, as they follow a prompt; no end token."""
        if not text:
            return []
        before, head = self.lead
        answer = self.template.answer.format(text)
        ids = self.encode(before + answer)
        if ids[: len(head)] == head:
            return ids[len(head) : -1]
        # Its beginning has merged with what precedes it.
        return self.encode(self.image + answer)[1:-1]

    @cached_property
    def sentence_ends(self) -> set[int]:
        """Tokens that end a sentence: every piece that ends in a full stop, and the end token."""
        vocabulary = self.fast.get_vocab(with_added_tokens=False)
        full_stops = {i for piece, i in vocabulary.items() if piece.endswith(".")}
        return full_stops | {self.eos_id}

    def response(self, text: str) -> list[int]:
        """The ids of an answer and its end token."""
        return [*self.answer(text), self.eos_id]


def with_marks(text: str, marks: dict[str, str]) -> str:
    """A template's text with a mark in the place of every control token."""
    return CONTROL.sub(lambda found: marks[found[0]], text)


def padding_id(folder: Path, config: LlavaConfig) -> int:
    """The id of padding in config.json; one that is missing may be any, and is 0."""
    pad = config.raw.get("pad_token_id")
    size = config.text.vocab_size
    if pad is not None and (type(pad) is not int or not 0 <= pad < size):
        message = f"pad_token_id is {pad!r}, no id below vocab_size {size}; mend it"
        raise UserError(f"{folder / 'config.json'}: {message}")
    return pad or 0


def require_vocabulary(folder: Path, config: LlavaConfig, fast: FastTokenizer) -> None:
    """Refuse a tokenizer with ids that the model does not have."""
    highest = max(fast.get_vocab().values(), default=0)
    size = config.text.vocab_size
    if highest >= size:
        message = f"has ids up to {highest}, config.json a vocab_size of {size}"
        raise UserError(f"{folder / 'tokenizer.json'}: {message}; they must belong together")


def read_tokenizer(folder: Path) -> FastTokenizer:
    """tokenizer.json, for which all text is data: typed control tokens are ordinary characters."""
    path = folder / "tokenizer.json"
    raw = read_json(path, "a model folder needs tokenizer.json")
    added = raw.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        message = "added_tokens must be a list of objects; download the folder again"
        raise UserError(f"{path}: {message}")
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
