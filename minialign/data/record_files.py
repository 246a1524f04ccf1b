"""Data files: opened in a moment whatever their size, records parsed when they are asked for.

JSON Lines are indexed, a JSON array is read whole. A bad record ends the run with its place in the
file, or is skipped and counted; `--limit` draws a random subset that follows from the seed.
"""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minialign.data.records import FORMATS, LeftOut, Record, format_of, require_writable
from minialign.errors import UserError

# So many pairs, the paper's subsample, are checked before anything is spent; others in their turn.
CHECKED = 5000
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
        """The record as JSON gives it; a line that is none is a `UserError`.

        So is a record that cannot be written again: parts of it may be copied into other files.
        """
        if self.array is not None:
            raw = self.array[number]
        else:
            try:
                raw = parse_json(self.line(number))
            except (ValueError, RecursionError) as error:
                raise UserError(f"not JSON ({error})") from None
        for name, value in raw.items() if isinstance(raw, dict) else ():
            require_writable({name: value}, name)
        return raw

    def json_object(self, number: int) -> dict:
        """The record, which must be an object."""
        raw = self[number]
        if not isinstance(raw, dict):
            raise UserError("expected a JSON object")
        return raw

    def line(self, number: int) -> bytes:
        """The bytes of a line."""
        with open(self.path, "rb") as file:  # anew, as threads would share one that is open
            file.seek(self.starts[number])
            return file.read(self.starts[number + 1] - self.starts[number])

    def place(self, number: int) -> str:
        """Where a record stands, for people."""
        return f"{self.path}, {'line' if self.array is None else 'record'} {number + 1}"

    def hash(self) -> str:
        """A short name of the number of records and the first `CHECKED`.

        Those behind are not in it, as they may be mended during a run.
        """
        if self.array is not None:
            try:
                data = json.dumps(self.array[:CHECKED]).encode()
            except RecursionError:
                message = "a record is nested too deep to be written again; mend it"
                raise UserError(f"{self.path}: {message}") from None
        else:
            with open(self.path, "rb") as file:
                data = file.read(self.starts[min(CHECKED, len(self))])
        return hashlib.sha256(data + str(len(self)).encode()).hexdigest()[:16]


def open_file(path: str, flag: str, remedy: str) -> RecordFile:
    """A file of records, an array where it begins with `[`, else lines.

    `remedy` is what to do where there is none.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no ordinary file"
        raise UserError(f"{flag} {path}: not readable, as it is {what}; name a file")
    try:
        with open(path, "rb") as file:
            begins = file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
        if begins.startswith(b"PAR1"):
            message = "is a parquet file; make JSON Lines of it as docs/running.md shows"
            raise UserError(f"{flag} {path}: {message}")
        if begins.startswith(b"["):
            return RecordFile(path, read_array(path, flag), np.zeros(0))
        return RecordFile(path, None, line_starts(path))
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{flag} {path}: not readable ({error}); {remedy}") from None


def read_array(path: str, flag: str) -> list:
    """The records of a JSON array."""
    remedy = f"give {flag} JSON, or JSON Lines"
    try:
        array = parse_json(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {remedy}") from None
    if not isinstance(array, list):
        raise UserError(f"{path}: expected a JSON array; {remedy}")
    return array


def parse_json(data: bytes) -> object:
    """JSON in UTF-8, perhaps behind a byte order mark; a `ValueError` where an object has a field
    twice, of which Python would take the last."""
    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=fields_once)


def fields_once(pairs: list[tuple[str, object]]) -> dict:
    """An object of its fields, none of which may stand twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        name = next(name for name, count in names.items() if count > 1)
        raise ValueError(f"field {name[:60]!r} stands twice in an object")
    return found


def line_starts(path: str) -> np.ndarray:
    """The byte offsets of a file's lines, and of their end; blank lines at the end do not count."""
    parts = [np.zeros(1, np.int64)]
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            parts.append(ends + size + 1)
            size += len(chunk)

        starts = np.concatenate(parts)
        if starts[-1] != size:  # the last line has no line end
            starts = np.append(starts, size)
        while len(starts) > 1:
            file.seek(starts[-2])
            if file.read(starts[-1] - starts[-2]).strip():
                break
            starts = starts[:-1]
    return starts


@dataclass(frozen=True)
class Records:
    """Some of a file's records, by their numbers in the file, parsed when they are asked for."""

    file: RecordFile
    format: str
    numbers: Sequence[int]

    def parse(self, number: int) -> Record:
        """The file's record of that number; one without an id is named by its number."""
        record = FORMATS[self.format].parse(self.file.json_object(number))
        return replace(record, id=record.id or str(number + 1), place=self.file.place(number))


def open_records(path: str, flag: str, form: str | None, remedy: str) -> Records:
    """All records of a file; where no format is given, it is that of its first record."""
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
            raw = file.json_object(number)
        except UserError:
            continue
        form = format_of(raw)
        if form is not None:
            return form

    # None has: what is wrong with the first?
    place = file.place(0)
    try:
        raw = file.json_object(0)
    except UserError as error:
        message = "give JSON Lines, or one JSON array of objects"
        raise UserError(f"{place}: {error}; {message}") from None
    shown = ", ".join(sorted(raw))[:80]
    known = "; ".join(f"{name}: {form.known_by[0]}" for name, form in FORMATS.items())
    message = f"fields {shown} are of no known format ({known}); give one of these"
    raise UserError(f"{place}: {message}")


def collect(
    raws: Iterable[tuple[str, object]], parse: Callable, limit: int | None, skip_bad: bool
) -> list:
    """What `parse` makes of (place, raw record), as by `sift`; tells how many were left out."""
    records, refused = sift(raws, parse, skip_bad, limit)
    reasons = Counter(str(error) for _, error in refused if isinstance(error, LeftOut))
    for reason, count in reasons.items():
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
    skipped.
    """
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
    remedy = "" if ";" in message else "; mend it"
    return f"{message}{remedy}, or pass --skip-bad-records"


def order_of(count: int, seed: int) -> list[int]:
    """Record numbers in a random order that follows from the seed; a subset of N are its first."""
    order = list(range(count))
    random.Random(f"subset-{seed}").shuffle(order)
    return order


def read_records(
    data: str,
    form: str | None,
    limit: int | None,
    seed: int,
    skip_bad: bool = False,
    flag: str = "--data",
) -> list[Record]:
    """A file's records to sample for, parsed, in its order; `flag` has named the file."""
    remedy = "give a data file (LLaVA-Instruct, POVID, ...), or `toy`"
    records = open_records(data, flag, form, remedy)
    # Always in random order, so that ids are numbered alike under every --limit.
    order = tqdm(order_of(len(records.numbers), seed), desc="read", unit="record", delay=3)
    numbered = ((records.file.place(number), number) for number in order)
    found = collect(numbered, lambda number: (number, records.parse(number)), limit, skip_bad)
    if not found:
        raise UserError(f"{flag} {data}: no usable record; {remedy}")
    unique = number_repeats([record for _, record in found])
    in_file = sorted(range(len(found)), key=lambda i: found[i][0])
    return [unique[i] for i in in_file]


def number_repeats(records: list[Record]) -> list[Record]:
    """Ids made unique (`7`, `7#2`, ...).

    LLaVA-Instruct's id names the picture, and what is drawn for a record follows from its id.
    """
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
        message = f"holds no rejected responses; sample them: sample_bdhs.py --data {pairs}"
        raise UserError(f"--pairs {pairs}: {message}")
    return records


def usable_pairs(
    pairs: Records, check: Callable[[Record], None], limit: int | None, seed: int, skip_bad: bool
) -> Records:
    """The first `CHECKED` pairs without those that `check` refuses, and the rest; with a limit a
    random subset.

    So a bad pair is met here and not after hours; one behind the first `CHECKED` in its turn.
    """
    total = len(pairs.numbers)
    order, rest = range(min(total, CHECKED)), range(CHECKED, total)
    if limit is not None:
        order, rest = order_of(total, seed), ()

    shown = tqdm(order, desc="check", unit="pair", delay=3)
    numbered = ((pairs.file.place(number), number) for number in shown)
    numbers = collect(numbered, lambda n: checked(pairs, check, n), limit, skip_bad)
    if not numbers:
        message = "no usable record: see above; give others, or pairs of sample_bdhs.py"
        raise UserError(f"{pairs.file.path}: {message}")
    return replace(pairs, numbers=sorted(numbers) + list(rest))


def checked(pairs: Records, check: Callable[[Record], None], number: int) -> int:
    """The number of a pair that `check` does not refuse."""
    check(pairs.parse(number))
    return number
