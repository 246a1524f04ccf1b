"""What a DPO step holds in memory: by formula for models of any size, and counted for those that
run here.

Weights and optimizer are counted on a model of the meta device, which has shapes and no data.
Activations are what autograd keeps for the backward pass, per token of one decoder layer, of D =
hidden_size, Q = heads * head_dim, K = key-value heads * head_dim, I = intermediate_size, rank r,
and w bytes per number of the frozen weights:
  2 (4 D + 4)          both norms: their float32 input and its scale
  w (2 D + I)          inputs of linears that have adapters: q, k, v share one, gate and up; down
  w 7 r                what each adapter's A gives
  w (2 Q + 2 K) + 4 H  attention: q, k, v and its result, o's input, too, and a float32 per head
                       for the softmax
  w Q                  o's input, if the result comes in two parts: the causal prefix and the rest
  w Q                  of the rest alone: its queries once more, where heads that share keys are
                       folded into rows
  w 3 I                SwiGLU: gate, its silu, up
Frozen linears keep nothing, as a gradient of their weights is never asked for. Beside the tokens, a
layer keeps its adapters in the type that they are multiplied in, if that is not float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minialign.align.logps import CHUNK
from minialign.model.llama import LlamaConfig
from minialign.model.llava import Llava, LlavaConfig
from minialign.model.lora import add_adapters
from minialign.model.masks import TokenTree

# ---------------------------------------------------------------- weights and optimizer


def meta_model(config: LlavaConfig, dtype: torch.dtype, rank: int) -> Llava:
    """The policy as train_dpo.py makes it, with shapes and without data."""
    with torch.device("meta"):
        model = Llava(config).to(dtype)
        add_adapters(model, rank, 2.0 * rank)
    return model


def local(tensor: Tensor, processes: int) -> int:
    """Bytes of a tensor's largest shard: FSDP2 deals its rows out, so the first process has the
    most."""
    rows = -(-len(tensor) // processes)
    return rows * (tensor.numel() // len(tensor)) * tensor.element_size()


def frozen_bytes(model: torch.nn.Module, processes: int = 1) -> int:
    """Bytes of what is not trained, on each of so many processes that share it."""
    return sum(local(p, processes) for p in model.parameters() if not p.requires_grad)


def trained_bytes(model: torch.nn.Module, processes: int = 1) -> int:
    """Bytes of adapters and projector; their gradients take as many, and Adam's two moments twice
    as many."""
    return sum(local(p, processes) for p in model.parameters() if p.requires_grad)


def gathered_bytes(model: Llava) -> int:
    """Beside the shards: what no layer holds, which stays gathered for the step, and two layers,
    one ahead of time."""
    layers = [whole_bytes(layer) for layer in model.language_model.layers]
    outside = whole_bytes(model) - sum(layers) - whole_bytes(model.vision_tower)
    return outside + 2 * max(layers)


def whole_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters."""
    return frozen_bytes(module) + trained_bytes(module)


# ---------------------------------------------------------------- activations


def layer_bytes(config: LlamaConfig, rank: int, itemsize: int, parts: int = 1) -> int:
    """Per token, what one decoder layer keeps for the backward pass: the sum that stands at the
    head of this file.

    parts: in how many attention is computed, the causal prefix and the rest.
    """
    D, I, H = config.hidden_size, config.intermediate_size, config.num_attention_heads
    Q, K = H * config.head_dim, config.num_key_value_heads * config.head_dim
    return 2 * (4 * D + 4) + itemsize * (2 * D + 4 * I + 7 * rank + (1 + parts) * Q + 2 * K) + 4 * H


def kept_of_layer(model: Llava, tree: TokenTree) -> int:
    """Bytes that one decoder layer of a model with adapters keeps of a tree."""
    config, itemsize = model.config.text, model.lm_head.weight.element_size()
    layer = model.language_model.layers[0]
    adapters = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    rank = len(layer.mlp.up_proj.lora_A)
    rows, width = tree.ids.shape
    rest = width - tree.prefix  # columns
    parts = (tree.prefix > 0) + (rest > 0)
    kept = rows * width * layer_bytes(config, rank, itemsize, parts)
    if config.num_attention_heads > config.num_key_value_heads:
        kept += rows * rest * config.num_attention_heads * config.head_dim * itemsize
    return kept + (adapters * itemsize if itemsize < 4 else 0)


def activation_bytes(model: Llava, tree: TokenTree, recompute: bool = False) -> int:
    """What the policy's forward pass keeps, without the mask.

    recompute: of each layer its input alone, and the layer whose turn it is in the backward pass in
    full.
    """
    config, itemsize = model.config.text, model.lm_head.weight.element_size()
    tokens, scored = tree.ids.numel(), int((tree.branch > 0).sum())
    features = int((tree.feature >= 0).sum())
    layer, layers = kept_of_layer(model, tree), config.num_hidden_layers
    kept = layers * tokens * config.hidden_size * itemsize + layer if recompute else layers * layer

    # Rotary tables and the last norm; hidden states and five int64 of where they lie.
    shared = tokens * (2 * config.head_dim * itemsize + 4 * config.hidden_size + 4)
    head = scored * (config.hidden_size * itemsize + 40)
    projector = features * 4 * (model.config.vision.hidden_size + 2 * config.hidden_size) + tokens
    return kept + shared + head + projector


def dense_mask_bytes(model: Llava, tree: TokenTree) -> int:
    """What the mask behind the causal prefix takes, as what is added to the scores: one for all
    layers."""
    rows, width = tree.ids.shape
    group = model.config.text.num_attention_heads // model.config.text.num_key_value_heads
    numbers = rows * group * (width - tree.prefix) * width
    return numbers * model.lm_head.weight.element_size()


def workspace_bytes(model: Llava, tree: TokenTree) -> int:
    """What comes and goes at the height of the backward pass, rounded up.

    Three float32 forms of a chunk's logits (log-softmax and two gradients), or as much as a layer
    keeps.
    """
    config = model.config.text
    chunk = min(CHUNK, int((tree.branch > 0).sum()))
    return max(12 * chunk * config.vocab_size, kept_of_layer(model, tree))


def kv_cache_bytes(config: LlamaConfig, batch: int, capacity: int, itemsize: int) -> int:
    """Keys and values of all layers."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * batch * capacity * width * itemsize


def peak_parts(model: Llava, tree: TokenTree, processes: int, recompute: bool) -> dict[str, int]:
    """Bytes per GPU at the height of a step; `processes` share the model, 1 being --shard none.

    From the second step on the moments are there, and with --accumulate the gradients, too.
    """
    trained = trained_bytes(model, processes)
    return {
        "weights": frozen_bytes(model, processes) + trained,
        "gradients and moments": 3 * trained,
        "gathered": gathered_bytes(model) if processes > 1 else 0,
        "activations": activation_bytes(model, tree, recompute),
        "workspace": workspace_bytes(model, tree),
    }


# ---------------------------------------------------------------- counted


def saved_bytes(model: Llava, work: Callable[[], Tensor]) -> int:
    """Bytes of all storages that autograd keeps of `work()`, each once, the model's own left
    out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    assert result.requires_grad  # else nothing is kept
    return sum(storage.nbytes() for storage in kept.values())


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.bytes, self.shape = 0, ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.nbytes > self.bytes:
                self.bytes, self.shape = tensor.nbytes, tuple(tensor.shape)
        return result
