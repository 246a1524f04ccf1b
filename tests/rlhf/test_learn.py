"""RLOO and PPO on a LLaVA: values, advantages and gradients against the plain way, one full
sequence per response."""

import copy
import math
import random
from collections import Counter

import pytest
import torch
from helpers import IMAGE, plain_logits, random_ids, random_model, worst
from minialign.rlhf.learn import Ppo, Rloo
from minialign.rlhf.rollout import Rollout

from minialign.align.logps import both_logps, token_logps
from minialign.model import lora, scalar_head
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.rlhf.rewards import last_tokens
from minialign.training.parallel import gather

SEEDS = range(4)


def policy_of(seed: int, head: bool = True):
    """A random model whose adapters have moved from the reference, with a head that says
    something."""
    model = copy.deepcopy(random_model(seed))
    torch.manual_seed(seed)
    lora.add_adapters(model, 3, 6.0)
    if head:
        scalar_head.set_head(model, torch.randn(1, model.config.text.hidden_size))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.adapter_state(model).items():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def rollout_of(model, seed: int, rows: int = 3, k: int = 3) -> Rollout:
    """k responses of unlike lengths to each of some prompts with a picture, and their scores."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    patches, width = model.config.vision.patches, model.config.vision.hidden_size
    sequences = []
    for _ in range(rows):
        prompt = [
            *random_ids(rng, 1 + rng.randrange(3)),
            IMAGE,
            *random_ids(rng, 1 + rng.randrange(4)),
        ]
        branches = [Branch(random_ids(rng, 1 + rng.randrange(6))) for _ in range(k)]
        sequences.append(Sequence(prompt, branches, patches))
    features = torch.randn(rows, patches, width, generator=generator)
    scores = torch.randn(rows, k, generator=generator)
    return Rollout(
        build_tree(sequences, IMAGE, 0), features, scores, list(range(rows)), rows
    ), sequences


def gradient(model, loss) -> torch.Tensor:
    """Of everything that is trained, as one vector; 0 where there is none."""
    parameters = list(lora.adapter_state(model).values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    both = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in both])


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_learns_the_policy_gradient_of_eq_2(seed):
    """Written out: a response's reward with its KL, less the mean of the others', times its
    log-prob's gradient."""
    model = policy_of(seed, head=False)
    rollout, sequences = rollout_of(model, seed)
    learner, beta = Rloo(model, 0.3, 3), 0.3
    loss, _ = learner.loss(rollout, Counter())
    logps, ref = both_logps(model, rollout.tree, rollout.features)
    rewards = (rollout.scores - beta * (logps - ref)).tolist()
    expected = 0
    for i in range(3):
        for n in range(3):
            others = sum(rewards[i][m] for m in range(3) if m != n) / 2
            expected = expected - (rewards[i][n] - others) * gradient(model, logps[i, n]) / 9
            logps, _ = both_logps(model, rollout.tree, rollout.features)  # the graph anew
    assert worst(gradient(model, loss), expected) < 1e-5 * max(1, expected.abs().max().item())


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_value_is_of_the_state_before_its_token(seed):
    """The head on the hidden state that predicts the token, each response alone and in one
    piece."""
    model = policy_of(seed)
    rollout, sequences = rollout_of(model, seed)
    learner = Ppo(model, 0.1, 3, 1, 0.9, 0.2, 0.2, 0.1)
    row, branch, logps, values = learner.ask(rollout)
    expected = []
    for i, sequence in enumerate(sequences):
        for response in sequence.branches:
            alone = build_tree(
                [Sequence(sequence.trunk + response.ids, [], sequence.image_features)], IMAGE, 0
            )
            hidden = model(alone, rollout.features[i : i + 1])[0]
            before = hidden[-len(response.ids) - 1 : -1]
            expected.append(before @ model.scalar_head.weight[0])
    assert worst(values, torch.cat(expected)) < 1e-5
    assert worst(logps, token_logps(model, rollout.tree, rollout.features)[2]) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_update_of_ppo_is_reinforce(seed):
    """lambda = 1: the return of each token less its value, whitened, times its log-prob's gradient:
    cosine > 0.999.

    The returns by hand from plain logits: the score on the last token, beta log(pi / ref) taken off
    every one."""
    model, beta = policy_of(seed), 0.2
    rollout, sequences = rollout_of(model, seed)
    learner = Ppo(model, beta, 3, 4, 1.0, 0.2, 0.2, value_coef=0.0)
    [look] = learner.look([rollout], Counter())
    loss, found = learner.loss(look, Counter())
    assert (
        found["policy/approxkl_avg"] == found["policy/clipfrac_avg"] == 0
    )  # the ratio is 1 to the last bit
    assert look.count == sum(len(b.ids) for s in sequences for b in s.branches)

    logps, returns = [], []
    for i, sequence in enumerate(sequences):
        for n, response in enumerate(sequence.branches):

            def plain(i=i, sequence=sequence, response=response):
                lines = plain_logits(
                    model, sequence.trunk + response.ids, rollout.features[i]
                ).log_softmax(-1)
                return lines[-len(response.ids) - 1 : -1].gather(
                    1, torch.tensor(response.ids)[:, None]
                )[:, 0]

            own = plain()
            with lora.adapters_off(model):
                ref = plain()
            paid = [-beta * (a - b) for a, b in zip(own.tolist(), ref.tolist(), strict=True)]
            paid[-1] += rollout.scores[i, n].item()
            logps.append(own)
            returns += [sum(paid[t:]) for t in range(len(paid))]
    values = learner.ask(rollout)[3].detach()
    advantages = torch.tensor(returns) - values
    assert worst(look.returns, torch.tensor(returns)) < 1e-4
    white = (advantages - advantages.mean()) / advantages.std(correction=0)
    assert worst(look.advantages, white) < 1e-4
    expected = gradient(model, -(white * torch.cat(logps)).mean())
    ours = gradient(model, loss)
    assert torch.cosine_similarity(ours, expected, dim=0) > 0.999
    assert ours.norm() == pytest.approx(expected.norm().item(), rel=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_head_learns_the_returns(seed):
    """With a policy that stands still the values come near what they should have been."""
    model = policy_of(seed)
    rollout, _ = rollout_of(model, seed)
    learner = Ppo(model, 0.2, 3, 1, 1.0, 0.2, math.inf, 1.0)
    [look] = learner.look([rollout], Counter())
    optimizer = torch.optim.Adam([model.scalar_head.weight], 0.05)
    losses = []
    for _ in range(200):
        losses.append(learner.loss(look, Counter())[1]["loss/value_avg"])
        optimizer.zero_grad()
        learner.loss(look, Counter())[0].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("learner", ["rloo", "ppo"])
def test_parts_of_a_step_add_up_to_the_whole(learner):
    """Advantages are whitened over all parts, and an idle rollout counts for nothing."""
    model = policy_of(1)
    whole, sequences = rollout_of(model, 1, rows=4, k=2)
    make = Rloo(model, 0.3, 2) if learner == "rloo" else Ppo(model, 0.3, 2, 1, 0.9, 0.2, 0.2, 0.1)

    def part(first: int, last: int, count: int) -> Rollout:
        rows = slice(first, last)
        tree = build_tree(sequences[rows], IMAGE, 0)
        return Rollout(tree, whole.features[rows], whole.scores[rows], list(range(count)), count)

    def all_of(rollouts: list[Rollout]):
        counts = Counter()
        batches = make.look(rollouts, counts)
        total = sum(batch.count for batch in batches)
        loss = sum(make.loss(batch, counts)[0] * (batch.count / total) for batch in batches)
        return gradient(model, loss), counts

    expected, counted = all_of([whole])
    for rollouts in ([part(0, 3, 3), part(3, 4, 1)], [part(0, 4, 4), part(2, 3, 0)]):
        found, counts = all_of(rollouts)
        assert worst(found, expected) < 1e-5 * max(1, expected.abs().max().item())
        assert {n: pytest.approx(v, abs=1e-4) for n, v in counted.items()} == dict(
            counts
        ) and counts["answers"] == 8


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_what_is_counted_of_a_step(seed):
    """KL and entropy per response, and the reward of Eq. 2, the same by RLOO and by PPO."""
    model = policy_of(seed)
    rollout, _ = rollout_of(model, seed)
    logps, ref = both_logps(model, rollout.tree, rollout.features)
    expected = {
        "kl": (logps - ref).sum(),
        "entropy": -logps.sum(),
        "answers": 9,
        "rlhf": rollout.scores.sum() - 0.3 * (logps - ref).sum(),
    }
    rloo, ppo = Counter(), Counter()
    Rloo(model, 0.3, 3).loss(rollout, rloo)
    Ppo(model, 0.3, 3, 1, 0.9, 0.2, 0.2, 0.1).look([rollout], ppo)
    for counts in (rloo, ppo):
        assert counts.keys() == expected.keys()
        assert all(
            counts[name] == pytest.approx(float(value), abs=1e-3)
            for name, value in expected.items()
        )


def test_last_tokens_are_the_tips():
    """`last_tokens` finds in the flat order what the tree calls tips."""
    model = random_model(0)
    rollout, sequences = rollout_of(model, 5)
    row, branch, _ = token_logps(model, rollout.tree, rollout.features)
    ends = last_tokens(row, branch)
    assert ends.sum() == 9 and [
        (int(r), int(b)) for r, b in zip(row[ends], branch[ends], strict=True)
    ] == [(i, n) for i in range(3) for n in range(3)]
    assert gather([1]) == [[1]]
