"""The token tree and Eq. 6: layout and rule against plain loops in Python, and what is refused."""

import math
import random

import pytest
import torch
from helpers import IMAGE, toy_model
from trees import random_sequences

from minialign.model.masks import (
    PADDING,
    TRUNK,
    Branch,
    Sequence,
    build_tree,
    dense_mask,
    image_attention_mask,
)

PAD = 0
SEEDS = range(12)


# ---------------------------------------------------------------- layout and rule, in plain Python


def plain_row(
    sequence: Sequence, first_feature: int, drop_hidden: bool
) -> tuple[list[dict], list[int]]:
    """The columns that a sequence should get, and its branches' tips. `place` counts along the
    expanded trunk.
    """
    expanded = []  # (token, visible, feature)
    start = []  # of each trunk token, in the expanded trunk
    for token in sequence.trunk:
        start.append(len(expanded))
        if token == IMAGE:
            visible = sequence.image_visible
            for i in range(sequence.image_tokens):
                expanded.append((IMAGE, visible is None or bool(visible[i]), first_feature + i))
        else:
            expanded.append((token, True, -1))
    start.append(len(expanded))
    columns, tips = [], []
    for place, (token, visible, feature) in enumerate(expanded):
        if visible or not drop_hidden:
            columns.append(
                {
                    "token": token,
                    "owner": 0,
                    "place": place,
                    "visible": visible,
                    "feature": feature,
                    "parent": len(columns) - 1,
                    "fork": 0,
                }
            )
    for owner, branch in enumerate(sequence.branches, start=1):
        fork = start[-1] if branch.fork is None else start[branch.fork]
        parent = [column["place"] if column["owner"] == 0 else -1 for column in columns].index(
            fork - 1
        )
        for place, token in enumerate(branch.ids, start=fork):
            columns.append(
                {
                    "token": token,
                    "owner": owner,
                    "place": place,
                    "visible": True,
                    "feature": -1,
                    "parent": parent,
                    "fork": fork,
                }
            )
            parent = len(columns) - 1
        tips.append(parent)
    return columns, tips


def sees(query: dict, key: dict) -> bool:
    """Who may attend to whom: what was before, on one's own branch or on the trunk it grew from."""
    if not key["visible"]:
        return False
    if key["owner"] == query["owner"]:
        return key["place"] <= query["place"]
    return key["owner"] == 0 and key["place"] < query["fork"]


@pytest.mark.parametrize("drop_hidden", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_layout(seed, drop_hidden):
    batch = random_sequences(seed)
    tree = build_tree(batch, IMAGE, PAD, drop_hidden)
    names = {
        "ids": "token",
        "positions": "place",
        "branch": "owner",
        "fork": "fork",
        "visible": "visible",
        "parent": "parent",
        "feature": "feature",
    }
    first = 0
    for row, sequence in enumerate(batch):
        columns, tips = plain_row(sequence, first, drop_hidden)
        first += sequence.image_tokens
        for ours, plain in names.items():
            assert getattr(tree, ours)[row, : len(columns)].tolist() == [
                c[plain] for c in columns
            ], ours
        assert tree.tip[row].tolist() == tips + [-1] * (tree.tip.shape[1] - len(tips))
        rest = slice(len(columns), None)
        assert set(tree.ids[row, rest].tolist()) <= {PAD}
        assert set(tree.branch[row, rest].tolist()) <= {PADDING}
        assert not tree.visible[row, rest].any() and (tree.parent[row, rest] == -1).all()
        assert (tree.feature[row, rest] == -1).all()
    assert tree.features_expected == first
    assert tree.tip.shape[1] == max(len(sequence.branches) for sequence in batch)


@pytest.mark.parametrize("drop_hidden", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_rule_against_a_double_loop(seed, drop_hidden):
    batch = random_sequences(seed)
    tree = build_tree(batch, IMAGE, PAD, drop_hidden)
    mask = dense_mask(tree, tree)
    width = tree.ids.shape[1]
    assert mask.shape == (len(batch), 1, width, width) and mask.dtype == torch.bool
    for row, sequence in enumerate(batch):
        columns, _ = plain_row(sequence, 0, drop_hidden)
        for q in range(width):
            for k in range(width):
                padding = q >= len(columns) or k >= len(columns)
                expected = q == k if padding else sees(columns[q], columns[k])
                assert mask[row, 0, q, k].item() == expected, (row, q, k)


def test_the_random_trees_have_everything():
    """The seeds above cover padding, hidden tokens, forks inside the trunk, empty branches, rows
    without a picture.
    """
    trees = [build_tree(random_sequences(seed), IMAGE, PAD, False) for seed in SEEDS]
    rows = [sequence for seed in SEEDS for sequence in random_sequences(seed)]
    assert any((tree.branch == PADDING).any() for tree in trees)
    assert any((~tree.visible & (tree.branch == TRUNK)).any() for tree in trees)
    branches = [(branch, len(row.trunk)) for row in rows for branch in row.branches]
    assert any(branch.fork is not None and branch.fork < length for branch, length in branches)
    assert any(not branch.ids for branch, _ in branches)
    assert any(not row.image_tokens for row in rows) and any(len(row.branches) > 2 for row in rows)


@pytest.mark.parametrize("drop_hidden", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_row_is_empty_and_padding_sees_only_itself(seed, drop_hidden):
    tree = build_tree(random_sequences(seed), IMAGE, PAD, drop_hidden)
    mask = dense_mask(tree, tree)[:, 0]
    assert mask.any(-1).all()
    padding = tree.branch == PADDING
    itself = torch.eye(mask.shape[-1]).bool().expand_as(mask)
    assert torch.equal(mask[padding], itself[padding])
    assert torch.equal(mask.mT[padding], itself[padding])  # and nobody else sees it


@pytest.mark.parametrize("seed", SEEDS)
def test_appended_columns(seed):
    """A tree and the columns behind it keep the rule: the mask of the last columns is the whole
    mask's.
    """
    tree = build_tree(random_sequences(seed), IMAGE, PAD)
    cut = random.Random(seed).randrange(tree.ids.shape[1])
    names = ("ids", "positions", "branch", "fork", "visible", "parent", "feature")
    left, right = (
        type(tree)(*(getattr(tree, name)[:, part] for name in names), tip, expected)
        for part, tip, expected in [
            (slice(None, cut), tree.tip - 1, tree.features_expected),
            (slice(cut, None), tree.tip, 0),
        ]
    )
    whole = left.append(right)
    assert all(torch.equal(getattr(whole, name), getattr(tree, name)) for name in (*names, "tip"))
    assert whole.features_expected == tree.features_expected
    assert torch.equal(dense_mask(right, whole), dense_mask(tree, tree)[:, :, cut:])


# ---------------------------------------------------------------- Eq. 6


@pytest.mark.parametrize("seed", range(5))
def test_image_attention_mask(seed):
    def draw(rho_th: float, count: int = 20_000, seed: int = seed):
        return image_attention_mask(count, rho_th, torch.Generator().manual_seed(seed))

    assert draw(0.0).all() and not draw(1.0).any()
    for rho_th in (0.01, 0.3, 0.5, 0.99):
        mask = draw(rho_th)
        assert mask.shape == (20_000,) and mask.dtype == torch.bool
        hidden = 1 - mask.float().mean().item()
        assert abs(hidden - rho_th) < 4 * math.sqrt(rho_th * (1 - rho_th) / 20_000)
        assert torch.equal(mask, draw(rho_th)) and not torch.equal(
            mask, draw(rho_th, seed=seed + 100)
        )
        assert not (mask & ~draw(rho_th - 0.01)).any()  # a higher threshold hides more of the same
    generator = torch.Generator().manual_seed(seed)
    first, second = (image_attention_mask(500, 0.5, generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert draw(0.5, 1).shape == (1,) and draw(0.5, 0).shape == (0,)


def test_rho_equal_to_the_threshold_is_visible(monkeypatch):
    """m_i = 1 if rho_i >= rho_th."""
    rho = torch.tensor([0.0, 0.25, 0.5, 0.75])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: rho)
    assert image_attention_mask(4, 0.5, torch.Generator()).tolist() == [False, False, True, True]
    assert image_attention_mask(4, 0.0, torch.Generator()).all()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("places,features", [(0, 5), (2, 5), (1, 0), (3, 7)])
def test_image_places_and_features_must_agree(places, features):
    trunk = [9, *[IMAGE] * places, 8]
    with pytest.raises(ValueError, match=rf"{places} image places.*{features} image features"):
        build_tree([Sequence([4]), Sequence(trunk, [], features)], IMAGE, PAD)


@pytest.mark.parametrize("count", [0, 4, 6])
def test_a_mask_of_another_length_than_the_image(count):
    mask = torch.ones(count, dtype=torch.bool)
    for drop_hidden in (True, False):
        with pytest.raises(ValueError, match=f"mask of {count}.*5 image"):
            build_tree([Sequence([9, IMAGE, 8], [], 5, mask)], IMAGE, PAD, drop_hidden)


@pytest.mark.parametrize("pictures", [None, 1, 3])
def test_slots_and_tower_features_must_agree(pictures):
    model = toy_model()
    patches, width = model.config.vision.patches, model.config.vision.hidden_size
    image = model.config.image_token_id
    tree = build_tree([Sequence([1, image, 9], [], patches)] * 2, image, PAD)
    features = None if pictures is None else torch.zeros(pictures, patches, width)
    with pytest.raises(
        ValueError, match=rf"{2 * patches} image slots.* {(pictures or 0) * patches} image features"
    ):
        model(tree, features)
    text = build_tree([Sequence([1, 9])], image, PAD)
    with pytest.raises(ValueError, match=rf"0 image slots.* {patches} image features"):
        model(text, torch.zeros(1, patches, width))


def test_a_fork_behind_a_hidden_token():
    hidden = torch.tensor([True, False])
    trunk = [9, IMAGE, 8]
    with pytest.raises(ValueError, match="branch 2 forks at position 3"):
        build_tree([Sequence(trunk, [Branch([5]), Branch([5], fork=2)], 2, hidden)], IMAGE, PAD)
    with pytest.raises(ValueError, match="branch 1 forks at position 3"):
        build_tree([Sequence(trunk[:2], [Branch([])], 2, hidden)], IMAGE, PAD)
    with pytest.raises(ValueError, match="branch 1 forks at position 0"):
        build_tree([Sequence(trunk, [Branch([5], fork=0)], 2, hidden)], IMAGE, PAD)
    # Behind a visible one, and before the picture.
    build_tree([Sequence(trunk, [Branch([5], fork=2)], 2, hidden.flip(0))], IMAGE, PAD)
    build_tree([Sequence(trunk, [Branch([5], fork=1)], 2, hidden)], IMAGE, PAD)
