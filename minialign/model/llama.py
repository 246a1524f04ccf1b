"""The Llama decoder: embeddings, explicit positions and an explicit mask in, hidden states out.

RMSNorm, rotary positions, grouped-query attention, SwiGLU. The numerics follow transformers' Llama.
The mask is an argument that passes through every layer; nothing is hidden in state.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class LayerCache:
    """Keys and values of one layer, (B, kv heads, capacity, head_dim) each."""

    def __init__(self, shape: tuple[int, ...], like: Tensor):
        # Zeros: free columns are attended to with weight 0, and 0 times what lay there may be NaN.
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def put(self, columns: Tensor, key: Tensor, value: Tensor) -> None:
        """Store (B, kv heads, T, head_dim) keys and values in T columns."""
        self.keys.index_copy_(2, columns, key)
        self.values.index_copy_(2, columns, value)


class KVCache:
    """A `LayerCache` per layer, and how many columns are filled: a tensor, so that a CUDA graph,
    too, writes at another place in every step.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, like: Tensor):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.layers = [LayerCache(shape, like) for _ in range(config.num_hidden_layers)]
        self.filled = torch.zeros((), dtype=torch.long, device=like.device)

    def next_columns(self, count: int) -> Tensor:
        """The numbers of the next free columns, (count,), which are filled from now on."""
        columns = self.filled + torch.arange(count, device=self.filled.device)
        self.filled += count
        return columns

    def keep(self, rows: Tensor) -> None:
        """Attend to some rows alone from now on, given in order. They move up, and only what is
        filled is copied; the memory of the others stays taken.
        """
        filled, count = int(self.filled), len(rows)
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                tensor[:count, :, :filled] = tensor[rows, :, :filled]
            layer.keys, layer.values = layer.keys[:count], layer.values[:count]


class RMSNorm(nn.Module):
    """Root-mean-square norm, in float32 whatever the input's type."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, (B, 1, T, head_dim), computed in float32.

    sin has the sign of the rotation: minus in the first half.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponents  # (B, 1, T, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to (B, heads, T, head_dim); halves are paired, as in transformers."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # rolled: the halves change places


def attention_bias(mask: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """A (B, 1, R, K) bool mask as what is added to the scores, once for all layers: 0 or -inf,
    (B, 1, group, R, K), `group` being the query heads to a key-value head.
    """
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return bias[:, :, None].repeat(1, 1, group, 1, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, prefix: int, bias: Tensor | None) -> Tensor:
    """Attention of T queries: (B, T, heads, head_dim). q (B, heads, T, head_dim); k, v (B, kv
    heads, K, head_dim).

    The first `prefix` queries are plain causal over as many keys; the others have a bias,
    `attention_bias`'s. Without one all are plain causal.
    """
    B, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    if bias is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
        return out.transpose(1, 2)

    first, last = q[:, :, :prefix], q[:, :, prefix:]
    if torch.compiler.is_compiling():
        # torch 2.13 takes the strides of slices that the backward pass needs for constants.
        first, last = first.contiguous(), last.contiguous()

    # A group's heads become rows of their key-value head, so that keys are read once, and no kernel
    # has to know of groups: with a mask, CUDA's fast ones do not.
    R = bias.shape[3]
    rows = last.reshape(B, kv_heads, group * R, head_dim)
    rest = F.scaled_dot_product_attention(rows, k, v, attn_mask=bias.flatten(2, 3))
    rest = rest.reshape(B, heads, R, head_dim).transpose(1, 2)
    if not prefix:
        return rest

    # The causal prefix needs no mask: the flash kernel, on a CPU and, in bfloat16, on a GPU.
    causal = F.scaled_dot_product_attention(
        first, k[:, :, :prefix], v[:, :, :prefix], is_causal=True, enable_gqa=group > 1
    )
    return torch.cat([causal.transpose(1, 2), rest], dim=1)


class Attention(nn.Module):
    """Grouped-query attention under an explicit mask."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        prefix: int,
        bias: Tensor | None,
        cache: LayerCache | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). The keys are the T tokens themselves, or with a cache, into whose
        `columns` they go, as many of its first columns as the bias has.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            cache.put(columns, k, v)
            keys = T if bias is None else bias.shape[-1]
            k, v = cache.keys[:, :, :keys], cache.values[:, :, :keys]
        return self.o_proj(attend(q, k, v, prefix, bias).reshape(B, T, -1))


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
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        prefix: int,
        bias: Tensor | None,
        cache: LayerCache | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); the rest is `Attention`'s."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, prefix, bias, cache, columns)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token embedding, the layers and the final norm. The LM head is applied by the caller, where
    it is needed.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, D) embeddings, (B, T) positions -> (B, T, D) hidden states.

        mask (B, 1, R, K) bool: which of K keys each of the last R tokens sees; the tokens before
        them are plain causal, and all are where it is None. Without a cache, or with one that is
        empty, K is T; else the keys are its first K columns, the T new ones being the last filled.
        """
        config, x = self.config, embeddings
        rotary = rotary_tables(positions, config.head_dim, config.rope_theta, x.dtype)
        prefix, bias = 0, None
        if mask is not None:
            prefix = x.shape[1] - mask.shape[2]
            group = config.num_attention_heads // config.num_key_value_heads
            bias = attention_bias(mask, group, x.dtype)
        if cache is None:
            for layer in self.layers:
                x = layer(x, rotary, prefix, bias)
            return self.norm(x)

        columns = cache.next_columns(x.shape[1])
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            x = layer(x, rotary, prefix, bias, kept, columns)
        return self.norm(x)
