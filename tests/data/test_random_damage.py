"""Damaged at random, a record or pair is either a UserError that names it or of use to all that
follows.
"""

import json
import math
import random
import re
from dataclasses import replace

import pytest
from data_sets import RAW, expected
from helpers import toy_assistant, toy_tokenizer
from input_files import (
    MESSAGE,
    array,
    instruct,
    lines,
    pair,
    pairs_in,
    records_in,
    toy_collator,
)

from minialign.data.record_files import open_pairs
from minialign.errors import UserError
from minialign.evaluation.report import write_report
from minialign.toy.world import open_picture
from minialign.training.outputs import report_pairs

RUBBISH = [
    None,
    True,
    0,
    -1,
    2**80,
    1.5,
    math.nan,
    math.inf,
    "",
    " ",
    "\ud800",
    "\x00\x1b",
    "x" * 3000,
    [],
    {},
    [[]],
    [None],
    {"role": "user"},
    [{"role": "user", "content": ""}],
    "../../etc/passwd",
    "</s><image>",
]


def damage(raw, rng: random.Random):
    """The value with one thing in it deleted, replaced, nested, repeated or renamed."""
    if isinstance(raw, dict) and raw and rng.random() < 0.9:
        name = rng.choice(list(raw))
        way = rng.randrange(6)
        if way == 0:
            return {k: v for k, v in raw.items() if k != name}
        if way == 1:
            return raw | {name: {name: raw[name]}}
        if way == 2:
            return {(k + "s" if k == name else k): v for k, v in raw.items()}
        return raw | {name: damage(raw[name], rng)}
    if isinstance(raw, list) and raw and rng.random() < 0.7:
        at = rng.randrange(len(raw))
        head, tail = raw[:at], raw[at + 1 :]
        return rng.choice([head + tail, raw + [raw[at]], [*head, damage(raw[at], rng), *tail]])
    return rng.choice([*RUBBISH, [raw], {"value": raw}, str(raw)])


def damage_text(line: str, rng: random.Random) -> str:
    """The line cut short, or with a character deleted, repeated or put in; never a line end."""
    at = rng.randrange(len(line))
    odd = ["", "\x00", "\x07", "\t", '"', "\\", "}", "[", ","]
    put = rng.choice([*odd, "\u2028", "\ufeff", "\\ud800", "é", line[at]])
    head, tail = line[:at], line[at:]
    return rng.choice([head, head + put + tail, head + put + tail[1:], tail])


COLLATE, ASSISTANT = toy_collator(64), toy_assistant()
# Pairs from elsewhere: what `bdhs` holds only the sampler writes.
PAIR = pair(1, bdhs=None)
LONG = PAIR | {"prompt": [MESSAGE, {"role": "assistant", "content": "A"}, MESSAGE]}


@pytest.mark.parametrize("seed", range(60))
def test_damaged_pairs(tmp_path, seed):
    """A damaged line is a UserError that names it, or a record that all that follows can use."""
    rng, path, neighbours = random.Random(seed), tmp_path / "pairs.jsonl", [pair(0), pair(2)]
    raw = rng.choice([PAIR, LONG])
    middle = damage_text(json.dumps(raw), rng) if seed % 3 == 0 else json.dumps(damage(raw, rng))
    path.write_bytes(lines(neighbours[0], middle, neighbours[1]))
    try:
        records = pairs_in(path)
    except UserError as error:
        assert f"{path}, line 2: " in str(error) and "--skip-bad-records" in str(error)
        records = pairs_in(path, skip_bad=True)
        assert len(records) == 2
    assert {"pair-0", "pair-2"} <= {record.id for record in records}

    if len(records) == 3 and usable(records[1]):
        batch = COLLATE.batch([COLLATE.load(records[1])])
        assert batch.tree.ids.shape[0] == 1
        of_file = replace(open_pairs(str(path), None), numbers=[1])
        shown = report_pairs(of_file, ASSISTANT, open_picture, None)
        write_report(tmp_path / "r.html", "", {}, shown, [], {})
    path.write_bytes(lines(*neighbours))
    assert [records[0], records[-1]] == pairs_in(path)


def usable(record) -> bool:
    """Whether the collator's check lets a record through."""
    try:
        COLLATE.check(record)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("seed", range(60))
def test_damaged_records(tmp_path, seed):
    rng, path, neighbours = random.Random(seed), tmp_path / "data.json", [instruct(0), instruct(2)]
    middle = damage(instruct(1), rng)
    path.write_bytes(array(neighbours[0], middle, neighbours[1]))
    try:
        records = records_in(path)
    except UserError as error:
        assert f"{path}, record 2: " in str(error) and "--skip-bad-records" in str(error)
        records = records_in(path, skip_bad=True)
        assert len(records) == 2
    for record in records[1:-1]:
        toy_tokenizer().prompt(record.turns)
        assert (
            record.id.strip()
            and record.chosen.strip()
            and all(text.strip() for _, text in record.turns)
        )
        json.dumps(record.id + record.image).encode("utf-8")
    path.write_bytes(array(*neighbours))
    assert [records[0], records[-1]] == records_in(path)


@pytest.mark.parametrize("form", RAW)
@pytest.mark.parametrize("seed", range(40))
def test_damaged_records_of_every_data_set(tmp_path, form, seed):
    """Between two good records: refused with its place, left out, or read; the neighbours stay what
    they are.
    """
    rng, path, good = random.Random(f"{form}-{seed}"), tmp_path / "data", RAW[form][:2]
    middle = damage(good[seed % 2], rng)
    as_lines = [json.dumps(good[0]), json.dumps(middle), json.dumps(good[1])]
    if seed % 4 == 0:
        as_lines[1] = damage_text(as_lines[1], rng)
    path.write_bytes(
        lines(*as_lines) if seed % 4 == 0 or seed % 3 else array(good[0], middle, good[1])
    )
    read = records_in if form == "instruct" else pairs_in
    try:
        records = read(path)
    except UserError as error:
        assert re.search(
            f"{re.escape(str(path))}, (line|record) 2: ", str(error)
        ) and "\n" not in str(error)
        records = read(path, skip_bad=True)
        assert len(records) == 2
    wanted = expected(form)
    if form == "pairs":  # of which the second is named by its line
        wanted[1] = replace(wanted[1], id="3")
    assert [wanted[0], wanted[1]] == [records[0], replace(records[-1], id=wanted[1].id)]
    for record in records[1:-1]:
        toy_tokenizer().prompt(record.turns)
        assert (
            record.id.strip()
            and record.chosen.strip()
            and all(text.strip() for _, text in record.turns)
        )
        json.dumps(record.id + record.image + record.rejected).encode("utf-8")
