"""Conversations to token ids, in the form that a template (templates.py) gives them.

Control tokens come from the template alone. Text is data: a user who types `</s>` or `<image>`
gets the ordinary pieces of those characters, whatever the kind of tokenizer, or is refused.
"""

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from minialign.data.templates import CONTROL, OWN_FORM, Template, control_tokens, template_of
from minialign.errors import UserError
from minialign.files import read_json
from minialign.model.config import read_config
from minialign.model.llava import LlavaConfig
from minialign.sampling.bdhs import FULL_STOP

Turn = tuple[str, str]  # ("user" | "assistant", text)
# What a post-processor may put before a text, and behind it, where tokenizer_config.json names no
# other.
BEGINNINGS = ("<s>", "<|begin_of_text|>", "<|startoftext|>")
ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")


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

        # Control token -> its id, and the mark that stands for it in a text.
        spelled = control_tokens(form, [t["content"] for t in raw["added_tokens"] if t["special"]])
        if not spelled.fullmatch(form.end):
            message = f"the form {name} ends an answer with {form.end!r}, which is no control token"
            raise UserError(f"{path}: {message}; {OWN_FORM}")
        control = {}
        for token in sorted(set(spelled.findall(form.system + form.user + form.answer + form.end))):
            if token not in vocabulary:
                message = f"no {token}, which the form of conversation {name} needs"
                raise UserError(f"{path}: {message}; {OWN_FORM}")
            control[token] = vocabulary[token]
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
        try:
            for i in sorted(tokenizer.control & set(vocabulary.values())):
                typed = fast.id_to_token(i)
                tokenizer.encode(typed)
                tokenizer.encode(f"{typed} a {typed} b{typed}c")
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return tokenizer

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

    def prompt(self, turns: list[Turn], image: bool = True) -> list[int]:
        """The ids of a conversation that ends with a user turn, up to where the answer begins.

        The image token stands once, at the head of the first user turn.
        """
        text = self.template.system
        for number, (role, said) in enumerate(turns):
            if number == 0 and image:
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


# ---------------------------------------------------------------- the folder's files


@contextmanager
def sound(where: object) -> Iterator[None]:
    """Inside, whatever the tokenizers library raises is a `UserError` that begins with `where`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a bare Exception; and none where its Rust code panics
        message = f"not a tokenizer that works ({error}); download the folder again"
        raise UserError(f"{where}: {message}") from None


def read_tokenizer_json(path: Path) -> dict:
    """tokenizer.json; its added tokens are checked, as their names count here."""
    raw = read_json(path, "a model folder needs tokenizer.json")
    added = raw.get("added_tokens") or []
    good = isinstance(added, list) and all(isinstance(token, dict) for token in added)
    if not good or not all(isinstance(token.get("content"), str) for token in added):
        message = "added_tokens must be a list of objects with a content"
        raise UserError(f"{path}: {message}; download the folder again")
    if not isinstance(raw.get("model"), dict):
        raise UserError(f"{path}: not a tokenizer, as it has no model; download the folder again")
    special = [token | {"special": token.get("special") is True} for token in added]
    return raw | {"added_tokens": special}


def fast_tokenizer(path: Path, raw: dict) -> FastTokenizer:
    """The tokenizer, for which all text is data: typed control tokens are ordinary characters."""
    # All are special: else typed text could become one of them.
    added = [token | {"special": True} for token in raw["added_tokens"]]
    with sound(path):
        raw = raw | {"added_tokens": added, "post_processor": None}  # see `beginning`
        fast = FastTokenizer.from_str(json.dumps(raw))
        fast.encode_special_tokens = True
        fast.no_truncation()
        fast.no_padding()
    return fast


def require_vocabulary(path: Path, config: LlavaConfig, fast: FastTokenizer) -> dict[str, int]:
    """The ids of all pieces and added tokens; refuses some that the model does not have."""
    with sound(path):
        vocabulary = fast.get_vocab()
    highest = max(vocabulary.values(), default=0)
    size = config.text.vocab_size
    if highest >= size:
        message = f"has ids up to {highest}, config.json a vocab_size of {size}"
        raise UserError(f"{path}: {message}; they must belong together")
    return vocabulary


def padding_id(folder: Path, config: LlavaConfig) -> int:
    """The id of padding in config.json; one that is missing may be any, and is 0."""
    pad = config.raw.get("pad_token_id")
    size = config.text.vocab_size
    if pad is not None and (type(pad) is not int or not 0 <= pad < size):
        message = f"pad_token_id is {pad!r}, no id below vocab_size {size}; mend it"
        raise UserError(f"{folder / 'config.json'}: {message}")
    return pad or 0


def named(folder: Path, name: str) -> str | None:
    """A control token that tokenizer_config.json names, as a text or as an object; or None."""
    path = folder / "tokenizer_config.json"
    found = read_json(path, "download the folder again").get(name) if path.exists() else None
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None


def unknown_id(model: dict, vocabulary: dict[str, int]) -> int | None:
    """The id that stands for what a tokenizer has no piece for, or None."""
    unknown = model.get("unk_token")
    return vocabulary.get(unknown) if isinstance(unknown, str) else model.get("unk_id")


def beginning(
    path: Path, raw: dict, vocabulary: dict[str, int], named_bos: str | None, end: str
) -> list[int]:
    """The beginning token, which tokenizer.json's post_processor puts before a text, or [].

    An end token that it puts behind the text is left out, as a prompt must not end; whatever else
    it puts is refused by its name.
    """
    known = {*BEGINNINGS, named_bos}
    try:
        before, behind = of_post_processor(raw.get("post_processor"))
        wrong = [name for name, ids in before if name not in known or ids != [vocabulary.get(name)]]
        wrong += [name for name, _ in behind if name not in {*ENDS, end}]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        message = "its post_processor is of an unknown kind, or damaged; download the folder again"
        raise UserError(f"{path}: {message}") from None

    if wrong or len(before) > 1:
        message = f"its post_processor puts {(wrong or before)[0]!r} beside every text"
        rule = "and only a beginning token before it and an end token behind it are known here"
        raise UserError(f"{path}: {message}, {rule}; take it out of the file")
    # The embedded world's has no rule for it.
    names = [token for token, _ in before] or ["<s>"]
    return [vocabulary[token] for token in names if token in vocabulary]


def of_post_processor(raw: dict | None) -> tuple[list, list]:
    """What a post-processor puts before a text, and behind it: names of control tokens, each with
    the ids that it stands for."""
    if raw is None or raw["type"] == "ByteLevel":  # which moves offsets alone
        return [], []
    if raw["type"] in ("BertProcessing", "RobertaProcessing"):
        return [(raw["cls"][0], [raw["cls"][1]])], [(raw["sep"][0], [raw["sep"][1]])]
    if raw["type"] == "Sequence":
        parts = [of_post_processor(part) for part in raw["processors"]]
        before = [token for part, _ in reversed(parts) for token in part]
        return before, [token for _, part in parts for token in part]
    if raw["type"] != "TemplateProcessing":
        raise ValueError(raw["type"])
    names = [
        piece["SpecialToken"]["id"] if "SpecialToken" in piece else "" for piece in raw["single"]
    ]
    tokens = [(name, raw["special_tokens"][name]["ids"]) if name else None for name in names]
    return tokens[: tokens.index(None)], tokens[tokens.index(None) + 1 :]


def require_no_pieces(
    folder: Path, fast: FastTokenizer, control: set[int], image_id: int, added: dict
) -> None:
    """Refuse a control token whose id is that of an ordinary piece, too."""
    with sound(folder / "tokenizer.json"):
        pieces = fast.get_vocab(with_added_tokens=False)
    for piece, i in pieces.items():
        of_control = piece in added or (CONTROL.fullmatch(piece) and not piece.startswith("<0x"))
        if i in control and not of_control:
            where = f"{folder / 'tokenizer.json'}: a control token's id is {i}"
            if i == image_id:
                where = f"{folder / 'config.json'}: image_token_index is {i}"
            raise UserError(f"{where}, the ordinary piece {piece!r}; mend it")
