"""RLOO and PPO on a LLaVA: values, advantages and gradients against the plain way, one full
sequence per response.
"""

import math
import random
from collections import Counter

import pytest
import torch
from helpers import IMAGE, plain_logits, random_ids, random_model, worst
from policies import adapted

from minialign.align.logps import branch_logps, reference_logps, token_logps
from minialign.model import lora, scalar_head
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.rlhf.losses import policy_loss, ppo_metrics, rloo_loss, value_loss
from minialign.rlhf.ppo import PpoBatch, logps_and_values, look_back, whitened
from minialign.rlhf.rewards import sequence_rewards
from minialign.rlhf.rollouts import Rollout

SEEDS = range(4)


def policy_of(seed: int):
    """A random model whose adapters have moved from the reference, with a head that says
    something.
    """
    model = adapted(random_model(seed), 3, 6.0, seed)
    generator = torch.Generator().manual_seed(seed)
    scalar_head.set_head(model, torch.randn(1, model.config.text.hidden_size, generator=generator))
    return model


def rollout_of(model, seed: int, rows: int = 3, k: int = 3) -> tuple[Rollout, list[Sequence]]:
    """k responses of unlike lengths to each of some prompts with a picture, and their scores."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    patches, width = model.config.vision.patches, model.config.vision.hidden_size
    sequences = []
    for _ in range(rows):
        before, after = random_ids(rng, 1 + rng.randrange(3)), random_ids(rng, 1 + rng.randrange(4))
        branches = [Branch(random_ids(rng, 1 + rng.randrange(6))) for _ in range(k)]
        sequences.append(Sequence([*before, IMAGE, *after], branches, patches))
    features = torch.randn(rows, patches, width, generator=generator)
    scores = torch.randn(rows, k, generator=generator)
    return Rollout(build_tree(sequences, IMAGE, 0), features, scores, rows), sequences


def part_of(whole: Rollout, sequences: list[Sequence], first: int, last: int, prompts: int):
    """Some rows of a rollout; with `prompts` 0 an idle one."""
    rows = slice(first, last)
    tree = build_tree(sequences[rows], IMAGE, 0)
    return Rollout(tree, whole.features[rows], whole.scores[rows], prompts)


def gradient(model, loss) -> torch.Tensor:
    """Of everything that is trained, as one vector; 0 where there is none."""
    parameters = list(lora.adapter_state(model).values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    both = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in both])


def rloo_loss_of(model, rollout: Rollout, beta: float) -> torch.Tensor:
    """As rloo.py has it."""
    logps = branch_logps(model, rollout.tree, rollout.features)
    ref_logps = reference_logps(model, rollout.tree, rollout.features)
    return rloo_loss(logps, sequence_rewards(rollout.scores, logps, ref_logps, beta))


def ppo_loss_of(model, batch: PpoBatch, value_coef: float) -> torch.Tensor:
    """As ppo.py has it, both clips at 0.2."""
    _, _, logps, values = logps_and_values(model, batch.rollout)
    actor = policy_loss(logps, batch.logps, batch.advantages, 0.2)
    return actor + value_coef * value_loss(values, batch.values, batch.returns, 0.2)


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_learns_the_policy_gradient_of_eq_2(seed):
    """Written out: a response's reward with its KL, less the mean of the others', times its
    log-prob's gradient.
    """
    model, beta = policy_of(seed), 0.3
    rollout, _ = rollout_of(model, seed)
    logps = branch_logps(model, rollout.tree, rollout.features)
    ref_logps = reference_logps(model, rollout.tree, rollout.features)
    rewards = (rollout.scores - beta * (logps - ref_logps)).tolist()
    expected = 0
    for i in range(3):
        for n in range(3):
            others = sum(rewards[i][m] for m in range(3) if m != n) / 2
            logps = branch_logps(model, rollout.tree, rollout.features)  # the graph anew
            expected = expected - (rewards[i][n] - others) * gradient(model, logps[i, n]) / 9
    found = gradient(model, rloo_loss_of(model, rollout, beta))
    assert worst(found, expected) < 1e-5 * max(1, expected.abs().max().item())


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_value_is_of_the_state_before_its_token(seed):
    """The head on the hidden state that predicts the token, each response alone and in one
    piece.
    """
    model = policy_of(seed)
    rollout, sequences = rollout_of(model, seed)
    _, _, logps, values = logps_and_values(model, rollout)
    expected = []
    for i, sequence in enumerate(sequences):
        for response in sequence.branches:
            ids = sequence.trunk + response.ids
            alone = build_tree([Sequence(ids, [], sequence.image_features)], IMAGE, 0)
            hidden = model(alone, rollout.features[i : i + 1])[0]
            before = hidden[-len(response.ids) - 1 : -1]
            expected.append(before @ model.scalar_head.weight[0])
    assert worst(values, torch.cat(expected)) < 1e-5
    assert worst(logps, token_logps(model, rollout.tree, rollout.features)[2]) == 0


def plain_token_logps(model, prompt: list[int], response: list[int], picture) -> torch.Tensor:
    """Log-prob of every token of a response, from its own full sequence."""
    lines = plain_logits(model, prompt + response, picture).log_softmax(-1)
    return lines[-len(response) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_update_of_ppo_is_reinforce(seed):
    """lambda = 1: the return of each token less its value, whitened, times its log-prob's gradient:
    cosine > 0.999.

    The returns by hand from plain logits: the score on the last token, beta log(pi / ref) taken off
    every one.
    """
    model, beta = policy_of(seed), 0.2
    rollout, sequences = rollout_of(model, seed)
    [batch] = whitened([look_back(model, rollout, beta, 1.0, Counter())])
    _, _, own_logps, values = logps_and_values(model, rollout)
    metrics = ppo_metrics(own_logps, batch.logps, 0.2)
    assert set(metrics.values()) == {0}  # the ratio is 1 to the last bit
    assert batch.tokens == sum(len(b.ids) for s in sequences for b in s.branches)

    logps, returns = [], []
    for i, sequence in enumerate(sequences):
        for n, response in enumerate(sequence.branches):
            asked = sequence.trunk, response.ids, rollout.features[i]
            own = plain_token_logps(model, *asked)
            with lora.adapters_off(model):
                ref = plain_token_logps(model, *asked)
            paid = [-beta * (a - b) for a, b in zip(own.tolist(), ref.tolist(), strict=True)]
            paid[-1] += rollout.scores[i, n].item()
            logps.append(own)
            returns += [sum(paid[t:]) for t in range(len(paid))]
    advantages = torch.tensor(returns) - values.detach()
    assert worst(batch.returns, torch.tensor(returns)) < 1e-4
    white = (advantages - advantages.mean()) / advantages.std(correction=0)
    assert worst(batch.advantages, white) < 1e-4
    expected = gradient(model, -(white * torch.cat(logps)).mean())
    found = gradient(model, ppo_loss_of(model, batch, value_coef=0.0))
    assert torch.cosine_similarity(found, expected, dim=0) > 0.999
    assert found.norm() == pytest.approx(expected.norm().item(), rel=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_head_learns_the_returns(seed):
    """With a policy that stands still the values come near what they should have been."""
    model = policy_of(seed)
    rollout, _ = rollout_of(model, seed)
    batch = look_back(model, rollout, 0.2, 1.0, Counter())
    optimizer = torch.optim.Adam([model.scalar_head.weight], 0.05)
    losses = []
    for _ in range(200):
        _, _, _, values = logps_and_values(model, rollout)
        loss = value_loss(values, batch.values, batch.returns, math.inf)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


PARTS = [((0, 3, 3), (3, 4, 1)), ((0, 4, 4), (2, 3, 0))]  # the second one's last part is idle


@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_a_step_of_rloo_add_up_to_the_whole(parts):
    model = policy_of(1)
    whole, sequences = rollout_of(model, 1, rows=4, k=2)
    expected = gradient(model, rloo_loss_of(model, whole, 0.3))
    loss = 0
    for part in parts:
        rollout = part_of(whole, sequences, *part)
        loss = loss + rloo_loss_of(model, rollout, 0.3) * (rollout.prompts / 4)
    assert worst(gradient(model, loss), expected) < 1e-5 * max(1, expected.abs().max().item())


@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_a_step_of_ppo_add_up_to_the_whole(parts):
    """Advantages are whitened over all parts, and an idle rollout counts for nothing."""
    model = policy_of(1)
    whole, sequences = rollout_of(model, 1, rows=4, k=2)

    def gradient_of(rollouts: list[Rollout]) -> tuple[torch.Tensor, Counter]:
        sums: Counter = Counter()
        batches = whitened([look_back(model, each, 0.3, 0.9, sums) for each in rollouts])
        tokens = sum(batch.tokens for batch in batches)
        loss = sum(ppo_loss_of(model, batch, 0.1) * (batch.tokens / tokens) for batch in batches)
        return gradient(model, loss), sums

    expected, sums = gradient_of([whole])
    found, also = gradient_of([part_of(whole, sequences, *part) for part in parts])
    assert worst(found, expected) < 1e-5 * max(1, expected.abs().max().item())
    assert also == pytest.approx(sums, abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_what_ppo_notes_of_a_step(seed):
    """KL and entropy, and the reward of Eq. 2, summed over responses."""
    model = policy_of(seed)
    rollout, _ = rollout_of(model, seed)
    logps = branch_logps(model, rollout.tree, rollout.features)
    kl = (logps - reference_logps(model, rollout.tree, rollout.features)).sum().item()
    sums: Counter = Counter()
    look_back(model, rollout, 0.3, 0.9, sums)
    expected = {
        "objective/kl": kl,
        "objective/entropy": -logps.sum().item(),
        "objective/rlhf_reward": rollout.scores.sum().item() - 0.3 * kl,
    }
    assert dict(sums) == pytest.approx(expected, abs=1e-3)
