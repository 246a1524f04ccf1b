"""Losses against values derived by hand and against TRL; log-probs against one full sequence per
response.
"""

import copy
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    IMAGE,
    plain_logp,
    random_batch,
    random_case,
    random_model,
    toy_features,
    toy_model,
    toy_processor,
    toy_tokenizer,
    worst,
)

from minialign.align.logps import branch_logps, token_logps
from minialign.align.losses import dpo_loss, ipo_loss, log_ratio_difference, slic_loss
from minialign.data.collate import PairCollator
from minialign.data.records import Record, instruct_record
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.toy import world

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


# ---------------------------------------------------------------- log-probs of branches


def plain_sums(model, batch: list[Sequence], features) -> list[list[torch.Tensor]]:
    """Every branch as a full sequence of its own."""
    pictures = iter(features)
    sums = []
    for row in batch:
        picture = next(pictures) if row.image_tokens else None
        sums.append([plain_logp(model, row.trunk[: b.fork], b.ids, picture) for b in row.branches])
    return sums


def assert_same_gradients(model, ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Equal to 1e-4 of the largest gradient of each parameter; the tower takes no part."""
    named = {n: p for n, p in model.named_parameters() if not n.startswith("vision_tower")}
    found = torch.autograd.grad(ours, list(named.values()))
    expected = torch.autograd.grad(plain, list(named.values()))
    for name, a, b in zip(named, found, expected, strict=True):
        assert b.abs().max() > 0, name
        assert worst(a, b) <= 1e-4 * b.abs().max().item() + 1e-6, name


@pytest.mark.parametrize("seed", SEEDS)
def test_branch_logps_equal_the_plain_way(seed):
    model, batch, features = random_case(seed)
    ours = branch_logps(model, build_tree(batch, IMAGE, pad_id=0), features)
    plain = plain_sums(model, batch, features)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed + 1))
    assert ours.dtype == torch.float32
    assert ours.shape == (len(batch), max(len(row.branches) for row in batch))
    for row, sums in enumerate(plain):
        assert worst(ours[row, : len(sums)], torch.stack(sums)) < 1e-4
        assert ours[row, len(sums) :].count_nonzero() == 0  # rows with fewer branches
    total = sum((weights[r, : len(sums)] * torch.stack(sums)).sum() for r, sums in enumerate(plain))
    assert_same_gradients(model, (ours * weights).sum(), total)


@pytest.mark.parametrize("first", [0, 6])
def test_pairs_of_the_embedded_world_equal_the_plain_way(first):
    """A collated batch of true answers, others' as rejected ones: log-probs, and IPO's gradients
    (never near 0)."""
    model, tokenizer = copy.deepcopy(toy_model()).requires_grad_(True), toy_tokenizer()
    answers = [instruct_record(raw) for raw in world.alignment_records(4, "validation", first)]
    records = []
    for a, b in zip(answers, answers[2:] + answers[:2], strict=True):
        records.append(Record(a.id, a.image, a.turns, a.chosen, b.chosen))
    collate = PairCollator(tokenizer, toy_processor(), world.open_picture, 200)
    batch = collate.batch([collate.load(record) for record in records])
    features = model.encode_images(batch.pixels)
    assert torch.equal(features, toy_features(tuple(range(first, first + 4))))
    ours = branch_logps(model, batch.tree, features)

    plain = []
    for record, picture in zip(records, features, strict=True):
        prompt = tokenizer.prompt(record.turns)
        for text in (record.chosen, record.rejected):
            plain.append(plain_logp(model, prompt, tokenizer.response(text), picture))
    plain = torch.stack(plain).view(4, 2)
    assert worst(ours, plain) < 1e-4 * max(1.0, plain.abs().max().item() / 10)
    zero = torch.zeros(4, 1)
    losses = [ipo_loss(x[:, :1], x[:, 1:], zero, zero, 0.1).sum() for x in (ours, plain)]
    assert_same_gradients(model, *losses)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_head_runs_on_response_positions_only(seed):
    model = copy.deepcopy(random_model(seed))
    batch, rows = random_batch(seed, 0), []
    model.lm_head.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    row, branch, logps = token_logps(model, build_tree(batch, IMAGE, pad_id=0), None)
    count = sum(len(b.ids) for s in batch for b in s.branches)
    assert rows == [count] and logps.shape == (count,)
    expected = []
    for r, sequence in enumerate(batch):
        for b, response in enumerate(sequence.branches):
            expected += [(r, b)] * len(response.ids)
    assert list(zip(row.tolist(), branch.tolist(), strict=True)) == expected


def test_an_empty_branch_has_log_probability_zero():
    model = random_model(0)
    tree = build_tree([Sequence([1, 5, 6], [Branch([]), Branch([7, 8])])], IMAGE, pad_id=0)
    sums = branch_logps(model, tree, None)[0]
    assert sums[0] == 0
    assert worst(sums[1], plain_logp(model, [1, 5, 6], [7, 8], None)) < 1e-5
