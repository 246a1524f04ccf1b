"""--pack: short sequences share a row, and nothing is another but time and the share of padding."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from helpers import IMAGE, random_ids, random_model, refused, worst
from input_files import lines, pair
from safetensors.torch import load_file
from script_runs import read_lines, stop_at, train
from test_distributed import SIZES, assert_same_training, run, run_alone
from test_lora import adapted
from torch import nn

import train_dpo
from minialign.distortion import distorted_tree
from minialign.heads import add_head, branch_rewards
from minialign.llama import Llama
from minialign.llava import Llava
from minialign.losses import both_logps, branch_logps, preference_loss, token_logps
from minialign.masks import NEWLINE, PADDING, Branch, Sequence, TokenTree, build_tree, dense_mask

SEEDS = range(8)
ADAPTER = "adapter/adapter_model.safetensors"
TOKENWISE = ("ids", "positions", "branch", "fork", "visible")  # the same, wherever a sequence stands


def crowd(seed: int, branches: int | None = None) -> tuple[Llava, list[Sequence], torch.Tensor]:
    """(model, many sequences, features): pictures of one tile or of AnyRes, hidden tokens, branches that fork anywhere.

    `branches`: so many in each sequence, all at its end, and nothing hidden, as pairs have it.
    """
    rng, model, rows, tiles = random.Random(seed), copy.deepcopy(random_model(seed)), [], 0
    generator, patches = torch.Generator().manual_seed(seed), model.config.vision.patches
    model.image_newline = nn.Parameter(torch.randn(model.config.text.hidden_size, generator=generator))
    for number in range(rng.randrange(4, 10)):
        trunk, picture = random_ids(rng, rng.randrange(1, 12)), rng.choice([0, 1, 1, 2, 3]) if number else 2
        tiles += picture
        shown = packing = None
        if picture:
            trunk.insert(rng.randrange(1, len(trunk) + 1), IMAGE)
            left = [i for i in range(picture * patches) if rng.random() < 0.8] + [NEWLINE]
            packing = torch.tensor(left[:-3] + [NEWLINE] + left[-3:]) if picture > 1 else None
            count = patches if packing is None else len(packing)
            shown = None if branches else torch.tensor([rng.random() < 0.5 for _ in range(count - 1)] + [True])
        forks = [rng.randrange(1, len(trunk) + 1) for _ in range(rng.randrange(4))] if number else [None]
        forks = [None] * branches if branches else forks
        answers = [Branch(random_ids(rng, rng.randrange(0 if number else 3, 9)), fork) for fork in forks]
        rows.append(Sequence(trunk, answers, picture * patches, shown, packing))
    return model, rows, torch.randn(tiles, patches, 16, generator=generator)


def packs(rows: list[Sequence], seed: int) -> list[int]:
    """Widths: nothing fits, some do, all are in one row."""
    longest, total = max(row.length for row in rows), sum(row.length for row in rows)
    return [1, longest, random.Random(seed).randrange(longest, total), total]


def place(tree: TokenTree, number: int) -> tuple[int, slice]:
    """The row and the columns of a sequence, which must be next to one another."""
    row, columns = (tree.sequence == number).nonzero(as_tuple=True)
    assert len(set(row.tolist())) == 1 and torch.equal(columns, torch.arange(columns[0], columns[-1] + 1))
    return int(row[0]), slice(int(columns[0]), int(columns[-1]) + 1)


# The tree, and what attends to what ----------------------------------------------------------------------------


@pytest.mark.parametrize("drop_hidden", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_shared_row_is_its_sequences_side_by_side(seed, drop_hidden):
    """Columns and mask: those of each sequence laid out on its own, and no two see one another."""
    _, rows, _ = crowd(seed)
    first = [sum(row.image_features for row in rows[:i]) for i in range(len(rows))]
    shared = 0
    for pack in packs(rows, seed):
        tree = build_tree(rows, IMAGE, 0, drop_hidden, pack)
        expected = torch.eye(tree.ids.shape[1]).bool().repeat(len(tree.ids), 1, 1)
        for number, sequence in enumerate(rows):
            alone = build_tree([sequence], IMAGE, 0, drop_hidden)
            row, columns = place(tree, number)
            for name in TOKENWISE:
                assert torch.equal(getattr(tree, name)[row, columns], getattr(alone, name)[0]), name
            start, parent = columns.start, alone.parent[0]
            assert torch.equal(tree.parent[row, columns], torch.where(parent < 0, -1, parent + start))
            feature = alone.feature[0]
            assert torch.equal(tree.feature[row, columns], torch.where(feature < 0, feature, feature + first[number]))
            tips = [tip + start for tip in alone.tip[0].tolist()]
            assert tree.tip[number].tolist() == tips + [-1] * (tree.tip.shape[1] - len(tips))
            expected[row, columns, columns] = dense_mask(alone, alone)[0, 0]
        assert torch.equal(dense_mask(tree, tree)[:, 0], expected)
        assert torch.equal(tree.sequence < 0, tree.branch == PADDING)
        assert tree.features_expected == sum(row.image_features for row in rows)
        assert tree.ids.numel() <= len(rows) * max(row.length for row in rows)
        shared += len(tree.ids) < len(rows)
    assert shared


def test_where_no_row_is_shared_the_sequence_is_the_row():
    _, rows, _ = crowd(0)
    tree, real = build_tree(rows, IMAGE, 0), build_tree(rows, IMAGE, 0).branch != PADDING
    assert torch.equal(tree.sequence, torch.where(real, torch.arange(len(rows))[:, None], -1))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shared_row_is_not_plain_causal(seed):
    """Though each of its sequences is on its own."""
    rng = random.Random(seed)
    rows = [Sequence(random_ids(rng, 2 + i), [Branch(random_ids(rng, 3))]) for i in range(4)]
    assert build_tree(rows, IMAGE, 0).causal and not build_tree(rows, IMAGE, 0, pack=99).causal


# What the model says -------------------------------------------------------------------------------------------


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Equal to 1e-5 of the largest value."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and worst(a, b) <= 1e-5 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("seed", SEEDS)
def test_log_probs_and_gradients(seed):
    """Of any trees, weighted at random, for all weights but the tower's."""
    model, rows, features = crowd(seed)
    trained = [p for name, p in model.named_parameters() if not name.startswith("vision_tower")]
    found = []
    for pack in (None, *packs(rows, seed)):
        logps = branch_logps(model, build_tree(rows, IMAGE, 0, pack=pack), features)
        weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed))
        gradients = torch.autograd.grad((logps * weights).sum(), trained, materialize_grads=True)
        found.append([logps.detach(), *gradients])
    assert all(value.abs().max() > 0 for value in found[0])
    for each in found[1:]:
        assert_close(each, found[0])


@pytest.mark.parametrize(("recompute", "loss"), [(False, "dpo"), (True, "ipo"), (False, "slic")])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_on_pairs(seed, recompute, loss):
    """Log-probs of policy and reference, the loss, and the gradients of adapters and projector."""
    model, rows, features = crowd(seed, branches=2)
    model = adapted(model, 4, 8.0, seed)
    model.language_model.in_training(recompute, compiled=False)
    trained, found = [p for p in model.parameters() if p.requires_grad], []
    for pack in (None, *packs(rows, seed)):
        logps, ref_logps = both_logps(model, build_tree(rows, IMAGE, 0, pack=pack), features)
        value = preference_loss(logps, ref_logps, loss, 0.1, torch.ones(1))
        found.append([logps.detach(), ref_logps, value.detach(), *torch.autograd.grad(value, trained)])
    for each in found[1:]:
        assert_close(each, found[0])


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_nothing_of_another_sequence_is_seen(seed):
    """Another text or picture of one, and no other's hidden states change by a single bit."""
    model, rows, features = crowd(seed)
    tree = build_tree(rows, IMAGE, 0, pack=sum(row.length for row in rows))
    assert len(tree.ids) < len(rows)
    before, generator = model(tree, features), torch.Generator().manual_seed(seed)
    first = 0
    for number, sequence in enumerate(rows):
        own = tree.sequence == number
        ids = torch.where(own & (tree.feature == -1), 4 + (tree.ids + 7) % 40, tree.ids)
        last = first + sequence.image_features // features.shape[1]
        other = features.clone()
        other[first:last] += torch.randn(other[first:last].shape, generator=generator)
        first = last
        for after in (model(replace(tree, ids=ids), features), model(tree, other)):
            assert torch.equal(before[~own], after[~own])
        assert not torch.equal(before[own], model(replace(tree, ids=ids), other)[own])


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_tokens_come_with_their_sequence(seed):
    """`token_logps`: sequence after sequence within a row, branch after branch, first token first."""
    model, rows, features = crowd(seed)
    sequence, branch, logps = token_logps(model, build_tree(rows, IMAGE, 0), features)
    for pack in packs(rows, seed):
        tree = build_tree(rows, IMAGE, 0, pack=pack)
        which, number, found = token_logps(model, tree, features)
        order = which.argsort(stable=True)
        assert torch.equal(which[order], sequence) and torch.equal(number[order], branch)
        assert_close([found[order]], [logps])


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_rewards(seed):
    """A head on the last token of every branch, wherever its sequence stands."""
    model, rows, features = crowd(seed)
    add_head(model, "value")
    model.scalar_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    plain = build_tree(rows, IMAGE, 0)
    there, expected = plain.tip >= 0, branch_rewards(model, plain, features)
    for pack in packs(rows, seed):
        found = branch_rewards(model, build_tree(rows, IMAGE, 0, pack=pack), features)
        assert_close([found[there]], [expected[there]])


@pytest.mark.parametrize("seed", SEEDS)
def test_distorted_responses(seed):
    """y~- is the same, wherever its sequence stands, and goes with its own sequence."""
    model, rows, features = crowd(seed, branches=2)
    rows[0] = replace(rows[0], branches=[Branch(rows[0].branches[0].ids * 3), rows[0].branches[1]])
    expected = branch_logps(model, distorted_tree(model, rows, features), features)
    for pack in (*packs(rows, seed), 999):
        tree = distorted_tree(model, rows, features, pack)
        assert tree.tip.shape == (len(rows), 3)
        assert_close([branch_logps(model, tree, features)], [expected])
    assert len(tree.ids) < len(rows)


# train_dpo.py --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> str:
    """14 pairs of unlike lengths, with an external y-."""
    rng, path = random.Random(5), tmp_path_factory.mktemp("uneven") / "pairs.jsonl"
    texts = [[f"{'A cup. ' * rng.randrange(1, 20)}{word}." for word in ("Yes", "No", "Perhaps")] for _ in range(14)]
    path.write_bytes(lines(*(pair(i, chosen=a, rejected=b, external=c) for i, (a, b, c) in enumerate(texts))))
    return str(path)


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, int]]:
    """(rows, columns) of each of the decoder's passes."""
    seen, real = [], Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda *a, **kw: seen.append(tuple(a[1].shape[:2])) or real(*a, **kw))
    return seen


@pytest.mark.parametrize("changes", [
    {}, {"accumulate": 2, "batch_size": 7}, {"loss": "sft"}, {"loss": "reward"}, {"rejected": "both", "gamma": 0.3},
    {"rejected": "distorted"}, {"rejected": "distorted", "accumulate": 3, "loss": "slic"}, {"recompute": True},
    {"compile": True}, {"ref_cache": "cache", "epochs": 2}, {"workers": 2, "truncate": True, "max_response_tokens": 20},
], ids=str)  # fmt: skip
def test_training_is_the_same(model, uneven, tmp_path, shapes, changes, compilations):
    """Metrics at every step, and the adapter, in fewer tokens."""
    rows, tokens = {}, {}
    for name, pack in (("plain", None), ("packed", 300)):
        own = changes | ({"ref_cache": str(tmp_path / name)} if "ref_cache" in changes else {})
        rows[name] = train(model, tmp_path / f"{name}-run", **{"pairs": uneven, "pack": pack, "lr": 1e-4} | own)
        tokens[name] = sum(a * b for a, b in shapes)
        assert pack is None or all(width <= pack for _, width in shapes)
        shapes.clear()
    for row, other in zip(rows["packed"], rows["plain"], strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)
    ours, theirs = (load_file(tmp_path / f"{name}-run" / ADAPTER) for name in ("packed", "plain"))
    assert max(theirs[name].abs().max() for name in theirs if "lora_B" in name) > 1e-4  # it did learn
    assert max(worst(ours[name], theirs[name]) for name in theirs) < 1e-5
    assert tokens["packed"] < tokens["plain"]


def test_a_run_goes_on_with_another_width(model, uneven, tmp_path, monkeypatch):
    train(model, tmp_path / "whole", pairs=uneven)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "pair_loss", 3)
        train(model, tmp_path / "stopped", pairs=uneven, save_every=1)
    train(model, tmp_path / "stopped", pairs=uneven, pack=400, save_every=1, resume=True)
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")
    assert len(read_lines(tmp_path / "stopped/metrics.jsonl")) == 4


def test_three_processes(uneven, tmp_path):
    """In shards, with --accumulate 2: of the last batch a process has no pair, and an idle row goes along."""
    flags = ["--pairs", uneven, *SIZES, "--eval-images", 0, "--epochs", 2]
    run_alone("train_dpo.py", *flags, "--batch-size", 11, "--out", tmp_path / "one")
    run(3, "train_dpo.py", *flags, "--batch-size", 11, "--pack", 300, "--shard", "full", "--accumulate", 2,
        "--out", tmp_path / "three")  # fmt: skip
    assert_same_training(tmp_path / "one", tmp_path / "three")


def test_a_width_below_one_is_refused(model, tmp_path):
    config = train_dpo.Config(model=model, pairs="none.jsonl", out=str(tmp_path / "out"), pack=0)
    refused(lambda: train_dpo.main(config), "--pack 0: at least 1")
