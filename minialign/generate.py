"""Cached, batched sampling of branches: one prefill per batch, then one token per branch and step.

The branches of a row are decoded together with the trunk, whose keys are stored once. What has ended is left out
of the steps that follow; on a GPU it is padding (see decoding.py). Randomness comes as one uniform number per branch
and step from that branch's own seed, so that what is drawn for an example does not depend on the batch that it is in.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from minialign.decoding import Context, columns, last_tokens
from minialign.errors import UserError
from minialign.llava import Llava
from minialign.masks import PADDING, Sequence, build_tree

LIKELY = 32  # ids that are sorted at first to draw one


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
    probs = torch.softmax(logits.double() / sampling.temperature, dim=-1).flatten(0, -2)
    return invert(probs, uniform.double().flatten(), sampling.top_p, LIKELY).view(uniform.shape)


def invert(probs: Tensor, uniform: Tensor, top_p: float, count: int) -> Tensor:
    """The ids (N,) at which the sums of `probs` (N, V), the likeliest first and equals by id, pass `uniform` (N,).

    Sorting a vocabulary takes long, and what is drawn is nearly always among the `count` likeliest; only for rows in
    which it may not be are more of them sorted.
    """
    count = min(count, probs.shape[-1])
    likely = probs.topk(count).indices.sort().values  # by id: topk gives equals in any order
    values, order = probs.gather(-1, likely).sort(dim=-1, descending=True, stable=True)
    cumulative = values.cumsum(-1)
    kept = cumulative - values < top_p
    total = cumulative.masked_fill(~kept, 0).amax(-1) if top_p < 1 else 1.0
    place = (cumulative <= (uniform * total)[:, None]).sum(-1, keepdim=True).clamp(max=count - 1)
    ids = likely.gather(-1, order.gather(-1, place))[:, 0]
    if count < probs.shape[-1]:
        # Equals of the last one may be missing, and some that top_p keeps.
        unsure = (values.gather(-1, place)[:, 0] == values[:, -1]) | ((top_p < 1) & (cumulative[:, -1] < top_p))
        if unsure.any():
            ids[unsure] = invert(probs[unsure], uniform[unsure], top_p, count**2)
    return ids


def uniform_numbers(seeds: list[list[int]], branches: int, count: int) -> Tensor:
    """(B, S, count) numbers of [0, 1): as many as a branch may need, from its own seed."""
    uniform = torch.zeros(len(seeds), branches, count)
    for row, row_seeds in enumerate(seeds):
        for branch, seed in enumerate(row_seeds):
            uniform[row, branch] = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return uniform


def still_running(active: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, W) branches: the rows to go on with, and for each the places (B', W') of its branches that have not ended.

    Rows go when half of them have ended: their keys are copied, and so all copies together are no more than one of all.
    """
    rows = torch.arange(len(active), device=active.device)
    live = active.any(1)
    if 2 * live.sum() <= len(live):
        rows = rows[live]
    order = (~active[rows]).sort(dim=1, stable=True).indices
    return rows, order[:, : active.sum(1).max()]


@torch.no_grad()
def generate(
    model: Llava,
    sequences: list[Sequence],
    tower_features: Tensor | None,
    sampling: Sampling,
    stop_ids: set[int],
    seeds: list[list[int]] | None = None,
    pad_id: int = 0,
    fixed: bool | None = None,
) -> list[list[Completion]]:
    """Continue every branch of every sequence until a stop token or the limit; [row][branch] of completions.

    A branch also ends, without having stopped, where the decoder's positions do. Log-probs are natural, of the
    untempered distribution, as training computes them. The image token is never sampled.
    seeds[row][branch] is needed unless temperature is 0. fixed: see decoding.py; None: on a GPU, but for a
    model in shards, as no graph takes their hooks.
    """
    device, positions, limit = model.device, model.config.text.max_position_embeddings, sampling.max_new_tokens
    fixed = device.type == "cuda" and not hasattr(model, "reshard") if fixed is None else fixed
    prompts = build_tree(sequences, model.config.image_token_id, pad_id).to(device)
    rows, branches = prompts.tip.shape
    last = last_tokens(prompts)
    taken = int(last.positions[last.visible].max()) + 1
    if taken >= positions:
        said = f"image and prompt take {taken} positions, the decoder has {positions}"
        raise UserError(f"{said}; ask less, or use another model")
    uniform = uniform_numbers(seeds if sampling.temperature > 0 else [[]] * rows, branches, limit).to(device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    context = Context(model, prompts, tower_features, branches * limit, fixed)
    steps = []
    for step in range(limit):
        logps = context.logits.log_softmax(-1)
        context.logits[..., model.config.image_token_id] = -torch.inf
        place = last.sequence.clamp(min=0), last.branch.clamp(min=1) - 1, step
        ids = pick(context.logits, uniform[place], sampling)
        steps.append((last.sequence, last.branch, ids, logps.gather(-1, ids[..., None])[..., 0]))
        active = last.visible & ~torch.isin(ids, stops) & (last.positions + 2 < positions)
        if not active.any() or step == limit - 1:
            break
        going = ids, last.sequence, last.positions + 1, last.branch, last.fork, active
        if not fixed:
            keep, places = still_running(active)
            going = [values[keep].gather(1, places) for values in going]
            if len(keep) < len(ids):
                context.keep(keep)
        last = columns(*going, context.filled)
        context.add(last)
    return completions(sequences, steps, stop_ids)


def completions(sequences: list[Sequence], steps: list[tuple[Tensor, ...]], stop_ids: set[int]):
    """What every branch got, from each step's sequence, branch, id and log-prob, (B, W) each.

    A branch has stopped by itself if its last token is one of those that stop.
    """
    said = [[([], []) for _ in sequence.branches] for sequence in sequences]
    for row, branch, ids, logps in steps:
        drawn = branch != PADDING
        for r, b, token, logp in zip(*(part[drawn].tolist() for part in (row, branch, ids, logps)), strict=True):
            said[r][b - 1][0].append(token)
            said[r][b - 1][1].append(logp)
    return [[Completion(ids, logps, ids[-1] in stop_ids) for ids, logps in row] for row in said]
