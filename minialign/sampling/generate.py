"""Cached, batched sampling of branches: one prefill per batch, then one token per branch and step.

The branches of a row are decoded together with the trunk, whose keys are stored once. What
decoding attends to is the tree so far with its keys and values, in one of two forms. In a
`GrowingContext` a step attends to what is there, and rows that have ended are let go: the least
work, which is what counts on a CPU. A `FixedContext` has its final width from the start, the
columns that are still free being padding: so all steps have the same shapes, and a GPU, which
would wait for the CPU to launch a thousand small kernels, replays one CUDA graph.

Randomness comes as one uniform number per branch and step from that branch's own seed, so that
what is drawn for an example does not depend on the batch that it is in.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from minialign.errors import UserError
from minialign.model.llama import KVCache
from minialign.model.llava import Llava
from minialign.model.masks import COLUMNS, PADDING, TRUNK, Sequence, TokenTree, build_tree

LIKELY = 32  # ids that are sorted at first to draw one
ROUND = 128  # columns: a context's room is a multiple of this, so that few widths occur


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus: of the likeliest tokens as many as have this probability together


@dataclass(frozen=True)
class Completion:
    """What one branch got."""

    ids: list[int]  # new ones, the stop token included
    logps: list[float]  # of each of them
    stopped: bool  # by itself: the last id is a stop token


def pick(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw token ids (...) from logits (..., V) by uniform numbers (...), inverting the cumulative
    sum of the probabilities."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.double() / sampling.temperature, dim=-1).flatten(0, -2)
    return invert(probs, uniform.double().flatten(), sampling.top_p, LIKELY).view(uniform.shape)


def invert(probs: Tensor, uniform: Tensor, top_p: float, count: int) -> Tensor:
    """The ids (N,) at which the sums of `probs` (N, V), the likeliest first and equals by id, pass
    `uniform` (N,).

    Sorting a vocabulary takes long, and what is drawn is nearly always among the `count`
    likeliest; only for rows in which it may not be are more of them sorted.
    """
    vocabulary = probs.shape[-1]
    count = min(count, vocabulary)
    if probs.is_cuda:
        count = vocabulary  # there sorting is quick, and to ask whether all are sure is not
    likely = torch.arange(vocabulary, device=probs.device).expand_as(probs)
    if count < vocabulary:
        likely = probs.topk(count).indices.sort().values  # by id: topk gives equals in any order

    values, order = probs.gather(-1, likely).sort(dim=-1, descending=True, stable=True)
    cumulative = values.cumsum(-1)  # (N, count)
    total = 1.0
    if top_p < 1:
        nucleus = cumulative - values < top_p
        total = cumulative.masked_fill(~nucleus, 0).amax(-1)  # (N,)
    place = (cumulative <= (uniform * total)[:, None]).sum(-1, keepdim=True).clamp(max=count - 1)
    ids = likely.gather(-1, order.gather(-1, place))[:, 0]

    # Equals of the last one may be missing, and some that top_p keeps.
    if count < vocabulary:
        unsure = values.gather(-1, place)[:, 0] == values[:, -1]
        if top_p < 1:
            unsure |= cumulative[:, -1] < top_p
        if unsure.any():
            ids[unsure] = invert(probs[unsure], uniform[unsure], top_p, count**2)
    return ids


# ---------------------------------------------------------------- what decoding attends to


def token_columns(
    ids: Tensor, position: Tensor, number: Tensor, fork: Tensor, active: Tensor, first: int
) -> TokenTree:
    """(B, W) columns of a tree, from its column `first` on: each a token of an active branch, or
    padding."""
    column = torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)
    nothing = torch.full_like(ids, -1)  # no picture; parents and tips are for training
    return TokenTree(
        ids=ids,
        positions=torch.where(active, position, column),  # unique for padding
        branch=torch.where(active, number, PADDING),
        fork=fork,
        visible=active,
        parent=nothing,
        feature=nothing,
        tip=nothing,
    )


def last_tokens(tree: TokenTree) -> TokenTree:
    """The (B, S) tokens that the branches go on from."""
    tip = tree.tip.clamp(min=0)
    position = tree.positions.gather(1, tip)
    number = torch.arange(1, tip.shape[1] + 1, device=tip.device).expand_as(tip)
    at_fork = tree.branch.gather(1, tip) == TRUNK  # nothing of the branch is there yet
    fork = torch.where(at_fork, position + 1, tree.fork.gather(1, tip))
    return token_columns(tree.ids.gather(1, tip), position, number, fork, tree.tip >= 0, 0)


def prefill(
    model: Llava, prompts: TokenTree, tower_features: Tensor | None, room: int
) -> tuple[KVCache, Tensor]:
    """Keys and values of the prompts, with room for `room` more columns; and the float32 logits
    (B, S, V) behind the branches' last tokens."""
    rows, width = prompts.ids.shape
    capacity = -(-(width + room) // ROUND) * ROUND
    cache = KVCache(model.config.text, rows, capacity, model.lm_head.weight)
    with plain_layers():
        hidden = model(prompts, tower_features, cache)  # (B, T, D)
    tip = prompts.tip.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
    return cache, model.lm_head(hidden.gather(1, tip)).float()


def next_logits(model: Llava, new: TokenTree, cache: KVCache, tree: TokenTree) -> Tensor:
    """One step: (B, W, V) float32 logits behind the `new` tokens, which are columns of the tree
    by now."""
    return model.lm_head(model(new, None, cache, tree)).float()


def plain_layers():
    """Inside, layers that --compile has compiled run as plain code: where each call has another
    length, there would be something to compile in each. Steps of a `FixedContext` run compiled.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing was compiled; to load the compiler takes seconds
    return torch.compiler.set_stance("force_eager")


class GrowingContext:
    """The tree so far, a step's columns wider after each step; rows can be let go."""

    def __init__(self, model: Llava, prompts: TokenTree, tower_features: Tensor | None, room: int):
        self.model, self.tree = model, prompts
        self.cache, self.logits = prefill(model, prompts, tower_features, room)

    @property
    def filled(self) -> int:
        """Columns so far."""
        return self.tree.ids.shape[1]

    def all_ended(self, active: Tensor) -> bool:
        """Whether none of the (B, W) branches goes on."""
        return not active.any()

    def add(self, new: TokenTree) -> None:
        """Take a step: the next columns, and the logits (B, W, V) behind them."""
        self.tree = self.tree.append(new)
        with plain_layers():
            self.logits = next_logits(self.model, new, self.cache, self.tree)

    def keep(self, rows: Tensor) -> None:
        """Let go of all but some rows, given in order."""
        self.tree = self.tree.rows(rows)
        self.cache.keep(rows)


class FixedContext:
    """The tree at its final width, filled from the left, every step the same work on the same
    memory: on a GPU the first step runs plainly, the second is captured as a CUDA graph, and from
    then on it is replayed."""

    def __init__(self, model: Llava, prompts: TokenTree, tower_features: Tensor | None, room: int):
        self.model, self.filled = model, prompts.ids.shape[1]
        self.cache, self.logits = prefill(model, prompts, tower_features, room)
        width = self.cache.layers[0].keys.shape[2]
        free = prompts.ids.new_zeros(len(prompts.ids), width - self.filled)
        self.tree = prompts.append(token_columns(free, free, free, free, free.bool(), self.filled))
        self.steps, self.graph = 0, None
        self.asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def all_ended(self, active: Tensor) -> bool:
        """Whether none of the (B, W) branches of the call before this one went on: so the CPU never
        waits for the step in progress, and gives the GPU the next one in time. At the end one step
        more is taken, of padding alone."""
        before = self.asked
        answer = active.any().to("cpu", non_blocking=True)  # torch copies into pinned memory
        self.asked = answer, torch.cuda.current_stream().record_event() if active.is_cuda else None
        if before is None:
            return False
        answer, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return not answer

    def add(self, new: TokenTree) -> None:
        """Take a step: the next columns, and the logits (B, W, V) behind them, which the step
        after it overwrites."""
        self.tree.put(new, self.filled)
        self.filled += new.ids.shape[1]
        self.steps += 1

        if self.steps == 2 and new.ids.is_cuda:
            self.capture(new)
        if self.graph is None:
            self.logits = next_logits(self.model, new, self.cache, self.tree)
            return

        for name in COLUMNS:
            getattr(self.new, name).copy_(getattr(new, name))
        self.graph.replay()

    def capture(self, new: TokenTree) -> None:
        """Record a step without taking it; where that is refused, steps go on plainly."""
        # The graph's own columns, into which each step's are copied.
        static = TokenTree(*[getattr(new, name).clone() for name in COLUMNS], new.tip)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Of this thread alone: others load pictures into pinned memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = next_logits(self.model, static, self.cache, self.tree)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            tell_once(f"sampling without a CUDA graph, which is slower: {error}")
            return
        self.graph, self.new, self.logits = graph, static, logits


@cache
def tell_once(message: str) -> None:
    """Say something to whoever runs the program, once."""
    print(message, file=sys.stderr)


# ---------------------------------------------------------------- sampling


def uniform_numbers(seeds: list[list[int]], branches: int, count: int) -> Tensor:
    """(B, S, count) numbers of [0, 1): as many as a branch may need, from its own seed."""
    uniform = torch.zeros(len(seeds), branches, count)
    for row, row_seeds in enumerate(seeds):
        for branch, seed in enumerate(row_seeds):
            uniform[row, branch] = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return uniform


def still_running(active: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, W) branches, active or ended: the rows to go on with (B',), and of each the places
    (B', W') of its active branches.

    Rows go when half of them have ended: the others' keys are copied, and so all these copies
    together move at most one whole cache.
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
    """Continue every branch of every sequence until a stop token or the limit; returns
    [row][branch] of completions.

    tower_features  (tiles, patches, D) of all pictures, in the order of the sequences
    seeds           [row][branch], needed unless the temperature is 0
    fixed           whether the context has its final width from the start; None: on a GPU, but not
                    for a model in shards, whose FSDP hooks no graph can hold

    A branch also ends, without having stopped, where the decoder's positions do. Log-probs are
    natural, of the untempered distribution, as training computes them. The image token is never
    sampled. A `UserError` where a prompt takes all positions.
    """
    device, limit = model.device, sampling.max_new_tokens
    positions = model.config.text.max_position_embeddings
    if fixed is None:
        fixed = device.type == "cuda"
        if fixed and hasattr(model, "reshard"):
            tell_once("sampling without a CUDA graph, which is slower: the model is in shards")
            fixed = False

    prompts = build_tree(sequences, model.config.image_token_id, pad_id).to(device)
    rows, branches = prompts.tip.shape
    row = torch.arange(rows, device=device)[:, None].expand(rows, branches)
    last = last_tokens(prompts)
    taken = int(last.positions[last.visible].max()) + 1
    if taken >= positions:
        message = f"image and prompt take {taken} positions, the decoder has {positions}"
        raise UserError(f"{message}; ask less, or use another model")

    seeds = seeds if sampling.temperature > 0 else [[]] * rows
    uniform = uniform_numbers(seeds, branches, limit).to(device)
    stops = torch.tensor(sorted(stop_ids), device=device)

    kind = FixedContext if fixed else GrowingContext
    context = kind(model, prompts, tower_features, branches * limit)
    steps = []
    for step in range(limit):
        # Draw a token for every branch that has not ended.
        logps = context.logits.log_softmax(-1)
        context.logits[..., model.config.image_token_id] = -torch.inf
        ids = pick(context.logits, uniform[row, last.branch.clamp(min=1) - 1, step], sampling)
        steps.append((row, last.branch, ids, logps.gather(-1, ids[..., None])[..., 0]))
        ended = torch.isin(ids, stops) | (last.positions + 2 >= positions)
        active = last.visible & ~ended
        if step == limit - 1 or context.all_ended(active):
            break

        # What has been drawn is the tree's next columns.
        going = [ids, last.positions + 1, last.branch, last.fork, active]
        if not fixed:
            keep, places = still_running(active)
            row, *going = [values[keep].gather(1, places) for values in (row, *going)]
            if len(keep) < len(ids):
                context.keep(keep)
        last = token_columns(*going, context.filled)
        context.add(last)
    return completions(sequences, steps, stop_ids)


def completions(
    sequences: list[Sequence], steps: list[tuple[Tensor, ...]], stop_ids: set[int]
) -> list[list[Completion]]:
    """What every branch got, from each step's row, branch, id and log-prob, (B, W) each.

    A branch has stopped by itself if its last token is one of those that stop.
    """
    drawn = [[([], []) for _ in sequence.branches] for sequence in sequences]
    # In the order of the steps, and fetched from a GPU at once.
    parts = zip(*steps, strict=True)
    values = [torch.cat([each.flatten() for each in part]).tolist() for part in parts]
    for row, branch, token, logp in zip(*values, strict=True):
        if branch != PADDING:
            drawn[row][branch - 1][0].append(token)
            drawn[row][branch - 1][1].append(logp)
    return [[Completion(ids, logps, ids[-1] in stop_ids) for ids, logps in row] for row in drawn]
