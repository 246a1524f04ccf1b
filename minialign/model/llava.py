"""LLaVA: tower, projector and decoder, and how image features get into the sequence."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minialign.model.clip import Clip, ClipConfig
from minialign.model.llama import KVCache, Llama, LlamaConfig
from minialign.model.masks import NEWLINE, TokenTree, dense_mask


@dataclass(frozen=True)
class LlavaConfig:
    """The three parts' sizes and LLaVA's own choices."""

    text: LlamaConfig
    vision: ClipConfig
    image_token_id: int = 32000
    vision_feature_layer: int = -2
    # AnyRes (LLaVA-1.6): the resolutions, (height, width), that pictures are fitted into
    pinpoints: tuple[tuple[int, int], ...] = ()
    # config.json as it was read, to write it back
    raw: dict = field(default_factory=dict, compare=False)


class Projector(nn.Module):
    """Two linear layers with an exact (erf) GELU: tower features to decoder embeddings."""

    def __init__(self, vision_size: int, text_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class Llava(nn.Module):
    """The multimodal model. hf_folder.py lists its parameters' names beside Hugging Face's."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = Clip(config.vision)
        self.multi_modal_projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = Llama(config.text)
        self.image_newline = None
        if config.pinpoints:
            self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size))
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie_weights()
        # A reward model and PPO's policy have one (scalar_head.py).
        self.scalar_head: nn.Linear | None = None

    def tie_weights(self) -> None:
        """One tensor for the embedding and the LM head, if config.json says so."""
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(tiles, 3, H, W) -> (tiles, patches, D_vision).

        The tower is frozen: what it has seen once serves policy and reference.
        """
        # There first: torch would change their type on the host, in memory that is not pinned.
        pixels = pixels.to(self.device, non_blocking=True).to(self.lm_head.weight.dtype)
        return self.vision_tower(pixels, self.config.vision_feature_layer)

    def embed(self, tree: TokenTree, tower_features: Tensor | None) -> Tensor:
        """Token embeddings with projected image features in the image slots, (B, T, D).

        tower_features (tiles, patches, D_vision) are the batch's images in row order. Only the
        features that the tree refers to are projected: neither hidden ones nor what AnyRes leaves
        out. Raises ValueError where slots and features disagree, with both numbers.
        """
        embeddings = self.language_model.embed_tokens(tree.ids)
        available = 0
        if tower_features is not None:
            available = tower_features.shape[0] * tower_features.shape[1]
        expected = tree.features_expected
        if available != expected:
            raise ValueError(f"{expected} image slots in the batch, but {available} image features")
        if not available:
            return embeddings

        if self.image_newline is not None:
            newlines = (tree.feature == NEWLINE)[..., None]
            newline = self.image_newline.to(embeddings.dtype)
            embeddings = torch.where(newlines, newline, embeddings)

        slots = tree.feature >= 0
        if not slots.any():
            return embeddings
        used = tower_features.flatten(0, 1)[tree.feature[slots]]  # (image tokens, D_vision)
        image = self.multi_modal_projector(used).to(embeddings.dtype)
        return embeddings.masked_scatter(slots[..., None], image)

    def forward(
        self,
        tree: TokenTree,
        tower_features: Tensor | None = None,
        cache: KVCache | None = None,
        keys: TokenTree | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) of a token tree; apply `lm_head` where logits are needed.

        With a cache, which then takes up the tokens' keys and values, `keys` is the whole tree so
        far, whose last T columns are `tree`'s; None: `tree` is all there is.
        """
        mask = tree.mask if keys is None else dense_mask(tree, keys)
        embeddings = self.embed(tree, tower_features)
        return self.language_model(embeddings, tree.positions, mask, cache)
