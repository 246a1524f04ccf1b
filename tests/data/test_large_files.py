"""Files of many records: indexed and not parsed, sampled at random, read ahead by other threads."""

import json
import random
import threading
import time
from pathlib import Path

import pytest
from data_sets import RAW, expected
from helpers import refused
from input_files import array, instruct, lines, pair, pairs_in, records_in
from online_runs import online
from script_runs import contents, read_lines, sample, train

from minialign.data import record_files
from minialign.data.prefetch import load_ahead
from minialign.data.record_files import open_file, open_pairs, usable_pairs
from minialign.errors import UserError
from minialign.training.optimizer import batches_of_epoch

SEED = 1  # of the runs that meet a bad picture late


@pytest.fixture
def parsed(monkeypatch) -> list:
    """What was parsed as JSON so far."""
    texts, real = [], record_files.parse_json
    monkeypatch.setattr(record_files, "parse_json", lambda data: texts.append(data) or real(data))
    return texts


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("chunk", [7, 64, 2**24])
def test_lines_are_found_by_their_offsets(tmp_path, monkeypatch, end, chunk):
    """Lines of any length, however many bytes are looked at together."""
    monkeypatch.setattr(record_files, "CHUNK", chunk)
    rng, path = random.Random(chunk), tmp_path / "data.jsonl"
    texts = [
        json.dumps({"n": i, "text": "é\u2028" * rng.randrange(60)}, ensure_ascii=False)
        for i in range(50)
    ]
    path.write_text("\n".join(texts) + end)
    file = open_file(str(path), "--data", "")
    assert len(file) == 50 and [file[i] for i in range(50)] == [json.loads(text) for text in texts]
    assert file.place(7) == f"{path}, line 8"


def test_a_large_file_is_not_parsed(tmp_path, parsed):
    """Of 20,000 lines, those are parsed that are asked for, and the first for its format."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(*(pair(i) for i in range(20_000))))
    pairs = open_pairs(str(path), None)
    assert len(pairs.numbers) == 20_000 and len(parsed) == 1
    assert (
        len(usable_pairs(pairs, lambda record: None, 100, 0, False).numbers) == 100
        and len(parsed) == 101
    )
    assert len(usable_pairs(pairs, lambda record: None, None, 0, False).numbers) == 20_000
    assert len(parsed) == 101 + record_files.CHECKED
    assert len(records_in(path, 10)) == 10 and len(parsed) == 101 + record_files.CHECKED + 11


def test_limit_is_a_fair_subset(tmp_path):
    """Drawn from the whole file, by the seed alone, in the file's order; the larger holds the
    smaller.
    """
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(*(instruct(i, id=str(i)) for i in range(400))))
    drawn = {}
    for seed in (0, 1):
        for limit in (40, 80):
            records = record_files.read_records(str(path), None, limit, seed)
            numbers = [int(record.id) for record in records]
            assert numbers == sorted(numbers) and len(set(numbers)) == limit
            assert records == record_files.read_records(str(path), None, limit, seed)
            drawn[seed, limit] = set(numbers)
        assert drawn[seed, 40] < drawn[seed, 80]
    assert len(drawn[0, 40] & drawn[1, 40]) < 12  # 4 are to be expected
    assert all(max(each) > 350 and min(each) < 50 for each in drawn.values())
    many = [number for seed in range(200) for number in record_files.order_of(400, seed)[:40]]
    counts = [sum(low <= number < low + 100 for number in many) for low in range(0, 400, 100)]
    # Each quarter alike, within 4 standard deviations.
    assert all(abs(count - 2000) < 150 for count in counts)


def test_a_limit_counts_what_can_be_used(tmp_path):
    """Ties and texts without an image are left out before the limit is reached."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(*(RAW["vlfeedback"] * 10)))
    assert len(pairs_in(path, 20)) == 20 and {r.rejected for r in pairs_in(path, 20)} == {
        expected("povid")[0].rejected
    }
    assert len(pairs_in(path, 25)) == 20


# ---------------------------------------------------------------- other threads, bad data met late


def test_workers_change_nothing(model, pairs, tmp_path):
    """The same pairs, weights and metrics with 0, 1 and 2 threads."""
    runs = []
    for workers in (0, 1, 2):
        out = tmp_path / str(workers)
        sample(model, out / "pairs.jsonl", workers=workers)
        train(model, out / "run", pairs=pairs, workers=workers, accumulate=2)
        kept = contents(out)
        runs.append(
            {
                name: kept[name]
                for name in kept
                if name.endswith(("tensors", "metrics.jsonl", "pairs.jsonl"))
            }
        )
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_line_is_met_in_its_turn(workers):
    def load(item: int) -> int:
        if item == 5:
            raise UserError("the fifth")
        return item * item

    seen = []
    refused(
        lambda: [seen.append(value) for value in load_ahead(range(9), load, workers)], "the fifth"
    )
    assert seen == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_load_side_by_side_and_not_too_far_ahead(monkeypatch, workers):
    """Every load waits until all threads are in one; and while an item is in use, two per thread
    are loaded ahead.
    """
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    together, started = threading.Barrier(workers, timeout=20), []

    def load(item: int) -> int:
        started.append(item)
        together.wait()
        return item

    ahead = load_ahead(range(12), load, workers)
    for item in range(12):
        assert next(ahead) == item
        assert len(started) <= item + 1 + 2 * workers
    assert next(ahead, None) is None and sorted(started) == list(range(12))


def test_what_nobody_waits_for_is_not_loaded():
    """A run that ends early waits for the loads that have begun, and drops those that wait for
    their turn.
    """
    started = []

    def load(item: int) -> int:
        started.append(item)
        time.sleep(0.2 * (item > 0))  # the second is still loading when the first is used
        return item

    ahead = load_ahead(range(1000), load, 1)
    assert next(ahead) == 0
    ahead.close()
    assert started in ([0], [0, 1]) and not [
        t for t in threading.enumerate() if t.name.startswith("load")
    ]


@pytest.fixture
def late(tmp_path, pictures, monkeypatch) -> Path:
    """12 pairs of which the first 4 are looked at before the run; the picture of the tenth is cut
    off.
    """
    monkeypatch.setattr(record_files, "CHECKED", 4)
    assert 9 not in sum(batches_of_epoch(range(12), 2, SEED, 0)[:3], [])  # steps come before it
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        lines(*(pair(i, images=["truncated.png" if i == 9 else "good.png"]) for i in range(12)))
    )
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_that_is_met_late(model, tmp_path, pictures, late, workers):
    """The run ends with its line, and goes on when the picture is mended, as if nothing had
    been.
    """
    flags = {
        "pairs": str(late),
        "images": str(pictures),
        "workers": workers,
        "batch_size": 2,
        "seed": SEED,
    }
    refused(
        lambda: train(model, tmp_path / "out", **flags),
        f"{late}, line 10: ",
        "truncated.png",
        "or pass --skip",
    )
    steps = len(read_lines(tmp_path / "out" / "metrics.jsonl"))
    assert 3 <= steps < 6 and not (tmp_path / "out" / "result.json").exists()
    (pictures / "truncated.png").write_bytes((pictures / "good.png").read_bytes())
    train(model, tmp_path / "out", resume=True, **flags)
    train(model, tmp_path / "whole", **flags)
    mended, whole = (contents(tmp_path / name) for name in ("out", "whole"))
    del mended["config.json"], whole["config.json"]  # which name their folders
    assert mended == whole


def test_a_bad_picture_that_is_left_out_late(model, tmp_path, pictures, late, capsys):
    flags = {
        "pairs": str(late),
        "images": str(pictures),
        "batch_size": 2,
        "skip_bad_records": True,
        "workers": 0,
    }
    rows = train(model, tmp_path / "out", **flags)
    assert sorted(row["pairs"] for row in rows) == [1, 2, 2, 2, 2, 2]
    shown = capsys.readouterr()
    assert f"1 pairs left out on the way, the first: {late}, line 10" in shown.out + shown.err
    del flags["pairs"]
    online(model, tmp_path / "online", method="online-bdhs", gamma=1.0, data=str(late), **flags)
    assert f"1 records left out on the way, the first: {late}, line 10" in capsys.readouterr().out
    flags["pairs"] = str(late)
    rows = train(model, tmp_path / "single", **flags | {"batch_size": 1})
    empty = [row["step"] for row in rows if row["pairs"] == 0]  # a step in which nothing is learned
    assert len(rows) == 12 and len(empty) == 1 and "loss" not in rows[empty[0] - 1]
    assert [row["step"] for row in rows] == list(range(1, 13))


@pytest.mark.parametrize("form", [lines, array])
def test_a_bad_line_that_is_mended_during_a_run(model, tmp_path, monkeypatch, form):
    """It is behind those that are looked at first: the run goes on where it stopped."""
    monkeypatch.setattr(record_files, "CHECKED", 4)
    path, good = tmp_path / "pairs.json", [pair(i) for i in range(12)]
    flags = {"pairs": str(path), "batch_size": 2, "seed": SEED, "workers": 0}
    path.write_bytes(form(*good[:9], {"id": "bad"}, *good[10:]))
    refused(
        lambda: train(model, tmp_path / "out", **flags),
        f"{path}, {'line' if form is lines else 'record'} 10: ",
    )
    path.write_bytes(form(*good))
    train(model, tmp_path / "out", resume=True, **flags)
    train(model, tmp_path / "whole", **flags)
    assert [
        contents(tmp_path / name)["adapter/adapter_model.safetensors"] for name in ("out", "whole")
    ].count(contents(tmp_path / "whole")["adapter/adapter_model.safetensors"]) == 2
    path.write_bytes(form(pair(0, chosen="Another cup."), *good[1:]))  # among the first: other data
    (tmp_path / "whole/report.html").unlink()  # a finished run has nothing to resume
    refused(
        lambda: train(model, tmp_path / "whole", resume=True, **flags),
        "are not those that",
        "data.json",
    )
