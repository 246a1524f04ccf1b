"""Data files: opened in a moment whatever their size, records parsed when they are asked for.

JSON Lines are indexed, a JSON array is read whole. A bad record ends the run with its place in the
file, or is skipped and counted; `--limit` draws a random subset that follows from the seed."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minialign.data.records import FORMATS, LeftOut, Record
from minialign.errors import UserError
from minialign.files import read_json

CHECKED = 5000  # so many pairs are looked at before anything is spent, the paper's subsample; the others in their turn
CHUNK = 2**24  # bytes of a file that are looked at together


@dataclass(frozen=True)
class RecordFile(Sequence):
    """The raw records of a JSON array, or of JSON Lines, which are read one by one."""

    path: str
    array: list | None
    starts: np.ndarray  # byte offsets of the lines, and of the end

    def __len__(self) -> int:
        return len(self.starts) - 1 if self.array is None else len(self.array)

    def __getitem__(self, number: int) -> object:
        """The record as JSON gives it; a line that is none is a `UserError`."""
        if self.array is not None:
            return self.array[number]
        try:
            return json.loads(self.line(number).decode("utf-8-sig" if number == 0 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON ({error})") from None

    def line(self, number: int) -> bytes:
        """The bytes of a line."""
        with open(
            self.path, "rb"
        ) as file:  # anew, as worker processes would share one that is open
            file.seek(self.starts[number])
            return file.read(self.starts[number + 1] - self.starts[number])

    def place(self, number: int) -> str:
        """Where a record stands, for people."""
        return f"{self.path}, {'line' if self.array is None else 'record'} {number + 1}"

    def hash(self) -> str:
        """A short name of the number of records and the first `CHECKED`; those behind may be mended
        during a run."""
        if self.array is not None:
            data = json.dumps(self.array[:CHECKED]).encode()
        else:
            with open(self.path, "rb") as file:
                data = file.read(self.starts[min(CHECKED, len(self))])
        return hashlib.sha256(data + str(len(self)).encode()).hexdigest()[:16]


def open_file(path: str, flag: str, remedy: str) -> RecordFile:
    """A file of records, an array where it begins with `[`; `remedy` is what to do where there is
    none."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            what = "a folder" if Path(path).is_dir() else "no ordinary file"
            raise UserError(f"{flag} {path}: not readable, as it is {what}; name a file")
        with open(path, "rb") as file:
            begins = file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
            if begins.startswith(b"PAR1"):
                raise UserError(
                    f"{flag} {path}: is a parquet file; make JSON Lines of it as the README shows"
                )
            if begins.startswith(b"["):
                return RecordFile(
                    path,
                    read_json(Path(path), f"give {flag} JSON, or JSON Lines", list),
                    np.zeros(0),
                )
            file.seek(0)
            starts, offset = [np.zeros(1, np.int64)], 0
            while chunk := file.read(CHUNK):
                starts.append(
                    np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset + 1
                )
                offset += len(chunk)
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:  # a NUL in the name
        raise UserError(f"{flag} {path}: not readable ({error}); {remedy}") from None
    lines = np.concatenate(starts)
    found = RecordFile(path, None, lines if lines[-1] == offset else np.append(lines, offset))
    while len(found) and not found.line(len(found) - 1).strip():  # blank lines at the end
        found = replace(found, starts=found.starts[:-1])
    return found


@dataclass(frozen=True)
class Records:
    """Some of a file's records, by their numbers in the file, parsed when they are asked for."""

    file: RecordFile
    format: str
    numbers: Sequence[int]

    def parse(self, number: int) -> Record:
        """The file's record of that number; one without an id is named by its number."""
        raw = self.file[number]
        if not isinstance(raw, dict):
            raise UserError("expected a JSON object")
        record = FORMATS[self.format][1](raw)
        return replace(record, id=record.id or str(number + 1), place=self.file.place(number))


def open_records(path: str, flag: str, form: str | None, remedy: str) -> Records:
    """All records of a file; the format, where it is not given, is that of the first record that
    has a known one."""
    file = open_file(path, flag, remedy)
    if not file:
        raise UserError(f"{flag} {path}: no usable record; {remedy}")
    form = form or detect(file)
    print(f"{path}: {len(file)} records, read as {form}")
    return Records(file, form, range(len(file)))


def detect(file: RecordFile) -> str:
    """The format of the first record that has a known one; the first hundred are asked."""
    for number in range(min(100, len(file))):
        try:
            raw = file[number]
        except UserError:
            continue
        for form, (known_by, _) in FORMATS.items():
            if isinstance(raw, dict) and known_by <= raw.keys():
                return form
    try:
        raw = file[0]
    except UserError as error:
        raise UserError(f"{file.place(0)}: {error}; give JSON Lines, or one JSON array") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{file.place(0)}: expected a JSON object; give JSON Lines, or one JSON array of objects"
        )
    known = "; ".join(
        f"{form}: {', '.join(sorted(fields))}" for form, (fields, _) in FORMATS.items()
    )
    raise UserError(
        f"{file.place(0)}: fields {', '.join(sorted(raw))[:80]} are of no known format ({known}); give one "
        "of these"
    )


def collect(
    raws: Iterable[tuple[str, object]], parse: Callable, limit: int | None, skip_bad: bool
) -> list:
    """Parse (place, raw record) one by one; a bad one ends the run with its place, or is skipped
    and counted."""
    records, refused = sift(raws, parse, skip_bad, limit)
    for reason, count in Counter(
        str(error) for _, error in refused if isinstance(error, LeftOut)
    ).items():
        tqdm.write(f"{count} records left out: {reason}")
    bad = [f"{place}: {error}" for place, error in refused if not isinstance(error, LeftOut)]
    if bad:
        tqdm.write(f"{len(bad)} bad records skipped, the first: {bad[0]}")
    return records


def sift(
    raws: Iterable[tuple[str, object]], parse: Callable, skip_bad: bool, limit: int | None = None
) -> tuple[list, list[tuple[str, UserError]]]:
    """What `parse` makes of (place, raw record), at most `limit` of them, and (place, error) of
    those refused.

    Those of no use are left out; a bad one ends the run with its place, unless bad ones are to be
    skipped."""
    records, refused = [], []
    for place, raw in raws:
        if limit is not None and len(records) >= limit:
            break
        try:
            records.append(parse(raw))
        except UserError as error:
            if not (skip_bad or isinstance(error, LeftOut)):
                raise UserError(or_skipped(f"{place}: {error}")) from None
            refused.append((place, error))
    return records, refused


def or_skipped(message: str) -> str:
    """What is wrong with a record, and that --skip-bad-records leaves it out."""
    return f"{message}{'' if ';' in message else '; mend it'}, or pass --skip-bad-records"


def order_of(count: int, seed: int) -> list[int]:
    """Record numbers in a random order that follows from the seed; its first N are the subset of
    N."""
    order = list(range(count))
    random.Random(f"subset-{seed}").shuffle(order)
    return order


def read_records(
    data: str, form: str | None, limit: int | None, seed: int, skip_bad: bool = False
) -> list[Record]:
    """A file's records to sample for, parsed, in its order."""
    remedy = "give a data file (LLaVA-Instruct, POVID, ...), or `toy`"
    records = open_records(data, "--data", form, remedy)
    # Always in random order, so that ids are numbered alike under every --limit.
    order = tqdm(order_of(len(records.numbers), seed), desc="read", unit="record", delay=3)
    numbered = ((records.file.place(number), number) for number in order)
    found = collect(numbered, lambda number: (number, records.parse(number)), limit, skip_bad)
    if not found:
        raise UserError(f"--data {data}: no usable record; {remedy}")
    numbers = [number for number, _ in found]
    named = zip(numbers, number_repeats([record for _, record in found]), strict=True)
    return [record for _, record in sorted(named, key=lambda pair: pair[0])]


def number_repeats(records: list[Record]) -> list[Record]:
    """Ids made unique (`7`, `7#2`, ...): LLaVA-Instruct names the picture, but a pair's seed
    follows from its id."""
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


def open_pairs(pairs: str, form: str | None) -> Records:
    """Preference pairs to train on, in a format that has rejected responses."""
    records = open_records(pairs, "--pairs", form, "make one with sample_bdhs.py")
    if records.format == "instruct":
        raise UserError(
            f"--pairs {pairs}: holds no rejected responses; sample them: sample_bdhs.py --data {pairs}"
        )
    return records


def usable_pairs(
    pairs: Records, check: Callable[[Record], None], limit: int | None, seed: int, skip_bad: bool
) -> Records:
    """The first `CHECKED` pairs without those that `check` refuses, and the rest; with a limit a
    random subset.

    A bad pair is met here and not after hours. Those behind the first `CHECKED` are met in their
    turn."""
    total = len(pairs.numbers)
    order = range(min(total, CHECKED)) if limit is None else order_of(total, seed)

    def checked(number: int) -> int:
        check(pairs.parse(number))
        return number

    shown = tqdm(order, desc="check", unit="pair", delay=3)
    numbers = collect(
        ((pairs.file.place(number), number) for number in shown), checked, limit, skip_bad
    )
    if not numbers:
        raise UserError(
            f"{pairs.file.path}: no usable record: see above; give others, or pairs of sample_bdhs.py"
        )
    rest = range(CHECKED, total) if limit is None else ()
    return replace(pairs, numbers=sorted(numbers) + list(rest))
