"""The cache of the reference's log-probs: its values, its keys, and files that are torn, damaged or shared."""

import copy
import json
import math
import multiprocessing
import random
from dataclasses import replace

import pytest
import torch
from helpers import IMAGE, plain_logp, random_ids, random_model, refused, toy_processor, worst
from script_runs import read_lines
from test_lora import adapted

from minialign import reference, toyworld
from minialign.chat import Tokenizer
from minialign.checkpoint import TOY
from minialign.collate import PairCollator
from minialign.lora import adapter_modules, adapter_state, keep_reference
from minialign.masks import Branch, Sequence, build_tree
from minialign.records import Record
from minialign.reference import ReferenceCache, pair_key, reference_key

Pair = tuple[Sequence, torch.Tensor]


def random_pairs(seed: int, count: int) -> list[Pair]:
    """Pairs of unlike lengths, and the pixels of their pictures."""
    rng, generator, pairs = random.Random(seed), torch.Generator().manual_seed(seed), []
    for _ in range(count):
        trunk = [*random_ids(rng, 1 + rng.randrange(3)), IMAGE, *random_ids(rng, 2 + rng.randrange(6))]
        branches = [Branch(random_ids(rng, 1 + rng.randrange(9))) for _ in range(2)]
        pairs.append((Sequence(trunk, branches, 9), torch.randn(1, 3, 12, 12, generator=generator)))
    return pairs


def ask(cache: ReferenceCache, model, pairs: list[Pair]) -> torch.Tensor:
    """What the cache gives for a batch of these pairs."""
    tree = build_tree([sequence for sequence, _ in pairs], IMAGE, 0)
    features = model.encode_images(torch.cat([pixels for _, pixels in pairs]))
    return cache.logps(model, [pair_key(*pair) for pair in pairs], tree, features)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many pairs each forward pass of the reference has had."""
    counts, real = [], reference.reference_logps

    def counting(model, tree, features):
        counts.append(len(tree.ids))
        return real(model, tree, features)

    monkeypatch.setattr(reference, "reference_logps", counting)
    return counts


# Values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_is_what_the_base_says(seed, tmp_path, computed):
    """Filled in batches of one cut, read in those of another, by another process's cache and another policy."""
    rng, base, pairs = random.Random(seed), random_model(seed), random_pairs(seed, 12)
    filling = adapted(base, 2, 4.0, seed)
    cache = ReferenceCache(tmp_path, filling)
    for start in range(0, 12, 4):
        given = ask(cache, filling, pairs[start : start + 4])
        assert torch.equal(ask(cache, filling, pairs[start : start + 4]), given)  # read back to the last bit
    assert computed == [4, 4, 4]
    reading, order = adapted(base, 3, 1.0, seed + 1), rng.sample(range(12), 12)
    size = rng.choice([1, 2, 3, 5])
    again = ReferenceCache(tmp_path, reading)
    for start in range(0, 12, size):
        batch = [pairs[i] for i in order[start : start + size]]
        found = ask(again, reading, batch)
        plain = torch.stack([
            torch.stack([plain_logp(base, s.trunk, branch.ids, base.encode_images(x)[0]) for branch in s.branches])
            for s, x in batch
        ])  # fmt: skip
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
    (path,) = tmp_path.iterdir()
    lines = read_lines(path)
    assert [line["pair"] for line in lines] == [pair_key(*pair) for pair in pairs[:6]]
    assert all(line.keys() == {"reference", "pair", "logps", "check"} for line in lines)
    ask(ReferenceCache(tmp_path, model), model, pairs[:6])
    assert computed == [4, 4]
    ask(ReferenceCache(tmp_path, model), model, pairs)
    assert computed == [4, 4, 9] and sum(len(read_lines(path)) for path in tmp_path.iterdir()) == 9


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_no_number_is_not_kept(tmp_path, monkeypatch, bad):
    """The training that meets it ends by itself; the other pairs' values are good."""
    model, pairs = adapted(random_model(0), 2, 4.0), random_pairs(0, 3)
    cache = ReferenceCache(tmp_path, model)
    with monkeypatch.context() as patch:
        rows = torch.tensor([[-1.0, -2.0], [-3.0, bad], [-4.0, -5.0]])
        patch.setattr(reference, "reference_logps", lambda *_: rows)
        assert ask(cache, model, pairs).nan_to_num().equal(rows.nan_to_num())
    keys = [pair_key(*pair) for pair in pairs]
    assert cache.known == ReferenceCache(tmp_path, model).known == {keys[0]: [-1.0, -2.0], keys[2]: [-4.0, -5.0]}


# Keys --------------------------------------------------------------------------------------------------------


def test_each_part_of_a_reference_counts(tmp_path, monkeypatch):
    """Any single value of any tensor, the type, the model's choices, the code; and nothing that is trained."""
    rng, base = random.Random(0), random_model(0)
    keys = [reference_key(adapted(base, 2, 4.0))]
    for name in base.state_dict():
        model = copy.deepcopy(base)
        values = model.state_dict()[name].flatten()
        i = rng.randrange(len(values))
        values[i] = torch.nextafter(values[i], torch.tensor(math.inf))  # its last bit
        keys.append(reference_key(adapted(model, 2, 4.0)))
    keys.append(reference_key(adapted(copy.deepcopy(base).bfloat16(), 2, 4.0)))
    for change in ({"vision_feature_layer": -1}, {"text": replace(base.config.text, rope_theta=5e5)}):
        model = adapted(base, 2, 4.0)
        model.config = replace(model.config, **change)
        keys.append(reference_key(model))
    source = tmp_path / "llama.py"
    for text in ("x = 1", "x = 2"):
        source.write_text(text)
        monkeypatch.setattr(reference, "SOURCES", [source])
        keys.append(reference_key(adapted(base, 2, 4.0)))
    assert len(set(keys)) == len(keys) == len(base.state_dict()) + 6


def test_the_policy_does_not_count():
    base = random_model(1)
    key = reference_key(adapted(base, 2, 4.0))
    assert reference_key(adapted(base, 5, 1.0, seed=7)) == key


def test_a_reference_of_adapters_counts():
    """Every value of theirs and their scale; but not what is drawn for a linear whose update is zero."""
    base, keys = random_model(2), []

    def key(change=None, alpha: float = 4.0) -> str:
        torch.manual_seed(0)
        model = adapted(base, 2, alpha)
        if change:
            change(model)
        keep_reference(model)
        with torch.no_grad():
            for parameter in adapter_state(model).values():  # the policy trains on
                parameter.add_(0.1)
        return reference_key(model)

    def nudge(name):
        def change(model):
            adapter_state(model)[name].data.view(-1)[-1] += 1e-3

        return change

    names = list(adapter_state(adapted(base, 2, 4.0)))
    keys = [reference_key(adapted(base, 2, 4.0)), key(), key(alpha=2.0), *(key(nudge(name)) for name in names)]
    assert len(set(keys)) == len(keys) == len(names) + 3 and key() == keys[1]

    def unused(value: float):
        def change(model):
            first = adapter_modules(model)[1]
            first.lora_A.data.fill_(value)
            first.lora_B.data.zero_()

        return change

    assert key(unused(1.0)) == key(unused(2.0)) not in keys


@pytest.mark.parametrize("seed", range(3))
def test_each_part_of_a_pair_counts(seed):
    """Ids, where a branch begins and forks, the order, the packing, any single value of the pixels, their shape."""
    rng, ((sequence, pixels),) = random.Random(seed), random_pairs(seed, 1)
    sequence = replace(sequence, packing=torch.arange(9))
    trunk, (chosen, rejected) = sequence.trunk, sequence.branches
    nudged = pixels.clone()
    nudged.view(-1)[rng.randrange(nudged.numel())] += 1e-3
    i, j = rng.randrange(len(trunk)), rng.randrange(len(chosen.ids))
    others = [
        replace(sequence, trunk=[*trunk[:i], trunk[i] + 50, *trunk[i + 1 :]]),
        replace(sequence, branches=[Branch([*chosen.ids[:j], 60, *chosen.ids[j + 1 :]]), rejected]),
        replace(sequence, branches=[chosen, Branch([*rejected.ids, 60])]),
        replace(sequence, branches=[rejected, chosen]),
        replace(sequence, branches=[Branch(chosen.ids, len(trunk) - 1), rejected]),
        replace(sequence, branches=[Branch(chosen.ids + rejected.ids[:1]), Branch(rejected.ids[1:])]),
        replace(sequence, trunk=trunk[:-1], branches=[Branch([trunk[-1], *chosen.ids]), rejected]),
        replace(sequence, image_features=10),
        replace(sequence, packing=torch.arange(9).flip(0)),
        replace(sequence, image_visible=torch.arange(9) > 0),
    ]
    keys = [pair_key(sequence, pixels), *(pair_key(other, pixels) for other in others), pair_key(sequence, nudged)]
    keys += [pair_key(sequence, pixels.view(1, 3, 6, 24)), pair_key(sequence, pixels.view(torch.int32))]
    assert len(set(keys)) == len(keys) == 14
    same = replace(sequence, branches=[Branch(list(chosen.ids)), rejected], packing=torch.arange(9))
    assert pair_key(same, pixels.clone()) == keys[0]


def test_a_pairs_key_in_a_batch():
    """It follows from texts, template, cut and picture, not from the other pairs; without a cache there is none."""

    def keys(*records: Record, template: str | None = None, **options) -> list[str]:
        tokenizer, options = Tokenizer.from_folder(TOY, template), {"keyed": True} | options
        return PairCollator(tokenizer, toy_processor(), "toy", 200, **options)(list(records)).keys

    first, second = (
        Record(str(i), toyworld.image_name("alignment", i), [("user", "What is there?")], "A red cup.", "A blue car.")
        for i in range(2)
    )
    a, b = keys(first, second)
    assert keys(second, first) == [b, a] and keys(replace(first, id="other")) == [a] and keys(first, keyed=False) == []
    assert keys(replace(first, image=second.image)) == [b] != [a]
    changed = [
        *keys(replace(first, chosen="A red cap.")), *keys(replace(first, turns=[("user", "What is here?")])),
        *keys(first, template="vicuna"), *keys(replace(first, chosen="A red cup. " * 90), truncate=True),
    ]  # fmt: skip
    assert len({a, b, *changed}) == 6


# Files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path) -> tuple:
    """A model, its cache's only file with six pairs, and these."""
    model, pairs = adapted(random_model(1), 2, 4.0), random_pairs(1, 6)
    ask(ReferenceCache(tmp_path, model), model, pairs)
    (path,) = tmp_path.iterdir()
    return model, path, pairs


@pytest.mark.parametrize("seed", range(5))
def test_a_torn_file_is_completed(written, computed, seed):
    """Cut anywhere: the lines that are whole are used, the half one never, and nothing is written behind it."""
    model, path, pairs = written
    whole = path.read_bytes()
    torn = whole[: random.Random(seed).randrange(len(whole))]
    path.write_bytes(torn)
    cache = ReferenceCache(path.parent, model)
    assert len(cache.known) == torn.count(b"\n")
    ask(cache, model, pairs)
    assert computed == [6] and path.read_bytes() == torn
    again = ReferenceCache(path.parent, model).known
    assert again == cache.known == {line["pair"]: line["logps"] for line in map(json.loads, whole.splitlines())}


DAMAGE = {
    "a digit": lambda line: line.replace("7", "8", 1) if "7" in line else line.replace("1", "2", 1),
    "NaN": lambda line: line.replace("[", "[NaN, ", 1),
    "one too few": lambda line: line.replace(line[line.index("[") + 1 : line.index(",", line.index("[")) + 2], "", 1),
    "another reference": lambda line: json.dumps(json.loads(line) | {"reference": "0" * 64}),
    "another pair": lambda line: json.dumps(json.loads(line) | {"pair": "0" * 64}),
    "no checksum": lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "check"}),
    "no log-probs": lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "logps"}),
    "half a line": lambda line: line[: len(line) // 2],
    "no object": lambda line: f"[{line}]",
    "nothing": lambda line: "",
    "zeros": lambda line: "\0" * len(line),
    "no text": lambda line: "\udcff" + line,
    "deep": lambda line: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("number", [0, 5])
def test_a_damaged_line_ends_the_run(written, damage, number):
    model, path, _ = written
    lines = path.read_text().splitlines()
    lines[number], before = damage(lines[number]), lines[number]
    assert lines[number] != before
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))
    said = "a line is damaged; delete the file, and what it held is computed anew"
    refused(lambda: ReferenceCache(path.parent, model), f"{path}: {said}")


def test_a_line_that_is_being_written_waits(written, computed):
    """Another process writes it to its end while this one runs, and this one then need not compute."""
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
    """One of several processes: adds to the cache in steps of random sizes, and reads what the others add."""
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
    assert [process.exitcode for process in processes] == [0, 0, 0] and len(list(tmp_path.iterdir())) == 3
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
