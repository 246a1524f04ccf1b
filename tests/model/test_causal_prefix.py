"""The carrier of the rule: a causal prefix without a mask, and the dense rule for the columns
behind it. The same numbers as under the whole rule, gradients too.
"""

import random
from dataclasses import replace

import pytest
import torch
from helpers import IMAGE, random_case, random_ids, toy_features, toy_model, worst
from torch.utils._python_dispatch import TorchDispatchMode
from trees import random_sequences, toy_rows, toy_tree

from minialign.model.llava import Llava
from minialign.model.masks import PADDING, Branch, Sequence, TokenTree, build_tree, dense_mask
from minialign.sampling.generate import Sampling, generate

SEEDS = range(8)
LAYERS = 2  # of the random models


def under_the_whole_rule(tree: TokenTree) -> TokenTree:
    """The same tree without a prefix: the T x T rule for all of its columns."""
    return replace(tree, prefix=0)


def chains(seed: int):
    """(model, rows of which each is a trunk, or a trunk and one branch at its end, features)."""
    model, batch, features = random_case(seed)
    rng = random.Random(seed)
    ends = [[], [Branch([])], [Branch(random_ids(rng, 5))]]
    return model, [replace(row, branches=rng.choice(ends)) for row in batch], features


@pytest.mark.parametrize("drop_hidden", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_the_prefix_is_as_long_as_the_rule_is_causal(seed, drop_hidden):
    """Row by row, each on its own and all together, whatever branches and hidden tokens they have:
    up to the prefix the rule is plain causal, and in the column behind it for some row not.
    """
    batch = random_sequences(seed)
    for rows in [[row] for row in batch] + [batch]:
        tree = build_tree(rows, IMAGE, 0, drop_hidden)
        width = tree.ids.shape[1]
        plain = torch.ones(width, width).tril().bool().expand(len(rows), -1, -1)
        # A column counts with its row of the rule and with its column of it, as a key.
        rule, real = dense_mask(tree, tree)[:, 0], tree.branch != PADDING
        same = (rule == plain) | ~real[:, :, None]
        agrees = [bool(same[:, : n + 1, : n + 1].all()) for n in range(width)]
        hidden = ((~tree.visible) & real).any(0).tolist()
        expected = 0
        while expected < width and agrees[expected] and not hidden[expected]:
            expected += 1
        assert tree.prefix == expected
        assert (tree.mask is None) == (tree.prefix == width)
        if tree.mask is not None:
            assert torch.equal(tree.mask[:, 0], rule[:, tree.prefix :])


@pytest.mark.parametrize("drop_hidden", [True, False])
@pytest.mark.parametrize("seed", range(24))
def test_the_same_hidden_states_and_gradients(seed, drop_hidden, carriers):
    """Random trees on random models with grouped heads, against one T x T mask."""
    model, batch, features = random_case(seed)
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(model.config.vision.patches, generator=generator) < 0.7
    hide = [seed % 2 == 0 and row.image_tokens > 0 and i == 0 for i, row in enumerate(batch)]
    batch = [
        replace(row, image_visible=seen, branches=row.branches[:1]) if hidden else row
        for row, hidden in zip(batch, hide, strict=True)
    ]
    tree = build_tree(batch, IMAGE, 0, drop_hidden)
    real = tree.branch != PADDING
    found, found_gradients = states_and_gradients(model, tree, features, real)
    assert {kind for kind, _ in carriers} <= {"prefix", "rest"}
    carriers.clear()
    expected, gradients = states_and_gradients(model, under_the_whole_rule(tree), features, real)
    assert {kind for kind, _ in carriers} == {"rest"}
    assert worst(found, expected) < 1e-5
    for a, b in zip(found_gradients, gradients, strict=True):
        assert worst(a, b) <= 1e-5 * max(1.0, b.abs().max().item())


def states_and_gradients(model: Llava, tree: TokenTree, features, real):
    """Hidden states of all tokens but padding, and the gradients of their weighted sum."""
    hidden = model(tree, features)[real]
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    trained = [p for name, p in model.named_parameters() if "language_model" in name]
    gradients = torch.autograd.grad((hidden * weights).sum(), trained)
    return hidden.detach(), gradients


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_on_trained_weights(seed, masked):
    """Pairs about real scenes, prompts of unlike lengths, patches hidden and dropped or not."""
    rows, features = toy_rows(seed, 4)
    patches, model = features.shape[1], toy_model()
    tree = toy_tree(
        [
            Sequence(
                prompt, [Branch(chosen), Branch(rejected)], patches, visible if masked else None
            )
            for prompt, chosen, rejected, visible in rows
        ]
    )
    assert 0 < tree.prefix < tree.ids.shape[1]
    real = tree.branch != PADDING
    expected = model(under_the_whole_rule(tree), features)[real]
    assert worst(model(tree, features)[real], expected) < 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tree_without_branches_needs_no_mask(seed, carriers):
    model, rows, features = chains(seed)
    tree = build_tree(rows, IMAGE, 0)
    width = tree.ids.shape[1]
    assert tree.prefix == tree.to("cpu").prefix == width and (tree.branch == PADDING).any()
    found, real = model(tree, features), tree.branch != PADDING
    assert carriers == [("prefix", width)] * LAYERS
    expected = model(under_the_whole_rule(tree), features)
    assert worst(found[real], expected[real]) < 1e-5
    assert found.isfinite().all()  # padding, too


def test_a_pair_has_a_mask_for_its_rejected_response_alone(carriers):
    """The first branch follows the trunk as any text does: behind it begins the rest."""
    model, features = toy_model(), toy_features((0,))
    prompt, patches = [1, model.config.image_token_id, 7, 8], features.shape[1]
    branches = [Branch([9, 10, 11]), Branch([12, 13])]
    tree = toy_tree([Sequence(prompt, branches, patches)])
    model(tree, features)
    layers, group = 3, 2  # the toy's: 4 heads to 2 of keys
    assert tree.prefix == len(prompt) - 1 + patches + 3
    assert carriers == [("rest", group * 2), ("prefix", tree.prefix)] * layers


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_pass_of_sampling(seed, carriers):
    """A prompt needs no mask, not even with most of its picture left out; what is sampled does."""
    model, rows, features = chains(seed)
    seen = torch.arange(model.config.vision.patches) % (seed + 1) == 0
    two = [Branch([]), Branch([])]
    rows = [
        replace(row, branches=two, image_visible=seen if row.image_tokens else None) for row in rows
    ]
    for each, first in (
        (rows, ["prefix"] * LAYERS),
        ([*rows, Sequence([5, 6, 7], [Branch([8], 2)])], ["rest", "prefix"] * LAYERS),
    ):
        carriers.clear()
        generate(model, each, features, Sampling(4, temperature=0.0), stop_ids=set())
        assert [kind for kind, _ in carriers] == first + ["rest"] * LAYERS * 3


class Nothing(TorchDispatchMode):
    """No tensor may be computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(func)


def test_nothing_is_computed_to_know():
    """What is on the device need not be waited for; a mask is built once."""
    trunk = [5, 6]
    causal = build_tree([Sequence(trunk, [Branch([7])])], IMAGE, 0)
    forked = build_tree([Sequence(trunk, [Branch([7])] * 2)], IMAGE, 0)
    with Nothing():
        assert causal.mask is None
    first = forked.mask
    with Nothing():
        assert forked.mask is first
