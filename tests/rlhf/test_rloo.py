"""RLOO: TRL's advantages and gradient, an example by hand, and the optimum of Eq. 2."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from bandit import Bandit, decaying_adam

from minialign.rlhf.losses import leave_one_out, rloo_loss
from minialign.rlhf.rewards import sequence_rewards

SEEDS = range(5)


def test_advantages_by_hand():
    """Of 1, 2, 6 the others' means are 4, 3.5 and 1.5."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    assert leave_one_out(rewards).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="no others"):
        leave_one_out(rewards[:, :1])


def trl_trainer(logps, ref, scores, inside, beta: float) -> SimpleNamespace:
    """What TRL's own code needs of a trainer, the text and the models aside: token log-probs
    (B k, T).
    """
    policy = torch.nn.Identity()
    policy.is_gradient_checkpointing = False
    ids = [[1] * length for length in inside.sum(1).tolist()]
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda t: t,
        process_index=0,
        reduce=lambda t, reduction: t,
    )
    return SimpleNamespace(
        model=policy,
        ref_model="reference",
        accelerator=accelerator,
        beta=beta,
        num_generations=scores.shape[1],
        _generate=lambda prompts: ([[1]] * len(ids), ids, ids),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        processing_class=None,
        chat_template_kwargs={},
        args=SimpleNamespace(
            per_device_train_batch_size=len(ids), gradient_checkpointing_kwargs=None
        ),
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (
            logps if model is policy else ref,
            logps * 0,
            None,
        ),
        _calculate_rewards=lambda *_: scores.flatten()[:, None],
        reward_weights=torch.ones(1),
        reward_clip_range=None,
        normalize_advantages=False,
        reward_func_names=["score"],
        _pending_extra_logs={},
        _pending_metrics={},
        _metrics=defaultdict(lambda: defaultdict(list)),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        _logs={
            "prompt": [],
            "completion": [],
            "rewards": {"score": []},
            "advantages": [],
            "extra": {},
        },
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_and_gradient_equal_trl(seed):
    """TRL's code, called: rewards with their KL, advantages, and its loss in the first update,
    where the ratio is 1.
    """
    trainer_class = pytest.importorskip("trl").RLOOTrainer
    generator = torch.Generator().manual_seed(seed)
    rows, k, longest, beta = 1 + seed, 2 + seed % 3, 1 + 2 * seed, 0.05 + 0.3 * seed
    lengths = torch.randint(1, longest + 1, (rows * k,), generator=generator)
    lengths[0] = longest  # TRL's padding is as wide as the longest
    inside = torch.arange(longest) < lengths[:, None]
    logps, ref = (-3 * torch.rand(rows * k, longest, generator=generator) for _ in range(2))
    scores = torch.randn(rows, k, generator=generator)

    theirs, mine = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    trainer = trl_trainer(theirs, ref, scores, inside, beta)
    batch = trainer_class._generate_and_score_completions(trainer, [{"prompt": "x"}] * (rows * k))
    sums, ref_sums = ((t * inside).sum(1).view(rows, k) for t in (mine, ref))
    rewards = sequence_rewards(scores, sums, ref_sums, beta)
    advantages = leave_one_out(rewards)
    torch.testing.assert_close(
        advantages.flatten(), batch["advantages"].detach(), rtol=1e-5, atol=1e-5
    )

    detached = {name: value.detach() for name, value in batch.items()}
    trainer_class._compute_loss(trainer, trainer.model, detached).backward()
    rloo_loss(sums, rewards).backward()
    assert theirs.grad.abs().max() > 0
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("vocab", "longest"), [(2, 1), (2, 3), (3, 2)])
def test_rloo_reaches_the_optimum_of_eq_2(vocab, longest, seed):
    """At the optimum r - beta log(pi / ref) is the same for all responses, so that even its noise
    is gone.
    """
    bandit, generator = Bandit(vocab, longest, seed), torch.Generator().manual_seed(seed)
    policy = bandit.reference.clone().requires_grad_()
    optimizer, schedule = decaying_adam([policy], 0.1, 300)
    for _ in range(300):
        drawn = bandit.draw(policy, 64, 4, generator)
        row, branch, prefix, token = bandit.tokens(drawn)
        sums = []
        for table in (policy, bandit.reference):
            logps = table.log_softmax(-1)[prefix, token]
            of_responses = torch.zeros(drawn.shape)
            sums.append(of_responses.index_put((row, branch), logps, accumulate=True))
        rewards = sequence_rewards(bandit.scores[drawn], *sums, bandit.beta)
        optimizer.zero_grad()
        rloo_loss(sums[0], rewards).backward()
        optimizer.step()
        schedule.step()
    assert bandit.distance(policy) < 1e-2
