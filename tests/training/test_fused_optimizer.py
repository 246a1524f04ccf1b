"""The fused optimizer is the plain one in one pass over the weights."""

import copy
import random

import pytest
import torch
from helpers import random_model, worst
from policies import adapted

from minialign.model.lora import trainable_groups
from minialign.training.optimizer import make_optimizer, set_learning_rate
from minialign.training.progress import progress_tensors


@pytest.mark.parametrize("seed", range(4))
def test_ten_steps_are_those_of_the_plain_optimizer(seed):
    """To the last bit but one of the weights and of what a checkpoint holds, whatever rates and
    gradients."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ours = adapted(random_model(seed), 4, 8.0, seed)
    theirs = copy.deepcopy(ours)
    optimizer = make_optimizer(ours, 1e-3, 1e-4)
    assert optimizer.defaults["fused"]
    plain = torch.optim.AdamW(trainable_groups(theirs, 1e-3, 1e-4), weight_decay=0.0, fused=False)
    pairs = [
        pair
        for one, other in zip(optimizer.param_groups, plain.param_groups, strict=True)
        for pair in zip(one["params"], other["params"], strict=True)
    ]
    first = [parameter.detach().clone() for parameter, _ in pairs]
    for _ in range(10):
        share, scale = rng.random(), 10 ** rng.uniform(-6, 0)
        for a, b in pairs:
            a.grad = torch.randn(a.shape, generator=generator) * scale
            b.grad = a.grad.clone()
        for group, peak in zip(plain.param_groups, (1e-3, 1e-4), strict=True):
            group["lr"] = share * peak
        set_learning_rate(optimizer, share)
        optimizer.step()
        plain.step()
    for (a, b), before in zip(pairs, first, strict=True):
        assert worst(a, b) <= 2e-7 * max(1.0, b.abs().max().item()) and worst(a, before) > 1e-5
    kept, expected = progress_tensors(ours, optimizer), progress_tensors(theirs, plain)
    assert kept.keys() == expected.keys()
    for name, tensor in kept.items():
        assert tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-7)
