"""`python -m minialign.chat`: what it answers, and the log-probs of an answer that is given."""

import json

import pytest
from helpers import (
    plain_greedy,
    plain_logits,
    refused,
    toy_features,
    toy_model,
    toy_processor,
    toy_tokenizer,
)

from minialign import chat
from minialign.cli import parse_config
from minialign.model.masks import mask_of_seed
from minialign.toy import world

QUESTION = "Is there a cup in the picture?"
PICTURE = "validation-000003.png"


def run(capsys, *argv: object) -> str:
    """What it prints last."""
    given = ["--image", PICTURE, "--prompt", QUESTION, *argv]
    chat.main(parse_config(chat.Config, "", [str(word) for word in given]))
    return capsys.readouterr().out.splitlines()[-1]


def plain_logps(
    prompt: list[int], ids: list[int], visible: list[bool] | None = None
) -> list[float]:
    """Of each of the ids, from one plain forward pass of the whole sequence."""
    [features] = toy_features((3,))
    logits = plain_logits(toy_model(), prompt + ids, features, visible).log_softmax(-1)
    first = len(logits) - len(ids) - 1
    return [logits[first + i, token].item() for i, token in enumerate(ids)]


def test_the_answer_is_the_models_own(capsys):
    tokenizer = toy_tokenizer()
    prompt = tokenizer.prompt([("user", QUESTION)])
    [features] = toy_features((3,))
    ids, logps = plain_greedy(toy_model(), prompt, features, {tokenizer.eos_id}, 256)
    assert run(capsys) == tokenizer.decode(ids)
    found = json.loads(run(capsys, "--json"))
    assert found["response_ids"] == ids and found["text"] == tokenizer.decode(ids)
    assert found["logps"] == pytest.approx(logps, abs=1e-4)


@pytest.mark.parametrize("rho_th", [0.0, 0.7, 1.0])
def test_the_score_of_a_given_answer(capsys, rho_th):
    """Text, ids and log-probabilities; with --rho-th under Eq. 6's mask, which the seed gives."""
    text = "Yes, there is a cup."
    given = ("--response", text, "--rho-th", rho_th, "--seed", 5)
    found = json.loads(run(capsys, *given, "--json"))
    tokenizer = toy_tokenizer()
    prompt, ids = tokenizer.prompt([("user", QUESTION)]), tokenizer.response(text)
    visible = mask_of_seed(toy_processor().patches, rho_th, 5)
    expected = plain_logps(prompt, ids, None if visible is None else visible.tolist())
    assert set(found) == {
        *("text", "prompt_ids", "response_ids", "image_tokens", "logps", "sum_logps")
    }
    assert (found["text"], found["prompt_ids"], found["response_ids"]) == (text, prompt, ids)
    assert found["image_tokens"] == toy_processor().patches
    assert found["logps"] == pytest.approx(expected, abs=1e-4)
    assert found["sum_logps"] == pytest.approx(sum(expected), abs=1e-3)
    assert run(capsys, *given) == f"{found['sum_logps']:.4f} nats over {len(ids)} tokens"


def test_a_sampled_answer_follows_from_the_seed(capsys, model):
    """Of a random model, which has no favourite."""
    flags = ("--model", model, "--temperature", 1, "--max-new-tokens", 12, "--json")
    answers = [json.loads(run(capsys, *flags, "--seed", seed)) for seed in (0, 0, 1)]
    assert answers[0] == answers[1] and answers[0]["response_ids"] != answers[2]["response_ids"]
    assert len(answers[0]["logps"]) == len(answers[0]["response_ids"]) <= 12


def test_a_picture_of_the_users_own(capsys, tmp_path):
    """A file, and the scene of that name, which a file of the same name goes before."""
    world.open_picture(PICTURE).save(tmp_path / "mine.png")
    flags = ("--response", "A cup.", "--json")
    own = json.loads(run(capsys, *flags, "--image", tmp_path / "mine.png"))
    assert own == json.loads(run(capsys, *flags))


@pytest.mark.parametrize(
    "flags", [("--prompt", "cup " * 1000, "--response", "A."), ("--response", "A cup. " * 400)]
)
def test_what_leaves_the_decoders_positions_is_refused(capsys, flags):
    """As it is without --response."""
    refused(lambda: run(capsys, *flags), "positions, the decoder has 1024", "shorten")


def test_the_last_position_is_used(capsys):
    """A response that ends with the decoder's positions is scored, and one token more is not."""
    tokenizer = toy_tokenizer()
    left = 1024 - len(tokenizer.prompt([("user", QUESTION)])) + 1 - toy_processor().patches
    words = left - len(tokenizer.response("cup")) + 1
    assert len(tokenizer.response("cup " * (words - 1) + "cup")) == left
    found = json.loads(run(capsys, "--json", "--response", "cup " * (words - 1) + "cup"))
    assert len(found["logps"]) == left
    refused(lambda: run(capsys, "--response", "cup " * words + "cup"), "take 1025 positions")


def test_a_form_of_a_file(capsys, tmp_path):
    """--template FILE asks in it."""
    form = {"system": "", "user": "Q: {} A:", "answer": " {}", "end": "</s>"}
    (tmp_path / "form.json").write_text(json.dumps(form))
    found = json.loads(run(capsys, "--template", tmp_path / "form.json", "--json"))
    shown = toy_tokenizer().fast.decode(found["prompt_ids"])
    assert shown.split() == f"Q: {QUESTION} A:".split()
