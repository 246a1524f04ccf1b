"""Eq. 1, whitening and the rewards of Eq. 2: values by hand, and the order of a token tree's
tokens.
"""

import math
import random

import pytest
import torch
from helpers import IMAGE, random_ids, random_model, worst

from minialign.align.logps import branch_logps, summed, token_logps
from minialign.align.losses import dpo_loss
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.rlhf.rewards import (
    Whitening,
    last_tokens,
    reward_loss,
    sequence_rewards,
    token_rewards,
)

SEEDS = range(5)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected", "slope"),
    [
        # -log sigmoid(r+ - r-), slope in r+ -sigmoid(r- - r+)
        (1.5, 1.5, math.log(2), -0.5),
        (math.log(3), 0.0, math.log(4 / 3), -0.25),
        (-math.log(3), 0.0, math.log(4), -0.75),
        (-600.0, 400.0, 1000.0, -1.0),  # no overflow
    ],
)
def test_eq_1_by_hand(chosen, rejected, expected, slope):
    two = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected)]
    loss = reward_loss(*two)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert [value.grad.item() for value in two] == pytest.approx([slope, -slope], abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_eq_3_is_eq_1_of_the_implicit_reward(seed):
    policy, ref = torch.randn(2, 2, 7, 1, generator=torch.Generator().manual_seed(seed))
    beta = 0.1 + seed
    chosen, rejected = beta * (policy - ref)
    expected = dpo_loss(policy[0], policy[1], ref[0], ref[1], beta)
    torch.testing.assert_close(reward_loss(chosen, rejected), expected)


def test_whitening_by_hand():
    """Mean 4, deviations -3 -1 1 3, mean square 5; and other values by the same numbers."""
    whitening = Whitening.of(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    assert whitening == Whitening(4.0, pytest.approx(math.sqrt(5)))
    got = whitening(torch.tensor([4.0, 4.0 + 2 * math.sqrt(5)]))
    assert got.tolist() == pytest.approx([0.0, 2.0])
    same = torch.full((3,), 0.7)
    assert Whitening.of(same)(same).abs().max() == 0  # nothing to learn


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_whitened_has_mean_0_and_deviation_1(seed):
    generator = torch.Generator().manual_seed(seed)
    # A mean far from 0 costs no precision.
    values = 1000 + 0.5 * torch.randn(100 + 37 * seed, generator=generator)
    got = Whitening.of(values)(values)
    assert abs(got.mean()) < 1e-3 and abs((got**2).mean() - 1) < 1e-3
    assert torch.equal(got.argsort(), values.argsort())


@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_of_a_tree(seed):
    """Per token they add up to those per response; without the KL only the last token, the branch's
    tip, has any.
    """
    rng, model, batch = random.Random(seed), random_model(seed), []
    for _ in range(3):
        prompt, count = random_ids(rng, 3), 1 + rng.randrange(4)
        branches = [Branch(random_ids(rng, 1 + rng.randrange(5))) for _ in range(count)]
        batch.append(Sequence(prompt, branches))
    tree = build_tree(batch, IMAGE, pad_id=0)
    row, branch, logps = token_logps(model, tree, None)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tree.tip.shape, generator=generator)
    ref = torch.randn(logps.shape, generator=generator)
    last = last_tokens(row, branch)
    column = (tree.branch > 0).nonzero(as_tuple=True)[1]
    assert torch.equal(last, column == tree.tip[row, branch])
    assert last.sum() == sum(len(sequence.branches) for sequence in batch)
    beta = rng.uniform(0.1, 2)

    per_token = token_rewards(scores, row, branch, logps, ref, beta)
    sums = branch_logps(model, tree, None), summed(tree, row, branch, ref)
    per_response = sequence_rewards(scores, *sums, beta)
    there = tree.tip >= 0
    assert worst(summed(tree, row, branch, per_token)[there], per_response[there]) < 1e-4
    assert worst(per_token[~last], (beta * (ref - logps))[~last]) < 1e-6
    without = token_rewards(scores, row, branch, logps, logps, beta)
    assert torch.equal(without, torch.where(last, scores[row, branch], 0))
    assert logps.requires_grad and not per_token.requires_grad and not per_response.requires_grad


def test_rewards_by_hand():
    """A response of two tokens and one of a single token: (pi / ref) of 2, 1/4 and 8,
    beta 1 / ln 2.
    """
    row, branch = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
    ref = torch.tensor([-3.0, -1.0, -5.0])
    logps = ref + math.log(2) * torch.tensor([1.0, -2.0, 3.0])
    scores = torch.tensor([[10.0, 20.0]])
    got = token_rewards(scores, row, branch, logps, ref, 1 / math.log(2))
    assert got.tolist() == pytest.approx([-1.0, 12.0, 17.0], abs=1e-5)
    sums = [torch.tensor([[each[:2].sum(), each[2]]]) for each in (logps, ref)]
    per_response = sequence_rewards(scores, *sums, 1 / math.log(2))
    assert per_response[0].tolist() == pytest.approx([11.0, 17.0], abs=1e-5)
