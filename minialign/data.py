"""Readers of supervised records and preference pairs, and the collation of pairs into one token tree."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minialign import toyworld
from minialign.chat import Tokenizer, Turn
from minialign.errors import UserError
from minialign.files import read_json
from minialign.images import ImageProcessor, noise_of_seed, open_image
from minialign.masks import Branch, Sequence, TokenTree, build_tree, mask_of_seed
from minialign.report import ReportPair

TOY_RECORDS = 2000  # alignment records of the embedded world, unless --limit says otherwise
BDHS_FIELDS = {"iterations": int, "similarity": int | float, "mask_seed": int, "guided": bool, "rho_th": int | float,
               "noise_steps": int, "truncated": bool}  # fmt: skip
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Record:
    """One example: its image's name, the conversation before the answer, the answer(s)."""

    id: str
    image: str
    turns: list[Turn]
    chosen: str
    rejected: str = ""
    bdhs: dict = field(default_factory=dict)


def read_instruct(data: str, limit: int | None, skip_bad: bool = False) -> list[Record]:
    """Records in LLaVA-Instruct form (a JSON array), or `toy` for the embedded world's alignment split."""
    if data == "toy":
        raws = toyworld.alignment_records(TOY_RECORDS if limit is None else limit)
        return [instruct_record(raw) for raw in raws]
    raws = read_json(Path(data), "give --data a LLaVA-Instruct JSON array, or `toy`", list)
    numbered = ((f"{data}, record {number}", raw) for number, raw in enumerate(raws, start=1))
    records = collect(numbered, instruct_record, limit, skip_bad)
    if not records:
        raise UserError(f"--data {data}: no usable record; give a LLaVA-Instruct JSON array, or `toy`")
    return number_repeats(records)


def number_repeats(records: list[Record]) -> list[Record]:
    """Ids made unique (`7`, `7#2`, ...): LLaVA-Instruct names the picture, but a pair's seed follows from its id."""
    taken: set[str] = set()
    times: Counter[str] = Counter()
    unique = []
    for record in records:
        identity = record.id
        while identity in taken:
            times[record.id] += 1
            identity = f"{record.id}#{times[record.id] + 1}"
        taken.add(identity)
        unique.append(replace(record, id=identity))
    return unique


def read_pairs(pairs: Path, limit: int | None, skip_bad: bool = False) -> list[Record]:
    """The pairs file that sample_bdhs.py writes: JSON Lines of id, images, prompt, chosen, rejected."""

    def lines() -> Iterator[tuple[str, object]]:
        with open(pairs, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield f"{pairs}, line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"{pairs}, line {number}", UserError(f"not JSON ({error})")

    try:
        records = collect(lines(), pair_record, limit, skip_bad)
    except FileNotFoundError:
        raise UserError(f"--pairs {pairs}: no such file; make one with sample_bdhs.py") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--pairs {pairs}: not readable as text ({error}); give JSON Lines") from None
    different = [record for record in records if record.chosen != record.rejected]
    if len(different) < len(records):
        tqdm.write(f"{len(records) - len(different)} pairs left out: chosen and rejected are the same text")
    if not different:
        raise UserError(f"--pairs {pairs}: no usable pair; make one with sample_bdhs.py")
    return different


def collect(raws, parse: Callable, limit: int | None, skip_bad: bool) -> list:
    """Parse (place, raw record) one by one; a bad one ends the run with its place, or is skipped and counted."""
    records, bad = [], []
    for place, raw in raws:
        if limit is not None and len(records) >= limit:
            break
        try:
            if isinstance(raw, UserError):
                raise raw
            records.append(parse(raw))
        except UserError as error:
            bad.append(f"{place}: {error}")
            if not skip_bad:
                raise UserError(f"{bad[0]}; mend it, or pass --skip-bad-records") from None
    if bad:
        tqdm.write(f"{len(bad)} bad records skipped, the first: {bad[0]}")
    return records


def text_field(raw: object, name: str) -> str:
    """`raw[name]`, which must be a text with something in it."""
    value = raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(value, str):
        raise UserError(f"field {name!r} is {'missing' if value is None else 'not a text'}")
    if not value.strip():
        raise UserError(f"field {name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"field {name!r} holds half a surrogate pair, which no file can hold") from None
    return value


def instruct_record(raw: dict) -> Record:
    """One LLaVA-Instruct record; its last answer is y+, what stands before it the prompt."""
    if not isinstance(raw, dict):
        raise UserError("expected a JSON object")
    talk = raw.get("conversations")
    if not isinstance(talk, list) or len(talk) < 2:
        raise UserError("field 'conversations' must hold a question and its answer")
    turns = []
    for number, turn in enumerate(talk):
        text = text_field(turn, "value")
        if number == 0:  # the placeholder's place is the template's choice
            text = re.sub(r"<image>\n|\n<image>|<image>", "", text, count=1)
            text = text_field({"value": text}, "value")
        turns.append((role_of(turn, "from", number), text.strip()))
    if len(turns) % 2:
        raise UserError("field 'conversations' must end with an answer")
    identity = raw.get("id")
    identity = str(identity) if type(identity) is int else text_field(raw, "id")
    return Record(identity, text_field(raw, "image"), turns[:-1], turns[-1][1])


def role_of(turn: dict, name: str, number: int) -> str:
    """A turn's role; turns alternate and begin with the user."""
    role = ROLES.get(text_field(turn, name))
    if role != ("user", "assistant")[number % 2]:
        raise UserError(f"turn {number + 1} is from {turn[name]!r}; turns alternate, the user's first")
    return role


def pair_record(raw: dict) -> Record:
    """One line of a pairs file; `prompt` is a question, or messages for several turns, then so are the answers."""
    if not isinstance(raw, dict):
        raise UserError("expected a JSON object")
    images = raw.get("images")
    if not isinstance(images, list) or len(images) != 1:
        raise UserError("field 'images' must be a list of one path")
    image = text_field({"images": images[0]}, "images")
    prompt = raw.get("prompt")
    if isinstance(prompt, list):
        turns = [(role_of(turn, "role", n), text_field(turn, "content")) for n, turn in enumerate(prompt)]
        if len(turns) % 2 == 0:
            raise UserError("field 'prompt' must end with the user's message")
    else:
        turns = [("user", text_field(raw, "prompt"))]
    chosen, rejected = answer_field(raw, "chosen"), answer_field(raw, "rejected")
    return Record(text_field(raw, "id"), image, turns, chosen, rejected, bdhs_field(raw))


def answer_field(raw: dict, name: str) -> str:
    """An answer: a text, or a list of one message by the assistant."""
    value = raw.get(name)
    if not isinstance(value, list):
        return text_field(raw, name)
    if len(value) != 1:
        raise UserError(f"field {name!r} must be a text, or a list of one message")
    role_of(value[0], "role", 1)
    return text_field(value[0], "content")


def bdhs_field(raw: dict) -> dict:
    """How a pair came about. Only the report uses it; pairs from elsewhere lack it."""
    bdhs = raw.get("bdhs") or {}
    if not isinstance(bdhs, dict):
        raise UserError("field 'bdhs' must be an object")
    for name, kind in BDHS_FIELDS.items():
        value = bdhs.get(name)
        right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)  # to Python, True is an int
        if value is not None and not (right and abs(value) < 2**63):
            raise UserError(f"field 'bdhs.{name}' is {str(value)[:40]!r}, not what sample_bdhs.py writes")
    for name, limit in (("rho_th", 1), ("noise_steps", 1000)):
        if not 0 <= (bdhs.get(name) or 0) <= limit:
            raise UserError(f"field 'bdhs.{name}' is {bdhs[name]}, not between 0 and {limit}")
    return bdhs


def preference_fields(turns: list[Turn], chosen: str, rejected: str, messages: bool) -> dict:
    """`prompt`, `chosen` and `rejected` of a pairs file: bare texts, or messages where there are earlier turns.

    A file keeps to one form, as its readers (datasets, TRL) want one type per field.
    """
    if not messages:
        return {"prompt": turns[-1][1], "chosen": chosen, "rejected": rejected}
    sides = {"prompt": turns, "chosen": [("assistant", chosen)], "rejected": [("assistant", rejected)]}
    return {name: [{"role": role, "content": text} for role, text in side] for name, side in sides.items()}


@dataclass(frozen=True)
class PairBatch:
    """Pairs as one token tree each (branches: chosen, rejected), and their pixels (tiles, 3, H, W)."""

    tree: TokenTree
    pixels: Tensor


@dataclass(frozen=True)
class PairCollator:
    """Records to a `PairBatch`."""

    tokenizer: Tokenizer
    processor: ImageProcessor
    images: str
    max_response_tokens: int

    def responses(self, record: Record) -> list[list[int]]:
        """Chosen and rejected ids; a response over the limit is refused, never cut."""
        ids = [self.tokenizer.response(text) for text in (record.chosen, record.rejected)]
        longest = max(map(len, ids))
        if longest > self.max_response_tokens:
            raise UserError(
                f"a response of {longest} tokens is longer than --max-response-tokens "
                f"{self.max_response_tokens}; raise it"
            )
        return ids

    def usable(self, records: list[Record], skip_bad: bool) -> list[Record]:
        """The records whose responses fit and whose pictures open; a bad one is met here, not after hours."""

        def check(record: Record) -> Record:
            self.responses(record)
            if self.images == "toy":
                toyworld.scene_of(record.image)  # drawing it would take longer
            else:
                open_image(self.images, record.image)
            return record

        kept = collect(((f"record {record.id}", record) for record in records), check, None, skip_bad)
        if not kept:
            raise UserError("no usable pair: no picture can be read, or no response fits; see above")
        return kept

    def __call__(self, records: list[Record]) -> PairBatch:
        """A pair is ONE sequence: image and prompt once, then two branches."""
        sequences, pixels = [], []
        for record in records:
            picture = open_image(self.images, record.image)
            patches, packing = self.processor.layout(picture)
            branches = [Branch(ids) for ids in self.responses(record)]
            sequences.append(Sequence(self.tokenizer.prompt(record.turns), branches, patches, packing=packing))
            pixels.append(self.processor(picture))
        return PairBatch(build_tree(sequences, self.tokenizer.image_id, self.tokenizer.pad_id), torch.cat(pixels))

    def report_pair(self, record: Record) -> ReportPair:
        """What the report shows of a pair: the whole picture as the tower saw it, its visible patches, the texts."""
        mask, picture = None, open_image(self.images, record.image)
        if record.bdhs.get("rho_th") and record.bdhs.get("mask_seed") is not None:
            tokens = len(self.processor.layout(picture)[1])
            mask = mask_of_seed(tokens, record.bdhs["rho_th"], record.bdhs["mask_seed"]).tolist()
            mask = mask[: self.processor.patches]  # AnyRes: the whole picture's tile comes first
        question = record.turns[-1][1]
        if record.bdhs.get("noise_steps") and record.bdhs.get("mask_seed") is not None:
            picture = noise_of_seed(picture, record.bdhs["noise_steps"], record.bdhs["mask_seed"])
        picture = self.processor.crop(picture)
        facts = (record.bdhs.get(name) for name in ("iterations", "similarity", "guided"))
        return ReportPair(record.id, picture, mask, question, record.chosen, record.rejected, *facts)
