"""Log-probs against one full sequence per response; and a chunk of tokens at a time: the numbers of
all at once, and never the logits of all at once.
"""

import copy

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
from torch.utils._python_dispatch import TorchDispatchMode

from minialign.align import logps as logps_module
from minialign.align.logps import branch_logps, token_logps
from minialign.align.losses import ipo_loss
from minialign.data.collate import PairCollator
from minialign.data.records import Record, instruct_record
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.toy import world

SEEDS = range(6)


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


# ---------------------------------------------------------------- a chunk at a time

VOCAB = 97  # no other width of the random models


class Heights(TorchDispatchMode):
    """Notes of every new tensor that is as wide as the vocabulary how many rows it has."""

    def __init__(self):
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_new = isinstance(out, torch.Tensor) and not func.is_view
        if is_new and out.shape[-1:] == (VOCAB,):
            self.seen.append(out.numel() // VOCAB)
        return out


def with_gradients(model, logps: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """The log-probs, then the gradients of a random sum of them by all that the decoder, projector
    and head hold.
    """
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed))
    named = [p for name, p in model.named_parameters() if not name.startswith("vision_tower")]
    return logps.detach(), *torch.autograd.grad((logps * weights).sum(), named)


def at_once(model, tree, features) -> torch.Tensor:
    """All branch tokens' log-probs, from the logits of all of them."""
    row, column = (tree.branch > 0).nonzero(as_tuple=True)
    logits = model.lm_head(model(tree, features)[row, tree.parent[row, column]])
    return logits.float().log_softmax(-1).gather(-1, tree.ids[row, column, None])[:, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_chunks_are_all_at_once(seed, monkeypatch):
    """Bit for bit where one chunk takes them all; and a chunk's logits are all that there ever is,
    and are not kept.
    """
    model, batch, features = random_case(seed, VOCAB)
    tree = build_tree(batch, IMAGE, pad_id=0)
    expected = with_gradients(model, at_once(model, tree, features), seed)
    tokens = int((tree.branch > 0).sum())
    for chunk in (logps_module.CHUNK, tokens, tokens - 1, 2 + seed, 1):
        monkeypatch.setattr(logps_module, "CHUNK", chunk)
        kept: list[torch.Tensor] = []

        def keep(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        with Heights() as heights:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                logps = token_logps(model, tree, features)[2]
            found = with_gradients(model, logps, seed)
        assert max(heights.seen) == min(chunk, tokens)
        assert not any(tensor.shape[-1:] == (VOCAB,) for tensor in kept)
        for ours, theirs in zip(found, expected, strict=True):
            assert theirs.abs().max() > 0
            if chunk >= tokens:
                assert torch.equal(ours, theirs)
            assert worst(ours, theirs) <= 1e-5 * theirs.abs().max().item()
