"""Where the rule is plain causal attention no mask is built: the same numbers, by the kernel that needs none."""

import random
from dataclasses import replace

import pytest
import torch
from helpers import IMAGE, random_case, random_ids, worst
from test_masks import random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from minialign.generate import Sampling, generate
from minialign.masks import PADDING, Branch, Sequence, build_tree, dense_mask

SEEDS = range(8)


def chains(seed: int):
    """(model, rows of which each is a trunk, or a trunk and one branch at its end, features)."""
    model, batch, features = random_case(seed)
    rng = random.Random(seed)
    rows = [replace(row, branches=rng.choice([[], [Branch([])], [Branch(random_ids(rng, 5))]])) for row in batch]
    return model, rows, features


@pytest.mark.parametrize("drop_hidden", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_a_tree_is_causal_where_the_rule_is(seed, drop_hidden):
    """Row by row, each on its own and all together, whatever branches and hidden tokens they have."""
    batch = random_batch(seed)
    for rows in ([row] for row in batch), [batch]:
        for each in rows:
            tree = build_tree(each, IMAGE, 0, drop_hidden)
            real = tree.branch != PADDING
            plain = torch.ones(tree.ids.shape[1], tree.ids.shape[1]).tril().bool().expand(len(each), -1, -1)
            assert tree.causal == torch.equal(dense_mask(tree, tree)[:, 0][real], plain[real])


@pytest.mark.parametrize("seed", SEEDS)
def test_both_paths_give_the_same(seed, carriers):
    model, rows, features = chains(seed)
    tree = build_tree(rows, IMAGE, 0)
    assert tree.causal and tree.to("cpu").causal and (tree.branch == PADDING).any()
    found, real = model(tree, features), tree.branch != PADDING
    expected = model(replace(tree, causal=False), features)
    assert carriers == ["causal"] * 2 + ["dense"] * 2  # layers
    assert worst(found[real], expected[real]) < 1e-5
    assert found.isfinite().all()  # padding, too


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_pass_of_sampling(seed, carriers):
    """A prompt needs no mask, not even with most of its picture left out; what is sampled does."""
    model, rows, features = chains(seed)
    seen = torch.arange(model.config.vision.patches) % (seed + 1) == 0
    rows = [
        replace(row, branches=[Branch([]), Branch([])], image_visible=seen if row.image_tokens else None)
        for row in rows
    ]
    for each, first in ((rows, "causal"), ([*rows, Sequence([5, 6, 7], [Branch([8], 2)])], "dense")):
        carriers.clear()
        generate(model, each, features, Sampling(4, temperature=0.0), stop_ids=set())
        assert carriers == [first] * 2 + ["dense"] * 2 * 3


def test_what_grows_is_not_causal():
    tree = build_tree([Sequence([5, 6, 7])], IMAGE, 0)
    assert tree.causal and not tree.append(tree).causal


class Nothing(TorchDispatchMode):
    """No tensor may be computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(func)


def test_nothing_is_computed_to_know():
    """What is on the device need not be waited for; a mask is built once."""
    causal, forked = (build_tree([Sequence([5, 6], [Branch([7])] * count)], IMAGE, 0) for count in (1, 2))
    with Nothing():
        assert causal.mask is None
    first = forked.mask
    with Nothing():
        assert forked.mask is first
