"""What makes decoding quick changes nothing but time: what has ended left out, fixed shapes, few ids sorted."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from helpers import IMAGE, random_ids, random_model, worst
from test_generate import SEEDS, random_rows, seeds_of

from minialign import decoding, generate
from minialign.compiled import compiled
from minialign.generate import Completion, Sampling, pick
from minialign.llama import KVCache
from minialign.masks import PADDING, Branch, Sequence, TokenTree, dense_mask

STOPS = set(range(4, 14))  # of 50 ids: branches end after some five tokens, at different times
SAMPLINGS = [Sampling(16, 0.0), Sampling(16, 0.6), Sampling(16, 1.3, 0.9)]


@pytest.fixture
def fed(monkeypatch) -> list:
    """What every decoding step is given: (its columns, the tree, the addresses of what it writes to)."""
    seen, plain = [], decoding.next_logits

    def noted(model, new, cache, tree):
        seen.append((new, tree, [tensor.data_ptr() for tensor in (cache.keys, cache.values, cache.length, tree.ids)]))
        return plain(model, new, cache, tree)

    monkeypatch.setattr(decoding, "next_logits", noted)
    return seen


@pytest.fixture
def caches(monkeypatch) -> list[KVCache]:
    """The caches that are made."""
    seen = []

    def noted(*args):
        seen.append(KVCache(*args))
        return seen[-1]

    monkeypatch.setattr(decoding, "KVCache", noted)
    return seen


def drawn(seed: int, sampling: Sampling, fixed: bool, model=None) -> list[list[Completion]]:
    rows, features = random_rows(seed)
    return generate.generate(
        model or random_model(seed), rows, features, sampling, STOPS, seeds_of(rows, seed), fixed=fixed
    )


def assert_same(ours: list[list[Completion]], theirs: list[list[Completion]]) -> None:
    for a, b in zip(sum(ours, []), sum(theirs, []), strict=True):
        assert a.ids == b.ids and a.stopped == b.stopped
        assert worst(torch.tensor(a.logps), torch.tensor(b.logps)) < 1e-5


def assert_padding_sees_itself(new: TokenTree, tree: TokenTree) -> None:
    assert (dense_mask(new, tree)[:, 0][new.branch == PADDING].sum(-1) == 1).all()


def plain_pick(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The whole vocabulary sorted, for every token."""
    probs = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    cumulative = probs.cumsum(-1)
    cumulative = probs.masked_fill(cumulative - probs >= sampling.top_p, 0).cumsum(-1)
    chosen = (cumulative <= uniform[..., None].double() * cumulative[..., -1:]).sum(-1, keepdim=True)
    return order.gather(-1, chosen)[..., 0]


# What has ended is left out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_step_is_wider_than_what_goes_on(seed, sampling, fed):
    """As many places as the row with most branches has left; rows that have ended go when they are half of all."""
    lengths = [[len(completion.ids) for completion in row] for row in drawn(seed, sampling, fixed=False)]
    assert len(fed) == max(map(max, lengths)) - 1
    rows = len(lengths)
    for step, (new, tree, _) in enumerate(fed, start=1):
        left = [sum(length > step for length in row) for row in lengths]
        live = sum(count > 0 for count in left)
        rows = live if 2 * live <= rows else rows
        assert new.ids.shape == (rows, max(left)) and len(tree.ids) == rows
        assert new.visible.sum() == sum(left)
        assert torch.equal(tree.ids[:, -max(left) :], new.ids)
        assert_padding_sees_itself(new, tree)


def test_rows_that_are_kept_keep_their_keys():
    generator = torch.Generator().manual_seed(0)
    config = random_model(0).config.text
    cache, shape = KVCache(config, 5, 9, torch.zeros(())), (5, config.num_key_value_heads, 4, config.head_dim)
    given = [torch.randn(2, *shape, generator=generator) for _ in range(config.num_hidden_layers)]
    for layer, (key, value) in enumerate(given):
        cache.append(layer, key, value, 4)
    cache.length += 4
    rows = torch.tensor([1, 2, 4])
    cache.keep(rows)
    new = torch.randn(2, 3, *shape[1:2], 1, config.head_dim, generator=generator)
    for layer, both in enumerate(given):
        for found, whole, last in zip(cache.append(layer, *new, 5), both, new, strict=True):
            assert torch.equal(found, torch.cat([whole[rows], last], dim=2))


# Fixed shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seed", range(12))
def test_both_forms_give_the_same(seed, sampling, fed):
    grown = drawn(seed, sampling, fixed=False)
    assert len({len(completion.ids) for row in grown for completion in row}) > 2
    fed.clear()
    assert_same(drawn(seed, sampling, fixed=True), grown)
    assert len({(new.ids.shape, tree.ids.shape, *written) for new, tree, written in fed}) == 1 < len(fed)
    for new, tree, _ in fed:
        assert_padding_sees_itself(new, tree)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_forms_end_where_the_positions_do(seed):
    few = copy.deepcopy(random_model(seed))
    few.config = replace(few.config, text=replace(few.config.text, max_position_embeddings=22))
    grown = drawn(seed, SAMPLINGS[1], False, few)
    assert any(not completion.stopped and len(completion.ids) < 16 for row in grown for completion in row)
    assert_same(drawn(seed, SAMPLINGS[1], True, few), grown)


@pytest.mark.parametrize("seed", SEEDS)
def test_free_columns_add_nothing_whatever_lay_in_memory(seed, monkeypatch):
    grown, empty = drawn(seed, SAMPLINGS[1], fixed=False), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.empty(like.shape, dtype=like.dtype))
    assert_same(drawn(seed, SAMPLINGS[1], fixed=True), grown)


def test_a_step_is_compiled_twice_at_most(compilations, monkeypatch):
    """Whatever the lengths and the number of rows and branches, as one graph each (`fullgraph`). Sizes that are equal
    at first, here rows, places and heads, are taken for one: hence a second. A size of 1 would be one more."""
    model, plain = random_model(0), decoding.next_logits
    monkeypatch.setattr(decoding, "next_logits", lambda *given: compiled(plain, "reduce-overhead")(*given))
    for seed, limit in enumerate([5, 90, 8, 12, 40, 7, 60, 9]):
        rng = random.Random(seed)
        count, branches = (4, 4) if seed == 0 else (rng.randrange(2, 6), rng.randrange(2, 5))  # as many as heads, too
        rows = [
            Sequence(random_ids(rng, rng.randrange(4, 150)), [Branch(random_ids(rng, 1), 3)] * branches)
            for _ in range(count)
        ]
        given = rows, None, Sampling(limit, 1.0), STOPS, seeds_of(rows, seed)
        done = generate.generate(model, *given, fixed=True)
        with monkeypatch.context() as patched:
            patched.setattr(decoding, "next_logits", plain)
            assert_same(done, generate.generate(model, *given, fixed=False))
    assert len(compilations) <= 2


# Keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_keys_of_the_trunk_are_stored_once(seed, fixed, caches):
    """One branch or eight: the bytes of keys and values grow by those of the new tokens alone."""
    model, limit = random_model(seed), 6
    text, trunk = model.config.text, [IMAGE + 1] * random.Random(seed).randrange(300, 500)
    for count in (1, 8):
        rows = [Sequence(trunk, [Branch([])] * count)] * 2
        generate.generate(model, rows, None, Sampling(limit, 0.0), set(), fixed=fixed)
    column = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4  # bytes of a token
    for cache, count in zip(caches, (1, 8), strict=True):
        assert cache.length == len(trunk) + count * (limit - 1)
        room = cache.keys.nbytes + cache.values.nbytes - 2 * column * (len(trunk) + count * limit)
        assert 0 <= room < 2 * column * decoding.ROUND and cache.keys.shape[3] % decoding.ROUND == 0


# Sorting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.6, 0.05])
@pytest.mark.parametrize("vocabulary", [7, 32, 33, 300, 3000])
def test_what_is_drawn_is_that_of_the_sorted_vocabulary(vocabulary, top_p):
    """Flat and peaked distributions, with many equals and with impossible ids; also across the first ids sorted."""
    generator = torch.Generator().manual_seed(vocabulary)
    flatness = torch.tensor([0.0, 0.2, 1.0, 4.0])[:, None, None]
    logits = torch.randn(4, 60, vocabulary, generator=generator) * flatness
    logits[:, 20:40] = logits[:, 20:40].round()  # equals
    logits[:, 40:, : vocabulary // 3] = -torch.inf
    uniform = torch.rand(4, 60, generator=generator)
    uniform[:, ::10], uniform[:, 1::10] = 0.0, 1 - 2**-24
    for temperature in (0.3, 1.0):
        sampling = Sampling(1, temperature, top_p)
        assert torch.equal(pick(logits, uniform, sampling), plain_pick(logits, uniform, sampling))


def test_few_ids_are_sorted_where_few_are_likely(monkeypatch):
    """Probabilities fall by exp(-0.2): id k where 1 - exp(-0.2 k) passes. Only one row takes more of the vocabulary."""
    sizes, plain = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, k: sizes.append((len(self), k)) or plain(self, k))
    logits = torch.linspace(0, -600, 3000).expand(5, -1)
    assert pick(logits, torch.tensor([0.1, 0.5, 0.9, 0.99, 0.9999]), Sampling()).tolist() == [0, 3, 11, 23, 46]
    assert sizes == [(5, 32), (1, 1024)]
