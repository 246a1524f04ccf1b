"""Where a piece of work's time goes: torch.profiler's kernels, on a CPU its operations."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its own beginning and end
TOP = 12
WIDTH = 90  # letters of a kernel's name, which may be very long


@dataclass(frozen=True)
class Kernel:
    """What all calls of one kernel have taken."""

    ms: float = 0.0
    calls: float = 0.0


Kernels = dict[str, Kernel]


def kernels_of(work: Callable[[], object], device: str) -> Kernels:
    """By name, of one call of `work`."""
    cuda = device == "cuda"
    activity = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activity) as seen:
        work()
        if cuda:
            torch.cuda.synchronize()

    found: Kernels = {}
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    for event in seen.key_averages():
        # On a GPU's time line there are also the marks that code sets, over kernels of their own.
        if event.device_type != wanted or getattr(event, "is_user_annotation", False):
            continue
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        found[event.key] = Kernel(us / 1e3, event.count)
    return found


def difference(more: Kernels, less: Kernels, parts: int) -> Kernels:
    """What `more` has taken beyond `less`, by each of so many parts."""
    found = {}
    for name, kernel in more.items():
        other = less.get(name, Kernel())
        ms, calls = kernel.ms - other.ms, kernel.calls - other.calls
        found[name] = Kernel(ms / parts, calls / parts)
    return found


def table(kernels: Kernels, top: int = TOP) -> list[str]:
    """The longest, each with its milliseconds, its share of all and its calls."""
    total = sum(kernel.ms for kernel in kernels.values())
    count = sum(kernel.calls for kernel in kernels.values())
    lines = [f"{total:10.3f} ms  100 % {count:8,.0f} calls  all"]
    longest = sorted(kernels.items(), key=lambda item: -item[1].ms)[:top]
    for name, kernel in longest:
        share = kernel.ms / total if total else 0.0
        taken = f"{kernel.ms:10.3f} ms {share:5.0%} {kernel.calls:8,.0f} calls"
        lines.append(f"{taken}  {name[:WIDTH]}")
    return lines
