"""FlexAttention's blocks and the dense mask carry one rule. There is no GPU here: flex_attention runs as plain code."""

import gc
import random
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import IMAGE, random_case, random_ids, worst
from torch.nn.attention import flex_attention as flex

from minialign import llama, masks
from minialign.generate import Sampling, generate
from minialign.losses import branch_logps
from minialign.masks import PADDING, Branch, Sequence, TokenTree, block_mask, build_tree, dense_mask

SEEDS = range(6)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Nothing is compiled; and what torch's kernel for the CPU cannot do, its plain code can: gradients."""
    for module in (llama, masks):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


def hidden_case(seed: int):
    """(model, rows with hidden image tokens, features): the last token of a picture is seen, so that all may fork."""
    model, batch, features = random_case(seed)
    rng = random.Random(seed)
    seen = [torch.tensor([rng.random() < 0.5 for _ in range(len(features[0]) - 1)] + [True]) for _ in batch]
    rows = [replace(r, image_visible=s) if r.image_tokens else r for r, s in zip(batch, seen, strict=True)]
    return model, rows, features


def long_tree(seed: int, pack: int | None = None) -> TokenTree:
    """Rows of several blocks, with hidden tokens that are kept, padding, and branches that fork anywhere."""
    rng, rows = random.Random(seed), []
    for _ in range(rng.randrange(1, 4)):
        trunk = random_ids(rng, rng.randrange(1, 200)) + [IMAGE] + random_ids(rng, rng.randrange(1, 200))
        forks = [rng.choice([None, 1, rng.randrange(1, len(trunk))]) for _ in range(rng.randrange(4))]
        branches = [Branch(random_ids(rng, rng.randrange(300)), fork) for fork in forks]
        share = rng.choice([0, 0.02, 0.9])
        seen = torch.tensor([rng.random() < share for _ in range(rng.randrange(400))] + [True])
        rows.append(Sequence(trunk, branches, len(seen), seen))
    return build_tree(rows, IMAGE, 0, drop_hidden=False, pack=pack)


@pytest.mark.parametrize("pack", [None, 99])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_decoder_under_blocks_is_the_decoder_under_the_dense_mask(seed, pack):
    """Hidden states and all gradients; GQA in two of three sizes."""
    model, rows, features = hidden_case(seed)
    tree = build_tree(rows, IMAGE, 0, drop_hidden=False, pack=pack)
    assert pack or (tree.branch == PADDING).any()
    assert (len(tree.ids) < len(rows)) == bool(pack) and not tree.visible[tree.branch != PADDING].all()
    results = []
    for mask in (block_mask(tree), dense_mask(tree, tree)):
        embeddings = model.embed(tree, features).detach().requires_grad_()
        hidden = model.language_model(embeddings, tree.positions, mask)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
        wanted = [embeddings, *model.language_model.layers.parameters()]
        results.append([hidden, *torch.autograd.grad((hidden * weights).sum(), wanted)])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 0 and worst(ours, theirs) <= 1e-5 * theirs.abs().max().item()


def listed(count: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, queries, keys) bool of the (B, 1, queries) first `indices` of each row."""
    there = torch.arange(indices.shape[-1]) < count[..., None]
    return torch.zeros(indices.shape).scatter(-1, indices.long(), there.float())[:, 0].bool()


@pytest.mark.parametrize("pack", [None, 3000])
@pytest.mark.parametrize("seed", range(10))
def test_the_blocks_are_those_of_the_dense_mask(seed, pack):
    """Inside its blocks, too; lengths are no multiples of a block's."""
    tree = long_tree(seed, pack)
    blocks, dense, width = block_mask(tree), dense_mask(tree, tree), tree.ids.shape[1]
    rows, columns = torch.arange(len(tree.ids))[:, None, None], torch.arange(width)
    assert torch.equal(blocks.mask_mod(rows, 0, columns[:, None], columns), dense[:, 0])
    size, count = 128, -(-width // 128)
    padded = torch.zeros(len(dense), count * size, count * size, dtype=torch.bool)
    padded[:, :width, :width] = dense[:, 0]
    tiles = padded.unflatten(1, (count, size)).unflatten(3, (count, size))
    some, full = tiles.any(4).any(2), tiles.all(4).all(2)
    assert torch.equal(listed(blocks.kv_num_blocks, blocks.kv_indices), some & ~full)
    assert torch.equal(listed(blocks.full_kv_num_blocks, blocks.full_kv_indices), full)
    assert torch.equal(listed(blocks.q_num_blocks, blocks.q_indices), (some & ~full).mT)  # of the backward pass
    assert torch.equal(listed(blocks.full_q_num_blocks, blocks.full_q_indices), full.mT)


@pytest.mark.parametrize("seed", range(2))
def test_training_takes_blocks_and_sampling_does_not(seed, carriers, monkeypatch):
    model, rows, features = hidden_case(seed)
    expected = branch_logps(model, build_tree(rows, IMAGE, 0), features)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert worst(branch_logps(model, build_tree(rows, IMAGE, 0), features), expected) < 1e-5
    assert carriers == ["dense"] * 2 + ["blocks"] * 2  # layers
    for branches, first in (([Branch([])], "causal"), ([Branch([5], 1), Branch([6], 1)], "dense")):
        carriers.clear()
        forked = [replace(row, branches=branches) for row in rows]
        generate(model, forked, features, Sampling(2, temperature=0.0), stop_ids=set())
        assert carriers == [first] * 2 + ["dense"] * 2
    carriers.clear()
    model(build_tree([replace(row, branches=[]) for row in rows], IMAGE, 0), features)
    assert carriers == ["causal"] * 2


def test_a_tree_and_its_blocks_go_together(monkeypatch):
    """Neither waits for the garbage collector, which does not know how full the GPU is."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    tree = long_tree(0)
    assert isinstance(tree.mask, flex.BlockMask)
    gone = weakref.ref(tree)
    gc.disable()
    try:
        del tree
        assert gone() is None
    finally:
        gc.enable()
