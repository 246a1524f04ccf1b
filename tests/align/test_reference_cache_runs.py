"""train_dpo.py --ref-cache: the same training, without the reference's forward passes where its
values are known.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import random_toy, refused, worst
from input_files import pair
from safetensors.torch import load_file, save_file
from script_runs import contents, read_lines, stop_at, train

from minialign.edge import CHECKPOINT
from minialign.model import lora
from minialign.model.hf_folder import fingerprint
from minialign.model.llama import Llama
from minialign.model.peft_folder import save_adapter

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, bool]]:
    """Rows of each of the decoder's passes, and whether it is the policy's."""
    seen, real = [], Llama.forward

    def decoder(self, embeddings, *args, **options):
        seen.append((len(embeddings), torch.is_grad_enabled()))
        return real(self, embeddings, *args, **options)

    monkeypatch.setattr(Llama, "forward", decoder)
    return seen


@pytest.fixture(scope="module")
def cached(model, pairs, tmp_path_factory) -> Path:
    """A run's folder like `undisturbed`, with a cache in it; not to be changed."""
    out = tmp_path_factory.mktemp("cached")
    train(model, out, pairs=pairs, epochs=2, lr=3e-3, ref_cache=str(out / "cache"))
    return out


@pytest.fixture
def cache(cached, tmp_path) -> str:
    """A copy of its cache."""
    return str(shutil.copytree(cached / "cache", tmp_path / "cache"))


def assert_alike(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    """The same figures at every step and the same adapter, but for the last bits."""
    for row, other in zip(*(read_lines(out / "metrics.jsonl") for out in (a, b)), strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)
    weights, others = (load_file(out / ADAPTER) for out in (a, b))
    assert max(worst(weights[name], others[name]) for name in weights) < tolerance


def test_a_second_epoch_asks_the_reference_nothing(
    model, pairs, cached, undisturbed, tmp_path, passes
):
    options = {"epochs": 2, "lr": 3e-3, "ref_cache": str(tmp_path / "cache")}
    train(model, tmp_path / "out", pairs=pairs, **options)
    first = [(n, grad) for n in (4, 4, 4, 2) for grad in (False, True)]
    assert passes == first + [(n, True) for n in (4, 4, 4, 2)]
    rows, plain = (read_lines(out / "metrics.jsonl") for out in (cached, undisturbed))
    assert rows[:4] == plain[:4]  # to the last bit
    assert_alike(cached, undisturbed)
    (path,) = (cached / "cache").glob("*.jsonl")
    assert len(read_lines(path)) == 14


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "ipo", "beta": 0.5},
        {"loss": "slic", "lr": 1e-4, "clip": 0.5},
        {"loss": "sft", "epochs": 2},
        {"seed": 5, "batch_size": 6, "accumulate": 3},
        {"lora_rank": 2, "lora_alpha": 3.0, "projector_lr": 0.0},
        {"workers": 2, "limit": 9, "truncate": True},
    ],
    ids=str,
)
def test_a_second_run_asks_the_reference_nothing(
    model, pairs, cache, tmp_path, passes, changes, capsys
):
    before = contents(Path(cache))
    train(model, tmp_path / "a", pairs=pairs, ref_cache=cache, **changes)
    assert passes and all(grad for _, grad in passes) and contents(Path(cache)) == before
    assert f"{cache}: has the reference's log-probs of 14 pairs" in capsys.readouterr().out
    train(model, tmp_path / "b", pairs=pairs, **changes)
    assert_alike(tmp_path / "a", tmp_path / "b")


def base_with_another_weight(model: str, folder: Path) -> str:
    """One value in the middle of the file, by its last bits: what `fingerprint` does not read."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name].view(-1)[tensors[name].numel() // 2] *= 1.000001
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert fingerprint(folder) == fingerprint(Path(model))
    return str(folder)


def some_adapter(folder: Path) -> str:
    """Whose policy says something else than the base."""
    adapted = copy.deepcopy(random_toy(1))
    lora.add_adapters(adapted, 2, 4.0)
    for parameter in lora.adapter_state(adapted).values():
        parameter.data += 0.01
    save_adapter(lora.adapter_state(adapted), 2, 4.0, str(CHECKPOINT), folder)
    return str(folder)


@pytest.mark.parametrize("what", ["weight", "template", "dtype", "adapter"])
def test_another_reference_or_text_finds_nothing(model, pairs, cache, tmp_path, passes, what):
    if what == "weight":
        model, changes = base_with_another_weight(model, tmp_path / "model"), {}
    elif what == "adapter":
        changes = {"adapter": some_adapter(tmp_path / "start"), "reference": "adapter"}
    else:
        changes = {"template": {"template": "vicuna_v1"}, "dtype": {"dtype": "bfloat16"}}[what]
    train(model, tmp_path / "out", pairs=pairs, limit=4, ref_cache=cache, **changes)
    assert passes == [(4, False), (4, True)]
    train(model, tmp_path / "again", pairs=pairs, limit=4, ref_cache=cache, **changes)
    assert passes == [(4, False), (4, True), (4, True)]


def test_a_policy_from_an_adapter_has_the_bases_cache(model, pairs, cache, tmp_path, passes):
    changes = {"adapter": some_adapter(tmp_path / "start"), "reference": "base"}
    train(model, tmp_path / "a", pairs=pairs, ref_cache=cache, **changes)
    assert passes == [(n, True) for n in (4, 4, 4, 2)]
    train(model, tmp_path / "b", pairs=pairs, **changes)
    assert_alike(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("where", "count", "save_every"), [("preference_metrics", 3, 2), ("append_lines", 6, 50)]
)
def test_a_stopped_run_resumes_bit_for_bit(
    cached, model, pairs, tmp_path, monkeypatch, where, count, save_every
):
    """Steps that are done again take what the first time has kept; the cache may also be left out,
    or be another.
    """
    options = {"pairs": pairs, "epochs": 2, "lr": 3e-3, "save_every": save_every}
    with monkeypatch.context() as patch:
        stop_at(patch, where, count)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "out", ref_cache=str(tmp_path / "cache"), **options)
    shutil.copytree(tmp_path / "out", tmp_path / "without")
    train(model, tmp_path / "out", resume=True, ref_cache=str(tmp_path / "cache"), **options)
    for name in ("metrics.jsonl", "checkpoint/progress.safetensors", ADAPTER):
        assert (tmp_path / "out" / name).read_bytes() == (cached / name).read_bytes()
    files = list((tmp_path / "cache").glob("*.jsonl"))
    assert sorted(len(read_lines(path)) for path in files) == {3: [2, 12], 6: [14]}[count]
    train(model, tmp_path / "without", resume=True, **options)
    assert_alike(tmp_path / "without", cached)


def test_bad_pairs_on_the_way(model, tmp_path, passes):
    """Pairs that are skipped leave the others their own values."""
    good = [pair(i, chosen="A cup." * (1 + i % 3)) for i in range(9)]
    lines = [json.dumps(raw) for raw in good]
    lines[2:2], lines[6:6] = ["{"], [json.dumps(pair(77, images=["none"]))]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    options = {"pairs": str(path), "skip_bad_records": True, "accumulate": 2, "epochs": 2}
    train(model, tmp_path / "a", ref_cache=str(tmp_path / "cache"), **options)
    assert sum(rows for rows, grad in passes if not grad) == 9
    train(model, tmp_path / "b", **options)
    assert_alike(tmp_path / "a", tmp_path / "b")


def test_both_kinds_of_rejected_responses(model, tmp_path, passes):
    """Eq. 5 has three branches; those of two runs that differ in --gamma are the same."""
    path = tmp_path / "pairs.jsonl"
    raws = [pair(i, external="A green tree." + " It is large." * (i % 2)) for i in range(6)]
    path.write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    for number, gamma in enumerate((0.5, 0.2)):
        options = {"pairs": str(path), "rejected": "both", "gamma": gamma}
        train(model, tmp_path / f"a{number}", ref_cache=str(tmp_path / "cache"), **options)
        assert sum(rows for rows, grad in passes if not grad) == 6
    train(model, tmp_path / "b", **options)
    assert_alike(tmp_path / "a1", tmp_path / "b")


def test_what_is_refused_in_one_line(model, pairs, tmp_path, cache):
    """Before anything is written: an earlier run's files are still there."""
    train(model, tmp_path / "out", pairs=pairs, limit=4)
    before = contents(tmp_path / "out")

    def run(**changes):
        train(model, tmp_path / "out", pairs=pairs, limit=4, **({"ref_cache": cache} | changes))

    message = "--ref-cache with --rejected distorted: these responses are made anew"
    refused(lambda: run(rejected="distorted"), message)
    refused(lambda: run(ref_cache=pairs), f"--ref-cache {pairs}: is --pairs")
    (path,) = Path(cache).glob("*.jsonl")
    path.write_bytes(b"{\n" + path.read_bytes())
    refused(run, f"{path}: a line is damaged; delete the file")
    assert contents(tmp_path / "out") == before
    path.unlink()
    run(rejected="distorted", gamma=1.0)  # which trains on the stored ones alone
