"""Keys of the reference's cache: whatever a log-prob follows from gives another key, and nothing
else does.
"""

import copy
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import random_model, toy_processor
from policies import adapted
from reference_pairs import random_pairs

from minialign.align import reference_cache
from minialign.align.reference_cache import reference_key
from minialign.data.collate import PairCollator, pair_key
from minialign.data.records import Record
from minialign.data.tokenizer import Tokenizer
from minialign.edge import CHECKPOINT
from minialign.model.lora import adapter_modules, adapter_state, keep_reference
from minialign.model.masks import Branch
from minialign.toy import world


def test_each_part_of_a_reference_counts(tmp_path, monkeypatch):
    """Any single value of any tensor, the type, the model's choices, the code; and nothing that is
    trained."""
    rng, base = random.Random(0), random_model(0)
    keys = [reference_key(adapted(base, 2, 4.0))]
    for name in base.state_dict():
        model = copy.deepcopy(base)
        values = model.state_dict()[name].flatten()
        i = rng.randrange(len(values))
        values[i] = torch.nextafter(values[i], torch.tensor(math.inf))  # its last bit
        keys.append(reference_key(adapted(model, 2, 4.0)))
    keys.append(reference_key(adapted(copy.deepcopy(base).bfloat16(), 2, 4.0)))
    text = replace(base.config.text, rope_theta=5e5)
    for change in ({"vision_feature_layer": -1}, {"text": text}):
        model = adapted(base, 2, 4.0)
        model.config = replace(model.config, **change)
        keys.append(reference_key(model))
    for room in reference_cache.ROOMS:  # a copy of the code, and a line more in each room
        path = tmp_path / room / "__init__.py"
        shutil.copytree(Path(reference_cache.__file__).parent.parent / room, path.parent)
    monkeypatch.setattr(reference_cache, "__file__", str(tmp_path / "align/reference_cache.py"))
    assert reference_key(adapted(base, 2, 4.0)) == keys[0]
    for room in reference_cache.ROOMS:
        (tmp_path / room / "__init__.py").write_text("x = 1\n")
        keys.append(reference_key(adapted(base, 2, 4.0)))
    assert len(set(keys)) == len(keys) == len(base.state_dict()) + 6


def test_the_policy_does_not_count():
    base = random_model(1)
    key = reference_key(adapted(base, 2, 4.0))
    assert reference_key(adapted(base, 5, 1.0, seed=7)) == key


def test_a_reference_of_adapters_counts():
    """Every value of theirs and their scale; but not what is drawn for a linear whose update is
    zero."""
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
    keys = [reference_key(adapted(base, 2, 4.0)), key(), key(alpha=2.0)]
    keys += [key(nudge(name)) for name in names]
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
    """Ids, where a branch begins and forks, the order, the packing, any single value of the pixels,
    their shape."""
    rng, ((sequence, pixels),) = random.Random(seed), random_pairs(seed, 1)
    sequence = replace(sequence, packing=torch.arange(9))
    trunk, (chosen, rejected) = sequence.trunk, sequence.branches
    nudged = pixels.clone()
    nudged.view(-1)[rng.randrange(nudged.numel())] += 1e-3
    i, j = rng.randrange(len(trunk)), rng.randrange(len(chosen.ids))
    moved = Branch(chosen.ids + rejected.ids[:1])
    others = [
        replace(sequence, trunk=[*trunk[:i], trunk[i] + 50, *trunk[i + 1 :]]),
        replace(sequence, branches=[Branch([*chosen.ids[:j], 60, *chosen.ids[j + 1 :]]), rejected]),
        replace(sequence, branches=[chosen, Branch([*rejected.ids, 60])]),
        replace(sequence, branches=[rejected, chosen]),
        replace(sequence, branches=[Branch(chosen.ids, len(trunk) - 1), rejected]),
        replace(sequence, branches=[moved, Branch(rejected.ids[1:])]),
        replace(sequence, trunk=trunk[:-1], branches=[Branch([trunk[-1], *chosen.ids]), rejected]),
        replace(sequence, image_features=10),
        replace(sequence, packing=torch.arange(9).flip(0)),
        replace(sequence, image_visible=torch.arange(9) > 0),
    ]
    keys = [pair_key(sequence, pixels), pair_key(sequence, nudged)]
    keys += [pair_key(other, pixels) for other in others]
    keys.append(pair_key(sequence, pixels.view(1, 3, 6, 24)))
    keys.append(pair_key(sequence, pixels.view(torch.int32)))
    assert len(set(keys)) == len(keys) == 14
    same = replace(sequence, branches=[Branch(list(chosen.ids)), rejected], packing=torch.arange(9))
    assert pair_key(same, pixels.clone()) == keys[0]


def test_a_pairs_key_in_a_batch():
    """It follows from texts, template, cut and picture, not from the other pairs; without a cache
    there is none."""

    def keys(*records: Record, template: str | None = None, keyed=True, truncate=False):
        tokenizer, processor = Tokenizer.from_folder(CHECKPOINT, template), toy_processor()
        collate = PairCollator(
            tokenizer, processor, world.open_picture, 200, truncate=truncate, keyed=keyed
        )
        return collate.batch([collate.load(record) for record in records]).keys

    turns, two = [("user", "What is there?")], ("A red cup.", "A blue car.")
    names = [world.image_name("alignment", i) for i in range(2)]
    first, second = (Record(name, name, turns, *two) for name in names)
    a, b = keys(first, second)
    assert keys(second, first) == [b, a] and keys(replace(first, id="other")) == [a]
    assert keys(first, keyed=False) == []
    assert keys(replace(first, image=second.image)) == [b] != [a]
    changed = [
        *keys(replace(first, chosen="A red cap.")),
        *keys(replace(first, turns=[("user", "What is here?")])),
        *keys(first, template="vicuna_v1"),
        *keys(replace(first, chosen="A red cup. " * 90), truncate=True),
    ]
    assert len({a, b, *changed}) == 6
