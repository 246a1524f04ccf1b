"""Policies to test with: adapters that have moved, and layers as the scripts wrap them."""

import copy
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from minialign.model.llava import Llava
from minialign.model.lora import adapter_state, add_adapters
from minialign.training.flags import COMPILE_OPTIONS


def adapted(model: Llava, rank: int, alpha: float, seed: int = 0, scale: float = 0.1) -> Llava:
    """A copy of `model` with adapters of nonzero A and B and a changed projector, as after
    training."""
    model = copy.deepcopy(model)
    add_adapters(model, rank, alpha)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def wrap_layers(model: Llava, recompute: bool, compile: bool) -> None:
    """What the scripts do with these flags, on a model that may have been wrapped before."""
    for layer in model.language_model.layers:
        layer.forward = type(layer).forward.__get__(layer)
        if compile:
            layer.forward = torch.compile(layer.forward, dynamic=True, options=COMPILE_OPTIONS)
        if recompute:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
