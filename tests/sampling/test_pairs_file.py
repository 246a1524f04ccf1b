"""The pairs file: a stopped sample_bdhs.py goes on to the same bytes, samples nothing twice, and
adds to no file but its own."""

import json
import random
import shutil
from pathlib import Path

import pytest
from script_runs import contents, instruct_file, read_lines, sample

import sample_bdhs
from minialign.errors import UserError
from minialign.sampling.pairs_file import resolved_curve
from minialign.toy import world


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_run_continues_to_the_same_bytes(model, tmp_path, seed):
    """Killed between lines or within one, and continued in other batches."""
    rng, undisturbed, out = random.Random(seed), tmp_path / "a", tmp_path / "b"
    sample(model, undisturbed / "pairs.jsonl")
    sample(model, out / "pairs.jsonl")
    whole = (out / "pairs.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    if seed % 2:
        cut = rng.randrange(len(whole))
    else:
        cut = len(b"".join(lines[: rng.randrange(len(lines))]))
    (out / "pairs.jsonl").write_bytes(whole[:cut])
    (out / "pairs.jsonl.stats.json").unlink()
    sample(model, out / "pairs.jsonl", batch_size=rng.choice([1, 2, 3, 7]))
    for name in ("pairs.jsonl", "pairs.jsonl.stats.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_run_that_is_interrupted_keeps_whole_batches(model, tmp_path, monkeypatch):
    real, batches = sample_bdhs.sample, []

    def interrupted(assistant, similarity, examples, config):
        batches.append(len(examples))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(assistant, similarity, examples, config)

    monkeypatch.setattr(sample_bdhs, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(model, tmp_path / "pairs.jsonl", batch_size=2)
    assert len(read_lines(tmp_path / "pairs.jsonl")) == 4
    assert not (tmp_path / "pairs.jsonl.stats.json").exists()

    monkeypatch.setattr(sample_bdhs, "sample", real)
    other = sample(model, tmp_path / "other.jsonl")
    assert sample(model, tmp_path / "pairs.jsonl", batch_size=2) == other


def test_what_is_there_is_not_sampled_again(model, tmp_path, monkeypatch):
    first = sample(model, tmp_path / "pairs.jsonl", limit=4)
    before, real, ids = contents(tmp_path), sample_bdhs.sample, []

    def noted(assistant, similarity, examples, config):
        ids.extend(example.record.id for example in examples)
        return real(assistant, similarity, examples, config)

    monkeypatch.setattr(sample_bdhs, "sample", noted)
    assert sample(model, tmp_path / "pairs.jsonl", limit=4) == first
    assert contents(tmp_path) == before and ids == []
    more = sample(model, tmp_path / "pairs.jsonl", limit=6)  # a longer run goes on
    assert more[:4] == first and ids == [record["id"] for record in world.alignment_records(6)[4:]]


@pytest.mark.parametrize(
    "changes",
    [
        {"rho_th": 0.5},
        {"seed": 1},
        {"n_bdhs": 2},
        {"guided": False},
        {"temperature": 0.5},
        {"eps_s": 0.5},
        {"noise_steps": 5},
    ],
    ids=str,
)
def test_pairs_of_other_settings_are_not_mixed(model, tmp_path, changes):
    sample(model, tmp_path / "pairs.jsonl", limit=2)
    before = contents(tmp_path)
    message = f"config.json: of another {next(iter(changes))}, .*; name another --out"
    with pytest.raises(UserError, match=message):
        sample(model, tmp_path / "pairs.jsonl", limit=2, **changes)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "data", [b"my notes\nwithout an end", b'{"id": 1}\n', b"no line end", b"\xff\x00"]
)
def test_a_file_that_is_no_pairs_file_is_left_alone(model, tmp_path, data):
    (tmp_path / "notes.txt").write_bytes(data)
    with pytest.raises(UserError, match="notes.txt.config.json: no such file; name another --out"):
        sample(model, tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": data}


@pytest.mark.parametrize("line", ["{", "5"])
def test_a_pairs_file_with_a_bad_line_is_refused(model, tmp_path, line):
    sample(model, tmp_path / "pairs.jsonl", limit=2)
    with open(tmp_path / "pairs.jsonl", "a") as file:
        file.write(line + "\n")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"pairs\.jsonl"):
        sample(model, tmp_path / "pairs.jsonl")
    assert contents(tmp_path) == before


def test_another_models_pairs_are_refused(model, tmp_path):
    """The folder's name is the same, its weights are not."""
    mine = shutil.copytree(model, tmp_path / "mine")
    sample(str(mine), tmp_path / "pairs.jsonl", limit=2)
    raw = bytearray((mine / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (mine / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="of another weights"):
        sample(str(mine), tmp_path / "pairs.jsonl", limit=3)


def test_records_with_the_same_id(model, tmp_path):
    """Each is sampled, from its own seed, and a continued run knows them apart."""
    answer = "A red cup. A blue ball. A green tree. A white dog."
    talk = [("human", "<image>\nWhat is there?"), ("gpt", answer)]
    data = Path(instruct_file(tmp_path / "data.json", talk, talk, talk))
    data.write_text(data.read_text().replace('"id": 1', '"id": 0').replace('"id": 2', '"id": 0'))
    pairs = sample(model, tmp_path / "pairs.jsonl", data=str(data))
    assert {pair["id"] for pair in pairs} == {"0", "0#2", "0#3"}
    assert len({pair["rejected"][0]["content"] for pair in pairs}) == 3
    whole = (tmp_path / "pairs.jsonl").read_bytes()
    (tmp_path / "pairs.jsonl").write_bytes(whole[: whole.index(b"\n") + 9])
    assert sample(model, tmp_path / "pairs.jsonl", data=str(data)) == pairs


def test_settings_of_two_pairs_files_in_one_folder_stay_apart(model, tmp_path):
    sample(model, tmp_path / "s0.0", limit=2, seed=0)
    sample(model, tmp_path / "s0.1", limit=2, seed=1)
    with pytest.raises(UserError, match="another seed"):
        sample(model, tmp_path / "s0.0", limit=3, seed=1)


@pytest.mark.parametrize(
    "change",
    [
        {"question": "What is here?"},
        {"chosen": "A blue cup."},
        {"image": world.image_name("alignment", 7)},
        {"rejected": "A dog."},
    ],
    ids=lambda change: next(iter(change)),
)
def test_data_that_changed_under_the_same_ids(model, tmp_path, change):
    """A pairs file is not continued on other records: its pairs would be taken for theirs."""
    data, out = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    stored = {"question": "What is there?", "chosen": "A red cup.", "rejected": "A car."}

    def write(count: int, changes: dict) -> None:
        """Some records, the second of them changed."""
        lines = []
        for number in range(count):
            record = {"id": number, "image": world.image_name("alignment", number), **stored}
            lines.append(json.dumps(record | (changes if number == 1 else {})) + "\n")
        data.write_text("".join(lines))

    write(3, {})
    sample(model, out, data=str(data))
    before = out.read_bytes()
    write(4, change)
    message = "line 2: '1' is another record in --data; name another --out"
    with pytest.raises(UserError, match=message):
        sample(model, out, data=str(data))
    assert out.read_bytes() == before

    write(4, {})
    assert len(sample(model, out, data=str(data))) == 4 and out.read_bytes().startswith(before)


def test_resolved_curve_by_hand():
    def pair(iterations: int, similarity: float, truncated: bool = False) -> dict:
        found = {"iterations": iterations, "similarity": similarity, "truncated": truncated}
        return {"bdhs": found}

    # Too similar twice, and cut off.
    first = [pair(1, 0.2), pair(1, 0.96), pair(2, 0.5)]
    pairs = [*first, pair(3, 0.9), pair(3, 0.97), pair(3, 1.0), pair(1, 0), pair(3, 0.2, True)]
    assert resolved_curve(pairs, 3, 0.97) == [3 / 8, 4 / 8, 5 / 8]
    assert resolved_curve(first, 3, 0.97) == [0.6667, 1.0, 1.0]
    assert resolved_curve([], 2, 0.97) == [0.0, 0.0]
