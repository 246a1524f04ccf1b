"""How near to the GPU's limits: model FLOPs utilisation of a DPO step, share of the memory
bandwidth in decoding.

Both count what the mathematics needs, not what an implementation happens to do: a score that the
mask throws away, an activation that is computed twice, or a weight that is read twice count as
waste.
"""

from dataclasses import dataclass

import torch
from torch import nn

from minialign.model.llama import LlamaConfig
from minialign.model.llava import Llava
from minialign.model.lora import LoraLinear
from minialign.model.masks import PADDING, Sequence, TokenTree, dense_mask


@dataclass(frozen=True)
class Gpu:
    """Peak rates from the maker's data sheets: dense bfloat16 FLOP/s, and bytes/s."""

    flops: float
    bandwidth: float


GPUS = {"H200": Gpu(989e12, 4.8e12), "H100": Gpu(989e12, 3.35e12), "A100": Gpu(312e12, 2.039e12)}


def this_gpu() -> Gpu | None:
    """The peak rates of this machine's GPU; None if it is none of those above."""
    name = torch.cuda.get_device_name()
    return next((gpu for known, gpu in GPUS.items() if known in name), None)


def weights_of(module: nn.Module) -> int:
    """Parameters of the linear layers' matrices, without adapters and biases."""
    linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)


def dpo_flops(model: Llava, tree: TokenTree, tiles: int, reference: bool = True) -> int:
    """FLOPs of one DPO step on a frozen base with adapters and a trained projector.

    A matrix of P parameters takes 2 P per token forward, 2 P backward for the gradient of what
    comes in, and 2 P for the gradient of the matrix, which is needed of trained ones alone. A
    reference that is not cached adds a forward pass of the base, and the tower's is for both. In
    sum, with policy + reference in brackets:
      (4 + 2) P  per token of the decoder's frozen matrices
      6 L        per token of the adapters, which the reference does not have
      (4 + 2) H  per scored token of the head
      (4 + 2) J1 + (6 + 2) J2  per feature of the projector's matrices; the tower in front needs no
                 gradient
      (12 + 4) d  per layer and pair of a query with a key that it may see: d for the scores and
                 d for the sum, each 2 forward and 4 backward; d is heads times head_dim
      2 V        per patch of the tower's matrices, class tokens included, and 4 d' per layer and
                 pair within a tile
    Padding, norms, the softmax, the patch embedding and the optimizer are left out.
    """
    config, decoder = model.config, model.language_model.layers
    real = tree.branch != PADDING
    tokens, scored = int(real.sum()), int((tree.branch > 0).sum())
    features = int((tree.feature >= 0).sum())
    pairs = int((dense_mask(tree, tree)[:, 0] & real[..., None]).sum())
    linears = [module for module in decoder.modules() if isinstance(module, LoraLinear)]
    adapters = sum(linear.lora_A.numel() + linear.lora_B.numel() for linear in linears)
    width = config.text.num_attention_heads * config.text.head_dim
    once = 2 if reference else 0

    flops = (4 + once) * weights_of(decoder) * tokens + 6 * adapters * tokens
    flops += (12 + 2 * once) * width * len(decoder) * pairs
    flops += (4 + once) * model.lm_head.weight.numel() * scored
    flops += projector_flops(model, features, reference)

    blocks = model.vision_tower.encoder.layers
    layer = config.vision_feature_layer
    used = blocks[: layer if layer >= 0 else len(blocks) + 1 + layer]
    patches = config.vision.patches + 1
    attention = 4 * config.vision.hidden_size * len(used) * patches
    return flops + tiles * patches * (2 * weights_of(used) + attention)


def projector_flops(model: Llava, features: int, reference: bool = True) -> int:
    """The projector's part of `dpo_flops`: it is trained in float32, whatever the other weights
    are."""
    once, projector = 2 if reference else 0, model.multi_modal_projector.copy
    first, second = projector.linear_1.weight.numel(), projector.linear_2.weight.numel()
    return features * ((4 + once) * first + (6 + once) * second)


def utilisation(flops: int, seconds: float) -> float | None:
    """Model FLOPs utilisation: those that are needed, over those that the GPU could have done
    meanwhile."""
    gpu = this_gpu()
    return None if gpu is None else flops / seconds / gpu.flops


def decoding_bytes(
    weights: int, config: LlamaConfig, itemsize: int, rows: list[tuple[int, int]], steps: int
) -> int:
    """Bytes that decoding has to read: in each step all weights once, and the keys and values so
    far.

    rows: (trunk tokens, branches) of each row, whose trunk is read once for all its branches. In
    step t = 1..steps each branch has t tokens of its own, whose keys and values the step reads, the
    new one's included.
    """
    width = config.num_key_value_heads * config.head_dim
    per_token = 2 * config.num_hidden_layers * width * itemsize
    trunks, branches = sum(trunk for trunk, _ in rows), sum(branches for _, branches in rows)
    own = per_token * branches * steps * (steps + 1) // 2
    return steps * (weights * itemsize + per_token * trunks) + own


def bandwidth_share(
    model: Llava, sequences: list[Sequence], steps: int, seconds: float
) -> float | None:
    """Of the GPU's memory bandwidth, what `steps` steps of decoding in so many seconds have
    needed."""
    gpu, weight = this_gpu(), model.lm_head.weight
    weights = weights_of(model.language_model.layers) + weight.numel()
    rows = []
    for sequence in sequences:
        trunk = len(sequence.trunk) - 1 + sequence.image_tokens
        rows.append((trunk, len(sequence.branches)))
    needed = decoding_bytes(weights, model.config.text, weight.element_size(), rows, steps)
    return None if gpu is None else needed / seconds / gpu.bandwidth
