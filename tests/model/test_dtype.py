"""--dtype bfloat16: the frozen weights take half the memory, what is trained and what is written
does not suffer.
"""

import math
from pathlib import Path

import pytest
import torch
from helpers import random_toy, toy_model
from safetensors.torch import load_file
from script_runs import read_lines, sample, train

import train_dpo
from minialign.edge import CHECKPOINT
from minialign.model.hf_folder import NAMES, load_model, rename, save_model
from minialign.model.lora import TARGETS


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """Random weights in float16, as the hub's folders have them: values that bfloat16 would
    round.
    """
    folder = tmp_path_factory.mktemp("half") / "llava"
    save_model(
        random_toy(1).state_dict(), toy_model().config.raw, CHECKPOINT, folder, torch.float16
    )
    return folder


@pytest.fixture(scope="module")
def runs(half, pairs, tmp_path_factory) -> dict[str, Path]:
    """The same training in both types."""
    folders = {}
    for dtype in ("float32", "bfloat16"):
        folders[dtype] = tmp_path_factory.mktemp(dtype)
        train(str(half), folders[dtype], pairs=pairs, dtype=dtype, lr=3e-3, workers=0)
    return folders


def test_what_was_not_trained_keeps_its_bytes(half, runs):
    before, after = (
        load_file(folder / "model.safetensors") for folder in (half, runs["bfloat16"] / "merged")
    )
    changed = {
        key for key in before if before[key].numpy().tobytes() != after[key].numpy().tobytes()
    }
    trained = {key for key in before if key.split(".")[-2] in TARGETS or "projector" in key}
    names = {rename(key, NAMES) for key in changed}
    assert changed <= trained and {tensor.dtype for tensor in after.values()} == {torch.float16}
    # The tower's projections are called alike, and are frozen; all of the decoder's and the
    # projector's have moved.
    assert names == {
        n for n in (rename(key, NAMES) for key in trained) if not n.startswith("vision_tower.")
    }


def test_updates_are_added_to_the_stored_weights(half, runs):
    """Not to what bfloat16 has made of them."""
    stored, merged = (
        load_file(folder / "model.safetensors") for folder in (half, runs["bfloat16"] / "merged")
    )
    adapter = load_file(runs["bfloat16"] / "adapter" / "adapter_model.safetensors")
    for key in [
        key for key in stored if key.startswith("language_model.") and key.split(".")[-2] in TARGETS
    ]:
        name = f"base_model.model.model.{rename(key, NAMES).removesuffix('.weight')}"
        update = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"] * (8.0 / 4)
        assert torch.equal(merged[key], (stored[key].float() + update).half())


def test_the_two_types_train_alike(half, runs):
    rows = {dtype: read_lines(out / "metrics.jsonl") for dtype, out in runs.items()}
    for dtype in rows:
        assert rows[dtype][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        trained = load_file(runs[dtype] / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    a, b = ([row["loss"] for row in rows[dtype]] for dtype in rows)
    assert a != b and max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.05 < max(a) - min(a)
    base, *merged = (
        load_model(folder).state_dict() for folder in (half, *(runs[d] / "merged" for d in runs))
    )
    moves = [torch.cat([(each[name] - base[name]).flatten() for name in base]) for each in merged]
    assert torch.cosine_similarity(*moves, dim=0) > 0.97


def test_the_model_has_that_type(half, pairs, tmp_path, monkeypatch):
    seen, real = set(), train_dpo.branch_logps

    def spy(model, tree, features):
        for name, parameter in model.named_parameters():
            if "projector" not in name:
                seen.add((name.split(".")[-1], parameter.dtype))
        return real(model, tree, features)

    monkeypatch.setattr(train_dpo, "branch_logps", spy)
    train(str(half), tmp_path, pairs=pairs, limit=4, dtype="bfloat16", workers=0)
    assert {kind for name, kind in seen if name.startswith("lora_")} == {torch.float32}
    assert {kind for name, kind in seen if not name.startswith("lora_")} == {torch.bfloat16}


def test_sampling_in_bfloat16(half, tmp_path):
    pairs = {
        dtype: sample(str(half), tmp_path / dtype / "p.jsonl", dtype=dtype)
        for dtype in ("float32", "bfloat16")
    }
    assert (
        all(pair["rejected"] for pair in pairs["bfloat16"])
        and pairs["bfloat16"] != pairs["float32"]
    )
