"""Cached, batched sampling of branches: one prefill per batch, then one token per branch and step.

The branches of a row are decoded together with the trunk, whose keys are stored once. Randomness comes as one
uniform number per branch and step from that branch's own seed, so that what is drawn for an example does not
depend on the batch that it is in.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from minialign.errors import UserError
from minialign.llama import KVCache
from minialign.llava import Llava
from minialign.masks import PADDING, TRUNK, Sequence, TokenTree, build_tree


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p keeps the smallest set of that probability."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """What one branch got: new ids (the stop token included), their log-probs, and whether it stopped by itself."""

    ids: list[int]
    logps: list[float]
    stopped: bool


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def pick(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Choose token ids: (..., V) logits and (...) uniform numbers -> (...) ids, by inverting the cumulative sum."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    cumulative = probs.cumsum(-1)
    probs = probs.masked_fill(cumulative - probs >= sampling.top_p, 0)
    cumulative = probs.cumsum(-1)
    target = uniform[..., None].double() * cumulative[..., -1:]
    chosen = (cumulative <= target).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
    return order.gather(-1, chosen)[..., 0]


def next_columns(keys: TokenTree, ids: Tensor, position: Tensor, fork: Tensor, active: Tensor) -> TokenTree:
    """The (B, S) columns of one decoding step: a token per active branch, padding for the others."""
    width, branches = keys.ids.shape[1], ids.shape[1]
    column = torch.arange(width, width + branches, device=ids.device).expand_as(ids)
    number = torch.arange(1, branches + 1, device=ids.device).expand_as(ids)
    nothing = torch.full_like(ids, -1)
    return TokenTree(
        ids=ids,
        positions=torch.where(active, position, column),  # unique for padding
        branch=torch.where(active, number, PADDING),
        fork=fork,
        visible=active,
        parent=torch.where(active, keys.tip, nothing),
        feature=nothing,
        tip=torch.where(active, column, nothing),
    )


@torch.no_grad()
def generate(
    model: Llava,
    sequences: list[Sequence],
    tower_features: Tensor | None,
    sampling: Sampling,
    stop_ids: set[int],
    seeds: list[list[int]] | None = None,
    pad_id: int = 0,
) -> list[list[Completion]]:
    """Continue every branch of every sequence until a stop token or the limit; [row][branch] of completions.

    A branch also ends, without having stopped, where the decoder's positions do. Log-probs are natural, of the
    untempered distribution, as training computes them. The image token is never sampled.
    seeds[row][branch] is needed unless temperature is 0.
    """
    device = model.device
    keys = build_tree(sequences, model.config.image_token_id, pad_id).to(device)
    active = keys.tip >= 0  # (B, S)
    cache = KVCache(
        model.config.text, len(sequences), keys.ids.shape[1] + active.shape[1] * sampling.max_new_tokens,
        model.lm_head.weight,
    )  # fmt: skip
    uniform = torch.zeros(*active.shape, sampling.max_new_tokens)
    if sampling.temperature > 0:
        for row, row_seeds in enumerate(seeds):
            for branch, seed in enumerate(row_seeds):
                stream = torch.Generator().manual_seed(seed)
                uniform[row, branch] = torch.rand(sampling.max_new_tokens, generator=stream)
    uniform = uniform.to(device)
    stops = torch.tensor(sorted(stop_ids), device=device)

    tip = keys.tip.clamp(min=0)
    position = keys.positions.gather(1, tip) + 1  # (B, S) of the next token
    fork = torch.where(keys.branch.gather(1, tip) == TRUNK, position, keys.fork.gather(1, tip))
    positions, taken = model.config.text.max_position_embeddings, int(position[active].max())
    if taken >= positions:
        said = f"image and prompt take {taken} positions, the decoder has {positions}"
        raise UserError(f"{said}; ask less, or use another model")
    hidden = model(keys, tower_features, cache)
    hidden = hidden.gather(1, tip[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, S, D)
    steps = []
    for step in range(sampling.max_new_tokens):
        logits = model.lm_head(hidden).float()
        logps = logits.log_softmax(-1)
        logits[..., model.config.image_token_id] = -torch.inf
        ids = pick(logits, uniform[..., step], sampling)
        steps.append((ids, logps.gather(-1, ids[..., None])[..., 0], active))
        active = active & ~torch.isin(ids, stops) & (position + 1 < positions)
        if not active.any() or step == sampling.max_new_tokens - 1:
            break
        new = next_columns(keys, ids, position, fork, active)
        keys = keys.append(new)
        hidden = model(new, None, cache, keys)
        position = position + 1
    ids, logps, drawn = (torch.stack(part, dim=-1).cpu() for part in zip(*steps, strict=True))  # (B, S, steps)
    return [
        [completion(ids[row, s][drawn[row, s]], logps[row, s][drawn[row, s]], stop_ids)
         for s in range(len(sequence.branches))]
        for row, sequence in enumerate(sequences)
    ]  # fmt: skip


def completion(ids: Tensor, logps: Tensor, stop_ids: set[int]) -> Completion:
    """What one branch got; it has stopped by itself if its last token is one of those that stop."""
    return Completion(ids.tolist(), logps.tolist(), int(ids[-1]) in stop_ids)
