"""Losses against values derived by hand and against TRL."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from minialign.align.losses import dpo_loss, ipo_loss, log_ratio_difference, slic_loss

SEEDS = range(6)
LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "slic": slic_loss}


# ---------------------------------------------------------------- values derived by hand


@pytest.mark.parametrize(
    ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "h"),
    [
        (-1.0, -4.0, -2.0, -3.0, 2.0),  # chosen up by 1, rejected down by 1
        (-5.0, -5.0, -5.0, -5.0, 0.0),
        (-7.0, -2.0, -7.0, -6.0, -4.0),  # rejected up by 4
        (-3.0, -9.0, -8.0, -9.0, 5.0),  # chosen up by 5
    ],
)
def test_log_ratio_difference(policy_chosen, policy_rejected, ref_chosen, ref_rejected, h):
    four = [
        torch.tensor(v, requires_grad=True)
        for v in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    ]
    value = log_ratio_difference(*four)
    value.backward()
    assert value.item() == h
    assert [v.grad.item() for v in four] == [1, -1, -1, 1]


@pytest.mark.parametrize(
    ("loss", "beta", "h", "expected", "slope"),
    [
        # -log sigmoid(beta h), slope -beta sigmoid(-beta h)
        (dpo_loss, 0.1, 0.0, math.log(2), -0.05),
        (dpo_loss, 0.5, 2 * math.log(3), math.log(4 / 3), -0.125),  # sigmoid = 3/4
        (dpo_loss, 0.5, -2 * math.log(3), math.log(4), -0.375),  # sigmoid = 1/4
        (dpo_loss, 1.0, -1000.0, 1000.0, -1.0),  # no overflow
        (dpo_loss, 1.0, 1000.0, 0.0, 0.0),
        # (h - 1 / (2 beta))^2, slope 2 (h - 1 / (2 beta))
        (ipo_loss, 0.1, 0.0, 25.0, -10.0),
        (ipo_loss, 0.5, 1.0, 0.0, 0.0),
        (ipo_loss, 0.25, 5.0, 9.0, 6.0),
        (ipo_loss, 1.0, -1.5, 4.0, -4.0),
        # max(0, 1 - beta h), slope -beta or 0
        (slic_loss, 0.1, 0.0, 1.0, -0.1),
        (slic_loss, 0.1, 5.0, 0.5, -0.1),
        (slic_loss, 0.1, 20.0, 0.0, 0.0),
        (slic_loss, 0.2, -10.0, 3.0, -0.2),
    ],
)
def test_losses_by_hand(loss, beta, h, expected, slope):
    """h is y+'s log-ratio here, of one pair; its slope is y+'s, and minus it y-'s."""
    chosen = torch.tensor([[h]], requires_grad=True)
    rejected, zero = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1)
    value = loss(chosen, rejected, zero, zero, beta)
    value.sum().backward()
    assert value.shape == (1, 1)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(slope, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(-slope, abs=1e-6)


# ---------------------------------------------------------------- TRL


def trl_loss(kind: str, beta: float, policy, ref, lengths) -> torch.Tensor:
    """TRL's own loss of token log-probs (2B, T), chosen rows first; zero behind each row's
    length."""
    width = policy.shape[1]
    inside = torch.arange(width) < lengths[:, None]

    def outputs(token_logps):
        zero = torch.zeros(len(lengths), width)
        return SimpleNamespace(
            log_probs=token_logps * inside, entropy=zero, mean_logits=zero, is_top1=zero.bool()
        )

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t
    )
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=model,
        ref_model=lambda **_: outputs(ref),
        accelerator=accelerator,
        precompute_ref_logps=False,
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        aux_loss_enabled=False,
        use_weighting=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {  # one prompt token, then the completion
        "input_ids": torch.ones(len(lengths), width + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(lengths), width + 1, dtype=torch.long),
        "completion_mask": torch.cat(
            [torch.zeros(len(lengths), 1, dtype=torch.long), inside.long()], dim=1
        ),
    }
    compute_loss = pytest.importorskip("trl").DPOTrainer._compute_loss
    return compute_loss(trainer, lambda **_: outputs(policy), inputs, return_outputs=False)


def our_loss(kind: str, beta: float, policy, ref, lengths) -> torch.Tensor:
    """The same from the sums."""
    inside = torch.arange(policy.shape[1]) < lengths[:, None]
    chosen, rejected = (policy * inside).sum(1, keepdim=True).chunk(2)  # (B, 1) each
    ref_chosen, ref_rejected = (ref * inside).sum(1, keepdim=True).chunk(2)
    return LOSSES[kind](chosen, rejected, ref_chosen, ref_rejected, beta).mean()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("ours", "trl"), [("dpo", "sigmoid"), ("slic", "hinge"), ("ipo", "ipo")])
def test_losses_equal_trl(ours, trl, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs, longest = 2 + seed, 1 + 3 * seed
    tokens = 1 if seed % 2 else longest
    lengths = torch.randint(1, longest + 1, (2 * pairs,), generator=generator)
    if trl == "ipo":
        # TRL's is the token mean: one length for all, and
        # (h/n - 1/(2 beta))^2 = (h - n/(2 beta))^2 / n^2.
        lengths = torch.full_like(lengths, tokens)
    policy, ref = (-3 * torch.rand(2 * pairs, longest, generator=generator) for _ in range(2))
    beta = 0.05 + 0.3 * seed
    mine, theirs = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    if trl == "ipo":
        loss = our_loss(ours, beta / tokens, mine, ref, lengths) / tokens**2
    else:
        loss = our_loss(ours, beta, mine, ref, lengths)
    expected = trl_loss(trl, beta, theirs, ref, lengths)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert theirs.grad.abs().max() > 0
