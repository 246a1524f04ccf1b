"""Declared fields: what follows its rule is given back, what breaks it is one line."""

import json
import random
from pathlib import Path

import pytest
from helpers import refused

from minialign.fields import (
    ANYTHING,
    flag,
    list_of,
    number,
    object_of,
    one_of,
    path_below,
    read_fields,
    text,
    whole,
)

PATH = Path("folder") / "config.json"
# Values that JSON can hold, Python's extensions among them.
VALUES = [
    *(None, True, False, 0, 1, -1, 7, 2**64, 10**400, 0.5, 1e300, float("nan"), float("inf")),
    *("", "x", "7", [], [1], [1, 2], ["x"], [[1]], {}, {"a": 1}, {"a": "x"}, {"a": None}),
]
RIGHT = [
    (whole(0, 7), [0, 1, 7]),
    (number(0, 1), [0, 1, 0.5]),
    (flag(), [True, False]),
    (text(), ["", "x", "7"]),
    (one_of("x", 1), [1, "x"]),
    (one_of(True), [True]),
    (list_of(whole(0, 7)), [[], [1], [1, 2]]),
    (list_of(number(0, 7), 2), [[1, 2]]),
    (object_of(text()), [{}, {"a": "x"}]),
    (path_below(), ["", "x", "7"]),
    (path_below("x"), ["x"]),
    (ANYTHING, VALUES),
]


@pytest.mark.parametrize(("field", "right"), RIGHT, ids=lambda value: str(value)[:40])
def test_every_value_is_given_back_or_refused_by_name(field, right):
    for value in VALUES:
        if any(type(value) is type(good) and repr(value) == repr(good) for good in right):
            found = read_fields(PATH, {"size": value, "other": 3}, {"size": field})
            assert list(found) == ["size"] and repr(found["size"]) == repr(value)
        else:
            message = refused(
                lambda v=value: read_fields(PATH, {"size": v}, {"size": field}),
                f"{PATH}: size is ",
                field.rule,
            )
            assert len(message) < 300


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/x", "x\0", "x\n", "x" * 300])
def test_a_path_that_leaves_the_folder_or_is_none(path):
    refused(lambda: read_fields(PATH, {"file": path}, {"file": path_below()}), "file is ", "inside")


def test_what_is_missing_or_null_has_its_default():
    fields = {"a": whole(1, 2, default=2), "b": text(default=None), "c": flag(default=False)}
    expected = {"a": 2, "b": None, "c": False}
    assert read_fields(PATH, {}, fields) == expected
    assert read_fields(PATH, {"a": None, "b": None, "c": None}, fields) == expected
    refused(lambda: read_fields(PATH, {}, {"a": whole(1, 2)}), "a is missing", "from 1 to 2")


def test_deep_and_long_values_are_a_short_line():
    rng = random.Random(0)
    deep = json.loads("[" * 800 + "]" * 800)
    for value in (deep, "x" * 10**5, list(range(10**5)), {str(i): i for i in range(10**4)}):
        field = rng.choice([whole(1, 2), text(default=None) if type(value) is not str else flag()])
        assert len(refused(lambda v=value, f=field: read_fields(PATH, {"a": v}, {"a": f}))) < 600
