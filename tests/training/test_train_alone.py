"""train_dpo.py without --pairs samples them first, goes on where it was stopped, and overwrites no
other pairs."""

import pytest
from script_runs import contents, read_lines, train

import sample_bdhs
from minialign.errors import UserError


def test_without_pairs_they_are_sampled_first(model, tmp_path, monkeypatch):
    """`train_dpo.py` alone: the whole road; stopped while it samples, it goes on from there."""
    knobs = {"limit": 5, "batch_size": 2}
    real = sample_bdhs.Config
    few = {"max_new_tokens": 4, "rho_th": 0.7, "temperature": 1.0, "batch_size": 2}
    monkeypatch.setattr(sample_bdhs, "Config", lambda **options: real(**(options | few)))
    train(model, tmp_path / "a", **knobs)
    assert len(read_lines(tmp_path / "a" / "pairs.jsonl")) == 5
    assert (tmp_path / "a" / "report.html").exists()
    real_sample, calls = sample_bdhs.sample, []

    def noted(assistant, similarity, examples, config):
        calls.append(examples)
        return real_sample(assistant, similarity, examples, config)

    def interrupted(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return noted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sample_bdhs, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "b", **knobs)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(sample_bdhs, "sample", noted)
        # There is nothing to resume yet: it begins.
        train(model, tmp_path / "b", resume=True, **knobs)
    assert sum(map(len, calls)) == 1  # the fifth; four were there
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    different = {name for name in a if a[name] != b[name]}
    assert a.keys() == b.keys() and different == {"config.json", "pairs.jsonl.config.json"}
    # A new run of the same settings takes the pairs that are there.
    train(model, tmp_path / "b", **knobs)
    assert contents(tmp_path / "b") == b and sum(map(len, calls)) == 1
    with pytest.raises(UserError, match="of another seed, which was 0 and is 1 now; name another"):
        train(model, tmp_path / "b", seed=1, **knobs)
    assert contents(tmp_path / "b") == b  # nothing of the run before is lost
    with open(tmp_path / "b" / "pairs.jsonl", "a") as file:
        file.write("rubbish\n")
    before = (tmp_path / "b" / "pairs.jsonl").read_bytes()
    # What it did not write it does not remove.
    with pytest.raises(UserError, match="another --out"):
        train(model, tmp_path / "b", **knobs)
    assert (tmp_path / "b" / "pairs.jsonl").read_bytes() == before
