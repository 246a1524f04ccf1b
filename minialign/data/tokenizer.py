"""Conversations to token ids, in the form that a template (templates.py) gives them.

Control tokens come from the template alone. Text is data: a user who types `</s>` or `<image>`
gets the ordinary pieces of those characters, whatever the kind of tokenizer, or is refused.
"""

import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from minialign.data.templates import Template, control_tokens, template_of
from minialign.data.tokenizer_file import (
    beginning,
    fast_tokenizer,
    named,
    padding_id,
    read_tokenizer_json,
    require_no_pieces,
    require_vocabulary,
    sound,
    unknown_id,
)
from minialign.errors import UserError
from minialign.model.config import read_config
from minialign.sampling.bdhs import FULL_STOP

Turn = tuple[str, str]  # ("user" | "assistant", text)


@dataclass(frozen=True)
class Tokenizer:
    """tokenizer.json under a template.

    A whole conversation is encoded as one text, as transformers does, since tokenizers treat what
    follows a control token differently from what begins a text. Where a control token belongs, that
    text holds a mark: an added token with a random name, which nobody can type. `ids` says which
    control token each mark stands for.
    """

    fast: FastTokenizer
    template: Template  # with marks in the places of its control tokens
    image: str  # the mark of the image token
    ids: dict[int, int]
    bos: list[int]
    eos_id: int
    pad_id: int
    image_id: int
    name: str = ""  # of the template
    control: frozenset[int] = frozenset()  # ids that no text may become

    @staticmethod
    def from_folder(folder: Path, template: str | None = None) -> "Tokenizer":
        """Read tokenizer.json and the ids in config.json; `template` overrides the model's own."""
        path = folder / "tokenizer.json"
        raw = read_tokenizer_json(path)
        fast = fast_tokenizer(path, raw)
        config = read_config(folder)
        pad_id = padding_id(folder, config)
        vocabulary = require_vocabulary(path, config, fast)
        chatml = "<|im_start|>" in vocabulary
        name, form = template_of(folder, config, chatml, template)

        known = [token["content"] for token in raw["added_tokens"] if token["special"]]
        spelled, control = control_tokens(path, name, form, known, vocabulary)
        eos_id, image_id = control[form.end], config.image_token_id
        bos = beginning(path, raw, vocabulary, named(folder, "bos_token"), form.end)

        # The unknown token is all that a text may become.
        added = {t["content"]: vocabulary.get(t["content"]) for t in raw["added_tokens"]}
        unknown = unknown_id(raw["model"], vocabulary)
        ids = {i for i in added.values() if i is not None} - {unknown} | {eos_id, *bos, image_id}
        require_no_pieces(folder, fast, ids, image_id, added)
        taken = {eos_id, unknown, *bos, *control.values()}
        if image_id in taken:
            message = f"is {image_id}, which is {fast.id_to_token(image_id)!r}, too; mend it"
            raise UserError(f"{folder / 'config.json'}: image_token_index {message}")

        # The mark that stands for each control token in a text.
        control["image"] = image_id
        marks = {token: f"\ue000{secrets.token_hex(8)}\ue001" for token in control}
        fast.add_tokens([AddedToken(m, special=False, normalized=False) for m in marks.values()])
        of_marks = {fast.token_to_id(mark): control[token] for token, mark in marks.items()}
        if not of_marks.keys().isdisjoint(vocabulary.values()):
            message = f"the ids of its {len(vocabulary)} pieces have gaps"
            raise UserError(f"{path}: {message}; download the folder again")

        def with_marks(text: str) -> str:
            """A form's text with a mark in the place of every control token."""
            return spelled.sub(lambda found: marks[found[0]], text)

        tokenizer = Tokenizer(
            fast=fast,
            template=Template(
                system=with_marks(form.system),
                user=with_marks(form.user),
                answer=with_marks(form.answer),
                end=marks[form.end],
            ),
            image=marks["image"],
            ids=of_marks,
            bos=bos,
            eos_id=eos_id,
            pad_id=pad_id,
            image_id=image_id,
            name=name,
            control=frozenset(ids - of_marks.keys()),
        )
        tokenizer.require_text_is_data(path, vocabulary)
        return tokenizer

    def require_text_is_data(self, path: Path, vocabulary: dict[str, int]) -> None:
        """Refuse a kind of tokenizer that makes control tokens of what is spelled like them."""
        try:
            for token in (token for token, i in vocabulary.items() if i in self.control):
                self.encode(token)
                self.encode(f"{token} a {token} b{token}c")
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Text to ids; no control token but for a mark. A text that becomes one all the same, as
        some kinds of tokenizer make it, is a `UserError`."""
        with sound("tokenizer.json fails on a text"):
            ids = self.fast.encode(text, add_special_tokens=False).ids
        if found := self.control.intersection(ids):
            typed = self.fast.id_to_token(min(found))
            message = f"a text becomes the control token {typed!r} with this tokenizer.json"
            raise UserError(f"{message}; change the text, or use another model")
        return [self.ids.get(i, i) for i in ids]

    def decode(self, ids: list[int]) -> str:
        """Ids to text, control tokens left out, and what the template has behind an answer."""
        # A model may have more ids than the tokenizer: some are the marks'.
        shown = [i for i in ids if i != self.image_id and i not in self.ids]
        with sound("tokenizer.json fails on a text of the model's"):
            text = self.fast.decode(shown, skip_special_tokens=True)
        return text.removesuffix(self.template.answer.partition("{}")[2])

    def prompt(self, turns: list[Turn], image: bool = True, image_turn: int = 0) -> list[int]:
        """The ids of a conversation that ends with a user turn, up to where the answer begins.

        The image token stands once, at the head of the turn of that number, a user's.
        """
        text = self.template.system
        for number, (role, said) in enumerate(turns):
            if number == image_turn and image:
                said = f"{self.image}\n{said}"
            if role == "assistant":
                text += self.template.answer.replace("{}", said) + self.template.end
            else:
                text += self.template.user.replace("{}", said)
        return self.bos + self.encode(text)

    @cached_property
    def lead(self) -> tuple[str, list[int]]:
        """What precedes an answer in the same piece of text, such as `ASSISTANT:`, and its ids.

        It may change how the answer begins; the image's mark keeps it from being the beginning of a
        text.
        """
        before = self.image + re.split("\ue001|{}", self.template.user)[-1]
        return before, self.encode(before)

    def behind_prompt(self, said: str) -> list[int]:
        """The ids of what stands between a prompt and the end token."""
        before, head = self.lead
        ids = self.encode(before + said + self.template.end)
        if ids[: len(head)] == head:
            return ids[len(head) : -1]
        # Its beginning has merged with what precedes it.
        return self.encode(self.image + said + self.template.end)[1:-1]

    def answer(self, text: str) -> list[int]:
        """The ids of an answer's beginning, or of all of its text, as they follow a prompt."""
        return self.behind_prompt(self.template.answer.partition("{}")[0] + text) if text else []

    def response(self, text: str) -> list[int]:
        """The ids of an answer and its end token."""
        ids = self.behind_prompt(self.template.answer.replace("{}", text)) if text else []
        return [*ids, self.eos_id]

    @cached_property
    def sentence_ends(self) -> set[int]:
        """Tokens that end a sentence: every piece that ends in a full stop, perhaps with quotes and
        brackets behind it, and the end token."""
        vocabulary = self.fast.get_vocab(with_added_tokens=False)
        # A single byte, as of texts without pieces, is no piece.
        ids = [i for piece, i in vocabulary.items() if not piece.startswith("<0x")]
        with sound("tokenizer.json fails on its own pieces"):
            pieces = self.fast.decode_batch([[i] for i in ids], skip_special_tokens=False)
        full_stops = {i for i, piece in zip(ids, pieces, strict=True) if FULL_STOP.search(piece)}
        return full_stops | {self.eos_id}
