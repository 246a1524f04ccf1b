"""A stopped sample_bdhs.py goes on to the same bytes, samples nothing twice, and adds to no file
but its own."""

import json
import random
import shutil
from pathlib import Path

import pytest
from script_runs import contents, instruct_file, read_lines, sample

import sample_bdhs
from minialign.errors import UserError
from minialign.sampling.bdhs import Bdhs
from minialign.toy import world


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_run_continues_to_the_same_bytes(model, tmp_path, seed):
    """Killed between lines or within one, and continued in other batches."""
    rng, undisturbed, out = random.Random(seed), tmp_path / "a", tmp_path / "b"
    sample(model, undisturbed / "pairs.jsonl")
    sample(model, out / "pairs.jsonl")
    whole = (out / "pairs.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    cut = (
        rng.randrange(len(whole)) if seed % 2 else len(b"".join(lines[: rng.randrange(len(lines))]))
    )
    (out / "pairs.jsonl").write_bytes(whole[:cut])
    (out / "pairs.jsonl.stats.json").unlink()
    sample(model, out / "pairs.jsonl", batch_size=rng.choice([1, 2, 3, 7]))
    for name in ("pairs.jsonl", "pairs.jsonl.stats.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_run_that_is_interrupted_keeps_whole_batches(model, tmp_path, monkeypatch):
    real, batches = Bdhs.sample, []

    def interrupted(self, examples):
        batches.append(len(examples))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(self, examples)

    monkeypatch.setattr(Bdhs, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(model, tmp_path / "pairs.jsonl", batch_size=2)
    assert (
        len(read_lines(tmp_path / "pairs.jsonl")) == 4
        and not (tmp_path / "pairs.jsonl.stats.json").exists()
    )
    monkeypatch.setattr(Bdhs, "sample", real)
    assert sample(model, tmp_path / "pairs.jsonl", batch_size=2) == sample(
        model, tmp_path / "other.jsonl"
    )


def test_what_is_there_is_not_sampled_again(model, tmp_path, monkeypatch):
    first = sample(model, tmp_path / "pairs.jsonl", limit=4)
    before, real, ids = contents(tmp_path), Bdhs.sample, []
    monkeypatch.setattr(
        Bdhs, "sample", lambda self, batch: ids.extend(e.id for e in batch) or real(self, batch)
    )
    assert (
        sample(model, tmp_path / "pairs.jsonl", limit=4) == first
        and contents(tmp_path) == before
        and ids == []
    )
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
    with pytest.raises(
        UserError, match=f"config.json: of another {next(iter(changes))}, .*; name another --out"
    ):
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


@pytest.mark.parametrize("line", ["{", "5", '{"id": "x"}'])
def test_a_pairs_file_with_a_bad_line_is_refused(model, tmp_path, line):
    sample(model, tmp_path / "pairs.jsonl", limit=2)
    with open(tmp_path / "pairs.jsonl", "a") as file:
        file.write(line + "\n")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"pairs\.jsonl"):
        sample(model, tmp_path / "pairs.jsonl")
    assert contents(tmp_path) == before


def test_a_pair_without_its_sampling_is_refused(model, tmp_path):
    sample(model, tmp_path / "pairs.jsonl", limit=2)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(row | {"bdhs": {}}) + "\n" for row in rows)
    )
    with pytest.raises(UserError, match="line 1: field 'bdhs.iterations' is missing"):
        sample(model, tmp_path / "pairs.jsonl")


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
    talk = [
        ("human", "<image>\nWhat is there?"),
        ("gpt", "A red cup. A blue ball. A green tree. A white dog."),
    ]
    data = Path(instruct_file(tmp_path / "data.json", talk, talk, talk))
    data.write_text(data.read_text().replace('"id": 1', '"id": 0').replace('"id": 2', '"id": 0'))
    pairs = sample(model, tmp_path / "pairs.jsonl", data=str(data))
    assert {pair["id"] for pair in pairs} == {"0", "0#2", "0#3"} and len(
        {pair["rejected"] for pair in pairs}
    ) == 3
    whole = (tmp_path / "pairs.jsonl").read_bytes()
    (tmp_path / "pairs.jsonl").write_bytes(whole[: whole.index(b"\n") + 9])
    assert sample(model, tmp_path / "pairs.jsonl", data=str(data)) == pairs


def test_settings_of_two_pairs_files_in_one_folder_stay_apart(model, tmp_path):
    sample(model, tmp_path / "s0.0", limit=2, seed=0)
    sample(model, tmp_path / "s0.1", limit=2, seed=1)
    with pytest.raises(UserError, match="another seed"):
        sample(model, tmp_path / "s0.0", limit=3, seed=1)


@pytest.mark.parametrize("change", ["question", "answer", "image", "rejected"])
def test_data_that_changed_under_the_same_ids(model, tmp_path, change):
    """A pairs file is not continued on other records: its pairs would be taken for theirs."""

    def record(number: int, **changes) -> dict:
        raw = {
            "id": number,
            "image": world.image_name("alignment", number),
            "question": "What is there?",
            "chosen": "A red cup.",
            "rejected": "A car.",
        }
        return raw | changes

    data, out = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(record(i)) + "\n" for i in range(3)))
    sample(model, out, data=str(data))
    before = out.read_bytes()
    other = {
        "question": {"question": "What is here?"},
        "answer": {"chosen": "A blue cup."},
        "image": {"image": world.image_name("alignment", 7)},
        "rejected": {"rejected": "A dog."},
    }
    data.write_text(
        "".join(json.dumps(record(i, **(other[change] if i == 1 else {}))) + "\n" for i in range(4))
    )
    with pytest.raises(
        UserError, match="line 2: '1' is another record in --data; name another --out"
    ):
        sample(model, out, data=str(data))
    assert out.read_bytes() == before
    data.write_text("".join(json.dumps(record(i)) + "\n" for i in range(4)))
    assert len(sample(model, out, data=str(data))) == 4 and out.read_bytes().startswith(before)


def test_two_programs_do_not_write_one_file(model, tmp_path, monkeypatch):
    """The one that comes second to a batch ends with its line; the file is the other's."""
    out, real, calls = tmp_path / "pairs.jsonl", sample_bdhs.append_lines, []

    def interrupted(path, lines, behind):
        if not calls:
            calls.append(lines)
            sample(model, tmp_path / "other.jsonl")
            path.write_bytes((tmp_path / "other.jsonl").read_bytes())
        return real(path, lines, behind)

    monkeypatch.setattr(sample_bdhs, "append_lines", interrupted)
    with pytest.raises(
        UserError, match="another program writes it, too; wait for that one, then run again"
    ):
        sample(model, out)
    assert out.read_bytes() == (tmp_path / "other.jsonl").read_bytes()
