"""tokenizer.json and the files beside it: read, and refused where they are not understood.

For what is read all text is data: typed control tokens are ordinary characters.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from minialign.data.templates import CONTROL
from minialign.errors import UserError
from minialign.fields import read_fields, shortened, whole
from minialign.files import read_json
from minialign.model.llava import LlavaConfig

# What a post-processor may put before a text, and behind it, where tokenizer_config.json names no
# other.
BEGINNINGS = ("<s>", "<|begin_of_text|>", "<|startoftext|>")
ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")


@contextmanager
def sound(where: object) -> Iterator[None]:
    """Inside, whatever the tokenizers library raises is a `UserError` that begins with `where`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a bare Exception; and none where its Rust code panics
        reason = shortened(str(error))
        message = f"not a tokenizer that works ({reason}); download the folder again"
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
    fields = {"pad_token_id": whole(0, config.text.vocab_size - 1, default=0)}
    return read_fields(folder / "config.json", config.raw, fields)["pad_token_id"]


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

    wrong += [name for name, _ in before[1:]]
    if wrong:
        message = f"its post_processor puts {wrong[0]!r} beside every text"
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
