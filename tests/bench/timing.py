"""Seconds and bytes: medians over interleaved repeats, and the peak of what is allocated."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its own beginning and end
Work = Callable[[], object]


@dataclass(frozen=True)
class Side:
    """What one side took: the median of its seconds, its peak bytes beyond the model, and the
    model's own."""

    seconds: float
    peak: int
    model: int


def seconds_of(work: Work, device: str) -> float:
    """Wall time of one call, the GPU's queue emptied before and after."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: str) -> None:
    """Wait for what a GPU has still to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(sides: dict[str, Work], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each side, which take turns, so that a machine that slows down slows all of
    them down."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            taken[name].append(seconds_of(work, device))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def peak_bytes(work: Work, device: str) -> int:
    """The most bytes of tensors that one call holds at a time beyond those that were there before
    it.

    Of torch's allocator on either device: on CUDA its own count, on the CPU the sum of what the
    profiler sees allocated, mapped from a file, and freed. The model, which was there before, is
    not in it, nor is what lies outside torch, such as the libraries.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    found = seen.profiler.kineto_results.events()
    events = [event for event in found if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def in_words(size: int) -> str:
    """Bytes for a reader."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def model_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of the parameters, tied ones once."""
    tensors = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in tensors.values())


def measured(
    works: dict[str, Work], models: dict[str, torch.nn.Module | None], repeats: int, device: str
) -> dict[str, Side]:
    """Each side's bytes, then its seconds: so each has been called once when the clock runs."""
    peaks = {name: peak_bytes(work, device) for name, work in works.items()}
    seconds = interleaved(works, repeats, device)
    held = {name: 0 if models[name] is None else model_bytes(models[name]) for name in works}
    return {name: Side(seconds[name], peaks[name], held[name]) for name in works}


def alone(work: Work, model: torch.nn.Module, device: str) -> dict:
    """Our own side by itself, of one call: a number to have, whatever the peer does."""
    return asdict(measured({"ours": work}, {"ours": model}, 1, device)["ours"])


def compared(work: str, checked: str, ours: Side, peer: Side, **facts) -> dict:
    """A row of bench.json: ratios are peer / ours, so that more is better for us.

    memory_ratio is that of the peaks beyond the model; with_model_ratio counts the weights, too.
    """
    return {
        "work": work,
        "checked": checked,
        "time_ratio": peer.seconds / ours.seconds,
        "memory_ratio": peer.peak / ours.peak,
        "with_model_ratio": (peer.peak + peer.model) / (ours.peak + ours.model),
        "ours": asdict(ours),
        "peer": asdict(peer),
        **facts,
    }
