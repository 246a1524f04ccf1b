"""The CLIP vision tower: pixels in, patch features out.

The numerics follow transformers' CLIPVisionModel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ClipConfig:
    """Tower sizes, by transformers' names; the defaults are CLIP ViT-L/14's at 336 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        """Patches of one image, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


class Embeddings(nn.Module):
    """[class; patches] + position table; images of another size are an error, not interpolated."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.image_size = config.image_size
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(config.patches + 1, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            size = f"{self.image_size}x{self.image_size}"
            raise ValueError(f"the tower takes {size} pixels, not {tuple(pixels.shape)}")
        patches = self.patch_embedding(pixels)  # (N, D, rows, columns)
        patches = patches.flatten(2).transpose(1, 2)  # (N, patches, D), row by row
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Full self-attention; q, k, v and out all have a bias."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        q = self.q_proj(x).view(N, T, self.heads, -1).transpose(1, 2)  # (N, heads, T, head_dim)
        k = self.k_proj(x).view(N, T, self.heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(N, T, self.heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(N, T, D))


class MLP(nn.Module):
    """Two linear layers with quick_gelu between them."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick_gelu


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers; `Clip` decides how many of them run."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))


class Clip(nn.Module):
    """The tower. What LLaVA never runs (last block, post_layernorm) is kept for the checkpoint."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        # The name is spelled so in every checkpoint.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor, feature_layer: int = -2) -> Tensor:
        """(N, 3, H, W) -> (N, patches, D): `hidden_states[feature_layer]`, the class token dropped.

        hidden_states[0] is after pre_layrnorm, [-1] after the last block: at -2 the last block need
        not run.
        """
        blocks = feature_layer
        if feature_layer < 0:
            blocks += len(self.encoder.layers) + 1
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers[:blocks]:
            x = layer(x)
        return x[:, 1:]
