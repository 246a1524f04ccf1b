"""Decoding: against transformers' generate, against one branch at a time, against the log-probs of
training."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from decoding import SEEDS, random_rows, seeds_of
from helpers import (
    IMAGE,
    plain_greedy,
    random_model,
    refused,
    toy_features,
    toy_model,
    toy_processor,
    toy_tokenizer,
    worst,
)

from minialign.align.logps import branch_logps
from minialign.edge import CHECKPOINT
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.sampling.generate import Completion, Sampling, generate, pick
from minialign.seeds import stable_seed
from minialign.toy import world

GREEDY = Sampling(max_new_tokens=24, temperature=0.0)


def features_of(rows: list[Sequence], features: torch.Tensor) -> list[torch.Tensor | None]:
    """Each row's own features (1, patches, D), or None."""
    pictures = iter(features)
    return [next(pictures)[None] if row.image_tokens else None for row in rows]


def completed(rows: list[Sequence], done: list[list[Completion]]) -> list[Sequence]:
    """The rows with what was said behind every branch."""
    whole = []
    for row, completions in zip(rows, done, strict=True):
        both = zip(row.branches, completions, strict=True)
        branches = [Branch(branch.ids + new.ids, branch.fork) for branch, new in both]
        whole.append(replace(row, branches=branches))
    return whole


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("first", [0, 40])
def test_greedy_equals_transformers(oracle, first):
    """Pictures and prompts of the embedded world, prompts of unlike length in one batch."""
    tokenizer, model = toy_tokenizer(), toy_model()
    patches = model.config.vision.patches
    others = ["Is there a cup?", "Do you see an umbrella?", "What place is this?"]
    questions = [*world.DESCRIBE, *others]
    indices = tuple(range(first, first + len(questions)))
    prompts = [tokenizer.prompt([("user", question)]) for question in questions]
    assert len({len(prompt) for prompt in prompts}) > 2
    ours = generate(
        model,
        [Sequence(p, [Branch([])], patches) for p in prompts],
        toy_features(indices),
        Sampling(60, 0.0),
        {tokenizer.eos_id},
        pad_id=tokenizer.pad_id,
    )
    kind = oracle.transformers.LlavaForConditionalGeneration
    peer = kind.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    for [completion], prompt, i in zip(ours, prompts, indices, strict=True):
        expanded: list[int] = []
        for token in prompt:
            expanded += [token] * (patches if token == tokenizer.image_id else 1)
        pixels = toy_processor()(world.picture(world.make_scene("validation", i)))
        ids = torch.tensor([expanded])
        theirs = peer.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=60,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            suppress_tokens=[tokenizer.image_id],
        )
        assert completion.ids == theirs[0, len(expanded) :].tolist()
        assert completion.stopped == (completion.ids[-1] == tokenizer.eos_id)


# ---------------------------------------------------------------- branches


@pytest.mark.parametrize("seed", SEEDS)
def test_branches_equal_each_branch_alone(seed):
    """... in the plain way: a sequence of its own, a whole forward pass per token."""
    model = random_model(seed)
    rows, features = random_rows(seed)
    stops = {5, 6, 7, 8}
    done = generate(model, rows, features, GREEDY, stops)
    for row, picture, completions in zip(rows, features_of(rows, features), done, strict=True):
        assert len(completions) == len(row.branches)
        for branch, completion in zip(row.branches, completions, strict=True):
            ids = row.trunk[: branch.fork] + branch.ids
            picture_seen = picture[0] if IMAGE in ids else None
            plain, logps = plain_greedy(model, ids, picture_seen, stops, GREEDY.max_new_tokens)
            assert completion.ids == plain
            assert worst(torch.tensor(completion.logps), torch.tensor(logps)) < 1e-4
            assert completion.stopped == (plain[-1] in stops)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_recorded_logps_are_those_of_training(seed, temperature):
    """The untempered distribution's, whatever the temperature: the completed tree scored anew."""
    model = random_model(seed)
    rows, features = random_rows(seed)
    sampling, seeds = Sampling(12, temperature, 0.8), seeds_of(rows, seed)
    done = generate(model, rows, features, sampling, {5, 6, 7}, seeds)
    whole = branch_logps(model, build_tree(completed(rows, done), IMAGE, pad_id=0), features)
    forced = branch_logps(model, build_tree(rows, IMAGE, pad_id=0), features)
    for row, completions in enumerate(done):
        for branch, completion in enumerate(completions):
            assert len(completion.logps) == len(completion.ids) > 0
            assert abs(sum(completion.logps) - (whole - forced)[row, branch].item()) < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_logps_on_the_embedded_world(temperature):
    model, tokenizer = toy_model(), toy_tokenizer()
    features = toy_features((0, 1, 2))
    prompts = [tokenizer.prompt([("user", question)]) for question in world.DESCRIBE]
    branches = [Branch([]), Branch(tokenizer.encode("This is"))]
    rows = [Sequence(prompt, branches, 36) for prompt in prompts]
    sampling = Sampling(30, temperature)
    done = generate(model, rows, features, sampling, {tokenizer.eos_id}, seeds_of(rows))
    whole = branch_logps(model, build_tree(completed(rows, done), tokenizer.image_id, 0), features)
    forced = branch_logps(model, build_tree(rows, tokenizer.image_id, 0), features)
    recorded = torch.tensor([[sum(c.logps) for c in cs] for cs in done])
    assert worst(recorded, whole - forced) < 1e-4


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("seed", SEEDS)
def test_completions_do_not_depend_on_the_batch(seed):
    model, sampling, stops = random_model(seed), Sampling(12, 1.0, 0.95), {5, 6}
    rows, features = random_rows(seed)
    pictures, seeds = features_of(rows, features), seeds_of(rows, seed)
    together = generate(model, rows, features, sampling, stops, seeds)
    each = zip(rows, pictures, seeds, strict=True)
    alone = [generate(model, [r], p, sampling, stops, [s])[0] for r, p, s in each]
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    seen = torch.cat([pictures[i] for i in order if pictures[i] is not None])
    other_rows, other_seeds = [rows[i] for i in order], [seeds[i] for i in order]
    shuffled = generate(model, other_rows, seen, sampling, stops, other_seeds)
    for i, row in enumerate(together):
        for a, b, c in zip(row, alone[i], shuffled[order.index(i)], strict=True):
            assert a.ids == b.ids == c.ids and a.stopped == b.stopped == c.stopped
            assert worst(torch.tensor(a.logps), torch.tensor(b.logps)) < 1e-4
    again = generate(model, rows, features, sampling, stops, seeds)
    assert [[c.ids for c in row] for row in again] == [[c.ids for c in row] for row in together]
    other = generate(model, rows, features, sampling, stops, seeds_of(rows, seed + 100))
    assert [[c.ids for c in row] for row in other] != [[c.ids for c in row] for row in together]


def test_stable_seed():
    """The same on every machine (a value that was derived with sha256sum), 63 bits, and parts do
    not run together."""
    # printf '1\x1fab\x1f2' | sha256sum | cut -c1-16, halved
    assert stable_seed(1, "ab", 2) == 0x7C72159F62A0E6EF >> 1
    assert stable_seed(1, "ab", 2) == stable_seed("1", "ab", "2")
    parts = [("a", "bc"), ("ab", "c"), ("abc",), ("a", "bc", 0)]
    assert len({stable_seed(*each) for each in parts}) == 4
    assert all(0 <= stable_seed(i) < 2**63 for i in range(200))


# ---------------------------------------------------------------- stopping and the image token


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stops_at_stop_tokens_and_at_the_limit(seed, temperature):
    model = random_model(seed)
    rows, features = random_rows(seed)
    sampling = Sampling(8, temperature)
    free = sum(generate(model, rows, features, sampling, set(), seeds_of(rows)), [])
    assert all(len(c.ids) == len(c.logps) == 8 and not c.stopped for c in free)
    for step in (0, 3, 7):  # at once, midway, with the very last token
        stop = free[0].ids[step]
        cut = sum(generate(model, rows, features, sampling, {stop}, seeds_of(rows)), [])
        for whole, part in zip(free, cut, strict=True):
            end = whole.ids.index(stop) + 1 if stop in whole.ids else 8
            assert part.ids == whole.ids[:end]  # the stop token included
            assert part.stopped == (stop in whole.ids)
    [[one]] = generate(model, [Sequence([1, 5], [Branch([])])], None, Sampling(1, 0.0), set())
    assert len(one.ids) == 1 and not one.stopped


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_image_token_is_never_sampled(seed, temperature):
    model = copy.deepcopy(random_model(seed))
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    head.weight = model.lm_head.weight
    with torch.no_grad():
        head.bias.zero_()
        head.bias[IMAGE] = 50.0  # by far the highest logit
    model.lm_head = head
    rows, features = random_rows(seed)
    for row in generate(model, rows, features, Sampling(10, temperature), set(), seeds_of(rows)):
        for completion in row:
            assert len(completion.ids) == 10 and IMAGE not in completion.ids
            # Of the whole distribution, as training computes them.
            assert max(completion.logps) < -20


# ---------------------------------------------------------------- pick


def test_pick_inverts_the_cumulative_sum():
    """Probabilities 1/2, 1/4, 1/8, 1/8 at ids 2, 0, 3, 1: intervals in that order, ties by id."""
    logits = torch.log(torch.tensor([0.25, 0.125, 0.5, 0.125]))
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.87, 0.88, 0.999999])
    ids = pick(logits.expand(8, 4), uniform, Sampling(temperature=1.0))
    assert ids.tolist() == [2, 2, 0, 0, 1, 1, 3, 3]


def test_pick_at_the_edges():
    """Eight equal logits: exactly 1/8 each, half-open intervals, and a set that reaches top_p is
    whole."""
    logits, uniform = torch.zeros(8, 8), torch.arange(8) / 8
    assert pick(logits, uniform, Sampling(temperature=1.0)).tolist() == list(range(8))
    half = pick(logits, uniform, Sampling(temperature=1.0, top_p=0.5))
    assert half.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    more = pick(logits, uniform, Sampling(temperature=1.0, top_p=0.51))
    assert more.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1.0, {0, 1, 2, 3}),
        (0.9, {0, 1, 2, 3}),  # 0.875 is not enough yet
        (0.8, {0, 1, 2}),
        (0.6, {0, 2}),
        (0.45, {2}),
        (0.01, {2}),  # never empty
    ],
)
def test_top_p_keeps_the_smallest_set(top_p, kept):
    """Probabilities 1/2, 1/4, 1/8 (id 1, the first of the tie), 1/8; what is kept is
    renormalised."""
    weights = torch.tensor([0.25, 0.125, 0.5, 0.125])
    uniform = torch.arange(8000) / 8000
    ids = pick(weights.log().expand(8000, 4), uniform, Sampling(temperature=1.0, top_p=top_p))
    assert set(ids.tolist()) == kept
    share = torch.bincount(ids, minlength=4) / 8000
    expected = torch.tensor([weights[i] if i in kept else 0 for i in range(4)])
    assert worst(share, expected / expected.sum()) < 1e-3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_follow_the_softmax(seed, temperature):
    """Pearson's chi-square over 20,000 draws, 11 degrees of freedom: below 31.3 but for one in a
    thousand."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, generator=generator) * 1.5
    uniform = torch.rand(20000, generator=generator)
    ids = pick(logits.expand(20000, 12), uniform, Sampling(temperature=temperature))
    expected = 20000 * torch.softmax(logits / temperature, dim=0)
    pooled = expected.clamp(min=5)  # cells with few expected draws weigh less
    assert ((torch.bincount(ids, minlength=12) - expected) ** 2 / pooled).sum() < 31.3


@pytest.mark.parametrize("seed", SEEDS)
def test_temperature_zero_is_the_argmax(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 3, 40, generator=generator)
    uniform = torch.rand(5, 3, generator=generator)
    assert torch.equal(pick(logits, uniform, Sampling(temperature=0.0)), logits.argmax(-1))
    assert torch.equal(pick(logits, uniform, Sampling(temperature=1e-4)), logits.argmax(-1))
    nucleus = Sampling(temperature=2.0, top_p=1e-9)
    assert torch.equal(pick(logits, uniform, nucleus), logits.argmax(-1))


def test_pick_never_takes_what_is_impossible():
    """At both ends of the interval too, where rounding might step over the first or the last
    possible id."""
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [3, 500, 900]] = torch.tensor([0.1, 0.2, 0.3])
    for uniform in (0.0, 0.5, 1.0 - 2**-24):  # the largest that torch.rand gives
        taken = pick(logits, torch.tensor([uniform]), Sampling(temperature=1.0)).item()
        assert taken in (3, 500, 900)


@pytest.mark.parametrize("seed", range(3))
def test_a_branch_ends_where_the_positions_do(seed):
    """The decoder's positions are a limit of every branch by itself; a prompt that takes them all
    is refused."""
    model = random_model(seed)
    prompt, longer = [5, 6, 7], [5, 6, 7, 8, 9]
    few = copy.deepcopy(model)
    few.config = replace(model.config, text=replace(model.config.text, max_position_embeddings=8))
    rows = [Sequence(prompt, [Branch([])]), Sequence(longer, [Branch([]), Branch([11])])]
    whole = generate(model, rows, None, Sampling(20, 0.0), set())
    cut = generate(few, rows, None, Sampling(20, 0.0), set())
    for ours, theirs, room in zip(sum(cut, []), sum(whole, []), [5, 3, 2], strict=True):
        assert ours.ids == theirs.ids[:room] and not ours.stopped
    full = [Sequence([5] * 8, [Branch([])])]
    refused(lambda: generate(few, full, None, Sampling(2, 0.0), set()), "take 8 positions")
