"""How memory and time grow, measured here: DPO against the response, BDHS against sentences and
image tokens.

On the bench's small LLaVA-1.6 (random weights), one thread: medians of repeats that take turns. The
stop tokens are taken away from BDHS, so that every sentence is completed by as many tokens.
"""

import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from minialign.align.logps import branch_logps
from minialign.data.anyres import PINPOINTS
from minialign.data.collate import PairBatch, PairCollator
from minialign.data.images import ImageProcessor
from minialign.sampling.bdhs import Bdhs, BdhsConfig, Example
from minialign.sampling.generate import Sampling
from tests.bench import memory
from tests.bench.dpo import Ours, collator, record, with_adapters
from tests.bench.models import load_ours, make_folder
from tests.bench.plot import write_plot
from tests.bench.sampling import never_similar
from tests.bench.scaling import markdown
from tests.bench.sizes import TINY, Size, picture, text_config, vision_config
from tests.bench.timing import interleaved, peak_bytes

REPEATS = 5  # of a DPO step
BDHS_REPEATS = 15  # which is quick
LENGTHS = (16, 64, 128, 256, 384)  # tokens of each of two responses
SENTENCES = (1, 2, 4, 8, 12, 16)
SIDES = (6, 9, 12, 15, 18)  # patches along a tile's edge, of which the image tokens follow
# A vocabulary that is wider than anything else, so that logits of all tokens would stand out.
MEMORY = replace(TINY, text=text_config(8192, 384, 1032, 4, 6))


def loaded(size: Size, folder: Path):
    """(model, tokenizer, processor) of a folder that is made here."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return load_ours(size, make_folder(size, folder))


def batch_of(collate: PairCollator, folder: Path, size: Size, response: int) -> PairBatch:
    """One pair whose responses have so many tokens."""
    pair = record(size, folder, 0)
    collate = replace(collate, max_response_tokens=response, truncate=True)
    words = replace(size, sentence_tokens=response)  # of five sentences: enough
    return collate(
        [replace(pair, chosen=words.answer(0, "chosen"), rejected=words.answer(0, "rejected"))]
    )


def dpo_steps(size: Size, folder: Path, lengths: Iterable[int]) -> dict[int, Ours]:
    """A DPO step for each length of response, on one model."""
    model, tokenizer, processor = loaded(size, folder)
    with_adapters(model, size.lora_rank)
    collate = collator(tokenizer, processor, folder)
    return {length: Ours(model, batch_of(collate, folder, size, length)) for length in lengths}


# ---------------------------------------------------------------- memory


def memory_rows(size: Size, folder: Path, lengths: Iterable[int]) -> list[dict[str, int]]:
    """What a DPO step keeps and its peak, as counted and by the formula, and its largest tensor, by
    length."""
    rows = []
    for ours in dpo_steps(size, folder, lengths).values():
        model, tree = ours.model, ours.batch.tree
        features = model.encode_images(ours.batch.pixels)
        ours.step()  # the moments are there from now on
        kept = memory.saved_bytes(model, lambda: branch_logps(model, tree, features))  # noqa: B023
        dense = memory.dense_mask_bytes(model, tree)
        with memory.LargestTensor() as largest:
            ours.step()
        formula = memory.activation_bytes(model, tree)
        rows.append(
            {
                "tokens": tree.ids.shape[1],
                "kept": kept - dense,
                "formula": formula,
                "dense": dense,
                "peak": peak_bytes(ours.step, "cpu") - dense,
                "peak formula": formula + memory.workspace_bytes(model, tree),
                "largest": largest.bytes,
                "shape": largest.shape,
            }
        )
    return rows


# ---------------------------------------------------------------- time


def dpo_times(
    size: Size, folder: Path, lengths: Iterable[int], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step by tokens of each response, the reference computed or cached."""
    steps, sides = dpo_steps(size, folder, lengths), {}
    for length, ours in steps.items():
        ref_logps = ours.ref_logps()
        sides["reference computed", length] = ours.step
        sides["--ref-cache", length] = partial(ours.cached_step, ref_logps)
    return by_line(interleaved(sides, repeats, "cpu"))


def by_line(seconds: dict[tuple[str, int], float]) -> dict[str, list[tuple[float, float]]]:
    """(line, x) -> y, as points of each line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for (name, x), y in seconds.items():
        lines.setdefault(name, []).append((x, y))
    return lines


def bdhs_work(size: Size, loads: tuple, sentences: int, rho_th: float):
    """Algorithm 1 for one example of so many sentences: the tower, a prefill, and as many
    branches."""
    model, tokenizer, processor = loads
    sampling = Sampling(size.sentence_tokens, temperature=0.0)
    bdhs = Bdhs(
        model, tokenizer, processor, never_similar, BdhsConfig(rho_th, n_bdhs=1, sampling=sampling)
    )
    sentence = size.answer(0, "chosen").split(". ")[0] + "."
    example = Example(
        "0", picture(0), [("user", size.question(0))], " ".join([sentence] * sentences)
    )
    pixels = processor(example.image)

    def work() -> None:
        with mock.patch.object(Bdhs, "sentence_stops", {-1}):  # no token stops
            bdhs.sample([example], [model.encode_images(pixels)])

    return work


def sentence_times(size: Size, folder: Path, counts: Iterable[int], repeats: int):
    """Seconds per example by sentences of y+."""
    loads = loaded(size, folder)
    sides = {("BDHS, rho_th 0.99", n): bdhs_work(size, loads, n, 0.99) for n in counts}
    return by_line(interleaved(sides, repeats, "cpu"))


def image_times(size: Size, folder: Path, sides: Iterable[int], repeats: int):
    """Seconds per example by image tokens, of which few or all are seen; the decoder stays the
    same."""
    works = {}
    for side in sides:
        shape = replace(size, vision=vision_config(96, 3, 3, side))
        loads = loaded(shape, folder / str(side))
        tokens = len(loads[2].layout(picture(0))[1])
        for rho_th in (0.99, 0.0):
            works[f"rho_th {rho_th:g}", tokens] = bdhs_work(shape, loads, 5, rho_th)
    return by_line(interleaved(works, repeats, "cpu"))


def loading_seconds(folder: Path, repeats: int) -> float:
    """Median seconds in which one process parses, decodes and tiles a pair's JPEG of 640 x 480 for
    a 7B's tower."""
    tokenizer = loaded(TINY, folder)[1]
    picture(0).save(folder / "0.jpg")
    pair = replace(record(TINY, folder, 0), image="0.jpg")
    collate = collator(tokenizer, ImageProcessor(pinpoints=PINPOINTS), folder)
    assert collate([pair]).tree.ids.shape[1] > 2340
    return interleaved({"load": lambda: collate([pair])}, repeats, "cpu")["load"]


def memory_table(rows: list[dict]) -> str:
    """MB, and the largest tensor's shape."""
    shown = []
    for row in rows:
        sizes = [
            f"{row[key] / 1e6:.1f}"
            for key in ("kept", "formula", "peak", "peak formula", "dense", "largest")
        ]
        per_token = f"{row['kept'] / row['tokens'] / 1e3:.2f}"
        shape = " x ".join(str(n) for n in row["shape"])
        shown.append([f"{row['tokens']:,}", *sizes[:2], per_token, *sizes[2:], shape])
    return markdown(
        "tokens | MB kept | formula | kB per token | MB peak | formula | mask | largest tensor |"
        " its shape",
        shown,
    )


def main(out: str) -> None:
    """Measure, print, and write the plots."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = memory_rows(MEMORY, folder / "memory", LENGTHS)
        print(f"## Memory against length\n\n{memory_table(rows)}")
        plots = {
            "response": (
                "tokens of each response",
                dpo_times(TINY, folder / "response", LENGTHS, REPEATS),
            ),
            "sentences": (
                "sentences of y+",
                sentence_times(TINY, folder / "sentences", SENTENCES, BDHS_REPEATS),
            ),
            "image-tokens": (
                "image tokens",
                image_times(TINY, folder / "images", SIDES, BDHS_REPEATS),
            ),
        }
        loading = loading_seconds(folder / "loading", BDHS_REPEATS)
    for plot, (across, lines) in plots.items():
        up = "ms of a DPO step" if plot == "response" else "ms of BDHS per example"
        lines = {line: [(x, y * 1e3) for x, y in points] for line, points in lines.items()}
        write_plot(Path(out) / f"scaling-{plot}.svg", across, up, lines)
        columns = [f"{x:,}" for x, _ in next(iter(lines.values()))]
        figures = [[line, *(f"{y:,.0f}" for _, y in points)] for line, points in lines.items()]
        print(f"## {up}\n\n{markdown(' | '.join([across, *columns]), figures)}")
    print(
        f"{loading * 1e3:.0f} ms to load a pair; "
        f"load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
