"""The fields of a JSON object, declared: one reader checks type, range and choice, and fills in
defaults.

    SIZES = {"layers": whole(1, 512), "eps": number(0, 1, default=1e-5), "act": one_of("silu")}
    sizes = read_fields(path, read_json(path, remedy), SIZES)

NaN and the infinities, which Python's `json` lets pass, are no numbers here.
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minialign.errors import UserError

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """What a field may hold.

    rule     what it must be, as an error says it: "it must be true or false"
    fits     whether a value follows the rule
    default  what a field that is missing or null stands for; REQUIRED: it may be neither
    """

    rule: str
    fits: Callable[[object], bool]
    default: object = REQUIRED


def whole(low: int, high: int, default: object = REQUIRED) -> Field:
    """A whole number of these bounds, both of them included."""
    rule = f"it must be a whole number from {low} to {high}"
    return Field(rule, lambda value: type(value) is int and low <= value <= high, default)


def number(low: float, high: float, default: object = REQUIRED) -> Field:
    """A number of these bounds, both of them included; NaN lies within none."""
    rule = f"it must be a number from {low} to {high}"
    return Field(rule, lambda value: type(value) in (int, float) and low <= value <= high, default)


def flag(default: object = REQUIRED) -> Field:
    """true or false."""
    return Field("it must be true or false", lambda value: type(value) is bool, default)


def text(default: object = REQUIRED) -> Field:
    """Any text."""
    return Field("it must be a text", lambda value: type(value) is str, default)


def path_below(ending: str = "", default: object = REQUIRED) -> Field:
    """The relative path of something in the file's own folder, or below it."""

    def fits(value: object) -> bool:
        if type(value) is not str or not value.isprintable() or len(value) > 200:
            return False
        path = PurePosixPath(value)
        return not path.is_absolute() and ".." not in path.parts and value.endswith(ending)

    ends = f" that ends in {ending!r}" if ending else ""
    return Field(f"it must be a path inside this folder{ends}", fits, default)


def one_of(*choices: object, default: object = REQUIRED) -> Field:
    """One of some values, of its very type: true is not 1."""
    rule = f"only {' or '.join(map(repr, choices))} is supported"

    def fits(value: object) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in choices)

    return Field(rule, fits, default)


def list_of(item: Field, count: int | None = None, default: object = REQUIRED) -> Field:
    """A list of values that all follow one rule; of `count` of them, if that is given."""
    rule = f"it must be a list{'' if count is None else f' of {count}'}, and of each: {item.rule}"

    def fits(value: object) -> bool:
        return (
            type(value) is list and count in (None, len(value)) and all(item.fits(v) for v in value)
        )

    return Field(rule, fits, default)


def object_of(item: Field, default: object = REQUIRED) -> Field:
    """A JSON object with any names, whose values all follow one rule."""
    rule = f"it must be a JSON object, and of each value: {item.rule}"

    def fits(value: object) -> bool:
        return type(value) is dict and all(item.fits(v) for v in value.values())

    return Field(rule, fits, default)


ANYTHING = Field("it may be anything", lambda value: True, None)


def read_fields(path: Path, values: dict, fields: dict[str, Field], where: str = "") -> dict:
    """The declared fields of an object that was read from `path`, each with its value or default.

    Fields that are not declared are left out. The first one that breaks its rule is a `UserError`;
    `where`, such as "text_config.", stands before its name.
    """
    found = {}
    for name, field in fields.items():
        value = values.get(name)
        if value is None and field.default is not REQUIRED:
            found[name] = field.default
            continue
        if value is None or not field.fits(value):
            raise broken_rule(path, where + name, value, field.rule)
        found[name] = value
    return found


def broken_rule(path: Path, name: str, value: object, rule: str) -> UserError:
    """The error for a field that is missing (None), or not as its rule says."""
    found = "missing" if value is None else shown(value)
    return UserError(f"{path}: {shortened(name)} is {found}; {rule}; mend it, or give another")


def shown(value: object) -> str:
    """A value of any size and depth, in a few words."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def shortened(text: str) -> str:
    """The beginning of a text that may be of any length."""
    return text if len(text) <= 200 else f"{text[:200]}..."
