"""Pixels for a GPU: pinned where they are loaded, fetched without waiting. There is none here: the
calls are noted.
"""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import random_toy, toy_processor
from input_files import pair, toy_collator
from script_runs import contents, train
from torch.utils._python_dispatch import TorchDispatchMode

import train_dpo
from minialign.data.records import pair_record
from minialign.training import flags


@pytest.fixture
def pins(monkeypatch) -> list[torch.Size]:
    """The shapes that are pinned from now on; the memory stays what it is."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append(self.shape) or self)
    return seen


@pytest.mark.parametrize(
    ("device", "noise_steps", "count"),
    [
        ("cpu", 0, 0),
        ("cpu", 500, 0),
        ("cuda", 0, 1),
        ("cuda:1", 500, 2),
    ],
)
def test_pinned_for_a_gpu_alone(pins, device, noise_steps, count):
    """Pixels and noisy pixels, whose values are the same."""
    records = [pair_record(pair(number)) for number in range(2)]
    batches = []
    for place in ("cpu", device):
        collate = toy_collator(noise_steps=noise_steps, device=place)
        batches.append(collate.batch([collate.load(record) for record in records]))
    plain, batch = batches
    assert pins == [batch.pixels.shape] * count
    assert torch.equal(batch.pixels, plain.pixels)
    assert batch.noisy is plain.noisy is None or torch.equal(batch.noisy, plain.noisy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_go_there_without_waiting(dtype):
    """One copy to the device, of the pixels as they are: pinned memory in another type would be
    pinned no more.
    """
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device(
                "meta"
            ):
                copies.append(
                    (args[0].device.type, kwargs.get("dtype"), kwargs.get("non_blocking"))
                )
            return function(*args, **(kwargs or {}))

    model, size = copy.deepcopy(random_toy()).to("meta", dtype), toy_processor().size
    with Copies():
        features = model.encode_images(torch.zeros(2, 3, size, size))
    assert features.dtype == dtype and features.device.type == "meta"
    assert copies == [("cpu", torch.float32, True)]


def test_the_script_says_where_they_go(model, pairs, tmp_path, pins, monkeypatch):
    """--device cuda: every batch is pinned, and the idle one; the CPU's run is the same, byte for
    byte.
    """
    train(model, tmp_path / "cpu", pairs=pairs)
    assert not pins
    monkeypatch.setattr(flags, "require_device", lambda device: None)
    real = train_dpo.load_policy_weights

    def here(policy, folder, config):
        real(policy, folder, replace(config, device="cpu"))

    monkeypatch.setattr(train_dpo, "load_policy_weights", here)
    train(model, tmp_path / "cuda", pairs=pairs, device="cuda", workers=2)
    assert sorted(shape[0] for shape in pins) == [1, 2, 4, 4, 4]
    left = [contents(tmp_path / device) for device in ("cpu", "cuda")]
    assert left[0].keys() == left[1].keys()
    assert [name for name in left[0] if left[0][name] != left[1][name]] == ["config.json"]
