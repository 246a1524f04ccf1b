"""The formulas of memory against what is there: autograd's tensors, weights, shards, a process's
peak."""

import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import IMAGE, random_ids, random_model
from policies import wrap_layers
from torchruns import run

from minialign.align import logps
from minialign.align.logps import branch_logps
from minialign.model.llama import KVCache
from minialign.model.lora import add_adapters
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.training.optimizer import make_optimizer
from tests.bench import memory
from tests.bench.timing import peak_bytes

ROOT = Path(__file__).resolve().parents[2]
TYPES = [torch.float32, torch.bfloat16]


def trained_model(seed: int, dtype: torch.dtype, rank: int = 3, vocab: int = 50):
    """A random model with adapters, its frozen weights of that type."""
    model = copy.deepcopy(random_model(seed, vocab)).to(dtype)
    add_adapters(model, rank, 2.0 * rank)
    return model


def rows_of(rng: random.Random, branches: int, low: int = 1, high: int = 30) -> list[Sequence]:
    """One to three rows on a picture of 9 patches each."""
    rows = []
    for _ in range(rng.randrange(1, 4)):
        before = random_ids(rng, rng.randrange(low, high))
        trunk = [*before, IMAGE, *random_ids(rng, rng.randrange(low, high))]
        responses = [Branch(random_ids(rng, rng.randrange(low, high))) for _ in range(branches)]
        rows.append(Sequence(trunk, responses, 9))
    return rows


def case(seed: int, dtype: torch.dtype, branches: int = 2, **lengths) -> tuple:
    """(model, tree, the tower's features) of a seed."""
    rng = random.Random(seed)
    model, rows = trained_model(seed, dtype, rng.randrange(1, 6)), rows_of(rng, branches, **lengths)
    generator = torch.Generator().manual_seed(seed)
    features = model.encode_images(torch.randn(len(rows), 3, 12, 12, generator=generator))
    return model, build_tree(rows, IMAGE, 0), features


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_what_autograd_keeps(monkeypatch, seed, branches, dtype):
    """To the byte, padding and chunks of the logits included; one branch is plain causal and has no
    dense mask."""
    monkeypatch.setattr(logps, "CHUNK", 5)
    model, tree, features = case(10 * seed + branches, dtype, branches)
    kept = memory.saved_bytes(model, lambda: branch_logps(model, tree, features))
    dense = 0 if branches == 1 else memory.dense_mask_bytes(model, tree)
    assert (tree.mask is None) == (branches == 1)
    assert kept == memory.activation_bytes(model, tree) + dense


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_what_autograd_keeps_with_recompute(seed, dtype):
    """The layers' inputs, and the mask once; the layer whose turn it is comes in the backward pass.

    The rotary tables are held without autograd's knowing.
    """
    model, tree, features = case(seed, dtype)
    wrap_layers(model, recompute=True, compile=False)
    kept = memory.saved_bytes(model, lambda: branch_logps(model, tree, features))
    turn = memory.kept_of_layer(model, tree)
    rotary = 2 * tree.ids.numel() * model.config.text.head_dim * dtype.itemsize
    mask = memory.dense_mask_bytes(model, tree)
    assert kept == memory.activation_bytes(model, tree, recompute=True) - turn - rotary + mask


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_peak_of_forward_and_backward(seed, recompute, dtype):
    """Of torch's allocator, for one branch each, as a GPU has no dense mask: at most the formula,
    and near to it."""
    model, tree, features = case(seed, dtype, branches=1, low=150, high=200)
    wrap_layers(model, recompute, compile=False)

    def step() -> None:
        branch_logps(model, tree, features).sum().backward()

    step()  # the gradients are there from now on
    formula = memory.activation_bytes(model, tree, recompute) + memory.workspace_bytes(model, tree)
    assert 0.5 * formula < peak_bytes(step, "cpu") <= formula


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_as_tall_as_the_sequence_and_as_wide_as_vocabulary_or_sequence(
    monkeypatch, seed
):
    """Forward and backward, the mask left out; what is kept grows by as much with every token."""
    monkeypatch.setattr(logps, "CHUNK", 8)
    model, kept = trained_model(seed, torch.float32, vocab=1500), {}
    features = model.encode_images(torch.randn(1, 3, 12, 12))
    for count in (120, 180, 300):
        row = Sequence([IMAGE] + [7] * 5, [Branch([8] * count), Branch([9] * count)], 9)
        tree = build_tree([row], IMAGE, 0)
        width, scored = tree.ids.shape[1], 2 * count
        work = memory.saved_bytes(model, lambda tree=tree: branch_logps(model, tree, features))
        kept[scored] = work - memory.dense_mask_bytes(model, tree)
        with memory.LargestTensor() as largest:
            branch_logps(model, tree, features).sum().backward()
        mask = memory.dense_mask_bytes(model, tree)
        tall = 4 * min(width**2, scored * 1500)
        assert largest.bytes < tall or largest.bytes == mask, largest.shape
    (a, x), (b, y), (c, z) = kept.items()
    assert (y - x) * (c - b) == (z - y) * (b - a) > 0


# ---------------------------------------------------------------- weights and what else stays


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_weights_and_optimizer(seed, dtype):
    """The model without data has the bytes of the real one; gradients and moments are those of the
    formula."""
    model, tree, features = case(seed, dtype)
    rank = len(model.language_model.layers[0].mlp.up_proj.lora_A)
    shapes = memory.meta_model(model.config, dtype, rank)
    optimizer = make_optimizer(model, 1e-3, 1e-3)
    branch_logps(model, tree, features).sum().backward()
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.requires_grad)
    assert memory.trained_bytes(shapes) == trained == gradients
    assert memory.frozen_bytes(shapes) == weights - trained

    optimizer.step()
    state = [t for moments in optimizer.state.values() for t in moments.values() if t.dim() > 0]
    parts = memory.peak_parts(shapes, tree, 1, False)
    assert parts["gradients and moments"] == gradients + sum(t.nbytes for t in state)
    assert parts["weights"] == weights and parts["gathered"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_keys_and_values(seed):
    rng, model = random.Random(seed), random_model(seed)
    batch, capacity = rng.randrange(1, 5), rng.randrange(1, 99)
    for dtype in TYPES:
        cache = KVCache(model.config.text, batch, capacity, torch.zeros(1, dtype=dtype))
        formula = memory.kv_cache_bytes(model.config.text, batch, capacity, dtype.itemsize)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        assert formula == sum(tensor.nbytes for tensor in tensors)


SHARDS = """
import copy, sys, torch
sys.path[:0] = [{root!r}, {support!r}]
from torch.distributed.fsdp import fully_shard
from helpers import random_model
from minialign.model.lora import add_adapters
from minialign.training import parallel
parallel.start("cpu")
for seed, dtype in ((0, torch.float32), (1, torch.bfloat16)):
    model = copy.deepcopy(random_model(seed, 51)).to(dtype)
    add_adapters(model, 3, 6.0)
    mesh = parallel.mesh("cpu")
    for unit in (*model.language_model.layers, model.vision_tower, model):
        fully_shard(unit, mesh=mesh)
    for trained in (False, True):
        print(sum(p.to_local().nbytes for p in model.parameters() if p.requires_grad == trained))
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_shards(tmp_path, processes):
    """Of the first process, which has the most where rows do not go round: to the byte."""
    script = tmp_path / "shards.py"
    script.write_text(SHARDS.format(root=str(ROOT), support=str(ROOT / "tests/support")))
    found = [int(line) for line in run(processes, str(script), "").stdout.split()]
    models = [trained_model(0, torch.float32, vocab=51), trained_model(1, torch.bfloat16, vocab=51)]
    counts = (memory.frozen_bytes, memory.trained_bytes)
    assert found == [count(model, processes) for model in models for count in counts]


# ---------------------------------------------------------------- a process

RSS = """
import sys, torch
sys.path[:0] = [{root!r}]
from minialign.align.logps import branch_logps
from minialign.model.clip import ClipConfig
from minialign.model.llama import LlamaConfig
from minialign.model.llava import Llava, LlavaConfig
from minialign.model.lora import add_adapters
from minialign.model.masks import Branch, Sequence, build_tree
from tests.bench import memory
torch.set_num_threads(1)
def resident(name):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
def step(response):
    tree = build_tree([Sequence([3, 5, 6], [Branch([7] * response)], 9)], 3, 0)
    branch_logps(model, tree, features).sum().backward()
    return tree
text = LlamaConfig(2000, 256, 688, 4, 4, 2, 64)
vision = ClipConfig(16, 24, 3, 2, image_size=12, patch_size=4)
model = Llava(LlavaConfig(text, vision, image_token_id=3))
add_adapters(model, 16, 32.0)
features = model.encode_images(torch.zeros(1, 3, 12, 12))
step(20)  # what comes once: the gradients, the libraries' own
before = resident("VmRSS")
for response in (900, 1800):
    tree = step(response)
    formula = memory.activation_bytes(model, tree) + memory.workspace_bytes(model, tree)
    print(resident("VmHWM") - before, formula)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_of_a_process():
    """Resident memory at its highest in steps of some 90 and 170 MB, against the formula."""
    script = RSS.format(root=str(ROOT))
    # What is freed is given back.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    for peak, formula in (map(int, line.split()) for line in done.stdout.splitlines()):
        print(f"peak {peak / 1e6:.1f} MB, formula {formula / 1e6:.1f} MB")
        assert 0.8 * formula < peak < 1.1 * formula
