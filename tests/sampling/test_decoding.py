"""What makes decoding quick changes nothing but time: what has ended left out, fixed shapes, few
ids sorted."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from decoding import SEEDS, random_rows, seeds_of
from helpers import IMAGE, random_ids, random_model, worst
from policies import wrap_layers

from minialign.model.llama import KVCache
from minialign.model.masks import PADDING, Branch, Sequence, TokenTree, dense_mask
from minialign.sampling import generate
from minialign.sampling.generate import Completion, Sampling, pick

STOPS = set(range(4, 14))  # of 50 ids: branches end after some five tokens, at different times
SAMPLINGS = [Sampling(16, 0.0), Sampling(16, 0.6), Sampling(16, 1.3, 0.9)]


@pytest.fixture
def fed(monkeypatch) -> list:
    """What every decoding step is given: (its columns, the tree, the addresses of what it writes
    to)."""
    seen, plain = [], generate.next_logits

    def noted(model, new, kept, tree):
        stored = [tensor for each in kept.layers for tensor in (each.keys, each.values)]
        written = [kept.filled, tree.ids, *stored]
        seen.append((new, tree, [tensor.data_ptr() for tensor in written]))
        return plain(model, new, kept, tree)

    monkeypatch.setattr(generate, "next_logits", noted)
    return seen


@pytest.fixture
def caches(monkeypatch) -> list[KVCache]:
    """The caches that are made."""
    seen = []

    def noted(*args):
        seen.append(KVCache(*args))
        return seen[-1]

    monkeypatch.setattr(generate, "KVCache", noted)
    return seen


def drawn(seed: int, sampling: Sampling, fixed: bool, model=None) -> list[list[Completion]]:
    rows, features = random_rows(seed)
    model, seeds = model or random_model(seed), seeds_of(rows, seed)
    return generate.generate(model, rows, features, sampling, STOPS, seeds, fixed=fixed)


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
    passed = cumulative <= uniform[..., None].double() * cumulative[..., -1:]
    chosen = passed.sum(-1, keepdim=True)
    return order.gather(-1, chosen)[..., 0]


# ---------------------------------------------------------------- what has ended is left out


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_step_is_wider_than_what_goes_on(seed, sampling, fed):
    """As many places as the row with most branches has left; rows that have ended go when they are
    half of all."""
    done = drawn(seed, sampling, fixed=False)
    lengths = [[len(completion.ids) for completion in row] for row in done]
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
    cache = KVCache(config, 5, 9, torch.zeros(()))
    shape = (5, config.num_key_value_heads, 4, config.head_dim)
    given = [torch.randn(2, *shape, generator=generator) for _ in range(config.num_hidden_layers)]
    first = cache.next_columns(4)
    for layer, both in zip(cache.layers, given, strict=True):
        layer.put(first, *both)
    rows = torch.tensor([1, 2, 4])
    cache.keep(rows)
    new = torch.randn(2, 3, *shape[1:2], 1, config.head_dim, generator=generator)
    then = cache.next_columns(1)
    assert first.tolist() == [0, 1, 2, 3] and then.tolist() == [4] and cache.filled == 5
    for layer, both in zip(cache.layers, given, strict=True):
        layer.put(then, *new)
        for found, whole, last in zip((layer.keys, layer.values), both, new, strict=True):
            assert torch.equal(found[:, :, :5], torch.cat([whole[rows], last], dim=2))


# ---------------------------------------------------------------- fixed shapes


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("seed", range(12))
def test_both_forms_give_the_same(seed, sampling, fed):
    grown = drawn(seed, sampling, fixed=False)
    assert len({len(completion.ids) for row in grown for completion in row}) > 2
    fed.clear()
    assert_same(drawn(seed, sampling, fixed=True), grown)
    steps = {(new.ids.shape, tree.ids.shape, *written) for new, tree, written in fed}
    assert len(steps) == 1 < len(fed)
    for new, tree, _ in fed:
        assert_padding_sees_itself(new, tree)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_forms_end_where_the_positions_do(seed):
    few = copy.deepcopy(random_model(seed))
    few.config = replace(few.config, text=replace(few.config.text, max_position_embeddings=22))
    grown = drawn(seed, SAMPLINGS[1], False, few)
    assert any(not each.stopped and len(each.ids) < 16 for row in grown for each in row)
    assert_same(drawn(seed, SAMPLINGS[1], True, few), grown)


@pytest.mark.parametrize("seed", SEEDS)
def test_free_columns_add_nothing_whatever_lay_in_memory(seed, monkeypatch):
    """What is taken without being cleared holds NaN here."""
    grown, empty = drawn(seed, SAMPLINGS[1], fixed=False), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.empty(like.shape, dtype=like.dtype))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a: torch.empty(*a, dtype=t.dtype))
    assert_same(drawn(seed, SAMPLINGS[1], fixed=True), grown)


def test_the_host_learns_one_step_later_that_all_have_ended(fed):
    """A fixed context is asked about the step in progress and answers of the one before."""
    context = object.__new__(generate.FixedContext)
    context.asked = None
    going, ended = torch.ones(2, 3).bool(), torch.zeros(2, 3).bool()
    answers = [context.all_ended(each) for each in (going, going, ended, ended)]
    assert answers == [False, False, False, True]
    sampling, seen = Sampling(40, 0.6), 0
    for seed in range(4):
        fed.clear()
        done = drawn(seed, sampling, fixed=True)
        longest = max(len(completion.ids) for row in done for completion in row)
        if longest < sampling.max_new_tokens:
            assert len(fed) == longest  # the last draws nothing that counts
            seen += 1
    assert seen


def test_compiled_layers_sample_the_same_and_compile_few_times(compilations, monkeypatch):
    """--compile: steps of a fixed context run compiled, whatever the lengths and the number of rows
    and branches; prompts and growing contexts, each of another length, run as plain code. Sizes
    that are equal at first, here rows, places and heads, are taken for one: hence more than one. A
    size of 1 would be one more."""
    model = copy.deepcopy(random_model(0))
    wrap_layers(model, recompute=False, compile=True)
    for seed, limit in enumerate([5, 40, 8, 12, 30, 7, 9]):
        rng = random.Random(seed)
        count, branches = 4, 4  # as many as heads, too
        if seed > 0:
            count, branches = rng.randrange(2, 6), rng.randrange(2, 5)
        rows = []
        for _ in range(count):
            trunk = random_ids(rng, rng.randrange(4, 150))
            rows.append(Sequence(trunk, [Branch(random_ids(rng, 1), 3)] * branches))
        given = rows, None, Sampling(limit, 1.0), STOPS, seeds_of(rows, seed)
        expected = generate.generate(random_model(0), *given, fixed=False)
        assert_same(generate.generate(model, *given, fixed=False), expected)
        compiled = len(compilations)
        assert_same(generate.generate(model, *given, fixed=True), expected)
        assert compiled == 0 if seed == 0 else compiled > 0
    assert len(compilations) <= 3


class RefusedGraph:
    """A GPU that captures nothing."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        raise RuntimeError("operation not permitted when stream is capturing")

    def __exit__(self, *_):
        pass


def test_where_no_graph_can_be_made_the_plain_step_serves(monkeypatch, capsys):
    """It is said once, and nothing else changes."""
    expected, tried = drawn(2, SAMPLINGS[1], fixed=True), []
    add = generate.FixedContext.add

    def add_and_capture(self, new):
        if self.steps == 1:
            tried.append(new)
            self.capture(new)
        add(self, new)

    generate.tell_once.cache_clear()
    monkeypatch.setattr(generate.FixedContext, "add", add_and_capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RefusedGraph)
    monkeypatch.setattr(torch.cuda, "graph", RefusedGraph)
    streams = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the usual one")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    assert [drawn(2, SAMPLINGS[1], fixed=True) for _ in range(2)] == [expected] * 2
    assert len(tried) == 2 and streams == ["the usual one"] * 2
    message = capsys.readouterr().err
    assert message.count("without a CUDA graph") == 1 and "not permitted" in message


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_keys_of_the_trunk_are_stored_once(seed, fixed, caches):
    """One branch or eight: the bytes of keys and values grow by those of the new tokens alone."""
    model, limit = random_model(seed), 6
    text, trunk = model.config.text, [IMAGE + 1] * random.Random(seed).randrange(300, 500)
    for count in (1, 8):
        rows = [Sequence(trunk, [Branch([])] * count)] * 2
        generate.generate(model, rows, None, Sampling(limit, 0.0), set(), fixed=fixed)
    # Bytes of a token.
    column = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    for cache, count in zip(caches, (1, 8), strict=True):
        assert cache.filled == len(trunk) + count * (limit - 1)
        taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        room = taken - 2 * column * (len(trunk) + count * limit)
        assert 0 <= room < 2 * column * generate.ROUND
        assert cache.layers[0].keys.shape[2] % generate.ROUND == 0


# ---------------------------------------------------------------- sorting


@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.6, 0.05])
@pytest.mark.parametrize("vocabulary", [7, 32, 33, 300, 3000])
def test_what_is_drawn_is_that_of_the_sorted_vocabulary(vocabulary, top_p):
    """Flat and peaked distributions, with many equals and with impossible ids; also across the
    first ids sorted."""
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
    """Probabilities fall by exp(-0.2): id k where 1 - exp(-0.2 k) passes. Only one row takes more
    of the vocabulary."""
    sizes, plain = [], torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda self, k: sizes.append((len(self), k)) or plain(self, k)
    )
    logits = torch.linspace(0, -600, 3000).expand(5, -1)
    uniform = torch.tensor([0.1, 0.5, 0.9, 0.99, 0.9999])
    assert pick(logits, uniform, Sampling()).tolist() == [0, 3, 11, 23, 46]
    assert sizes == [(5, 32), (1, 1024)]
