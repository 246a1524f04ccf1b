"""A training that diverges ends with the step and a remedy, and its checkpoint stays finite."""

import math

import pytest
from safetensors.torch import load_file
from script_runs import read_lines, stop_at, train

import train_dpo
from minialign.errors import UserError


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(model, pairs, tmp_path, monkeypatch, bad):
    """The run ends with step and remedy, and the checkpoint holds the weights before that step."""
    with monkeypatch.context() as patch:
        stop_at(patch, "append_lines", 2)
        with pytest.raises(KeyboardInterrupt):  # one checkpoint, after step 1
            train(model, tmp_path / "good", pairs=pairs, save_every=1)
    real, calls = train_dpo.dpo_loss, []

    def failing(*args):
        calls.append(1)
        return real(*args) * (bad if len(calls) == 2 else 1)

    monkeypatch.setattr(train_dpo, "dpo_loss", failing)
    message = r"^step 2: loss (nan|inf), .* what was saved before it stays; .* a lower --lr"
    with pytest.raises(UserError, match=message):
        train(model, tmp_path / "bad", pairs=pairs)
    path = "checkpoint/progress.safetensors"  # tensors, moments and the number of steps
    assert (tmp_path / "bad" / path).read_bytes() == (tmp_path / "good" / path).read_bytes()
    assert len(read_lines(tmp_path / "bad" / "metrics.jsonl")) == 1
    for name in ("result.json", "adapter", "merged", "report.html"):
        assert not (tmp_path / "bad" / name).exists()


def test_a_rate_that_is_far_too_high(model, pairs, tmp_path):
    with pytest.raises(UserError, match="^step [23]: loss nan, .* a lower --lr"):
        train(model, tmp_path, pairs=pairs, lr=1e30)
    found = load_file(tmp_path / "checkpoint" / "progress.safetensors")
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_weights_that_are_not_finite_are_not_saved(model, pairs, tmp_path, monkeypatch):
    """The checkpoint of the step before them stays."""
    real, calls = train_dpo.branch_logps, []

    def failing(policy, *args):
        calls.append(1)
        if len(calls) == 6:  # of the third step's policy, after its reference
            policy.multi_modal_projector.copy.linear_1.bias.data[0] = math.inf
        return real(policy, *args)

    monkeypatch.setattr(train_dpo, "branch_logps", failing)
    with pytest.raises(UserError, match="^step 3: loss nan"):
        train(model, tmp_path, pairs=pairs, save_every=1)
    found = load_file(tmp_path / "checkpoint" / "progress.safetensors")
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["optimizer.0.0.step"] == 2
