"""Runs of minialign.rlhf.rloo and ppo: what they learn, resume, --kl-stop, parts of a step,
refusals, and the paper's values.
"""

import json
import random

import pytest
from helpers import refused
from online_runs import RLHF, rlhf, weights_of
from safetensors import safe_open
from script_runs import instruct_file, stop_at

from minialign.cli import parse_config
from minialign.data.collate import StepLoader
from minialign.model.llava import Llava
from minialign.rlhf import reward_model
from minialign.rlhf.scorers import HEAD_FILE
from minialign.training.progress import hash_of, passed_kl_stop

METHODS = tuple(RLHF)
RATES = {"rloo": 4e-3, "ppo": 1e-3}  # ppo makes four updates where rloo makes one
FEW = {"limit": 8, "max_new_tokens": 6, "batch_size": 4, "epochs": 2, "k": 2}


def function_file(path, body: str) -> str:
    """A reward of the user's, as --reward takes it."""
    path.write_text(f"def pay(image, prompt, response):\n    {body}\n")
    return f"{path}:pay"


@pytest.mark.parametrize(("method", "sign"), [("rloo", 1), ("ppo", -1)])
def test_it_learns_what_is_paid(tmp_path, method, sign):
    """To begin a description in the north, or in the south, by the user's own function, within a
    few steps."""
    reward = function_file(
        tmp_path / "pay.py", f"return {sign} * ('north' in ' '.join(response.split()[:7]))"
    )
    talks = [[("human", "<image>\nDescribe the picture."), ("gpt", "A cup.")]] * 24
    data = instruct_file(tmp_path / "data.json", *talks)
    flags = {"data": data, "reward": reward, "k": 4, "max_new_tokens": 20, "beta": 0.02}
    flags |= {"epochs": 4, "batch_size": 12, "lr": RATES[method]}
    flags |= {"lora_rank": 16, "lora_alpha": 32.0}
    rows = rlhf(method, "toy", tmp_path / "out", **flags)
    north = [sign * row["objective/scores"] for row in rows]  # shares of the responses
    assert 0.3 < north[0] < 0.7 and all(row["responses"] == 48 for row in rows)
    assert sign * (sum(north[-3:]) / 3 - sum(north[:3]) / 3) > 0.2
    for row in rows:
        paid = row["objective/scores"] - 0.02 * row["objective/kl"]
        assert row["objective/rlhf_reward"] == pytest.approx(paid, abs=1e-4)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["objective/kl"] > 0.01


def test_both_sample_and_note_the_same(model, tmp_path):
    """In the first step, before anything is learned: scores, KL, entropy and lengths."""
    rloo, ppo = (rlhf(method, model, tmp_path / method, **FEW)[0] for method in METHODS)
    names = [name for name in rloo if name.startswith(("objective/", "sampled/"))]
    assert len(names) == 6 and {"objective/kl", "sampled/truncated"} < set(names)
    for name in names:
        assert rloo[name] == pytest.approx(ppo[name], abs=1e-4)
    assert rloo["objective/entropy"] > 1


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_resumes_bit_for_bit(model, tmp_path, monkeypatch, method):
    """Values, moments and draws: killed after the third step's line, before its checkpoint."""
    flags = FEW | {"save_every": 2}
    rows = rlhf(method, model, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        stop_at(patch, "append_lines", 3)
        with pytest.raises(KeyboardInterrupt):
            rlhf(method, model, tmp_path / "cut", **flags)
    assert rlhf(method, model, tmp_path / "cut", resume=True, **flags) == rows and len(rows) == 4
    names = (
        "adapter/adapter_model.safetensors",
        "checkpoint/progress.safetensors",
        "merged/model.safetensors",
    )
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_step_learn_the_same(model, tmp_path, method):
    """--accumulate changes neither draws nor, to rounding, what is learned; advantages are whitened
    over all parts.
    """
    rows = rlhf(method, model, tmp_path / "1", **FEW)
    split = rlhf(method, model, tmp_path / "3", accumulate=3, **FEW)
    examples = [row.pop("example")["image"] for row in (*rows, *split)]
    assert len(examples) == 8  # of a short run every step has one
    assert split == [pytest.approx(row, abs=1e-4, rel=1e-4) for row in rows]
    assert rows[-1]["grad_norm"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_an_image_is_encoded_once_per_step(model, tmp_path, monkeypatch, method):
    """For k samples, policy, reference, values and all updates."""
    tiles, real = [], Llava.encode_images

    def noted(self, pixels):
        tiles.append(len(pixels))
        return real(self, pixels)

    monkeypatch.setattr(Llava, "encode_images", noted)
    rlhf(method, model, tmp_path, **FEW)
    assert tiles == [4] * 4


def test_ppo_updates_several_times_per_rollout(model, tmp_path):
    """One update has the ratio 1 all along; with four it moves, and the value loss is logged."""
    one, four = (rlhf("ppo", model, tmp_path / str(n), updates=n, **FEW) for n in (1, 4))
    assert all(row["policy/approxkl_avg"] == row["policy/clipfrac_avg"] == 0 for row in one)
    assert all(row["policy/approxkl_avg"] > 0 and row["loss/value_avg"] > 0 for row in four)
    assert weights_of(tmp_path / "1") != weights_of(tmp_path / "4")


def test_the_head_of_values_is_not_exported(model, tmp_path):
    rlhf("ppo", model, tmp_path, **FEW)
    assert not (tmp_path / "merged" / HEAD_FILE).exists()
    assert b"scalar_head" not in weights_of(tmp_path)
    assert b"scalar_head" in (tmp_path / "checkpoint/progress.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_whose_records_are_all_left_out_learns_nothing(
    model, tmp_path, monkeypatch, method, capsys
):
    """It is logged as one, and the run goes on."""
    real, calls = StepLoader.__call__, []

    def load(self, numbers, step):
        calls.append(numbers)
        return [] if len(calls) == 1 else real(self, numbers, step)

    monkeypatch.setattr(StepLoader, "__call__", load)
    rows = rlhf(method, model, tmp_path, **FEW)
    assert rows[0].keys() == {"step", "lr", "responses"}
    assert [row["responses"] for row in rows] == [0, 8, 8, 8]
    assert "4 steps, 24 responses, score " in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_kl_stop_ends_the_run_and_a_resumed_one(model, tmp_path, method, capsys):
    """The step that passes the bound is the last; weights, figures and the reason are there."""
    flags, out = FEW | {"epochs": 6, "lr": 3e-2, "kl_stop": 0.5}, tmp_path / "out"
    rows = rlhf(method, model, out, **flags)
    kls = [row["objective/kl"] for row in rows]
    assert len(rows) < 12 and kls[-1] > 0.5 >= max(kls[:-1])
    reason = json.loads((out / "result.json").read_text())["stopped"]
    assert reason.startswith(f"step {len(rows)}: a KL of ") and "above --kl-stop 0.5" in reason
    assert f"ended early, {reason}" in capsys.readouterr().out
    with safe_open(out / "checkpoint/progress.safetensors", "pt") as file:  # saved there and then
        note = json.loads(file.metadata()["progress"])
        assert note == {"step": len(rows), "log": hash_of(rows)}
    weights = weights_of(out)
    assert rlhf(method, model, out, resume=True, **flags) == rows and weights_of(out) == weights
    assert not (out / "checkpoint/.progress.partial").exists()


@pytest.mark.parametrize("seed", range(5))
def test_kl_stop_is_hard(seed):
    """The first step whose KL is above it; steps that sampled nothing do not count."""
    rng = random.Random(seed)
    rows = [{"step": n, "objective/kl": 0.1 * n + rng.gauss(0, 0.05)} for n in range(1, 30)]
    rows = [row for each in rows for row in (each, {"step": each["step"], "loss": 0.1})]
    above = {row["step"] for row in rows if row.get("objective/kl", 0) > 1.5}
    stops = [rows[n]["step"] for n in range(len(rows)) if passed_kl_stop(rows[: n + 1], 1.5)]
    assert set(stops) == above and passed_kl_stop(rows, None) is passed_kl_stop([], 1.5) is None
    assert passed_kl_stop(rows, 1.5).startswith("step 29: a KL of ")


def test_the_reference_of_an_adapter(model, tmp_path):
    """Started from an adapter that is the reference too, the first KL is 0; held against the base
    it is not.
    """
    rlhf("rloo", model, tmp_path / "first", **FEW | {"lr": 3e-2})
    start, kl = FEW | {"adapter": str(tmp_path / "first/adapter"), "epochs": 1}, {}
    for reference in ("adapter", "base"):
        rows = rlhf("rloo", model, tmp_path / reference, reference=reference, **start)
        kl[reference] = rows[0]["objective/kl"]
    assert kl["adapter"] == pytest.approx(0, abs=1e-4) and abs(kl["base"]) > 1e-2


BAD = [
    ("rloo", "--k 1", "--k 1: at least 2"),
    ("rloo", "--kl-stop 0", "--kl-stop 0.0: above 0"),
    ("rloo", "--beta -1", "--beta -1.0: 0 or more"),
    ("rloo", "--max-new-tokens 0", "--max-new-tokens 0: at least 1"),
    ("rloo", "--images .", "--reward oracle: knows the embedded world alone"),
    ("ppo", "--k 0", "--k 0: at least 1"),
    ("ppo", "--updates 0", "--updates 0: at least 1"),
    ("ppo", "--ratio-clip 0", "--ratio-clip 0.0: above 0"),
    ("ppo", "--value-clip nan", "--value-clip nan: above 0"),
    ("ppo", "--gae-lambda 1.1", "--gae-lambda 1.1: between 0 and 1"),
    ("ppo", "--value-coef -1", "--value-coef -1.0: 0 or more"),
    ("ppo", "--kl-stop -1", "--kl-stop -1.0: above 0"),
]


@pytest.mark.parametrize(("method", "flags", "message"), BAD)
def test_bad_flags(method, flags, message, tmp_path):
    program, out = RLHF[method], tmp_path / "out"
    config = parse_config(program.Config, "", [*flags.split(), "--out", str(out)])
    refused(lambda: program.main(config), message)
    assert not out.exists()


# Sec. 5.5, App. A: flags and their values, as a command line would have them.
PAPER = {
    "rloo": "beta 0.4 lr 0.0003 epochs 2 batch_size 256 k 4",
    "ppo": "lr 1.41e-05 schedule constant epochs 3 batch_size 32",
    "reward_model": "lr 2e-05 schedule constant warmup 0.03 steps 4000 batch_size 32",
}
OF_ALL = "lora_rank 128 lora_alpha 256.0 projector_lr 0.0 clip 1.0"


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_run_has_the_papers_values(llava_folder, monkeypatch, tmp_path, name):
    """Where --model is no toy and nothing is said; the projector stays as it is."""
    program, seen = (RLHF | {"reward_model": reward_model})[name], []

    def noted(config):
        seen.append(config)
        raise ZeroDivisionError

    monkeypatch.setattr(program, "check_training", noted)
    with pytest.raises(ZeroDivisionError):
        program.main(program.Config(model=str(llava_folder), out=str(tmp_path / "out")))
    [config] = seen
    words = f"{PAPER[name]} {OF_ALL}".split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        assert str(getattr(config, flag)) == value, flag
