"""Who scores: the embedded world's truth by hand, and functions of the user's, good and bad."""

from pathlib import Path

import pytest
import torch
from helpers import refused
from online_runs import online, rlhf
from safetensors.torch import save_file

from minialign.data.records import Record
from minialign.edge import scorer_of
from minialign.rlhf.rloo import Config
from minialign.rlhf.scorers import read_head, save_head
from minialign.toy import oracle
from minialign.toy.world import Scene

SCENE = Scene("park", {(0, 0): ("cup", "red"), (0, 1): ("dog", "white"), (0, 2): ("dog", "red")}, 5)
TURNS = [("user", "One."), ("assistant", "Two."), ("user", "What is there?")]
RECORD = Record("a", "test-000001.png", TURNS, "A cup.")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0),
        ("The northwest cup is red.", 1),
        ("The northwest cup is red. The north dog is white.", 2),
        ("The northwest cup is blue.", 0),  # there, but of another colour
        ("The south cup is red.", 0),  # there, but elsewhere
        ("The north boat is red.", -1),
        ("No, there is no boat.", 0),
        ("Yes, there is a boat.", -1),
        ("Yes, there is a dog.", 1),
        ("No, there is no dog.", 0),
    ],
)
def test_the_truth_pays_in_objects(monkeypatch, text, score):
    """One for each that is there, minus one for each that is not and for each wrong colour or
    place.
    """
    monkeypatch.setattr(oracle, "scene_of", lambda name: SCENE)
    assert oracle.oracle_reward([RECORD], [None], [(text, "")]).tolist() == [[score, 0]]


def reward_of(path: Path, source: str, name: str = "pay"):
    path.write_text(source)
    return scorer_of(f"{path}:{name}", Config())


def test_a_function_gets_picture_prompt_and_response(tmp_path):
    """Of several turns all of them; a number of any kind comes back, and what is beside the file
    can be imported.
    """
    (tmp_path / "beside_the_reward.py").write_text("FACTOR = 2\n")
    source = """
from __future__ import annotations
from dataclasses import dataclass
from beside_the_reward import FACTOR

@dataclass
class Seen:
    words: int = 0

def pay(image, prompt, response):
    assert image == 'picture' and prompt == 'One.\\nTwo.\\nWhat is there?'
    return FACTOR * len(response)
"""
    reward = reward_of(tmp_path / "pay.py", source)
    scores = reward([RECORD, RECORD], ["picture"] * 2, [("a", "bcd"), ("", "e")])
    assert scores.tolist() == [[2, 6], [0, 2]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 'much'", "raised ValueError("),
        ("return None", "raised TypeError("),
        ("return float('nan')", "nan of"),
        ("return 1e300", "1e+300 of record a, which is no finite number"),
        ("raise ValueError", "raised ValueError()"),
        ("import sys; sys.exit(0)", "raised SystemExit(0)"),
        ("return [1, 2]", "raised TypeError("),
    ],
)
def test_a_function_that_gives_no_number_is_refused(tmp_path, body, message):
    path = tmp_path / "pay.py"
    reward = reward_of(path, f"def pay(image, prompt, response):\n    {body}\n")
    parts = f"--reward {path}:pay: ", message, "record a"
    refused(lambda: reward([RECORD], [None], [("a", "b")]), *parts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "has no function 'pay'"),
        ("pay = 3", "has no function 'pay'"),
        ("def pay(:", "raised SyntaxError("),
        ("raise SystemExit(0)", "raised SystemExit(0)"),
        ("raise BaseException(7)", "raised BaseException(7)"),
        ("import not_a_module_of_any_kind", "raised ModuleNotFoundError("),
    ],
)
def test_a_file_without_the_function_is_refused(tmp_path, source, message):
    refused(lambda: reward_of(tmp_path / "pay.py", source), "--reward", "pay.py", message)


@pytest.mark.parametrize("reward", ["nothing/here", "nothing.py:pay", "", "pay.py"])
def test_a_reward_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, reward):
    out, message = tmp_path / "out", f"--reward {reward}: no such folder"
    refused(lambda: rlhf("rloo", "toy", out, reward=reward), message, "give one")
    assert not out.exists()


def test_the_truth_knows_its_own_world_alone(tmp_path):
    elsewhere = Config(images=str(tmp_path))
    refused(lambda: scorer_of("oracle", elsewhere), "--reward oracle: knows the embedded world")


def test_a_bad_reward_can_be_mended_in_the_same_out(model, tmp_path):
    """It fails at its first call: one line, and no checkpoint that would refuse the next try."""
    path, out = tmp_path / "pay.py", tmp_path / "out"
    flags = {"reward": f"{path}:pay", "limit": 4, "batch_size": 4, "max_new_tokens": 4}

    path.write_text("def pay(image, prompt):\n    return 1.0\n")
    refused(lambda: rlhf("rloo", model, out, **flags), f"--reward {path}:pay: raised TypeError(")
    assert not (out / "checkpoint/progress.safetensors").exists()

    path.write_text("def pay(image, prompt, response):\n    return 1.0\n")
    assert len(rlhf("rloo", model, out, **flags)) == 1


def test_a_step_of_which_some_updates_were_made_is_not_saved(model, tmp_path):
    """PPO at a rate that breaks the model in a later update: the last checkpoint stays, of whole
    steps.
    """
    flags = {"limit": 16, "warmup": 0.0, "lr": 1e6, "clip": 1e9, "save_every": 1, "updates": 8}
    message = "what was saved before it stays"
    refused(lambda: rlhf("ppo", model, tmp_path, **flags), message)
    # In the first step, behind its first update.
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "checkpoint/progress.safetensors").exists()


def test_out_over_what_is_read_is_refused(trained_reward):
    """A reward model, or an annotator, within --out would be overwritten."""
    merged, message = trained_reward / "merged", "which is read; name a place outside of it"
    for method in ("rloo", "ppo"):
        refused(lambda m=method: rlhf(m, "toy", trained_reward, reward=str(merged)), message)
    flags = {"method": "online-dpo", "annotator": str(merged)}
    refused(lambda: online("toy", trained_reward, **flags), message)
    assert (merged / "reward_head.safetensors").exists()


@pytest.fixture
def trained_reward(tmp_path) -> Path:
    """What looks like a run of a reward model."""
    folder = tmp_path / "reward"
    (folder / "merged").mkdir(parents=True)
    (folder / "merged/reward_head.safetensors").write_bytes(torch.zeros(3).numpy().tobytes())
    return folder


DAMAGES = [
    ({"weight": torch.full((1, 4), torch.nan)}, "weight holds NaN"),
    ({"weight": torch.zeros(2, 4)}, "weight has shape [2, 4]"),
    ({"other": torch.zeros(1, 4)}, "missing tensors: weight"),
]


@pytest.mark.parametrize(("tensors", "message"), DAMAGES, ids=lambda value: str(value)[:9])
def test_a_damaged_head_is_refused(tmp_path, tensors, message):
    path = tmp_path / "reward_head.safetensors"
    save_head(torch.ones(1, 4), tmp_path)
    assert torch.equal(read_head(path, 4), torch.ones(1, 4))
    save_file(tensors, path)
    refused(lambda: read_head(path, 4), path, message)
