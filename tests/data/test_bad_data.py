"""Bad records and pairs end in one line that names file, place and remedy, and leave nothing in
--out.
"""

import json

import pytest
from helpers import refused
from input_files import (
    MESSAGE,
    NO_DATA,
    array,
    gives_remedy,
    instruct,
    left_in,
    lines,
    pair,
    pairs_in,
    sample,
    talk,
    train,
)

BAD_INSTRUCT = [
    (array(), "no usable record"),
    (array(instruct())[:-30], "not readable as JSON"),
    (array(instruct(0), 5), "record 2: expected a JSON object"),
    (array(instruct(id="")), "record 1: field 'id' is empty"),
    (array(instruct(id=True)), "field 'id' is not a text"),
    (array(instruct(id=[1])), "field 'id' is not a text"),
    (array(instruct(image=None)), "no usable record"),
    (array(instruct(image=7)), "field 'image' is not a text"),
    (array(instruct(0), instruct(1, conversations=None)), "record 2: field 'conversations'"),
    (array(instruct(conversations="text")), "field 'conversations'"),
    (array(instruct(conversations=talk(("human", "Q")))), "a question and end with an answer"),
    (array(instruct(conversations=["Q", "A"])), "turn 1: a message must be an object"),
    (array(instruct(conversations=talk(("human", "Q"), ("gpt", "")))), "field 'value' is empty"),
    (
        array(instruct(conversations=talk(("human", "Q"), ("gpt", " \n\t")))),
        "field 'value' is empty",
    ),
    (
        array(instruct(conversations=talk(("human", "<image>\n"), ("gpt", "A")))),
        "turn 1 is empty",
    ),
    (
        array(instruct(conversations=talk(("human", "Q"), ("gpt", 7)))),
        "field 'value' is not a text",
    ),
    (array(instruct(conversations=talk(("gpt", "A"), ("human", "Q")))), "turn 1 is from 'gpt'"),
    (array(instruct(conversations=talk(("human", "Q"), ("human", "Q")))), "turn 2 is from 'human'"),
    (array(instruct(conversations=talk(("human", "Q"), ("robot", "A")))), "turn 2 is from 'robot'"),
    (
        array(instruct(conversations=talk(("human", "Q"), ("gpt", "A"), ("human", "Q")))),
        "end with an answer",
    ),
    (
        array(instruct(conversations=talk(("human", "Q"), ("gpt", "\ud800")))),
        "half a surrogate pair",
    ),
]
BAD_PAIRS = [
    (lines(pair(0), pair(1)) + b'{"id": "2", "ima', "line 3: not JSON"),
    (lines(pair(0), "", pair(1)), "line 2: not JSON"),
    (lines(pair(0), "{'id': 1}"), "line 2: not JSON"),
    (lines(pair(0), '{"id": "a\tb"}'), "line 2: not JSON"),  # a control character
    (lines(pair(0), [pair(1)]), "line 2: expected a JSON object"),
    (lines(pair(id=[5])), "line 1: field 'id' is not a text"),
    (lines(pair(0), pair(1, images=None)), "line 2: field 'image' .* is missing"),
    (lines(pair(images=[])), "no usable record"),
    (lines(pair(images=7)), "field 'images' is not a text"),
    (lines(pair(images=["a.png", "b.png"])), "line 1: 2 pictures to a record"),
    (lines(pair(images=[{}])), "field 'images' is not a text"),
    (lines(pair(prompt=None)), "field 'prompt' is missing"),
    (lines(pair(prompt=" ")), "field 'prompt' is empty"),
    (lines(pair(prompt=[])), "the prompt must end with the user's"),
    (
        lines(pair(prompt=[MESSAGE, {"role": "assistant", "content": "A"}])),
        "the prompt must end with the user's",
    ),
    (lines(pair(prompt=[MESSAGE, MESSAGE, MESSAGE])), "turn 2 is from 'user'"),
    (lines(pair(prompt=[{"role": "user"}])), "field 'content' is missing"),
    (lines(pair(0), pair(1, chosen=None)), "line 2: field 'chosen' is missing"),
    (lines(pair(chosen="")), "field 'chosen' is empty"),
    (lines(pair(rejected="  \n ")), "field 'rejected' is empty"),
    (lines(pair(rejected=["A"])), "a message must be an object"),
    (lines(pair(rejected=[MESSAGE])), "is from 'user'"),
    (lines(pair(rejected=[])), "field 'rejected'"),
    (lines(pair(chosen="\udfff")), "half a surrogate pair"),
    (lines(pair(bdhs=[1])), "field 'bdhs'"),
    (lines(pair(chosen="The same.", rejected="The same.")), "no usable record"),
    (
        lines(pair(chosen="A cup. " * 300)),
        "line 1: a response of .* longer than --max-response-tokens 512",
    ),
    (
        lines(pair(images=["elsewhere.png"])),
        "line 1: image 'elsewhere.png' is not in the embedded world",
    ),
]


@pytest.mark.parametrize(
    "data,match", NO_DATA + BAD_INSTRUCT, ids=range(len(NO_DATA + BAD_INSTRUCT))
)
def test_bad_records(model, tmp_path, data, match):
    path, out = tmp_path / "data.json", tmp_path / "out"
    path.write_bytes(data)
    gives_remedy(lambda: sample(model, out, "--data", str(path)), match, path)
    assert left_in(out) == []


@pytest.mark.parametrize("data,match", NO_DATA + BAD_PAIRS, ids=range(len(NO_DATA + BAD_PAIRS)))
def test_bad_pairs(model, tmp_path, data, match):
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    path.write_bytes(data)
    gives_remedy(lambda: train(model, out, "--pairs", str(path)), match, path)
    assert left_in(out) == []


@pytest.mark.parametrize(
    "bdhs",
    [
        {"mask_seed": "x", "rho_th": 0.7},
        {"mask_seed": 1, "rho_th": "0.7"},
        {"mask_seed": -1, "rho_th": 0.7},
        {"rho_th": 7},
        {"noise_steps": 99999},
        {"iterations": [1]},
        {"similarity": "x"},
        {"guided": "perhaps"},
        {"rho_th": float("nan")},
    ],
    ids=str,
)
def test_rubbish_in_what_a_pair_says_of_itself(tmp_path, bdhs):
    """Met with the record, and not by the report after all is trained."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair(1, bdhs=bdhs)) + "\n")
    name = next(iter(bdhs)) if bdhs.get("mask_seed") != 1 else "rho_th"
    refused(lambda: pairs_in(path), "line 1: ", f"field 'bdhs': {name} is ", "it must be")
