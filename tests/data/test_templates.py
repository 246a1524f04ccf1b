"""Templates: prompt and response, separately encoded, are the ids of the joint text as transformers
encodes it.
"""

import json
import random

import pytest
from helpers import refused
from llama_tokenizer import AWKWARD, FORMS, joint, llama2_folder, random_text, with_metaspace

from minialign.data.tokenizer import Tokenizer
from minialign.edge import CHECKPOINT
from minialign.toy import world


@pytest.fixture(scope="module", params=["toy", *FORMS, "chatml-metaspace", "vicuna_v1-metaspace"])
def both(request, oracle, tmp_path_factory):
    """(our tokenizer, transformers' `text -> ids`, the template's form) of one folder."""
    name, _, metaspace = request.param.partition("-")
    folder = (
        CHECKPOINT if name == "toy" else llama2_folder(tmp_path_factory.mktemp("llama") / "model")
    )
    if metaspace:
        with_metaspace(folder)
    theirs = oracle.transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, oracle.transformers.PreTrainedTokenizerFast)
    form = FORMS["short" if name == "toy" else name]
    ours = Tokenizer.from_folder(folder, None if name == "toy" else name)
    return ours, lambda text: theirs(text, add_special_tokens=False).input_ids, form


def check(both, turns: list, response: str) -> None:
    """Prompt and response, separately encoded, are the joint text's ids."""
    ours, theirs, form = both
    for image in (True, False):
        prompt, whole = joint(form, turns, response, "<image>" if image else "")
        ids = ours.prompt(turns, image)
        assert ids[0] == 1 and ids[1:] == theirs(prompt)
        assert ids[1:] + ours.response(response) == theirs(whole)
        assert ids.count(ours.image_id) == image and ids.count(1) == 1
        assert (
            ours.response(response).count(ours.eos_id) == 1
            and ours.response(response)[-1] == ours.eos_id
        )


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_awkward_texts(both, text):
    check(both, [("user", text)], "Yes")
    check(both, [("user", "What is it?")], text)
    check(both, [("user", text), ("assistant", text), ("user", text)], text)


@pytest.mark.parametrize("seed", range(20))
def test_random_conversations(both, seed):
    rng = random.Random(seed)
    turns = [("user", random_text(rng))]
    for _ in range(rng.randrange(4)):
        turns += [("assistant", random_text(rng)), ("user", random_text(rng))]
    check(both, turns, random_text(rng))


@pytest.mark.parametrize("kind", ["description", "existence", "attribute"])
@pytest.mark.parametrize("index", range(3))
def test_conversations_of_the_embedded_world(both, kind, index):
    turns = world.conversation(world.make_scene("train", index), kind, random.Random(index))
    for end in range(1, len(turns), 2):
        check(both, turns[:end], turns[end][1])


def test_an_empty_question(both):
    check(both, [("user", "")], "Yes")


def test_a_prompt_continues_the_one_before(both):
    """Turn by turn: prompt, answer and next question are one sequence, so that a conversation may
    be grown.
    """
    ours, _, _ = both
    turns = [
        ("user", "What is it?"),
        ("assistant", "A dog."),
        ("user", "Where?"),
        ("assistant", "Left."),
        ("user", "Sure?"),
    ]
    ids = ours.prompt(turns[:1])
    for end in (3, 5):
        longer = ours.prompt(turns[:end])
        grown = ids + ours.response(turns[end - 2][1])
        assert longer[: len(grown)] == grown and ours.image_id not in longer[len(grown) :]
        ids = longer


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({}, "vicuna_v1"),
        ({"minialign_template": "llava_v1"}, "llava_v1"),
        ({"minialign_template": "short"}, "short"),
        ({"text_config": {"vocab_size": 32064, "model_type": "mistral"}}, "mistral"),
        ({"text_config": {"vocab_size": 32064, "model_type": "llama"}}, "vicuna_v1"),
    ],
)
def test_template_follows_from_the_config(tmp_path, changes, expected):
    folder = llama2_folder(tmp_path / "model", chatml=False)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    turns = [("user", "What is it?")]
    assert Tokenizer.from_folder(folder).prompt(turns) == Tokenizer.from_folder(
        folder, expected
    ).prompt(turns)
    others = [
        Tokenizer.from_folder(folder, name).prompt(turns)
        for name in FORMS
        if name not in (expected, "chatml")
    ]
    assert Tokenizer.from_folder(folder).prompt(turns) not in others


def test_a_vocabulary_with_chatml_tokens_means_chatml(tmp_path):
    folder, turns = llama2_folder(tmp_path / "model"), [("user", "What is it?")]
    assert Tokenizer.from_folder(folder).prompt(turns) == Tokenizer.from_folder(
        folder, "chatml"
    ).prompt(turns)
    assert Tokenizer.from_folder(folder).eos_id == 32003


def test_templates_that_cannot_be(tmp_path):
    folder = llama2_folder(tmp_path / "model", chatml=False)
    refused(
        lambda: Tokenizer.from_folder(folder, "chatml"),
        "tokenizer.json",
        "<|im_end|>",
        "--template FILE",
    )
    refused(lambda: Tokenizer.from_folder(folder, "vicunya"), "--template 'vicunya'", *FORMS)


def test_an_answer_that_merges_with_what_precedes_it(tmp_path):
    """chatml ends in a line break; where two of them are one piece, an answer's own first one is
    kept.
    """
    folder = llama2_folder(tmp_path / "model")
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    for index, piece in enumerate(("\n", "\n\n")):
        vocab = {name: i for name, i in vocab.items() if i != 31990 + index} | {
            piece: 31990 + index
        }
    raw["model"] |= {"vocab": vocab, "merges": [*raw["model"]["merges"], ["\n", "\n"]]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with_metaspace(folder)
    ours = Tokenizer.from_folder(folder, "chatml")
    for text in ("\nA", "\n", "\n\n\nA"):
        assert ours.decode(ours.answer(text)) == text
