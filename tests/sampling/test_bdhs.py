"""Algorithm 1: the branched completion, the loop over iterations, and what hides the picture."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import cuts, plain_greedy, random_toy, toy_model, toy_processor, toy_tokenizer, worst

import minialign.sampling.bdhs
from minialign.model.masks import image_attention_mask
from minialign.sampling.bdhs import Bdhs, BdhsConfig, Example, full_stop_ids, join, split_sentences
from minialign.sampling.generate import Sampling, generate
from minialign.sampling.noise import noise_of_seed
from minialign.toy import world


def examples(count: int, first: int = 0) -> list[Example]:
    """Records of the embedded world with their pictures."""
    found = []
    for raw in world.alignment_records(count, "validation", first):
        question, answer = (
            turn["value"].removeprefix("<image>\n") for turn in raw["conversations"]
        )
        picture = world.picture(world.scene_of(raw["image"]))
        found.append(Example(raw["id"], picture, [("user", question)], answer))
    return found


def never(texts, references):
    """A similarity by which everything differs."""
    return [0.0] * len(texts)


def always(texts, references):
    """A similarity by which everything is the same."""
    return [1.0] * len(texts)


def sampler(model=None, similarity=never, limit=12, temperature=0.0, **knobs) -> Bdhs:
    """Algorithm 1 with little knobs."""
    config = BdhsConfig(**knobs, sampling=Sampling(limit, temperature))
    return Bdhs(model or toy_model(), toy_tokenizer(), toy_processor(), similarity, config)


@pytest.fixture
def calls(monkeypatch) -> list[SimpleNamespace]:
    """What `generate` is given and what it gives back, call by call."""
    seen = []

    def spy(model, sequences, features, sampling, stops, seeds, pad_id):
        done = generate(model, sequences, features, sampling, stops, seeds, pad_id)
        seen.append(
            SimpleNamespace(
                sequences=sequences, features=features, stops=stops, seeds=seeds, done=done
            )
        )
        return done

    monkeypatch.setattr(minialign.bdhs, "generate", spy)
    return seen


@pytest.mark.parametrize(("rho_th", "seed"), [(0.0, 1), (0.5, 2), (0.7, 3), (0.99, 4), (1.0, 5)])
@pytest.mark.parametrize("make", [toy_model, random_toy])
def test_branches_equal_one_sentence_at_a_time(calls, make, rho_th, seed):
    """The plain Eq. 7: hidden image tokens masked but not dropped, prompt, true earlier sentences,
    kept part."""
    tokenizer, model, batch = toy_tokenizer(), make(), examples(4, 4 * seed)
    bdhs = sampler(model, rho_th=rho_th, seed=seed, n_bdhs=1, limit=20)
    results = bdhs.sample(batch)
    [call] = calls
    assert call.stops == full_stop_ids(tokenizer)
    for example, result, features, done, row in zip(
        batch, results, call.features, call.done, call.sequences, strict=True
    ):
        visible = image_attention_mask(36, rho_th, torch.Generator().manual_seed(result.mask_seed))
        assert torch.equal(visible, bdhs.mask(result.mask_seed, 36))
        prompt, rng = tokenizer.prompt(example.turns), random.Random(result.mask_seed)
        whole, seen = (
            prompt + tokenizer.encode(example.chosen),
            max(branch.fork for branch in row.branches),
        )
        assert row.trunk == whole[:seen]  # y+ as it is, as far as a branch sees it
        parts = cuts(example.chosen, rng)
        assert len(parts) == len(done)
        for (_, cut), completion in zip(parts, done, strict=True):
            ids = prompt + cut.kept_ids
            plain, logps = plain_greedy(model, ids, features, call.stops, 20, visible.tolist())
            assert completion.ids == plain
            assert worst(torch.tensor(completion.logps), torch.tensor(logps)) < 1e-4
        assert result.rejected == join([cut for _, cut in parts], done, tokenizer)


# Iterations
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("make", [toy_model, random_toy])
def test_pairs_do_not_depend_on_the_batch(make, temperature):
    """The number of iterations differs from example to example, so that batches shrink
    differently."""

    def similarity(texts, references):
        return [
            len(set(text.split()) & set(ref.split())) / 10
            for text, ref in zip(texts, references, strict=True)
        ]

    batch = examples(6)
    bdhs = sampler(
        make(), similarity, temperature=temperature, rho_th=0.7, n_bdhs=3, eps_s=0.6, seed=1
    )
    together = bdhs.sample(batch)
    assert [bdhs.sample([example])[0] for example in batch] == together
    assert bdhs.sample(batch[::-1])[::-1] == together
    assert bdhs.sample(batch[:4]) + bdhs.sample(batch[4:]) == together
    other = replace(bdhs, config=replace(bdhs.config, seed=2)).sample(batch)
    assert [r.rejected for r in other] != [r.rejected for r in together]
    assert all(a.mask_seed != b.mask_seed for a, b in zip(other, together, strict=True))


def test_only_too_similar_responses_are_sampled_again(calls):
    """Similarities by script: the examples are done after 1, 3, 2 and (never different) all 4
    iterations."""
    batch, asked = examples(4), []
    script = {
        batch[0].chosen: [0.96],
        batch[1].chosen: [0.97, 0.99, 0.5],  # eps_s itself is still too similar
        batch[2].chosen: [1.0, 0.96998],  # 0.97 when rounded, and yet below
        batch[3].chosen: [0.98, 0.98, 0.98, 1.0],
    }
    left = {chosen: list(values) for chosen, values in script.items()}

    def similarity(texts, references):
        asked.append(list(zip(texts, references, strict=True)))
        return [left[reference].pop(0) for reference in references]

    results = sampler(similarity=similarity, rho_th=0.7, n_bdhs=4, eps_s=0.97).sample(batch)
    assert [len(call) for call in asked] == [4, 3, 2, 1]
    assert [len(call.sequences) for call in calls] == [4, 3, 2, 1]
    assert [r.iterations for r in results] == [1, 3, 2, 4]
    assert [r.similarity for r in results] == [0.96, 0.5, 0.97, 1.0]
    assert [r.guided for r in results] == [True, True, True, False]
    assert not any(left.values())
    for example, result in zip(batch, results, strict=True):  # the text is that iteration's
        texts = [text for call in asked for text, reference in call if reference == example.chosen]
        assert len(texts) == result.iterations and result.rejected == texts[-1]
    assert len({r.mask_seed for r in results}) == 4


def test_what_the_limit_cuts_off_is_sampled_again(calls):
    """With room for one token a sentence ends by itself only where the full stop is all that is
    missing."""
    batch = examples(4)
    results = sampler(limit=1, n_bdhs=3, rho_th=0.7).sample(batch)
    assert [len(call.sequences) for call in calls] == [4, 4, 4]
    assert all(r.truncated and r.iterations == 3 for r in results)
    results = sampler(limit=60, n_bdhs=3, rho_th=0.7).sample(batch)
    assert not any(r.truncated for r in results) and all(r.iterations == 1 for r in results)


def test_an_empty_response_is_sampled_again(monkeypatch):
    texts = iter([["", "a."], ["b."]])
    monkeypatch.setattr(
        Bdhs, "iterate", lambda self, part, i, guided, *rest: (next(texts), [False] * len(part))
    )
    results = sampler(n_bdhs=5).sample(examples(2))
    assert [(r.rejected, r.iterations) for r in results] == [("b.", 2), ("a.", 1)]


@pytest.mark.parametrize("n_bdhs", [2, 3])
def test_the_last_iteration_is_unguided_and_final(calls, n_bdhs):
    tokenizer, batch = toy_tokenizer(), examples(3)
    results = sampler(similarity=always, rho_th=0.7, n_bdhs=n_bdhs).sample(batch)
    assert len(calls) == n_bdhs
    assert all(r.iterations == n_bdhs and r.similarity == 1.0 and not r.guided for r in results)
    for call in calls[:-1]:
        assert call.stops == full_stop_ids(tokenizer)
        assert [len(row.branches) for row in call.sequences] == [
            len(split_sentences(e.chosen)) for e in batch
        ]
    for example, result, row, [done] in zip(
        batch, results, calls[-1].sequences, calls[-1].done, strict=True
    ):
        assert row.trunk == tokenizer.prompt(example.turns)  # y+ is not there
        assert [b.ids for b in row.branches] == [[]]
        assert torch.equal(
            row.image_visible, sampler(rho_th=0.7).mask(result.mask_seed, 36)
        )  # the mask still is
        assert result.rejected == tokenizer.decode(done.ids).strip()
    assert calls[-1].stops == {tokenizer.eos_id}  # a whole response, not a sentence


def test_one_iteration_is_guided(calls):
    batch = examples(3)
    results = sampler(similarity=always, rho_th=0.7, n_bdhs=1).sample(batch)
    assert [(r.iterations, r.guided) for r in results] == [(1, True)] * 3
    assert [len(row.branches) for row in calls[0].sequences] == [
        len(split_sentences(e.chosen)) for e in batch
    ]


@pytest.mark.parametrize("n_bdhs", [1, 3])
def test_without_guidance_every_iteration_is_unguided(calls, n_bdhs):
    results = sampler(similarity=always, rho_th=0.7, n_bdhs=n_bdhs, guided=False).sample(
        examples(2)
    )
    assert not any(r.guided for r in results) and len(calls) == n_bdhs
    assert all(len(row.branches) == 1 for call in calls for row in call.sequences)


# What hides the picture
# --------------------------------------------------------------------------------------


def with_pictures_of(batch: list[Example], others: list[Example]) -> list[Example]:
    return [
        replace(example, image=other.image) for example, other in zip(batch, others, strict=True)
    ]


def all_logps(call) -> torch.Tensor:
    """The first new token's log-prob of every branch."""
    return torch.tensor([completion.logps[0] for row in call.done for completion in row])


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rho_one_hides_the_whole_picture(calls, guided, temperature):
    batch, others = examples(4), examples(4, 10)
    for rho_th, same in ((1.0, True), (0.5, False)):
        bdhs = sampler(
            random_toy(), temperature=temperature, rho_th=rho_th, n_bdhs=1, guided=guided
        )
        first, second = bdhs.sample(batch), bdhs.sample(with_pictures_of(batch, others))
        assert (first == second) or not same
        assert (worst(all_logps(calls[-1]), all_logps(calls[-2])) == 0) == same
        assert all(row.image_visible.any() != same for row in calls[-1].sequences)


@pytest.mark.parametrize("noise_steps", [100, 500])
def test_noise_is_another_way_to_blur_the_picture(calls, noise_steps):
    batch, others = examples(4), examples(4, 10)
    bdhs = sampler(random_toy(), rho_th=0.0, noise_steps=noise_steps, n_bdhs=1)
    first = bdhs.sample(batch)
    torch.manual_seed(0)  # no global randomness
    assert bdhs.sample(batch) == first
    bdhs.sample(with_pictures_of(batch, others))
    sampler(random_toy(), rho_th=0.0, n_bdhs=1).sample(batch)
    noisy, again, other, clean = calls
    assert torch.equal(noisy.features, again.features)
    assert worst(all_logps(noisy), all_logps(other)) > 1e-3  # the picture still shows
    assert worst(all_logps(noisy), all_logps(clean)) > 1e-3  # blurred
    assert all(row.image_visible.all() for row in noisy.sequences)
    for i, (example, result) in enumerate(
        zip(batch, first, strict=True)
    ):  # Eq. 9 on the raw picture
        picture = noise_of_seed(example.image, noise_steps, result.mask_seed)
        features = random_toy().encode_images(toy_processor()(picture))
        assert worst(features[0], noisy.features[i]) < 1e-4


@pytest.mark.parametrize("rho_th", [0.3, 0.7, 0.99])
def test_masks_follow_from_example_and_iteration(rho_th):
    """Over many examples a share of rho_th is hidden; id, iteration and seed all matter."""
    bdhs, example = sampler(rho_th=rho_th, seed=3), examples(1)[0]
    seeds = [
        bdhs.mask_seed(replace(example, id=f"x{i}"), iteration)
        for i in range(150)
        for iteration in (1, 2)
    ]
    assert len(set(seeds)) == 300
    assert sampler(rho_th=rho_th, seed=4).mask_seed(replace(example, id="x0"), 1) != seeds[0]
    hidden = torch.stack([~bdhs.mask(seed, 36) for seed in seeds]).float().mean().item()
    assert abs(hidden - rho_th) < 4 * (rho_th * (1 - rho_th) / (300 * 36)) ** 0.5
