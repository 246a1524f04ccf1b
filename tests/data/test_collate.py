"""Long sequences: responses refused or cut at their end, images never; like lengths together within
a step.
"""

import copy
import random

import pytest
import torch
from data_sets import PHOTOGRAPHS, photographs
from helpers import random_toy, refused, toy_tokenizer, worst
from input_files import lines, pair, toy_collator
from script_runs import train

from minialign.align.logps import branch_logps
from minialign.align.losses import dpo_loss
from minialign.data.collate import PairBatch, PairCollator, StepLoader
from minialign.data.images import ImageProcessor, PictureFolder
from minialign.data.record_files import open_pairs
from minialign.data.records import Record
from minialign.model import lora
from minialign.model.masks import NEWLINE

CUP = Record(
    "1", "alignment-000000.png", [("user", "What is there?")], "A cup. " * 9 + "Yes.", "A ball."
)
PATCHES = 36


def alone(collate: PairCollator, record: Record) -> PairBatch:
    """The batch of one record."""
    return collate.batch([collate.load(record)])


def branch_ids(collate: PairCollator, record: Record) -> list[list[int]]:
    """The two responses as they stand in the tree."""
    tree = alone(collate, record).tree
    assert int((tree.feature >= 0).sum()) == PATCHES  # the whole picture, whatever was cut
    return [tree.ids[0][tree.branch[0] == number].tolist() for number in (1, 2)]


def test_a_response_that_is_too_long():
    ids = [toy_tokenizer().response(text) for text in (CUP.chosen, CUP.rejected)]
    assert branch_ids(toy_collator(len(ids[0])), CUP) == ids
    limit = len(ids[0]) - 1
    message = f"a response of {limit + 1} tokens is longer than --max-response-tokens {limit}"
    refused(lambda: alone(toy_collator(limit), CUP), message, "; raise it, or pass --truncate")
    refused(lambda: toy_collator(limit).check(CUP), message, "; raise it, or pass --truncate")
    # Cut at its end alone.
    assert branch_ids(toy_collator(limit, truncate=True), CUP) == [ids[0][:-1], ids[1]]
    assert branch_ids(toy_collator(1, truncate=True), CUP) == [ids[0][:1], ids[1][:1]]


@pytest.mark.parametrize("truncate", [False, True])
def test_what_the_decoder_has_no_positions_for(truncate):
    """Image and prompt stay whole; the response has the positions that they leave, or the record is
    refused.
    """
    ids = [toy_tokenizer().response(text) for text in (CUP.chosen, CUP.rejected)]
    trunk = len(toy_tokenizer().prompt(CUP.turns)) - 1 + PATCHES
    exact = toy_collator(positions=trunk + len(ids[0]), truncate=truncate)
    assert branch_ids(exact, CUP) == ids
    short = toy_collator(positions=trunk + 3, truncate=truncate)
    if truncate:
        assert branch_ids(short, CUP) == [each[:3] for each in ids]
    else:
        message = f"the 3 positions that image and prompt leave of {trunk + 3}"
        refused(lambda: alone(short, CUP), message)
        refused(lambda: short.check(CUP), message)
    for positions in (trunk, trunk - 1, 5):
        full = toy_collator(positions=positions, truncate=truncate)
        refused(lambda c=full: alone(c, CUP), "which leaves none for a response")
        refused(lambda c=full: c.check(CUP), "which leaves none for a response")


def test_the_flag(model, tmp_path):
    """Through the command line: refused by its line, or trained on."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(pair(0), pair(1, chosen="A cup. " * 20), pair(2)))
    flags = {"pairs": str(path), "max_response_tokens": 20, "workers": 0}
    refused(lambda: train(model, tmp_path / "a", **flags), f"{path}, line 2", "pass --truncate")
    assert train(model, tmp_path / "b", truncate=True, **flags)[0]["pairs"] == 3
    assert train(model, tmp_path / "c", skip_bad_records=True, **flags)[0]["pairs"] == 2


# ---------------------------------------------------------------- buckets within a step


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """16 pairs whose responses have lengths of every kind, in no order."""
    rng, path = random.Random(3), tmp_path_factory.mktemp("uneven") / "pairs.jsonl"
    path.write_bytes(lines(*(pair(i, chosen="A cup. " * rng.randrange(1, 30)) for i in range(16))))
    return open_pairs(str(path), None)


def step(records, accumulate: int):
    loader = StepLoader(records, toy_collator(), accumulate, skip_bad=False)
    batches = loader(list(records.numbers))
    assert loader.left_out == [] and sum(len(batch) for batch in batches) == 16
    return batches


@pytest.mark.parametrize("accumulate", [2, 3, 4, 16])
def test_pairs_of_like_length_pass_together(uneven, accumulate):
    batches = step(uneven, accumulate)
    widths = [(batch.tree.branch >= 0).sum(1).tolist() for batch in batches]
    assert (
        sum(widths, [])
        == sorted(sum(widths, []))
        != step(uneven, 1)[0].tree.branch.ge(0).sum(1).tolist()
    )
    padding = sum(int((batch.tree.branch < 0).sum()) for batch in batches)
    assert padding < 0.6 * int((step(uneven, 1)[0].tree.branch < 0).sum())
    assert accumulate < 16 or padding == 0


@pytest.mark.parametrize("loss", ["dpo", "sft"])
@pytest.mark.parametrize("accumulate", [2, 3, 16])
def test_the_gradient_is_that_of_the_whole_batch(uneven, loss, accumulate):
    model = copy.deepcopy(random_toy())
    torch.manual_seed(0)
    lora.add_adapters(model, 4, 8.0)
    gradients = []
    for batches in (step(uneven, 1), step(uneven, accumulate)):
        mean = sum(batch.chosen_tokens for batch in batches) / 16
        for batch in batches:
            features = model.encode_images(batch.pixels)
            with lora.adapters_off(model):
                ref_logps = branch_logps(model, batch.tree, features)
            logps = branch_logps(model, batch.tree, features)
            chosen, rejected = logps[:, :1], logps[:, 1:]
            if loss == "sft":
                value = -chosen.mean() / mean
            else:
                value = dpo_loss(chosen, rejected, ref_logps[:, :1], ref_logps[:, 1:], 0.1).mean()
            (value * len(batch) / 16).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    largest = max(g.abs().max() for g in gradients[0])
    assert all(worst(a, b) < 1e-5 * largest for a, b in zip(*gradients, strict=True))


def test_pictures_stay_with_their_pairs(uneven):
    """Sorted or not, a row's pixels are its own record's picture."""
    whole = step(uneven, 1)[0]
    order = sorted(range(16), key=lambda i: int((whole.tree.branch[i] >= 0).sum()))
    assert torch.equal(torch.cat([batch.pixels for batch in step(uneven, 4)]), whole.pixels[order])
    assert order != list(range(16))


def test_pictures_of_many_sizes(tmp_path):
    """AnyRes: each row has its own picture's tokens and newlines, each batch its pictures' tiles in
    row order.
    """
    processor = ImageProcessor(16, 4, pinpoints=((16, 32), (32, 16), (32, 32), (48, 16), (16, 48)))
    source = PictureFolder(str(photographs(tmp_path / "pictures")))
    collate = PairCollator(toy_tokenizer(), processor, source, 512)
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(*(pair(i, images=[name]) for i, name in enumerate(PHOTOGRAPHS))))
    records = open_pairs(str(path), None)
    pictures = [source(name) for name in PHOTOGRAPHS]
    layouts = [processor.layout(picture) for picture in pictures]
    order = sorted(range(4), key=lambda i: len(layouts[i][1]))
    assert order != list(range(4)) and len({len(packing) for _, packing in layouts}) > 1
    batches = StepLoader(records, collate, 4, skip_bad=False)(list(range(4)))
    for i, batch in zip(order, batches, strict=True):
        patches, packing = layouts[i]
        assert batch.tree.features_expected == patches and torch.equal(
            batch.pixels, processor(pictures[i])
        )
        image = batch.tree.feature[0]
        assert image[(image >= 0) | (image == NEWLINE)].tolist() == packing.tolist()
