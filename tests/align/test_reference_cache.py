"""The cache of the reference's log-probs: its values, and files that are torn, damaged or
shared.
"""

import json
import multiprocessing
import random

import pytest
import torch
from helpers import IMAGE, plain_logp, random_model, refused, worst
from policies import adapted
from reference_pairs import Pair, random_pairs
from script_runs import read_lines

from minialign.align import reference_cache
from minialign.align.reference_cache import ReferenceCache
from minialign.data.collate import pair_key
from minialign.model.masks import build_tree


def ask(cache: ReferenceCache, model, pairs: list[Pair]) -> torch.Tensor:
    """What the cache gives for a batch of these pairs."""
    tree = build_tree([sequence for sequence, _ in pairs], IMAGE, 0)
    features = model.encode_images(torch.cat([pixels for _, pixels in pairs]))
    return cache.logps(model, [pair_key(*pair) for pair in pairs], tree, features)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many pairs each forward pass of the reference has had."""
    counts, real = [], reference_cache.reference_logps

    def counting(model, tree, features):
        counts.append(len(tree.ids))
        return real(model, tree, features)

    monkeypatch.setattr(reference_cache, "reference_logps", counting)
    return counts


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_is_what_the_base_says(seed, tmp_path, computed):
    """Filled in batches of one cut, read in those of another, by another process's cache and
    another policy.
    """
    rng, base, pairs = random.Random(seed), random_model(seed), random_pairs(seed, 12)
    filling = adapted(base, 2, 4.0, seed)
    cache = ReferenceCache(tmp_path, filling)
    for start in range(0, 12, 4):
        some = pairs[start : start + 4]
        given = ask(cache, filling, some)
        assert torch.equal(ask(cache, filling, some), given)  # read back to the last bit
    assert computed == [4, 4, 4]

    reading, order = adapted(base, 3, 1.0, seed + 1), rng.sample(range(12), 12)
    size = rng.choice([1, 2, 3, 5])
    again = ReferenceCache(tmp_path, reading)
    for start in range(0, 12, size):
        batch, plain = [pairs[i] for i in order[start : start + size]], []
        for sequence, pixels in batch:
            features = base.encode_images(pixels)[0]
            for branch in sequence.branches:
                plain.append(plain_logp(base, sequence.trunk, branch.ids, features))
        plain = torch.stack(plain).view(-1, 2)
        found = ask(again, reading, batch)
        assert found.dtype == torch.float32 and not found.requires_grad
        assert worst(found, plain) < 1e-5 * plain.abs().max()
    assert computed == [4, 4, 4]


@pytest.mark.parametrize("seed", range(3))
def test_a_partial_cache_is_completed(seed, tmp_path, computed):
    model, pairs = adapted(random_model(seed), 2, 4.0), random_pairs(seed, 9)
    cache = ReferenceCache(tmp_path, model)
    ask(cache, model, pairs[:4])
    ask(cache, model, pairs[2:6])  # two of which are known
    ask(cache, model, pairs[1:6])
    assert computed == [4, 4]
    (path,) = tmp_path.glob("*.jsonl")
    lines = read_lines(path)
    assert [line["pair"] for line in lines] == [pair_key(*pair) for pair in pairs[:6]]
    assert all(line.keys() == {"reference", "pair", "logps"} for line in lines)
    ask(ReferenceCache(tmp_path, model), model, pairs[:6])
    assert computed == [4, 4]
    ask(ReferenceCache(tmp_path, model), model, pairs)
    assert computed == [4, 4, 9]
    assert sum(len(read_lines(path)) for path in tmp_path.glob("*.jsonl")) == 9


# ---------------------------------------------------------------- files


@pytest.fixture
def written(tmp_path) -> tuple:
    """A model, its cache's only file with six pairs, and these."""
    model, pairs = adapted(random_model(1), 2, 4.0), random_pairs(1, 6)
    ask(ReferenceCache(tmp_path, model), model, pairs)
    (path,) = tmp_path.glob("*.jsonl")
    return model, path, pairs


@pytest.mark.parametrize("seed", range(5))
def test_a_torn_file_is_completed(written, computed, seed):
    """Cut anywhere: the lines that are whole are used, the half one never, and nothing is written
    behind it.
    """
    model, path, pairs = written
    whole = path.read_bytes()
    torn = whole[: random.Random(seed).randrange(len(whole))]
    path.write_bytes(torn)
    cache = ReferenceCache(path.parent, model)
    assert len(cache.known) == torn.count(b"\n")
    ask(cache, model, pairs)
    assert computed == [6] and path.read_bytes() == torn
    expected = {line["pair"]: line["logps"] for line in map(json.loads, whole.splitlines())}
    assert ReferenceCache(path.parent, model).known == cache.known == expected


DAMAGE = {
    "half a line": lambda line: line[: len(line) // 2],
    "nothing": lambda line: "",
    "zeros": lambda line: "\0" * len(line),
    "no text": lambda line: "\udcff" + line,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("number", [0, 5])
def test_a_damaged_line_ends_the_run(written, damage, number):
    model, path, _ = written
    lines = path.read_text().splitlines()
    lines[number], before = damage(lines[number]), lines[number]
    assert lines[number] != before
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))
    message = "a line is damaged; delete the file, and what it held is computed anew"
    refused(lambda: ReferenceCache(path.parent, model), f"{path}: {message}")


def test_a_line_that_is_being_written_waits(written, computed):
    """Another process writes it to its end while this one runs, and this one then need not
    compute.
    """
    model, path, pairs = written
    whole = path.read_bytes()
    for cut in (whole.rindex(b"\n", 0, -1) + 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        cache = ReferenceCache(path.parent, model)
        assert len(cache.known) == 5 and path.read_bytes() == whole[:cut]
        path.write_bytes(whole)
        ask(cache, model, pairs)
    assert computed == []


def test_other_files_and_other_references_stay_as_they_are(written, computed):
    model, path, pairs = written
    (path.parent / "metrics.jsonl").write_text("no line of the cache's")
    other = adapted(random_model(2), 2, 4.0)
    cache = ReferenceCache(path.parent, other)
    ask(cache, other, pairs)
    assert computed == [6] and len(cache.known) == 6
    assert ReferenceCache(path.parent, model).known.keys() == cache.known.keys()
    assert ReferenceCache(path.parent, model).known != cache.known


def fill(folder, seed: int, begin) -> None:
    """One of several processes: adds to the cache in steps of random sizes, and reads what the
    others add."""
    rng, cache, number = random.Random(seed), ReferenceCache(folder, random_model(0)), 0
    begin.wait()
    while number < 300:
        size = rng.randrange(1, 20)
        cache.add({f"{seed}-{i}": [seed + 0.1, -i / 3] for i in range(number, number + size)})
        cache.read()
        number += size


def test_processes_that_write_at_once(tmp_path):
    """Nothing is lost or mixed, and a line that one of them is writing disturbs no reader."""
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(3)
    processes = [context.Process(target=fill, args=(tmp_path, seed, begin)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    known = ReferenceCache(tmp_path, random_model(0)).known
    for seed in range(3):
        assert {f"{seed}-{i}" for i in range(300)} <= known.keys()
    assert all(row == [int(key[0]) + 0.1, -int(key[2:]) / 3] for key, row in known.items())


def test_one_process_knows_what_another_has_found(tmp_path, computed):
    """As the ranks of a run do, whose pairs change hands from one epoch to the next."""
    model, pairs = adapted(random_model(0), 2, 4.0), random_pairs(0, 6)
    first, second = (ReferenceCache(tmp_path, model) for _ in range(2))
    ask(first, model, pairs[:3])
    ask(second, model, pairs[3:])
    assert torch.equal(ask(first, model, pairs), ask(second, model, pairs)) and computed == [3, 3]
