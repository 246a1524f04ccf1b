"""train_online.py --method rloo and ppo: what they learn, resume, --kl-stop, parts of a step, and
refusals."""

import json
import random

import pytest
from helpers import refused
from online_runs import online, weights_of
from safetensors import safe_open
from script_runs import instruct_file

import train_online
from minialign.cli import parse_config
from minialign.model.llava import Llava
from minialign.rlhf.scorers import HEAD_FILE
from train_online import passed_kl_stop

RL = ("rloo", "ppo")
RATES = {"rloo": 4e-3, "ppo": 1e-3}  # ppo makes four updates where rloo makes one
FEW = {"limit": 8, "max_new_tokens": 6, "batch_size": 4, "epochs": 2, "k": 2}


def function_file(path, body: str) -> str:
    """A reward of the user's, as --reward takes it."""
    path.write_text(f"def pay(image, prompt, response):\n    {body}\n")
    return f"{path}:pay"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", RL)
def test_it_learns_what_is_paid(tmp_path, method, sign):
    """To begin a description in the north, or in the south, by the user's own function, within a
    few steps."""
    reward = function_file(
        tmp_path / "pay.py", f"return {sign} * ('north' in ' '.join(response.split()[:7]))"
    )
    talks = [[("human", "<image>\nDescribe the picture."), ("gpt", "A cup.")]] * 24
    data = instruct_file(tmp_path / "data.json", *talks)
    flags = {
        "method": method,
        "data": data,
        "epochs": 4,
        "batch_size": 12,
        "lr": RATES[method],
        "max_new_tokens": 60,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "beta": 0.02,
        "reward": reward,
        "k": 4,
    }
    rows = online("toy", tmp_path / "out", **flags)
    north = [sign * row["objective/scores"] for row in rows]  # shares of the responses
    assert 0.3 < north[0] < 0.7 and all(row["responses"] == 48 for row in rows)
    assert sign * (sum(north[-3:]) / 3 - sum(north[:3]) / 3) > 0.2
    for row in rows:
        paid = row["objective/scores"] - 0.02 * row["objective/kl"]
        assert row["objective/rlhf_reward"] == pytest.approx(paid, abs=1e-4)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["objective/kl"] > 0.01


@pytest.mark.parametrize("method", RL)
def test_a_stopped_run_resumes_bit_for_bit(model, tmp_path, monkeypatch, method):
    """Values, moments and draws: killed after the third step's line, before its checkpoint."""
    rows = online(model, tmp_path / "whole", method=method, save_every=2, **FEW)
    real, calls = train_online.resume.append_lines, []

    def stopping(*args):
        real(*args)
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_online.resume, "append_lines", stopping)
    with pytest.raises(KeyboardInterrupt):
        online(model, tmp_path / "cut", method=method, save_every=2, **FEW)
    monkeypatch.undo()
    assert (
        online(model, tmp_path / "cut", method=method, save_every=2, resume=True, **FEW) == rows
        and len(rows) == 4
    )
    names = (
        "adapter/adapter_model.safetensors",
        "checkpoint/progress.safetensors",
        "merged/model.safetensors",
    )
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("method", RL)
def test_parts_of_a_step_learn_the_same(model, tmp_path, method):
    """--accumulate changes neither draws nor, to rounding, what is learned; advantages are whitened
    over all parts."""
    rows = online(model, tmp_path / "1", method=method, **FEW)
    split = online(model, tmp_path / "3", method=method, accumulate=3, **FEW)
    assert split == [pytest.approx(row, abs=1e-4, rel=1e-4) for row in rows]
    assert rows[-1]["grad_norm"] > 0


@pytest.mark.parametrize("method", RL)
def test_an_image_is_encoded_once_per_step(model, tmp_path, monkeypatch, method):
    """For k samples, policy, reference, values and all updates."""
    tiles, real = [], Llava.encode_images
    monkeypatch.setattr(
        Llava, "encode_images", lambda self, pixels: tiles.append(len(pixels)) or real(self, pixels)
    )
    online(model, tmp_path, method=method, **FEW)
    assert tiles == [4] * 4


def test_ppo_updates_several_times_per_rollout(model, tmp_path):
    """One update has the ratio 1 all along; with four it moves, and the value loss is logged."""
    [one, four] = [online(model, tmp_path / str(n), method="ppo", updates=n, **FEW) for n in (1, 4)]
    assert all(row["policy/approxkl_avg"] == row["policy/clipfrac_avg"] == 0 for row in one)
    assert all(row["policy/approxkl_avg"] > 0 and row["loss/value_avg"] > 0 for row in four)
    assert weights_of(tmp_path / "1") != weights_of(tmp_path / "4")


def test_the_head_of_values_is_not_exported(model, tmp_path):
    online(model, tmp_path, method="ppo", **FEW)
    assert not (tmp_path / "merged" / HEAD_FILE).exists() and b"scalar_head" not in weights_of(
        tmp_path
    )
    assert b"scalar_head" in (tmp_path / "checkpoint/progress.safetensors").read_bytes()


@pytest.mark.parametrize("method", RL)
def test_kl_stop_ends_the_run_and_a_resumed_one(model, tmp_path, method, capsys):
    """The step that passes the bound is the last; weights, figures and the reason are there."""
    flags = FEW | {"method": method, "epochs": 6, "lr": 3e-2, "kl_stop": 0.5}
    rows = online(model, tmp_path / "out", **flags)
    assert len(rows) < 12 and rows[-1]["objective/kl"] > 0.5 >= max(
        row["objective/kl"] for row in rows[:-1]
    )
    said = json.loads((tmp_path / "out/result.json").read_text())["stopped"]
    assert said.startswith(f"step {len(rows)}: a KL of ") and "above --kl-stop 0.5" in said
    assert f"ended early, {said}" in capsys.readouterr().out
    with safe_open(
        tmp_path / "out/checkpoint/progress.safetensors", "pt"
    ) as file:  # saved there and then
        assert json.loads(file.metadata()["progress"]) == {"step": len(rows)}
    weights = weights_of(tmp_path / "out")
    assert (
        online(model, tmp_path / "out", resume=True, **flags) == rows
        and weights_of(tmp_path / "out") == weights
    )
    assert not (tmp_path / "out/checkpoint/.progress.partial").exists()


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
    it is not."""
    online(model, tmp_path / "first", method="rloo", **FEW | {"lr": 3e-2})
    start = FEW | {"method": "rloo", "adapter": str(tmp_path / "first/adapter"), "epochs": 1}
    kl = {
        r: online(model, tmp_path / r, reference=r, **start)[0]["objective/kl"]
        for r in ("adapter", "base")
    }
    assert kl["adapter"] == pytest.approx(0, abs=1e-4) and abs(kl["base"]) > 1e-2


BAD = [
    ("--method rloo --k 1", "--k 1: at least 2"),
    ("--method ppo --k 0", "--k 0: at least 1"),
    ("--method ppo --updates 0", "--updates 0: at least 1"),
    ("--method ppo --ratio-clip 0", "--ratio-clip 0.0: above 0"),
    ("--method ppo --value-clip nan", "--value-clip nan: above 0"),
    ("--method ppo --gae-lambda 1.1", "--gae-lambda 1.1: between 0 and 1"),
    ("--method ppo --value-coef -1", "--value-coef -1.0: 0 or more"),
    ("--method rloo --kl-stop 0", "--kl-stop 0.0: above 0"),
    ("--method rloo --temperature 0.5", "--temperature or --top-p with --method rloo"),
    ("--method ppo --top-p 0.5", "--temperature or --top-p with --method ppo"),
    ("--method online-dpo --kl-stop 3", "--kl-stop with --method online-dpo: is for rloo and ppo"),
]


@pytest.mark.parametrize("argv,said", BAD)
def test_bad_flags(argv, said, tmp_path):
    config = parse_config(train_online.Config, "", [*argv.split(), "--out", str(tmp_path / "out")])
    refused(lambda: train_online.main(config), said)
    assert not (tmp_path / "out").exists()


def test_a_paper_run_has_the_papers_values(llava_folder, monkeypatch, tmp_path):
    """App. A and Sec. 5.5, where --model is no toy and nothing is said."""
    seen = []
    monkeypatch.setattr(
        train_online.flags, "check_training", lambda config: seen.append(config) or 1 / 0
    )
    for method in ("rloo", "ppo", "online-dpo"):
        with pytest.raises(ZeroDivisionError):
            train_online.main(
                train_online.Config(
                    model=str(llava_folder), method=method, out=str(tmp_path / "out")
                )
            )
    rloo, ppo, dpo = seen
    assert (rloo.beta, rloo.lr, rloo.epochs, rloo.batch_size, rloo.k) == (0.4, 3e-4, 2, 256, 4)
    assert (ppo.lr, ppo.epochs, ppo.batch_size, ppo.schedule) == (1.41e-5, 3, 32, "constant")
    assert (dpo.lr, dpo.epochs, dpo.batch_size, dpo.schedule, dpo.beta) == (
        5e-7,
        3,
        16,
        "cosine",
        0.1,
    )
