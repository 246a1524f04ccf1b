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
    # A new run begins with pairs of its own, and nothing of the run before is lost.
    train(model, tmp_path / "b", seed=1, **knobs)
    assert contents(tmp_path / "b.1") == b and contents(tmp_path / "b") != b


def test_pairs_that_it_did_not_sample_are_not_gone_on_with(model, tmp_path):
    """As those of a stopped run whose file somebody has written into."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b/.minialign").write_text("train_dpo\n")
    (tmp_path / "b/pairs.jsonl").write_text("rubbish\n")
    before = contents(tmp_path / "b")
    with pytest.raises(UserError, match="no such file; name another --out"):
        train(model, tmp_path / "b", limit=2)
    assert contents(tmp_path / "b") == before
