"""Every data set's own form: what is read of it, and the whole road on it with a tiny random
LLaVA-1.6.
"""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_sets import RAW, answer, expected, photographs, write
from helpers import refused, worst
from input_files import pairs_in, records_in
from script_runs import read_lines

import sample_bdhs
import train_dpo
from minialign.data.images import ImageProcessor, PictureFolder
from minialign.data.record_files import order_of, read_records
from minialign.data.records import FORMATS, instruct_record
from minialign.data.tokenizer import Tokenizer
from minialign.edge import CHECKPOINT
from minialign.model.hf_folder import load_model
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.model.peft_folder import load_adapter

PAIRED = [form for form in RAW if form != "instruct"]


def test_every_format_has_its_records():
    assert RAW.keys() == FORMATS.keys()


@pytest.mark.parametrize("form", RAW)
def test_what_is_read(tmp_path, capsys, form):
    path = Path(write(tmp_path, form))
    records = records_in(path)
    wanted = expected(form)
    assert records[:2] == wanted and all(record.rejected == "" for record in records[2:])
    shown = capsys.readouterr()
    assert f"{path}: {len(RAW[form])} records, read as {form}\n" in shown.out
    if form == "instruct":
        assert (
            "1 records left out: text without an image" in shown.out + shown.err
            and len(records) == 2
        )
        refused(lambda: pairs_in(path), path, "holds no rejected responses; sample them")
    else:
        assert pairs_in(path) == wanted


@pytest.mark.parametrize("form", RAW)
@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_and_lines_are_told_apart(tmp_path, form, indent):
    """Whatever the file's name, and with white space or a byte order mark before the bracket."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(RAW[form], indent=indent).encode())
    assert records_in(path)[:2] == expected(form)
    path.write_text("\n".join(json.dumps(raw) for raw in RAW[form]))
    assert records_in(path)[:2] == expected(form)


@pytest.mark.parametrize(
    "ratings,best,worst_one",
    [
        ([["1", "1", "1"], ["2", "1", "1"]], 1, 0),
        ([["5", "1", "3"], ["4", "4", "4"], ["2", "3", "3"]], 1, 2),
        ([["3", "3", "3"], ["4", "4", "1"], ["1", "5", "3"]], 0, None),
        ([["4.5", "4", "4"], ["4", "4", "4"]], 0, 1),
    ],
)
def test_best_and_worst_by_mean_rating(tmp_path, ratings, best, worst_one):
    completions = [answer(f"Answer {i}.", rating) for i, rating in enumerate(ratings)]
    record = FORMATS["vlfeedback"].parse(RAW["vlfeedback"][0] | {"completions": completions})
    assert record.chosen == f"Answer {best}."
    assert record.rejected == ("" if worst_one is None else f"Answer {worst_one}.")


def test_format_overrides_what_is_detected(tmp_path):
    path = Path(write(tmp_path, "povid"))
    records = read_records(str(path), "instruct", None, 0)
    assert records == [instruct_record(raw) for raw in RAW["povid"]] and records[0].rejected == ""
    refused(
        lambda: read_records(str(path), "rlhf-v", None, 0),
        path,
        "record",
        "field 'text' is missing",
    )


def test_a_bad_first_record_does_not_hide_the_format(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "bad"}, *RAW["povid"]]))
    message = f"{path}, record 1: field 'image' (or 'images') is missing; mend it"
    refused(lambda: pairs_in(path), message)
    assert pairs_in(path, skip_bad=True) == expected("povid")


@pytest.mark.parametrize(
    "changes", [{"image": None}, {"conversations": None}, {"conversations": []}]
)
def test_text_alone_is_left_out_whatever_it_says(tmp_path, changes):
    """Records of the 665k mix without an image: as `datasets` writes a missing column, or with a
    talk of any form.
    """
    odd = {"id": "text", "conversations": [{"from": "gpt", "value": ""}]} | changes
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*RAW["instruct"][:2], odd]))
    assert records_in(path) == expected("instruct")


def test_a_feedback_row_with_an_image_column(tmp_path):
    raw = {key: value for key, value in RAW["vlfeedback"][0].items() if key != "img_path"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(raw | {"image": "a.jpg"}))
    assert pairs_in(path)[0].image == "a.jpg"


@pytest.mark.parametrize(
    "data,message",
    [
        (b"PAR1\x15\x04", "is a parquet file; make JSON Lines of it"),
        (b'{"data": [1]}', "fields data are of no known format"),
        (b"id,image\n", "line 1: not JSON"),
        (b"[1, 2]", "expected a JSON object"),
    ],
)
def test_files_of_another_kind(tmp_path, data, message):
    path = tmp_path / "data"
    path.write_bytes(data)
    refused(lambda: pairs_in(path), path, message)


def test_what_is_no_file(tmp_path):
    """A pipe would be read twice, and wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: pairs_in(tmp_path / "pipe"), "pipe", "no ordinary file; name a file")
    refused(lambda: pairs_in(tmp_path), tmp_path, "it is a folder; name a file")


@pytest.mark.parametrize("end", [b"\n", b"\n\n", b"\r\n \t\n\n"])
def test_blank_lines_at_the_end(tmp_path, end):
    path = Path(write(tmp_path, "rlhf-v"))
    path.write_bytes(path.read_bytes().rstrip() + end)
    assert pairs_in(path) == expected("rlhf-v")


def test_turns_that_come_with_a_larger_limit(next_model, tmp_path):
    """The first two records have one turn, the third has several: they go into one file."""
    pictures, path = photographs(tmp_path / "pictures"), tmp_path / "data.json"
    path.write_text(
        json.dumps([RAW["instruct"][0] | {"id": str(i)} for i in range(4)] + [RAW["instruct"][1]])
    )
    few = {
        "max_new_tokens": 4,
        "n_bdhs": 2,
        "workers": 0,
        "model": str(next_model),
        "images": str(pictures),
    }
    seed = next(s for s in range(9) if 4 not in order_of(5, s)[:2])
    run = sample_bdhs.Config(
        data=str(path), out=str(tmp_path / "p.jsonl"), rho_th=0.9, seed=seed, limit=2, **few
    )
    sample_bdhs.main(run)
    before = (tmp_path / "p.jsonl").read_bytes()
    sample_bdhs.main(replace(run, limit=5))
    assert (tmp_path / "p.jsonl").read_bytes().startswith(before)
    turns = [len(record.turns) for record in pairs_in(tmp_path / "p.jsonl")]
    assert sorted(turns) == [1, 1, 1, 1, 3]


# ---------------------------------------------------------------- the whole road


@pytest.fixture(scope="module")
def next_model(oracle, tmp_path_factory) -> Path:
    """A folder of a tiny random LLaVA-1.6, with the embedded world's tokenizer."""
    folder = tmp_path_factory.mktemp("next")
    theirs = oracle.make_next(0, "vicuna", (579, 4))
    theirs.save_pretrained(folder)
    vision, pinpoints = theirs.config.vision_config, theirs.config.image_grid_pinpoints
    edge = {"size": {"shortest_edge": vision.image_size}, "image_grid_pinpoints": pinpoints}
    crop = {"height": vision.image_size, "width": vision.image_size}
    oracle.transformers.LlavaNextImageProcessorPil(crop_size=crop, **edge).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return folder


@torch.no_grad()
def answers(oracle, folder: Path, pictures: Path, theirs, ours) -> list[float]:
    """How far the two models' logits of a prompt and an answer on each picture are apart."""
    tokenizer, processor = Tokenizer.from_folder(folder), ImageProcessor.from_folder(folder)
    distances = []
    for record in expected("povid") + expected("rlhf-v"):
        picture = PictureFolder(str(pictures))(record.image)
        ids = tokenizer.prompt(record.turns) + tokenizer.response(record.chosen)
        patches, packing = processor.layout(picture)
        pixels = processor(picture)
        tree = build_tree(
            [Sequence(ids, [Branch([])], patches, packing=packing)], tokenizer.image_id, 0
        )
        logits = ours.lm_head(ours(tree, ours.encode_images(pixels)))[0]
        sizes = torch.tensor([[picture.height, picture.width]])
        wanted = oracle.logits(theirs, ids, pixels, image_sizes=sizes, count=len(packing))
        distances.append(worst(logits, wanted))
    return distances


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("form", RAW)
def test_the_whole_road(oracle, next_model, tmp_path, form):
    """Sampled and trained on; what comes out is read by transformers and PEFT, with the same
    logits.
    """
    pictures, data = photographs(tmp_path / "pictures"), write(tmp_path, form)
    common = {"model": str(next_model), "images": str(pictures)}
    few = {"max_new_tokens": 4, "n_bdhs": 2, "batch_size": 2}
    sample_bdhs.main(
        sample_bdhs.Config(
            **common, data=data, out=str(tmp_path / "pairs.jsonl"), rho_th=0.9, **few
        )
    )
    sampled = read_lines(tmp_path / "pairs.jsonl")
    assert len(sampled) == len(records_in(Path(data))) >= 2 and all(
        pair["rejected"] for pair in sampled
    )
    small = {
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lr": 1e-2,
        "projector_lr": 1e-2,
        "epochs": 1,
        "batch_size": 2,
    }
    if form in PAIRED:
        train_dpo.main(
            train_dpo.Config(**common, pairs=data, out=str(tmp_path / "direct"), **small)
        )
        rows = read_lines(tmp_path / "direct" / "metrics.jsonl")
        assert rows[0]["pairs"] == 2 and rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    out = tmp_path / "out"
    train_dpo.main(
        train_dpo.Config(**common, pairs=str(tmp_path / "pairs.jsonl"), out=str(out), **small)
    )
    kind = oracle.transformers.LlavaNextForConditionalGeneration
    merged, info = kind.from_pretrained(out / "merged", output_loading_info=True)
    assert not any(info.values())
    ours = load_model(out / "merged")
    assert max(answers(oracle, out / "merged", pictures, merged.eval(), ours)) < 1e-4
    base = kind.from_pretrained(next_model).eval()
    assert min(answers(oracle, out / "merged", pictures, base, ours)) > 1e-3  # it was trained
    peft = pytest.importorskip("peft").PeftModel.from_pretrained(base, out / "adapter").eval()
    adapted = load_model(next_model)
    load_adapter(adapted, out / "adapter")
    assert max(answers(oracle, next_model, pictures, peft, adapted)) < 1e-4
    assert max(answers(oracle, next_model, pictures, peft, ours)) < 1e-4
