"""What follows from the token tree on the embedded checkpoint: its logits are those of separate
sequences.
"""

import random
from dataclasses import replace

import pytest
import torch
from helpers import toy_model, toy_tokenizer, worst
from trees import toy_rows, toy_tree

from minialign.model.masks import PADDING, TRUNK, Branch, Sequence


@torch.no_grad()
def toy_logits(tree, features, model=None):
    """(B, T, V)."""
    model = model or toy_model()
    return model.lm_head(model(tree, features))


def alone(prompt: list[int], response: list[int], features, visible):
    """(logits, log-probs) at the response of a sequence that is nothing but a trunk."""
    tree = toy_tree([Sequence(prompt + response, [], len(features), visible)], False)
    logits = toy_logits(tree, features[None])[0, -len(response) - 1 : -1]
    return logits, logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def of_branch(tree, logits, row: int, number: int):
    """(logits, log-probs) at a branch of a tree."""
    columns = (tree.branch[row] == number).nonzero()[:, 0]
    found = logits[row, tree.parent[row, columns]]
    return found, found.log_softmax(-1).gather(-1, tree.ids[row, columns, None])[:, 0]


@pytest.mark.parametrize("drop_hidden", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_packed_pair_is_two_separate_sequences(seed, masked, drop_hidden):
    rows, features = toy_rows(seed)
    patches = features.shape[1]
    tree = toy_tree(
        [
            Sequence(
                prompt, [Branch(chosen), Branch(rejected)], patches, visible if masked else None
            )
            for prompt, chosen, rejected, visible in rows
        ],
        drop_hidden,
    )
    logits = toy_logits(tree, features)
    for row, (prompt, chosen, rejected, visible) in enumerate(rows):
        for number, response in ((1, chosen), (2, rejected)):
            expected = alone(prompt, response, features[row], visible if masked else None)
            for ours, theirs in zip(of_branch(tree, logits, row, number), expected, strict=True):
                assert ours.shape == theirs.shape and worst(ours, theirs) < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_branches_inside_an_answer_are_separate_sequences(seed):
    """Eq. 7: the trunk holds y+, and every branch forks where its sentence was cut."""
    rows, features = toy_rows(seed, 3)
    rng = random.Random(seed)
    sequences, cuts = [], []
    for prompt, chosen, rejected, visible in rows:
        cuts.append([rng.randrange(len(chosen)) for _ in range(rng.randrange(1, 4))])
        branches = [
            Branch(rejected[cut:] + rejected[: cut + 1], fork=len(prompt) + cut) for cut in cuts[-1]
        ]
        sequences.append(Sequence(prompt + chosen, branches, features.shape[1], visible))
    tree = toy_tree(sequences)
    logits = toy_logits(tree, features)
    for row, (prompt, chosen, _, visible) in enumerate(rows):
        for number, (cut, branch) in enumerate(
            zip(cuts[row], sequences[row].branches, strict=True), start=1
        ):
            expected = alone(prompt + chosen[:cut], branch.ids, features[row], visible)
            for ours, theirs in zip(of_branch(tree, logits, row, number), expected, strict=True):
                assert ours.shape == theirs.shape and worst(ours, theirs) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_dropped_tokens_are_masked_tokens(seed):
    rows, features = toy_rows(seed, 3, hide=[0.2, 0.5, 0.9, 0.99][seed])
    sequences = [Sequence(p, [Branch(c), Branch(r)], features.shape[1], v) for p, c, r, v in rows]
    dropped, masked = toy_tree(sequences, True), toy_tree(sequences, False)
    logits = toy_logits(dropped, features), toy_logits(masked, features)
    for row in range(len(rows)):
        kept = masked.visible[row] & (masked.branch[row] != PADDING)
        count = int(kept.sum())
        assert torch.equal(dropped.positions[row, :count], masked.positions[row, kept])
        assert worst(logits[0][row, :count], logits[1][row, kept]) < 1e-4
        assert (
            count == (dropped.branch[row] != PADDING).sum() < (masked.branch[row] != PADDING).sum()
        )


@pytest.mark.parametrize("seed", range(3))
def test_a_hidden_image_embedding_changes_no_text_logit_at_all(seed):
    rows, features = toy_rows(seed)
    tree = toy_tree(
        [Sequence(p, [Branch(c), Branch(r)], features.shape[1], v) for p, c, r, v in rows], False
    )
    text = (tree.feature < 0) & (tree.branch != PADDING)
    before = toy_logits(tree, features)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed)) * 5
    hidden = torch.stack([~visible for *_, visible in rows])
    after = toy_logits(tree, features + noise * hidden[..., None])
    assert torch.equal(before[text], after[text])
    # The picture's own logits were perturbed, though.
    assert not torch.equal(before[tree.feature >= 0], after[tree.feature >= 0])
    for row in range(len(rows)):  # one visible embedding of one row: that row changes, and no other
        one = torch.zeros_like(hidden)
        one[row, int((~hidden[row]).nonzero()[0])] = True
        after = toy_logits(tree, features + noise * one[..., None])
        behind = text & (tree.positions > rows[row][0].index(toy_tokenizer().image_id))
        assert (before[row][behind[row]] != after[row][behind[row]]).any()
        others = torch.arange(len(rows)) != row
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize("seed", range(3))
def test_branches_do_not_see_one_another(seed):
    rows, features = toy_rows(seed)
    cut = 3
    sequences = [
        Sequence(
            p + c,
            [Branch(r, len(p) + cut), Branch(c[cut:], len(p) + cut), Branch(r)],
            features.shape[1],
            v,
        )
        for p, c, r, v in rows
    ]
    tree = toy_tree(sequences)
    before = toy_logits(tree, features)

    def changed(row: int, column: int):
        """(T,) bool: where the row's logits are not equal to the last bit, once this token is
        another.
        """
        ids = tree.ids.clone()
        ids[row, column] = 5 + (ids[row, column] + 7) % (toy_model().config.text.vocab_size - 5)
        return (toy_logits(replace(tree, ids=ids), features) != before).any(-1)

    for row, (_, chosen, _, _) in enumerate(rows):
        own = {
            name: (tree.branch[row] == name).nonzero()[:, 0].tolist()
            for name in (PADDING, TRUNK, 1, 2, 3)
        }
        answer = own[TRUNK][-len(chosen) :]
        everyone = [own[1], own[2], own[3]]
        # A branch's token changes that branch alone.
        cases = [(own[number][0], [own[number]]) for number in (1, 2, 3)]
        cases += [
            # On the trunk, at the fork: not the branches that fork there.
            (answer[cut], [answer[cut:], own[3]]),
            (answer[cut - 1], [answer[cut - 1 :], *everyone]),  # before it: everyone
            (own[TRUNK][0], [own[TRUNK], *everyone]),
            *((pad, [[pad]]) for pad in own[PADDING][:1]),
        ]
        for column, seen_by in cases:
            found = changed(row, column)
            columns = set(found[row].nonzero()[:, 0].tolist())
            assert (
                columns <= set(sum(seen_by, [])) and not found[torch.arange(len(rows)) != row].any()
            )
            assert column in columns and all(columns & set(part) for part in seen_by)


@pytest.mark.parametrize("seed", range(2))
def test_the_other_rows_of_a_batch_change_nothing(seed):
    rows, features = toy_rows(seed, 3)
    sequences = [Sequence(p, [Branch(c), Branch(r)], features.shape[1], v) for p, c, r, v in rows]
    tree = toy_tree(sequences)
    together = toy_logits(tree, features)
    for row, sequence in enumerate(sequences):
        single = toy_tree([sequence])
        count = single.ids.shape[1]
        assert worst(together[row, :count], toy_logits(single, features[row : row + 1])[0]) < 1e-4
