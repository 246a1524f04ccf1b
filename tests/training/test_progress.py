"""A stopped train_dpo.py resumes bit for bit, and only what is its own and whole."""

import json
from pathlib import Path

import pytest
from script_runs import contents, stop_at, train

import sample_bdhs
import train_dpo
from minialign.errors import UserError

STOPS = [
    ("preference_metrics", 1, 1),
    ("preference_metrics", 3, 2),
    ("preference_metrics", 6, 5),
    ("append_lines", 2, 3),
    ("append_lines", 5, 3),
    ("append_lines", 7, 50),
    ("append_lines", 8, 3),
    ("save_progress", 1, 3),
    ("save_progress", 3, 2),
]


@pytest.mark.parametrize("where,count,save_every", STOPS)
def test_a_stopped_run_resumes_bit_for_bit(
    undisturbed, model, pairs, tmp_path, monkeypatch, where, count, save_every
):
    options = {"pairs": pairs, "epochs": 2, "lr": 3e-3, "save_every": save_every}
    with monkeypatch.context() as patch:
        stop_at(patch, where, count)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path, **options)
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "adapter").exists()
    if count % 2:  # killed within the writing of a line
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "lo')
    train(model, tmp_path, resume=True, **options)
    expected, found = contents(undisturbed), contents(tmp_path)
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    assert different == ["config.json"]  # --out and --save-every are not the same
    assert '"resume": false' in (tmp_path / "config.json").read_text()


def test_stopped_twice(undisturbed, model, pairs, tmp_path, monkeypatch):
    options = {"pairs": pairs, "epochs": 2, "lr": 3e-3, "save_every": 2}
    for resume, count in ((False, 3), (True, 3)):
        with monkeypatch.context() as patch:
            stop_at(patch, "append_lines", count)
            with pytest.raises(KeyboardInterrupt):
                train(model, tmp_path, resume=resume, **options)
    train(model, tmp_path, resume=True, **options)
    for name in (
        "metrics.jsonl",
        "checkpoint/progress.safetensors",
        "adapter/adapter_model.safetensors",
    ):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_finished_run_is_left_alone(model, pairs, tmp_path, capsys):
    """Also what somebody has put into its folders; where only the report is missing no step is left
    to do, and all comes out the same.
    """
    options = {"pairs": pairs, "limit": 4}
    train(model, tmp_path, **options)
    (tmp_path / "merged/README.md").write_text("a model card")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train(model, tmp_path, resume=True, **options)
    assert ended.value.code == 0 and "this run is finished" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_a_run_without_its_report_ends_as_it_did(model, pairs, tmp_path, monkeypatch):
    options = {"pairs": pairs, "limit": 4}
    train(model, tmp_path, **options)
    before = contents(tmp_path)
    unfinished(tmp_path)
    monkeypatch.setattr(train_dpo, "preference_metrics", None)  # no step is left
    train(model, tmp_path, resume=True, **options)
    assert contents(tmp_path) == before


def unfinished(out: Path) -> None:
    """A run that was killed before it wrote its last file."""
    (out / "report.html").unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 1e-4},
        {"seed": 3},
        {"batch_size": 2},
        {"loss": "ipo"},
        {"lora_rank": 2},
        {"limit": 3},
        {"epochs": 2},
    ],
    ids=str,
)
def test_other_settings_do_not_resume(model, pairs, tmp_path, changes):
    train(model, tmp_path, pairs=pairs, limit=4)
    before = contents(tmp_path)
    name = next(iter(changes))
    with pytest.raises(
        UserError,
        match=f"config.json: of another {name}, which was .* now; give the old value, or leave",
    ):
        train(model, tmp_path, resume=True, **({"pairs": pairs, "limit": 4} | changes))
    assert contents(tmp_path) == before


def test_nothing_to_resume(model, pairs, tmp_path):
    """Schedulers repeat the same command: it begins, and leaves what a new run leaves."""
    options = {"pairs": pairs, "limit": 4, "batch_size": 2}
    train(model, tmp_path / "new", **options)
    train(model, tmp_path / "out", resume=True, **options)
    new, out = contents(tmp_path / "new"), contents(tmp_path / "out")
    assert new.keys() == out.keys()
    assert [name for name in new if new[name] != out[name]] == ["config.json"]


def test_an_earlier_runs_checkpoint_is_not_resumed(model, pairs, tmp_path, monkeypatch):
    """A new run in the same folder, stopped before its own first checkpoint."""
    options = {"pairs": pairs, "limit": 4, "batch_size": 2}
    train(model, tmp_path / "a", lr=1e-2, **options)
    train(model, tmp_path / "b", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, "append_lines", 1)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "a", **options)
    train(model, tmp_path / "a", resume=True, **options)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "damage,match",
    [
        (
            lambda out: (out / "metrics.jsonl").unlink(),
            "metrics.jsonl: not the log of the 1 steps that .* was saved after; leave --resume out",
        ),
        (
            lambda out: (out / "metrics.jsonl").write_text("{\n"),
            "metrics.jsonl: not readable as JSON Lines",
        ),
        (lambda out: (out / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (
            lambda out: (out / "checkpoint/progress.safetensors").write_bytes(b"short"),
            "not a whole safetensors file",
        ),
    ],
)
def test_damaged_runs_do_not_resume(model, pairs, tmp_path, damage, match):
    train(model, tmp_path, pairs=pairs, limit=4)
    unfinished(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=match):
        train(model, tmp_path, pairs=pairs, limit=4, resume=True)


def open_pairs(folder: Path, model: str) -> list[str]:
    """The lines of a small pairs file."""
    sample_bdhs.main(sample_bdhs.Config(out=str(folder / "pairs.jsonl"), limit=6))
    return (folder / "pairs.jsonl").read_text().splitlines()


def test_resuming_on_other_pairs_is_refused(model, tmp_path):
    rows = [json.loads(line) for line in open_pairs(tmp_path, model)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(model, tmp_path / "run", pairs=str(file))
    unfinished(tmp_path / "run")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(UserError, match="annotator or reward are not those"):
        train(model, tmp_path / "run", pairs=str(file), resume=True)
