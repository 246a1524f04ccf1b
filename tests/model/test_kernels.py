"""Fewer kernels, the same numbers: each form against the one that it stands for, gradients too; and
grouped heads, trained and decoded, against transformers.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers import random_ids, worst

from minialign.align.logps import branch_logps
from minialign.model.hf_folder import load_model
from minialign.model.llama import RMSNorm, attend, attention_bias, rotary_tables, rotate
from minialign.model.lora import LoraLinear
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.sampling.generate import Sampling, generate

SEEDS = range(6)
TYPES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-2}


def assert_same_with_gradients(ours, theirs, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Both functions of the same inputs give the same, and so do the gradients of a weighted
    sum.
    """
    found = []
    for function in (ours, theirs):
        given = [each.detach().clone().requires_grad_(True) for each in inputs]
        result = function(*given)
        weights = torch.linspace(-1, 1, result.numel()).view_as(result).to(result.dtype)
        found.append([result, *torch.autograd.grad((result * weights).sum(), given)])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert worst(a.float(), b.float()) <= tolerance * max(1.0, b.abs().max().item())


def numbers(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_norm(seed, dtype):
    """Seven kernels' worth: to float32 and back, as transformers writes it out."""
    rng = random.Random(seed)
    width, eps = rng.randrange(3, 40), rng.choice([1e-6, 1e-5, 1e-2])
    norm = RMSNorm(width, eps)

    def ours(x, weight):
        norm.weight = None
        del norm.weight
        norm.weight = weight
        return norm(x)

    def written_out(x, weight):
        wide = x.double() if dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(dtype)

    norm._parameters.clear()  # a plain attribute takes the weight's place
    x = numbers(seed, 2, rng.randrange(1, 9), width, dtype=dtype) * rng.choice([0.1, 1, 30])
    weight = 1 + 0.1 * numbers(seed + 1, width, dtype=dtype)
    assert_same_with_gradients(ours, written_out, [x, weight], TYPES[dtype])


@pytest.mark.parametrize("seed", SEEDS)
def test_rotary_positions(seed):
    """Halves that change places by `roll`, against transformers' cat of halves: to the last bit."""
    rng = random.Random(seed)
    head_dim = 2 * rng.randrange(1, 17)
    positions = torch.tensor([sorted(rng.sample(range(500), 7)) for _ in range(2)])
    cos, sin = rotary_tables(positions, head_dim, 1e4, torch.float32)

    def halves(x):
        first, second = x.chunk(2, dim=-1)
        signless = torch.cat([-sin[..., : head_dim // 2], sin[..., head_dim // 2 :]], dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * signless

    x = numbers(seed, 2, 3, 7, head_dim)
    assert torch.equal(rotate(x, cos, sin), halves(x))
    assert_same_with_gradients(lambda x: rotate(x, cos, sin), halves, [x], 1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_an_adapter(seed, dtype):
    """One product that scales and adds, against two products, a scaling and a sum."""
    rng = random.Random(seed)
    inside, outside, rank = rng.randrange(2, 30), rng.randrange(2, 30), rng.randrange(1, 5)
    alpha = rng.choice([1.0, 3.0, 8.0])
    layer = LoraLinear(torch.nn.Linear(inside, outside, bias=False, dtype=dtype), rank, alpha)
    layer.requires_grad_(False)

    def ours(x, A, B):
        layer._parameters.clear()
        layer.lora_A, layer.lora_B = A, B
        return layer(x)

    def written_out(x, A, B):
        low = F.linear(x, A.to(dtype)) * layer.scaling
        return layer.base(x) + F.linear(low, B.to(dtype))

    x = numbers(seed, 2, rng.randrange(1, 9), inside, dtype=dtype)
    updates = [numbers(seed + 1, rank, inside), numbers(seed + 2, outside, rank)]
    assert_same_with_gradients(ours, written_out, [x, *updates], TYPES[dtype])


@pytest.mark.parametrize("seed", range(12))
def test_attention_in_two_parts_and_with_folded_groups(seed):
    """Against softmax written out, every query head with its own copy of its keys."""
    rng = random.Random(seed)
    kv_heads, group, size = rng.randrange(1, 4), rng.randrange(1, 4), rng.randrange(2, 9)
    prefix, rest = rng.randrange(0, 9), rng.randrange(1, 7)
    width = prefix + rest
    mask = torch.ones(width, width).tril().bool().repeat(2, 1, 1, 1)
    drop = torch.rand(2, 1, rest, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, :, prefix:] &= ~drop
    mask[:, 0, torch.arange(width), torch.arange(width)] = True  # itself, always

    def ours(q, k, v):
        bias = attention_bias(mask[:, :, prefix:], group, q.dtype)
        return attend(q, k, v, prefix, bias)

    def written_out(q, k, v):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.transpose(-1, -2) / size**0.5
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    q = numbers(seed, 2, kv_heads * group, width, size)
    k, v = (numbers(seed + i, 2, kv_heads, width, size) for i in (1, 2))
    assert_same_with_gradients(ours, written_out, [q, k, v], 1e-5)


# ---------------------------------------------------------------- grouped heads, as transformers'


def both(oracle, tmp_path, family: str, seed: int):
    """(transformers' LLaVA-1.6 with a Mistral- or 34B-like decoder, ours with its weights)."""
    theirs = oracle.make_next(seed, family)
    theirs.save_pretrained(tmp_path)
    return theirs, load_model(tmp_path).requires_grad_(True)


@pytest.mark.parametrize("family", ["mistral", "34b"])
@pytest.mark.parametrize("seed", range(3))
def test_training_with_grouped_heads(oracle, tmp_path, family, seed):
    """Log-probs of two responses as branches of one trunk, and all gradients of the decoder."""
    theirs, ours = both(oracle, tmp_path, family, seed)
    rng, image = random.Random(seed), ours.config.image_token_id
    vocab = ours.config.text.vocab_size
    prompt, *responses = (
        [i for i in random_ids(rng, count, vocab) if i != image] or [image + 1]
        for count in (9, 7, 5)
    )
    rows = [Sequence(prompt, [Branch(ids) for ids in responses])]
    logps = branch_logps(ours, build_tree(rows, image, 0), None)[0]

    expected = []
    for ids in responses:
        logits = theirs(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
    assert worst(logps, torch.stack(expected)) < 1e-4

    (logps[0] - 2 * logps[1]).backward()
    (expected[0] - 2 * expected[1]).backward()
    grads = {k: p.grad for k, p in theirs.named_parameters() if "layers" in k and "vision" not in k}
    for name, parameter in ours.language_model.layers.named_parameters():
        [key] = [key for key in grads if key.endswith(f"language_model.layers.{name}")]
        assert worst(parameter.grad, grads[key]) <= 1e-4 * max(1.0, grads[key].abs().max().item())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("family", ["mistral", "34b"])
@pytest.mark.parametrize("seed", range(3))
def test_decoding_with_grouped_heads(oracle, tmp_path, family, seed, fixed):
    theirs, ours = both(oracle, tmp_path, family, seed)
    rng, image = random.Random(seed), ours.config.image_token_id
    vocab = ours.config.text.vocab_size
    prompts = [[i for i in random_ids(rng, n, vocab) if i != image] for n in (12, 7)]
    rows = [Sequence(prompt, [Branch([])]) for prompt in prompts]
    done = generate(ours, rows, None, Sampling(15, 0.0), set(), fixed=fixed)
    for prompt, [completion] in zip(prompts, done, strict=True):
        said = theirs.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=15,
            do_sample=False,
            suppress_tokens=[image],
            eos_token_id=None,
            pad_token_id=0,
        )
        assert completion.ids == said[0, len(prompt) :].tolist()
