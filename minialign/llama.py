"""The Llama decoder: embeddings, explicit positions and an explicit mask in, hidden states out.

RMSNorm, rotary positions, grouped-query attention, SwiGLU. The numerics follow transformers' Llama.
The mask is an argument that passes through every layer; nothing is hidden in state.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from minialign.compiled import compiled


@dataclass(frozen=True)
class LlamaConfig:
    """Decoder sizes, by transformers' names; the defaults are Llama-7B's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048  # RoPE has no table: a limit on what is trained
    tie_word_embeddings: bool = False


class KVCache:
    """Keys and values of all layers, (B, kv heads, capacity, head_dim) each, filled from the left.

    `length`, how much is filled, is a tensor: so a CUDA graph, too, writes at another place in every step.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, like: Tensor):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.length = torch.zeros((), dtype=torch.long, device=like.device)

    def append(self, layer: int, key: Tensor, value: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Store one layer's new (B, kv, T, head_dim) keys and values; return the first `width` columns of all."""
        columns = self.length + torch.arange(key.shape[2], device=key.device)
        self.keys[layer].index_copy_(2, columns, key)
        self.values[layer].index_copy_(2, columns, value)
        return self.keys[layer, :, :, :width], self.values[layer, :, :, :width]

    def keep(self, rows: Tensor) -> None:
        """Let go of all but some rows, given in order. The rows move up, and only what is filled is copied."""
        filled, count = int(self.length), len(rows)
        for tensor in (self.keys, self.values):
            tensor[:, :count, :, :filled] = tensor[:, rows, :, :filled]
        self.keys, self.values = self.keys[:, :count], self.values[:, :count]


class RMSNorm(nn.Module):
    """Root-mean-square norm, in float32 whatever the input's type."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, (B, 1, T, head_dim), computed in float32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, head_dim/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to (B, heads, T, head_dim); halves are paired, as in transformers."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention under an explicit mask."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_attention_heads != config.num_key_value_heads
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x, rotary, mask, cache: KVCache | None, layer: int) -> Tensor:
        """(B, T, D) -> (B, T, D).

        mask: (B, 1, T, keys) bool, keys being T, or the first columns of `cache`, where they go; a BlockMask of T by T;
        or None, which is plain causal.
        """
        B, T, _ = x.shape
        q, k, v = (  # (B, heads, T, head_dim)
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(layer, k, v, T if mask is None else mask.shape[-1])
        if isinstance(mask, BlockMask):
            flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
            out = flex(q, k, v, block_mask=mask, enable_gqa=self.grouped)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual.

    Two means of training, where there is no cache, which leave the numbers as they are:
    recompute  nothing but the input is kept for the backward pass, which runs the layer again
    compiled   the layer runs compiled; all layers share the code
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = self.compiled = False

    def forward(self, x, rotary, mask, cache: KVCache | None, layer: int) -> Tensor:
        if cache is not None:
            return self.block(x, rotary, mask, cache, layer)
        block = compiled(DecoderLayer.block) if self.compiled else DecoderLayer.block
        if not self.recompute:
            return block(self, x, rotary, mask)
        return checkpoint(block, self, x, rotary, mask, use_reentrant=False, preserve_rng_state=False)

    def block(self, x, rotary, mask, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """What the layer computes; `layer` is its number in the cache."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token embedding, the layers and the final norm. The LM head is applied by the caller, where it is needed."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def in_training(self, recompute: bool, compiled: bool) -> None:
        """How every layer runs where there is no cache: see `DecoderLayer`."""
        for layer in self.layers:
            layer.recompute, layer.compiled = recompute, compiled

    def forward(
        self, embeddings: Tensor, positions: Tensor, mask: Tensor | BlockMask | None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T, D) embeddings, (B, T) positions, a mask as `Attention` takes it -> (B, T, D) hidden states.

        With a cache, the keys are those already cached followed by the T new ones.
        """
        x = embeddings
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, cache, number)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)
