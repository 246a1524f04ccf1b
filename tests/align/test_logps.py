"""Log-probs a chunk of tokens at a time: the numbers of all at once, and never the logits of all at
once.
"""

import pytest
import torch
from helpers import IMAGE, random_case, worst
from torch.utils._python_dispatch import TorchDispatchMode

from minialign.align import logps as logps_module
from minialign.align.logps import token_logps
from minialign.model.masks import build_tree

SEEDS = range(6)
VOCAB = 97  # no other width of the random models


class Heights(TorchDispatchMode):
    """Notes of every new tensor that is as wide as the vocabulary how many rows it has."""

    def __init__(self):
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_new = isinstance(out, torch.Tensor) and not func.is_view
        if is_new and out.shape[-1:] == (VOCAB,):
            self.seen.append(out.numel() // VOCAB)
        return out


def with_gradients(model, logps: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """The log-probs, then the gradients of a random sum of them by all that the decoder, projector
    and head hold.
    """
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed))
    named = [p for name, p in model.named_parameters() if not name.startswith("vision_tower")]
    return logps.detach(), *torch.autograd.grad((logps * weights).sum(), named)


def at_once(model, tree, features) -> torch.Tensor:
    """All branch tokens' log-probs, from the logits of all of them."""
    row, column = (tree.branch > 0).nonzero(as_tuple=True)
    logits = model.lm_head(model(tree, features)[row, tree.parent[row, column]])
    return logits.float().log_softmax(-1).gather(-1, tree.ids[row, column, None])[:, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_chunks_are_all_at_once(seed, monkeypatch):
    """Bit for bit where one chunk takes them all; and a chunk's logits are all that there ever is,
    and are not kept.
    """
    model, batch, features = random_case(seed, VOCAB)
    tree = build_tree(batch, IMAGE, pad_id=0)
    expected = with_gradients(model, at_once(model, tree, features), seed)
    tokens = int((tree.branch > 0).sum())
    for chunk in (logps_module.CHUNK, tokens, tokens - 1, 2 + seed, 1):
        monkeypatch.setattr(logps_module, "CHUNK", chunk)
        kept: list[torch.Tensor] = []

        def keep(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        with Heights() as heights:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                logps = token_logps(model, tree, features)[2]
            found = with_gradients(model, logps, seed)
        assert max(heights.seen) == min(chunk, tokens)
        assert not any(tensor.shape[-1:] == (VOCAB,) for tensor in kept)
        for ours, theirs in zip(found, expected, strict=True):
            assert theirs.abs().max() > 0
            if chunk >= tokens:
                assert torch.equal(ours, theirs)
            assert worst(ours, theirs) <= 1e-5 * theirs.abs().max().item()
