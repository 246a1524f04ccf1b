"""Records of all formats with placeholders, roles, control tokens and rubbish put into them at
random: refused in one line, left out, or read as texts that have none of these in them."""

import json
import random

import pytest
from data_sets import RAW
from helpers import toy_tokenizer
from test_random_damage import RUBBISH, damage

from minialign.data.records import FORMATS, LeftOut, pair_fields
from minialign.errors import UserError

# What must never be read as characters, wherever it is put.
NEVER = ["<image>", "USER:", "ASSISTANT:", "[INST]", "[/INST]", "<<SYS>>", "<|im_start|>", "</s>"]
NEVER += ["<|im_end|>", "<|eot_id|>", "### Human:", "###Assistant:", "<s>", "<pad>", "<ImageHere>"]
NEVER += ["<image_1>", "<video>", "<start_of_turn>", "\n\nHuman:"]
# Fields that may stand beside the others, or in their place.
BESIDE = {
    "image": ["a.png", "", None, ["a.png", "b.png"], {"path": "a.png"}, {"bytes": "x"}, 5],
    "images": [["a.png"], [], "a.png", [None], ["a.png", "a.png"], [["a.png"]], {"path": None}],
    "prompt": ["Q", [], [{"role": "system", "content": "S"}], None],
    "system": ["", "Be brief.", None],
    "question": ["Q", None, ["Q"]],
    "history": [[], [["Q", "A"]], [["Q"]], "Q"],
    "messages": [[], None, [{"role": "user", "content": [{"type": "image"}]}]],
    "external": ["", "E", [{"role": "assistant", "content": "<image>"}]],
}


def with_markup(raw: object, rng: random.Random) -> object:
    """The value with something of `NEVER` somewhere in one of its texts, JSON within them too."""
    if isinstance(raw, dict) and raw:
        name = rng.choice(list(raw))
        return raw | {name: with_markup(raw[name], rng)}
    if isinstance(raw, list) and raw:
        at = rng.randrange(len(raw))
        return [*raw[:at], with_markup(raw[at], rng), *raw[at + 1 :]]
    if isinstance(raw, str) and raw.startswith("{"):
        return json.dumps(with_markup(json.loads(raw), rng))
    if isinstance(raw, str):
        at = rng.randrange(len(raw) + 1)
        return raw[:at] + rng.choice(["", " ", "\n"]) + rng.choice(NEVER) + raw[at:]
    return rng.choice(RUBBISH)


def changed(form: str, rng: random.Random) -> dict:
    """A record of a format with one to three things put into it."""
    raw = json.loads(json.dumps(rng.choice(RAW[form])))
    for _ in range(rng.choice([1, 1, 2, 3])):
        way = rng.randrange(4)
        if way == 0:
            name = rng.choice(list(BESIDE))
            found = raw | {name: rng.choice(BESIDE[name])}
        else:
            found = damage(raw, rng) if way == 1 else with_markup(raw, rng)
        raw = found if isinstance(found, dict) else raw  # that it is an object was seen before
    return raw


def check(form: str, seed: int) -> str:
    """What became of a record, after all that must hold of it."""
    rng = random.Random(f"{form} {seed}")
    raw = changed(form, rng)
    try:
        record = FORMATS[form].parse(raw)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400, error
        return "left out" if isinstance(error, LeftOut) else "refused"

    texts = [text for _, text in record.turns] + [record.chosen, record.rejected, record.external]
    assert not any(markup in text for markup in NEVER for text in texts), raw
    assert all(text == text.strip() for text in texts) and record.chosen
    roles = [role for role, _ in record.turns]
    assert roles == [("user", "assistant")[n % 2] for n in range(len(roles))] and len(roles) % 2
    assert isinstance(record.image, str) and roles[record.image_turn] == "user"

    ids = toy_tokenizer().prompt(record.turns, image_turn=record.image_turn)
    assert ids.count(toy_tokenizer().image_id) == 1
    if "\ud800" not in json.dumps(raw, ensure_ascii=False):
        answers = {"chosen": record.chosen, "rejected": record.rejected or "B."}
        written = json.loads(json.dumps(pair_fields(record, answers)))
        again = FORMATS["pairs"].parse(written | {"id": "1"})
        assert (again.turns, again.image_turn) == (record.turns, record.image_turn)
    return "read"


@pytest.mark.parametrize("form", FORMATS)
def test_random_texts(form):
    outcomes = [check(form, seed) for seed in range(35)]
    assert {"read", "refused"} <= set(outcomes)
