"""torch.compile, for tensors of any length."""

from collections.abc import Callable
from functools import cache

import torch


@cache
def compiled(function: Callable, mode: str | None = None) -> Callable:
    """`function`, compiled at its first call; all who ask for it share the code. Only then is the compiler loaded."""
    return torch.compile(function, dynamic=True, mode=mode)
