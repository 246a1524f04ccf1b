"""A killed evaluation goes on to the same bytes; answers of other settings are refused, and nothing
is overwritten.
"""

import json
import random
import shutil

import pytest
from benchmark_files import (
    NAMES,
    bench_line,
    chair_photographs,
    mmhal_item,
    photographs,
    pope_photographs,
    run,
    write_lines,
)
from helpers import refused
from script_runs import contents

from minialign.data.templates import asked_form
from minialign.evaluation import questions

KINDS = ("pope", "chair", "llava-bench", "mmhal")


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory):
    """{benchmark: the flags of a run on the photographs}."""
    folder = tmp_path_factory.mktemp("files")
    images = photographs(folder / "images")
    write_lines(
        folder / "q.jsonl",
        [bench_line(n, image=NAMES[n % 4], text=f"What is {n}?") for n in range(7)],
    )
    items = [mmhal_item(NAMES[n % 4], question=f"Where is {n}?") for n in range(5)]
    (folder / "m.json").write_text(json.dumps(items))
    data = {
        "pope": ["--data", pope_photographs(folder / "pope.json")],
        "chair": chair_photographs(folder / "coco"),
        "llava-bench": ["--data", folder / "q.jsonl"],
        "mmhal": ["--data", folder / "m.json"],
    }
    common = ("--model", model, "--images", images, "--max-new-tokens", 6)
    return {kind: [*common, "--benchmark", kind, *data[kind]] for kind in KINDS}


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """{benchmark: the folder of a run that nothing happened to}."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for kind in KINDS:
        run(*flags[kind], "--out", folder / kind, "--batch-size", 1)
    return {kind: folder / kind for kind in KINDS}


def same_result(out, other) -> bool:
    """Equal bytes of everything but the settings, which name the folder."""
    a, b = contents(out), contents(other)
    a.pop("config.json"), b.pop("config.json")
    assert len(a) >= 2 and {"answers.jsonl", "result.json"} <= a.keys()
    return a == b


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("written", [False, True])
def test_killed_at_each_batch(flags, undisturbed, tmp_path, monkeypatch, kind, batch, written):
    """Before a batch's lines are on the disk, or right after."""
    real, calls = questions.append_lines, []

    def killing(path, lines):
        calls.append(lines)
        if len(calls) < batch or written:
            real(path, lines)
        if len(calls) == batch:
            raise KeyboardInterrupt

    monkeypatch.setattr(questions, "append_lines", killing)
    with pytest.raises(KeyboardInterrupt):
        run(*flags[kind], "--out", tmp_path / "out", "--batch-size", 1)
    assert not (tmp_path / "out" / "result.json").exists()
    there = sum(map(len, calls[: batch if written else batch - 1]))
    calls.clear()

    def noting(path, lines):
        calls.append(lines)
        real(path, lines)

    monkeypatch.setattr(questions, "append_lines", noting)
    run(*flags[kind], "--out", tmp_path / "out", "--batch-size", 2)
    assert same_result(tmp_path / "out", undisturbed[kind])
    assert there + sum(map(len, calls)) == len(
        (undisturbed[kind] / "answers.jsonl").read_bytes().splitlines()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_killed_within_a_line(flags, undisturbed, tmp_path, kind, seed):
    out, rng = tmp_path / "out", random.Random(seed)
    shutil.copytree(undisturbed[kind], out)
    (out / "result.json").unlink()
    whole = (out / "answers.jsonl").read_bytes()
    (out / "answers.jsonl").write_bytes(whole[: rng.randrange(len(whole))])
    run(*flags[kind], "--out", out, "--batch-size", rng.randrange(1, 5))
    assert same_result(out, undisturbed[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_asks_nothing(flags, undisturbed, tmp_path, monkeypatch, kind):
    out = shutil.copytree(undisturbed[kind], tmp_path / "out")
    monkeypatch.setattr(questions, "answer_batch", None)
    run(*flags[kind], "--out", out)
    assert same_result(out, undisturbed[kind])


def test_a_longer_run_goes_on(flags, undisturbed, tmp_path, monkeypatch):
    out, real, asked = tmp_path / "out", questions.answer_batch, []
    assert run(*flags["chair"], "--out", out, "--limit", 2)["questions"] == 2

    def noting(assistant, images, groups, limit):
        asked.append(len(groups))
        return real(assistant, images, groups, limit)

    monkeypatch.setattr(questions, "answer_batch", noting)
    assert run(*flags["chair"], "--out", out, "--limit", 4)["questions"] == 4 and asked == [2]
    assert same_result(out, undisturbed["chair"])
    assert run(*flags["chair"], "--out", out, "--limit", 3)["answered"] == 3


def test_a_picture_that_is_mended_is_asked_about(flags, undisturbed, tmp_path):
    images = photographs(tmp_path / "images")
    argv = [images if word == flags["pope"][3] else word for word in flags["pope"]]
    whole = (images / NAMES[2]).read_bytes()
    (images / NAMES[2]).write_bytes(whole[:50])
    out = ("--out", tmp_path / "out")
    assert run(*argv, *out, "--skip-bad-records")["answered"] == 9
    message = refused(
        lambda: run(*argv, *out), "question pope.json:3", NAMES[2], "not a readable picture"
    )
    assert "or pass --skip-bad-records" in message
    (images / NAMES[2]).write_bytes(whole)
    assert run(*argv, *out)["answered"] == 12
    lines = [
        (path / "answers.jsonl").read_text().splitlines()
        for path in (tmp_path / "out", undisturbed["pope"])
    ]
    assert sorted(lines[0]) == sorted(lines[1]) and lines[0] != lines[1]  # they came later


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (["--max-new-tokens", "7"], "max_new_tokens"),
        (["--template", "vicuna_v1"], "template"),
        (["--model", "toy"], "model"),
        (["--benchmark", "llava-bench"], "benchmark"),
    ],
    ids=str,
)
def test_other_settings_are_refused(flags, undisturbed, tmp_path, changes, name):
    out = shutil.copytree(undisturbed["pope"], tmp_path / "out")
    before = contents(out)
    refused(
        lambda: run(*flags["pope"], *changes, "--out", out),
        f"another {name}",
        out,
        "name another --out",
    )
    assert contents(out) == before


def test_other_questions_or_weights_are_refused(flags, tmp_path):
    """The same names of files, another content."""
    argv, out = list(flags["llava-bench"]), tmp_path / "out"
    argv[argv.index("--data") + 1] = data = write_lines(
        tmp_path / "q.jsonl", [bench_line(1), bench_line(2)]
    )
    argv[1] = shutil.copytree(argv[1], tmp_path / "model")
    run(*argv, "--out", out)
    before = contents(out)
    write_lines(data, [bench_line(1), bench_line(2, text="What else?")])
    refused(lambda: run(*argv, "--out", out), "another questions")
    write_lines(data, [bench_line(1), bench_line(2)])
    weights = tmp_path / "model" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    refused(lambda: run(*argv, "--out", out), "another weights")
    assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", '{"loss": "dpo"}'),
        ("config.json", "{"),
        ("config.json", "[]"),
        ("result.json", "{}"),
        ("answers.jsonl", "my notes"),
    ],
)
def test_another_programs_folder_is_left_alone(flags, tmp_path, name, data):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(data)
    refused(lambda: run(*flags["pope"], "--out", out), out, "no run has made it; name a new folder")
    assert contents(out) == {name: data.encode()}


def test_answers_that_are_no_json_are_refused(flags, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed["pope"], tmp_path / "out")
    (out / "answers.jsonl").write_text("my notes\n")
    before = contents(out)
    refused(lambda: run(*flags["pope"], "--out", out), "answers.jsonl", "name another --out")
    assert contents(out) == before


def test_what_changes_no_answer_may_change(flags, undisturbed, tmp_path):
    """Other synonyms: the same answers, counted anew."""
    out = shutil.copytree(undisturbed["chair"], tmp_path / "out")
    (tmp_path / "s.txt").write_text("cup, a, the, is\ndog\nboat")
    argv = [*flags["chair"], "--synonyms", tmp_path / "s.txt"]
    before = (out / "answers.jsonl").read_bytes()
    assert run(*argv, "--out", out)["answered"] == 4
    assert (out / "answers.jsonl").read_bytes() == before


def test_a_question_too_long_for_the_decoder(flags, tmp_path):
    """Told by its place, or left out by itself; the other questions about its picture are asked."""
    argv, long = list(flags["llava-bench"]), bench_line(2, text="cup " * 1000)
    data = write_lines(tmp_path / "q.jsonl", [bench_line(1), long, bench_line(3)])
    argv[argv.index("--data") + 1] = data
    refused(lambda: run(*argv, "--out", tmp_path / "out"), "question q.jsonl:2", "1024", "shorten")
    found = run(*argv, "--out", tmp_path / "out", "--skip-bad-records")
    assert (found["questions"], found["answered"]) == (3, 2)


def test_settings_bind_a_folder_from_its_first_answer_on(flags, tmp_path):
    """A run that has kept no answer leaves nothing, whatever was wrong with its flags."""
    (tmp_path / "empty").mkdir()
    argv, out = list(flags["pope"]), tmp_path / "out"
    argv[argv.index("--images") + 1] = tmp_path / "empty"
    refused(lambda: run(*argv, "--out", out), "no such file")
    assert not contents(out)
    assert run(*flags["pope"], "--out", out)["answered"] == 12
    assert json.loads((out / "config.json").read_text())["images"] == str(flags["pope"][3])


def test_another_form_in_the_file_of_the_template_is_refused(flags, tmp_path):
    argv, out = [*flags["pope"], "--template", tmp_path / "form.json"], tmp_path / "out"
    form = {"system": "", "user": "Q: {} A:", "answer": " {}", "end": "</s>"}
    (tmp_path / "form.json").write_text(json.dumps(form))
    run(*argv, "--out", out, "--limit", 1)
    asked_form.cache_clear()  # as in another process
    (tmp_path / "form.json").write_text(json.dumps(form | {"user": "{} A:"}))
    refused(lambda: run(*argv, "--out", out), "another template")
