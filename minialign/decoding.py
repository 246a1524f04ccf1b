"""What decoding attends to: the tree so far with its keys and values, in one of two forms.

It grows by a step's columns, and rows that have ended are let go: the least work, which is what counts on a CPU.
Or it has its final width from the start, the columns that are still free being padding: so all steps have the same
shapes, and a GPU replays one CUDA graph for each of them. There a step waits for launches and for the weights, and
free columns cost little.
"""

import torch
from torch import Tensor

from minialign.compiled import compiled
from minialign.llama import KVCache
from minialign.llava import Llava
from minialign.masks import PADDING, TRUNK, TokenTree

ROUND = 128  # columns: a fixed width is a multiple of this, so that few widths occur


def columns(
    ids: Tensor, sequence: Tensor, position: Tensor, number: Tensor, fork: Tensor, active: Tensor, first: int
) -> TokenTree:
    """(B, W) columns of a tree, from its column `first` on: a token of an active branch each, or padding."""
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
        sequence=torch.where(active, sequence, PADDING),
        tip=nothing,
    )


def last_tokens(tree: TokenTree) -> TokenTree:
    """The (B, S) tokens that the branches go on from."""
    tip = tree.tip.clamp(min=0)
    position, number = tree.positions.gather(1, tip), torch.arange(1, tip.shape[1] + 1, device=tip.device)
    fork = torch.where(tree.branch.gather(1, tip) == TRUNK, position + 1, tree.fork.gather(1, tip))
    ids, sequence = tree.ids.gather(1, tip), tree.sequence.gather(1, tip)
    return columns(ids, sequence, position, number.expand_as(tip), fork, tree.tip >= 0, 0)


def next_logits(model: Llava, new: TokenTree, cache: KVCache, tree: TokenTree) -> Tensor:
    """One step: (B, W, V) float32 logits behind the `new` tokens, which are columns of the tree by now."""
    return model.lm_head(model(new, None, cache, tree)).float()


def replayed_logits(model: Llava, new: TokenTree, cache: KVCache, tree: TokenTree) -> Tensor:
    """The same as one CUDA graph. The logits are overwritten by the next step's."""
    torch.compiler.cudagraph_mark_step_begin()
    return compiled(next_logits, "reduce-overhead")(model, new, cache, tree)


class Context:
    """The tree so far with its keys and values: at first the prompts, with room for `room` more columns."""

    def __init__(self, model: Llava, prompts: TokenTree, tower_features: Tensor | None, room: int, fixed: bool):
        rows, self.filled = prompts.ids.shape
        capacity = -(-(self.filled + room) // ROUND) * ROUND
        self.model, self.tree, self.fixed = model, prompts, fixed
        self.cache = KVCache(model.config.text, rows, capacity, model.lm_head.weight)
        if fixed:  # free columns are attended to with weight 0, and 0 times NaN is NaN
            self.cache.keys.zero_(), self.cache.values.zero_()
        hidden = model(prompts, tower_features, self.cache)
        tip = prompts.tip.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        self.logits = model.lm_head(hidden.gather(1, tip)).float()  # (B, S, V) behind the branches' last tokens
        self.step = next_logits
        if fixed:
            free = prompts.ids.new_zeros(rows, capacity - self.filled)
            self.tree = prompts.append(columns(free, free, free, free, free, free.bool(), self.filled))
            for tensor in (self.cache.keys, self.cache.values, self.cache.length):
                torch._dynamo.mark_static_address(tensor)  # a graph writes them where they are
        if fixed and model.device.type == "cuda":
            self.step = replayed_logits

    def add(self, new: TokenTree) -> None:
        """Take a step: the next columns, and the logits (B, W, V) behind them."""
        if self.fixed:
            self.tree.put(new, self.filled)
        else:
            self.tree = self.tree.append(new)
        self.filled += new.ids.shape[1]
        self.logits = self.step(self.model, new, self.cache, self.tree)

    def keep(self, rows: Tensor) -> None:
        """Let go of all but some rows, given in order."""
        self.tree = self.tree.rows(rows)
        self.cache.keep(rows)
