"""PPO: GAE by hand and by its definition, clipping by hand, REINFORCE's direction, and the optimum
of Eq. 2.
"""

import math

import pytest
import torch
from bandit import Bandit, decaying_adam

from minialign.rlhf.losses import gae, policy_loss, ppo_metrics, value_loss
from minialign.rlhf.rewards import Whitening, last_tokens, token_rewards

SEEDS = range(5)


def test_gae_by_hand():
    """gamma = lam = 1/2. First response: delta 1 + 0.5 - 0.5 = 1, then 2 - 1 = 1; A 1 + 1/4, then
    1. Second: 3 - 4.
    """
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 4.0])
    last = torch.tensor([False, True, True])
    assert gae(rewards, values, last, 0.5, 0.5).tolist() == [1.25, 1.0, -1.0]
    # Returns 3, 2, 3 less the values.
    assert gae(rewards, values, last, 1.0, 1.0).tolist() == [2.5, 1.0, -1.0]
    assert gae(rewards, values, last, 1.0, 0.0).tolist() == [1.5, 1.0, -1.0]  # deltas


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_equals_its_definition(seed):
    """A_t = sum over l of (gamma lam)^l delta_t+l, response by response, in O(T^2)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 3 + 5 * seed, (4 + seed,), generator=generator).tolist()
    rewards, values = (torch.randn(sum(lengths), generator=generator) for _ in range(2))
    gamma, lam = (0.3 + 0.7 * torch.rand(2, generator=generator)).tolist()
    last = torch.zeros(sum(lengths), dtype=torch.bool)
    last[torch.tensor(lengths).cumsum(0) - 1] = True
    expected = []
    for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True):
        after = [*v[1:].tolist(), 0.0]
        delta = [float(r[t]) + gamma * after[t] - float(v[t]) for t in range(len(r))]
        for t in range(len(r)):
            expected.append(sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(r))))
    found = gae(rewards, values, last, gamma, lam)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        # -min(q A, clamp(q, 0.8, 1.2) A), slope in log pi: -q A, or 0 where the clamp is the
        # smaller
        (1.0, 3.0, -3.0, -3.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # far enough the right way
        (1.5, -2.0, 3.0, 3.0),  # the wrong way
        (0.5, -2.0, 1.6, 0.0),
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_clipped_policy_loss_by_hand(ratio, advantage, expected, slope):
    """Of two tokens, the other of advantage 0: so half of each."""
    old = torch.tensor([-2.0, -1.0])
    logps = (old + torch.tensor([math.log(ratio), 5.0])).requires_grad_()
    loss = policy_loss(logps, old, torch.tensor([advantage, 0.0]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected / 2, abs=1e-5)
    assert logps.grad.tolist() == pytest.approx([slope / 2, 0.0], abs=1e-5)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "slope"),
    [
        # half of max((V - R)^2, (clipped V - R)^2) at clip 0.2
        (1.1, 1.0, 2.0, 0.405, -0.9),
        (1.5, 1.0, 2.0, 0.32, 0.0),  # too far towards the target: the error is that of 1.2
        (0.5, 1.0, 2.0, 1.125, -1.5),  # away from it: the error is its own
        (2.5, 1.0, 0.0, 3.125, 2.5),
    ],
)
def test_clipped_value_loss_by_hand(value, old, target, expected, slope):
    values = torch.tensor([value, 7.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([old, 7.0]), torch.tensor([target, 7.0]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected / 2, abs=1e-5)
    assert values.grad.tolist() == pytest.approx([slope / 2, 0.0], abs=1e-5)


def test_metrics_by_hand():
    got = ppo_metrics(torch.log(torch.tensor([1.0, 1.1, 1.15, 0.5])), torch.zeros(4), 0.2)
    kl = sum(math.log(q) ** 2 for q in (1.1, 1.15, 0.5)) / 8
    assert got == {"policy/clipfrac_avg": 0.25, "policy/approxkl_avg": pytest.approx(kl, abs=1e-6)}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_update_has_the_direction_of_reinforce(seed):
    """lam = gamma = 1, one epoch: grad log pi_t (return from t on less V_t), summed token by token,
    same baseline.
    """
    bandit, generator = Bandit(2 + seed % 3, 3, seed), torch.Generator().manual_seed(seed)
    policy = torch.randn(bandit.reference.shape, generator=generator, requires_grad=True)
    drawn = bandit.draw(policy, 5, 3, generator)
    row, branch, prefix, token = bandit.tokens(drawn)
    logps = policy.log_softmax(-1)[prefix, token]
    ref_logps = bandit.reference.log_softmax(-1)[prefix, token]
    baseline = torch.randn(len(policy), generator=generator)
    rewards = token_rewards(bandit.scores[drawn], row, branch, logps, ref_logps, bandit.beta)
    advantages = gae(rewards, baseline[prefix], last_tokens(row, branch), 1.0, 1.0)
    (ours,) = torch.autograd.grad(policy_loss(logps, logps.detach(), advantages, 0.2), policy)

    loss = 0.0
    for number in drawn.flatten().tolist():
        steps = [step for step in bandit.steps[number].tolist() if step[0] >= 0]
        own = [policy.log_softmax(-1)[p, t] for p, t in steps]
        other = [bandit.reference.log_softmax(-1)[p, t] for p, t in steps]
        for t, (before, _) in enumerate(steps):
            kl = sum(a.item() - b.item() for a, b in zip(own[t:], other[t:], strict=True))
            loss = loss - own[t] * (bandit.scores[number] - bandit.beta * kl - baseline[before])
    (reinforce,) = torch.autograd.grad(loss, policy)
    assert torch.cosine_similarity(ours.flatten(), reinforce.flatten(), dim=0) > 0.999
    # Ours is a mean over tokens.
    torch.testing.assert_close(ours * len(token), reinforce, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("vocab", "longest"), [(2, 1), (2, 3), (3, 2)])
def test_ppo_reaches_the_optimum_of_eq_2(vocab, longest, seed, whiten):
    """Two updates per rollout, values learned beside the policy; whitened advantages move no
    optimum.
    """
    bandit, generator = Bandit(vocab, longest, seed), torch.Generator().manual_seed(seed)
    policy = bandit.reference.clone().requires_grad_()
    table = torch.zeros(len(policy), requires_grad=True)  # the value head starts at zero
    optimizer, schedule = decaying_adam([policy, table], 0.05, 250)
    for _ in range(250):
        drawn = bandit.draw(policy, 128, 2, generator)
        row, branch, prefix, token = bandit.tokens(drawn)
        old = policy.detach().log_softmax(-1)[prefix, token]
        ref = bandit.reference.log_softmax(-1)[prefix, token]
        values = table.detach()[prefix]
        rewards = token_rewards(bandit.scores[drawn], row, branch, old, ref, bandit.beta)
        advantages = gae(rewards, values, last_tokens(row, branch), 1.0, 0.95)
        returns = advantages + values
        if whiten:
            advantages = Whitening.of(advantages)(advantages)
        for _ in range(2):
            optimizer.zero_grad()
            loss = policy_loss(policy.log_softmax(-1)[prefix, token], old, advantages, 0.2)
            (loss + value_loss(table[prefix], values, returns, 0.2)).backward()
            optimizer.step()
        schedule.step()
    assert bandit.distance(policy) < 1e-2
