"""Algorithm 1 (`sample_bdhs.sample`): the branched completion, the loop over iterations, and what
hides the picture."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import cuts, plain_greedy, random_toy, toy_assistant, toy_model, toy_tokenizer, worst

import sample_bdhs
from minialign.data.records import instruct_record
from minialign.model.masks import image_attention_mask, mask_of_seed
from minialign.sampling.bdhs import join, split_sentences
from minialign.sampling.generate import generate
from minialign.sampling.noise import noise_of_seed
from minialign.sampling.pairs_file import Sampled
from minialign.toy import world
from sample_bdhs import Config, Example, draw_seed

PATCHES = 36


def examples(count: int, first: int = 0) -> list[Example]:
    """Records of the embedded world with their pictures."""
    found = []
    for raw in world.alignment_records(count, "validation", first):
        record = instruct_record(raw)
        picture = world.open_picture(record.image)
        found.append(Example(record, picture, toy_assistant().processor.prepare(picture)))
    return found


def never(texts, references):
    """A similarity by which everything differs."""
    return [0.0] * len(texts)


def always(texts, references):
    """A similarity by which everything is the same."""
    return [1.0] * len(texts)


def config(**flags) -> Config:
    """Greedy and short, unless a test says otherwise."""
    return Config(**{"rho_th": 0.7, "temperature": 0.0, "max_new_tokens": 12} | flags)


def sample(batch: list[Example], model=None, similarity=never, **flags) -> list[Sampled]:
    """Algorithm 1 with some flags."""
    return sample_bdhs.sample(toy_assistant(model), similarity, batch, config(**flags))


@pytest.fixture
def calls(monkeypatch) -> list[SimpleNamespace]:
    """What `generate` is given and what it gives back, call by call."""
    seen = []

    def spy(model, sequences, features, sampling, stops, seeds, pad_id):
        done = generate(model, sequences, features, sampling, stops, seeds, pad_id)
        seen.append(SimpleNamespace(sequences=sequences, features=features, stops=stops, done=done))
        return done

    monkeypatch.setattr(sample_bdhs, "generate", spy)
    return seen


def sentences_of(batch: list[Example]) -> list[int]:
    """How many each y+ has."""
    return [len(split_sentences(example.record.chosen)) for example in batch]


def branches_of(call: SimpleNamespace) -> list[int]:
    """How many each row has."""
    return [len(row.branches) for row in call.sequences]


@pytest.mark.parametrize(("rho_th", "seed"), [(0.0, 1), (0.5, 2), (0.7, 3), (0.99, 4), (1.0, 5)])
@pytest.mark.parametrize("make", [toy_model, random_toy])
def test_branches_equal_one_sentence_at_a_time(calls, make, rho_th, seed):
    """The plain Eq. 7: hidden image tokens masked but not dropped, prompt, true earlier sentences,
    kept part."""
    tokenizer, model, batch = toy_tokenizer(), make(), examples(4, 4 * seed)
    results = sample(batch, model, rho_th=rho_th, seed=seed, n_bdhs=1, max_new_tokens=20)
    [call] = calls
    assert call.stops == tokenizer.sentence_ends
    for example, result, features, done, row in zip(
        batch, results, call.features, call.done, call.sequences, strict=True
    ):
        chosen, generator = example.record.chosen, torch.Generator().manual_seed(result.mask_seed)
        visible = image_attention_mask(PATCHES, rho_th, generator)
        assert torch.equal(visible, row.image_visible)

        # The trunk is y+ as it is, as far as a branch sees it.
        prompt = tokenizer.prompt(example.record.turns)
        whole, seen = prompt + tokenizer.encode(chosen), max(each.fork for each in row.branches)
        assert row.trunk == whole[:seen]

        parts = [cut for _, cut in cuts(chosen, random.Random(result.mask_seed))]
        assert len(parts) == len(done)
        for cut, completion in zip(parts, done, strict=True):
            ids = prompt + cut.kept_ids
            plain, logps = plain_greedy(model, ids, features, call.stops, 20, visible.tolist())
            assert completion.ids == plain
            assert worst(torch.tensor(completion.logps), torch.tensor(logps)) < 1e-4
        said = [completion.ids for completion in done]
        assert result.rejected == join(parts, said, tokenizer.decode)


# ---------------------------------------------------------------- iterations


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("make", [toy_model, random_toy])
def test_pairs_do_not_depend_on_the_batch(make, temperature):
    """The number of iterations differs from example to example, so that batches shrink
    differently."""

    def similarity(texts, references):
        both = zip(texts, references, strict=True)
        return [len(set(text.split()) & set(ref.split())) / 10 for text, ref in both]

    def sampled(batch: list[Example], seed: int = 1) -> list[Sampled]:
        flags = {"temperature": temperature, "n_bdhs": 3, "eps_s": 0.6, "seed": seed}
        return sample(batch, make(), similarity, **flags)

    batch = examples(6)
    together = sampled(batch)
    assert [sampled([example])[0] for example in batch] == together
    assert sampled(batch[::-1])[::-1] == together
    assert sampled(batch[:4]) + sampled(batch[4:]) == together

    other = sampled(batch, seed=2)
    assert [result.rejected for result in other] != [result.rejected for result in together]
    assert all(a.mask_seed != b.mask_seed for a, b in zip(other, together, strict=True))


def test_features_that_are_given_are_those_of_the_tower(calls):
    """A training step hands over what its tower has seen; `step` makes other draws."""
    batch, assistant = examples(3), toy_assistant()
    features = [assistant.encode([example.image]) for example in batch]
    first = sample_bdhs.sample(assistant, never, batch, config(), features)
    assert first == sample(batch)
    others = [features[1], features[2], features[0]]
    sample_bdhs.sample(assistant, never, batch, config(), others)
    assert torch.equal(calls[-1].features, torch.cat(others))
    later = sample_bdhs.sample(assistant, never, batch, config(), features, step=5)
    assert all(a.mask_seed != b.mask_seed for a, b in zip(first, later, strict=True))


def test_only_too_similar_responses_are_sampled_again(calls):
    """Similarities by script: the examples are done after 1, 3, 2 and (never different) all 4
    iterations."""
    batch, asked = examples(4), []
    script = {
        batch[0].record.chosen: [0.96],
        batch[1].record.chosen: [0.97, 0.99, 0.5],  # eps_s itself is still too similar
        batch[2].record.chosen: [1.0, 0.96998],  # 0.97 when rounded, and yet below
        batch[3].record.chosen: [0.98, 0.98, 0.98, 1.0],
    }
    left = {chosen: list(values) for chosen, values in script.items()}

    def similarity(texts, references):
        asked.append(list(zip(texts, references, strict=True)))
        return [left[reference].pop(0) for reference in references]

    results = sample(batch, similarity=similarity, n_bdhs=4, eps_s=0.97)
    assert [len(call) for call in asked] == [4, 3, 2, 1]
    assert [len(call.sequences) for call in calls] == [4, 3, 2, 1]
    assert [result.iterations for result in results] == [1, 3, 2, 4]
    assert [result.similarity for result in results] == [0.96, 0.5, 0.97, 1.0]
    assert [result.guided for result in results] == [True, True, True, False]
    assert not any(left.values())

    # The text is that iteration's.
    for example, result in zip(batch, results, strict=True):
        chosen = example.record.chosen
        texts = [text for call in asked for text, reference in call if reference == chosen]
        assert len(texts) == result.iterations and result.rejected == texts[-1]
    assert len({result.mask_seed for result in results}) == 4


def test_what_the_limit_cuts_off_is_sampled_again(calls):
    """With room for one token a sentence ends by itself only where the full stop is all that is
    missing."""
    batch = examples(4)
    results = sample(batch, max_new_tokens=1, n_bdhs=3)
    assert [len(call.sequences) for call in calls] == [4, 4, 4]
    assert all(result.truncated and result.iterations == 3 for result in results)
    results = sample(batch, max_new_tokens=60, n_bdhs=3)
    assert not any(result.truncated for result in results)
    assert all(result.iterations == 1 for result in results)


def test_an_empty_response_is_sampled_again(monkeypatch):
    texts = iter(["", "a.", "b."])
    monkeypatch.setattr(sample_bdhs, "join", lambda *_: next(texts))
    results = sample(examples(2), max_new_tokens=60)
    assert [(result.rejected, result.iterations) for result in results] == [("b.", 2), ("a.", 1)]


@pytest.mark.parametrize("n_bdhs", [2, 3])
def test_the_last_iteration_is_unguided_and_final(calls, n_bdhs):
    tokenizer, batch = toy_tokenizer(), examples(3)
    results = sample(batch, similarity=always, n_bdhs=n_bdhs)
    assert len(calls) == n_bdhs
    for result in results:
        assert result.iterations == n_bdhs and result.similarity == 1.0 and not result.guided
    for call in calls[:-1]:
        assert call.stops == tokenizer.sentence_ends
        assert branches_of(call) == sentences_of(batch)

    # A whole response, not a sentence: y+ is not there, the mask still is.
    last = calls[-1]
    assert last.stops == {tokenizer.eos_id}
    for example, result, row, [done] in zip(batch, results, last.sequences, last.done, strict=True):
        assert row.trunk == tokenizer.prompt(example.record.turns)
        assert [branch.ids for branch in row.branches] == [[]]
        assert torch.equal(row.image_visible, mask_of_seed(PATCHES, 0.7, result.mask_seed))
        assert result.rejected == tokenizer.decode(done.ids).strip()


def test_one_iteration_is_guided(calls):
    batch = examples(3)
    results = sample(batch, similarity=always, n_bdhs=1)
    assert [(result.iterations, result.guided) for result in results] == [(1, True)] * 3
    assert branches_of(calls[0]) == sentences_of(batch)


@pytest.mark.parametrize("n_bdhs", [1, 3])
def test_without_guidance_every_iteration_is_unguided(calls, n_bdhs):
    results = sample(examples(2), similarity=always, n_bdhs=n_bdhs, guided=False)
    assert not any(result.guided for result in results) and len(calls) == n_bdhs
    assert all(branches_of(call) == [1, 1] for call in calls)


# ---------------------------------------------------------------- what hides the picture


def with_pictures_of(batch: list[Example], others: list[Example]) -> list[Example]:
    """The records of the one with the pictures of the other."""
    both = zip(batch, others, strict=True)
    return [replace(other, record=example.record) for example, other in both]


def all_logps(call) -> torch.Tensor:
    """The first new token's log-prob of every branch."""
    return torch.tensor([completion.logps[0] for row in call.done for completion in row])


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rho_one_hides_the_whole_picture(calls, guided, temperature):
    batch = examples(4)
    others = with_pictures_of(batch, examples(4, 10))
    for rho_th, same in ((1.0, True), (0.5, False)):
        flags = {"temperature": temperature, "rho_th": rho_th, "n_bdhs": 1, "guided": guided}
        first, second = (sample(each, random_toy(), **flags) for each in (batch, others))
        assert (first == second) or not same
        assert (worst(all_logps(calls[-1]), all_logps(calls[-2])) == 0) == same
        assert all(row.image_visible.any() != same for row in calls[-1].sequences)


@pytest.mark.parametrize("noise_steps", [100, 500])
def test_noise_is_another_way_to_blur_the_picture(calls, noise_steps):
    batch = examples(4)
    others, model = with_pictures_of(batch, examples(4, 10)), random_toy()
    flags = {"rho_th": 0.0, "n_bdhs": 1}
    first = sample(batch, model, noise_steps=noise_steps, **flags)
    torch.manual_seed(0)  # no global randomness
    assert sample(batch, model, noise_steps=noise_steps, **flags) == first
    sample(others, model, noise_steps=noise_steps, **flags)
    sample(batch, model, **flags)
    noisy, again, other, clean = calls
    assert torch.equal(noisy.features, again.features)
    assert worst(all_logps(noisy), all_logps(other)) > 1e-3  # the picture still shows
    assert worst(all_logps(noisy), all_logps(clean)) > 1e-3  # blurred
    assert all(row.image_visible.all() for row in noisy.sequences)

    # Eq. 9 on the raw picture.
    for example, result, features in zip(batch, first, noisy.features, strict=True):
        picture = noise_of_seed(example.picture, noise_steps, result.mask_seed)
        expected = model.encode_images(toy_assistant().processor(picture))
        assert worst(expected[0], features) < 1e-4


@pytest.mark.parametrize("rho_th", [0.3, 0.7, 0.99])
def test_masks_follow_from_example_and_iteration(rho_th):
    """Over many examples a share of rho_th is hidden; id, iteration, step and seed all matter."""
    record = examples(1)[0].record
    records = [replace(record, id=f"x{number}") for number in range(150)]
    seeds = [draw_seed(3, record, iteration) for record in records for iteration in (1, 2)]
    others = [draw_seed(4, records[0], 1), draw_seed(3, records[0], 1, step=0)]
    assert len(set(seeds + others)) == 302
    masks = torch.stack([mask_of_seed(PATCHES, rho_th, seed) for seed in seeds])
    hidden = (~masks).float().mean().item()
    assert abs(hidden - rho_th) < 4 * (rho_th * (1 - rho_th) / (300 * PATCHES)) ** 0.5


def test_a_word_that_cannot_be_cut_is_sampled_unguided(calls):
    """And says so, whatever else is in the batch; to a swapped Yes there is something to add."""
    texts = ["Cup.", "A cup.", "Yes.", "\u732b\u3002"]
    batch = [
        replace(example, record=replace(example.record, chosen=text))
        for example, text in zip(examples(4), texts, strict=True)
    ]
    results = sample(batch, n_bdhs=1)
    assert [result.guided for result in results] == [False, True, True, False]
    prompt = toy_tokenizer().prompt(batch[0].record.turns)
    row = calls[0].sequences[0]
    assert row.trunk == prompt and [branch.ids for branch in row.branches] == [[]]
    assert [sample([example], n_bdhs=1)[0] for example in batch] == results
