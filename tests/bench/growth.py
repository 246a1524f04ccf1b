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

import sample_bdhs
from minialign.align.logps import branch_logps
from minialign.data.anyres import PINPOINTS
from minialign.data.collate import PairCollator
from minialign.data.images import ImageProcessor, PictureFolder
from minialign.data.tokenizer import Tokenizer
from minialign.sampling.assistant import Assistant
from tests.bench import memory
from tests.bench.dpo import Ours, batch_of, record, with_adapters
from tests.bench.models import load_ours, make_folder
from tests.bench.plot import write_plot
from tests.bench.sampling import bdhs_config, bdhs_example, never_similar
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


def loaded(size: Size, folder: Path) -> Assistant:
    """The model of a folder that is made here."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return load_ours(size, make_folder(size, folder))


def dpo_steps(size: Size, folder: Path, lengths: Iterable[int]) -> dict[int, Ours]:
    """A DPO step for each length of response, in tokens, on one model."""
    assistant, steps = loaded(size, folder), {}
    model = with_adapters(assistant.model, size.lora_rank)
    for length in lengths:
        words = replace(size, sentence_tokens=length)  # of five sentences: enough
        batch = batch_of(assistant, folder, [record(words, folder, 0)], length)
        steps[length] = Ours(model, batch)
    return steps


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
        sides["--ref-cache", length] = partial(ours.step, ref_logps)
    return by_line(interleaved(sides, repeats, "cpu"))


def by_line(seconds: dict[tuple[str, int], float]) -> dict[str, list[tuple[float, float]]]:
    """(line, x) -> y, as points of each line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for (name, x), y in seconds.items():
        lines.setdefault(name, []).append((x, y))
    return lines


def bdhs_work(size: Size, assistant: Assistant, sentences: int, rho_th: float):
    """Algorithm 1 for one example of so many sentences: the tower, a prefill, and as many
    branches."""
    config = replace(bdhs_config(size), rho_th=rho_th)
    example = bdhs_example(assistant, size, 0)
    sentence = example.record.chosen.split(". ")[0] + "."
    chosen = " ".join([sentence] * sentences)
    example = replace(example, record=replace(example.record, chosen=chosen))

    def work() -> None:
        with mock.patch.object(Tokenizer, "sentence_ends", {-1}):  # no token stops
            sample_bdhs.sample(assistant, never_similar, [example], config)

    return work


def sentence_times(size: Size, folder: Path, counts: Iterable[int], repeats: int):
    """Seconds per example by sentences of y+."""
    assistant = loaded(size, folder)
    sides = {("BDHS, rho_th 0.99", n): bdhs_work(size, assistant, n, 0.99) for n in counts}
    return by_line(interleaved(sides, repeats, "cpu"))


def image_times(size: Size, folder: Path, sides: Iterable[int], repeats: int):
    """Seconds per example by image tokens, of which few or all are seen; the decoder stays the
    same."""
    works = {}
    for side in sides:
        shape = replace(size, vision=vision_config(96, 3, 3, side))
        assistant = loaded(shape, folder / str(side))
        tokens = len(assistant.processor.layout(picture(0))[1])
        for rho_th in (0.99, 0.0):
            works[f"rho_th {rho_th:g}", tokens] = bdhs_work(shape, assistant, 5, rho_th)
    return by_line(interleaved(works, repeats, "cpu"))


def loading_seconds(folder: Path, repeats: int) -> float:
    """Median seconds in which one process parses, decodes and tiles a pair's JPEG of 640 x 480 for
    a 7B's tower."""
    tokenizer = loaded(TINY, folder).tokenizer
    picture(0).save(folder / "0.jpg")
    pair = replace(record(TINY, folder, 0), image="0.jpg")
    processor, pictures = ImageProcessor(pinpoints=PINPOINTS), PictureFolder(str(folder))
    collate = PairCollator(tokenizer, processor, pictures, max_response_tokens=1024)

    def load():
        return collate.batch([collate.load(pair)])

    assert load().tree.ids.shape[1] > 2340
    return interleaved({"load": load}, repeats, "cpu")["load"]


def memory_table(rows: list[dict]) -> str:
    """MB, and the largest tensor's shape."""
    keys = ("kept", "formula", "peak", "peak formula", "dense", "largest")
    shown = []
    for row in rows:
        sizes = [f"{row[key] / 1e6:.1f}" for key in keys]
        per_token = f"{row['kept'] / row['tokens'] / 1e3:.2f}"
        shape = " x ".join(str(n) for n in row["shape"])
        shown.append([f"{row['tokens']:,}", *sizes[:2], per_token, *sizes[2:], shape])
    head = "tokens | MB kept | formula | kB per token"
    head += " | MB peak | formula | mask | largest tensor | its shape"
    return markdown(head, shown)


def main(out: str) -> None:
    """Measure, print, and write the plots."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = memory_rows(MEMORY, folder / "memory", LENGTHS)
        print(f"## Memory against length\n\n{memory_table(rows)}")
        responses = dpo_times(TINY, folder / "response", LENGTHS, REPEATS)
        sentences = sentence_times(TINY, folder / "sentences", SENTENCES, BDHS_REPEATS)
        images = image_times(TINY, folder / "images", SIDES, BDHS_REPEATS)
        plots = {
            "response": ("tokens of each response", responses),
            "sentences": ("sentences of y+", sentences),
            "image-tokens": ("image tokens", images),
        }
        loading = loading_seconds(folder / "loading", BDHS_REPEATS)
    for plot, (across, lines) in plots.items():
        up = "ms of a DPO step" if plot == "response" else "ms of BDHS per example"
        lines = {line: [(x, y * 1e3) for x, y in points] for line, points in lines.items()}
        write_plot(Path(out) / f"scaling-{plot}.svg", across, up, lines)
        columns = [f"{x:,}" for x, _ in next(iter(lines.values()))]
        figures = [[line, *(f"{y:,.0f}" for _, y in points)] for line, points in lines.items()]
        print(f"## {up}\n\n{markdown(' | '.join([across, *columns]), figures)}")
    load = f"load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    print(f"{loading * 1e3:.0f} ms to load a pair; {load}")
