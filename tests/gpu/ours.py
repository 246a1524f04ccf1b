"""Our own side by itself: a DPO step in each mode, decoding and BDHS, and where their time goes.

The pair and the questions are those of tests.bench, whose rows have a peer beside them.
"""

import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.utils.checkpoint import checkpoint

from minialign.model.llava import Llava
from minialign.sampling.generate import FixedContext
from minialign.training.flags import COMPILE_OPTIONS
from tests.bench import roofline
from tests.bench.dpo import Ours, batch_of, record, require_same_work, with_adapters
from tests.bench.models import load_ours
from tests.bench.rows import Facts
from tests.bench.sampling import bandwidth_share, bdhs_work, generate_work
from tests.bench.sizes import Size
from tests.bench.timing import in_words, measured, seconds_of
from tests.gpu.kernels import difference, kernels_of, table

PROFILED = 8  # steps of decoding

# ---------------------------------------------------------------- how layers run, as in the scripts


def compile_layers(model: Llava) -> None:
    """--compile."""
    for layer in model.language_model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, options=COMPILE_OPTIONS)


def recompute_layers(model: Llava) -> None:
    """--recompute."""
    for layer in model.language_model.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


# ---------------------------------------------------------------- a DPO step


def measure_step(
    row: str,
    size: Size,
    folder: Path,
    facts: Facts,
    pairs: int = 1,
    compiled: bool = False,
    recompute: bool = False,
) -> None:
    """A whole step: seconds, bytes beyond the model, model FLOPs utilisation, kernels."""
    assistant = load_ours(size, folder)
    model = with_adapters(assistant.model, size.lora_rank)
    batch = batch_of(assistant, folder, [record(size, folder, i) for i in range(pairs)])
    ours = Ours(model, batch)

    # Other means, the same loss and gradient norm.
    plain = ours.step() if compiled or recompute else None
    if compiled:
        compile_layers(model)
    if recompute:
        recompute_layers(model)
    begin = time.perf_counter()
    first = ours.step()
    facts.add(row, loss=first[0], grad_norm=first[1], first_step=time.perf_counter() - begin)
    if plain:
        facts.add(row, checked=require_same_work(first, plain, size.dtype))

    side = measured({"step": ours.step}, {"step": model}, size.repeats, size.device)["step"]
    flops = ours.flops()
    summary = f"{side.seconds:.3f} s a step of {batch.tree.ids.numel():,} tokens"
    found = {"step_seconds": side.seconds, "peak": side.peak, "flops": flops}
    if size.device == "cuda":
        found["utilisation"] = roofline.utilisation(flops, side.seconds)
        summary += f", {found['utilisation'] or 0:.1%} of peak FLOP/s"
    summary += f", {in_words(side.peak)}; the first {facts.rows[row]['first_step']:.1f} s"
    facts.add(row, summary=summary, **found)

    # The same with the reference's log-probs given.
    if not compiled and not recompute:
        ref_logps = ours.ref_logps()
        works = {"cached": lambda: ours.step(ref_logps)}
        cached = measured(works, {"cached": model}, size.repeats, size.device)["cached"]
        facts.add(row, cached_seconds=cached.seconds)
        facts.add(row, summary=f"{summary}; with a cached reference {cached.seconds:.3f} s")
    facts.finish(row, kernels=table(kernels_of(ours.step, size.device)))


# ---------------------------------------------------------------- decoding


class Graphs:
    """How many contexts of fixed width have captured their step as a CUDA graph, and how many
    could not."""

    def __init__(self):
        self.captured = self.refused = 0

    def watch(self):
        """Inside, captures are counted."""
        real = FixedContext.capture

        def capture(context: FixedContext, new) -> None:
            real(context, new)
            self.captured += context.graph is not None
            self.refused += context.graph is None

        return mock.patch.object(FixedContext, "capture", capture)


def measure_decoding(
    row: str, size: Size, folder: Path, facts: Facts, compiled: bool = False
) -> None:
    """Two samples of each picture: milliseconds a token, share of the bandwidth, kernels of a
    step."""
    assistant = load_ours(size, folder)
    model = assistant.model
    if compiled:
        compile_layers(model)
    graphs = Graphs()
    with graphs.watch():
        begin = time.perf_counter()
        work = generate_work(size, assistant)
        first = time.perf_counter() - begin
        facts.add(row, first_call=first, captured=graphs.captured, refused=graphs.refused)

        side = measured({"all": work.call}, {"all": model}, size.repeats, size.device)["all"]
        found = bandwidth_share(size, model, work, side.seconds)
        summary = f"{found['ms_per_token']:.2f} ms a token"
        if size.device == "cuda":
            summary += f", {found['bandwidth_share'] or 0:.1%} of bandwidth"
            summary += f", {graphs.captured} graphs captured and {graphs.refused} refused"
        summary += f"; {work.title}: {side.seconds:.2f} s, of which prefill"
        summary += (
            f" {found['prefill_seconds']:.2f} s, {in_words(side.peak)}; the first {first:.1f} s"
        )
        facts.add(row, all_seconds=side.seconds, peak=side.peak, summary=summary, **found)

        few = kernels_of(lambda: work.call(1), size.device)
        more = kernels_of(lambda: work.call(1 + PROFILED), size.device)
    facts.finish(row, kernels=table(difference(more, few, PROFILED)))


def measure_bdhs(row: str, size: Size, folder: Path, facts: Facts) -> None:
    """Algorithm 1 for a batch of examples: seconds, bytes, kernels."""
    assistant = load_ours(size, folder)
    work, model = bdhs_work(size, assistant), assistant.model
    side = measured({"bdhs": work.call}, {"bdhs": model}, size.repeats, size.device)["bdhs"]
    once = seconds_of(lambda: model.encode_images(torch.cat(work.pixels)), size.device)
    summary = f"{side.seconds:.3f} s, of which the tower {once:.3f} s, {in_words(side.peak)}"
    summary += f"; {work.title}"
    facts.add(row, bdhs_seconds=side.seconds, tower_seconds=once, peak=side.peak, summary=summary)
    facts.finish(row, kernels=table(kernels_of(work.call, size.device)))
