"""Folders of sentence encoders that are broken or not supported are refused by path and remedy."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from encoder_folders import LIMIT, make_encoder, make_folder, make_tokenizer, set_fields
from helpers import refused
from safetensors.torch import load_file, save_file
from tokenizers import processors

from minialign.sampling.sentence_encoder import SentenceEncoder
from minialign.sampling.similarity import load_similarity


def check_error(folder: Path, *words: str) -> None:
    """Loading `folder` fails with one line that has all of `words`."""
    refused(lambda: load_similarity(str(folder)), *words)


def test_a_missing_file_names_the_path_and_the_remedy(encoder_folder, tmp_path):
    folder, _ = encoder_folder
    parts = ["modules.json", "config.json", "tokenizer.json", "sentence_bert_config.json"]
    for part in [*parts, "1_Pooling/config.json", "model.safetensors"]:
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        (broken / part).unlink()
        check_error(broken, str(broken / part), "sentence-transformers folder")
        (broken / part).write_bytes(b"{ neither JSON nor safetensors")
        remedy = "download" if part.endswith(".safetensors") else "sentence-transformers folder"
        check_error(broken, str(broken / part), remedy)
        shutil.rmtree(broken)
    nowhere = tmp_path / "nowhere"
    check_error(nowhere, str(nowhere), "no such folder", "sentence-transformers folder")


def test_pickle_is_refused(encoder_folder):
    folder, _ = encoder_folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    check_error(folder, str(folder / "model.safetensors"), "pickle", "convert it to safetensors")


def test_weights_that_do_not_fit_are_listed(encoder_folder):
    folder, _ = encoder_folder
    weights = load_file(folder / "model.safetensors")
    of_layers = sorted(key for key in weights if key.startswith("encoder.layer"))
    missing = random.Random(1).choice(of_layers)
    del weights[missing]
    weights["encoder.layer.99.output.dense.bias"] = torch.zeros(1)
    weights["embeddings.word_embeddings.weight"] = torch.zeros(3, 2)
    save_file(weights, folder / "model.safetensors")
    other = "encoder.layer.99.output.dense.bias (expected None"
    words = "embeddings.word_embeddings.weight", "found (3, 2)"
    check_error(folder, f"{missing} (expected (", "found None", other, *words)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("config.json", {"model_type": "roberta"}, "roberta"),
        ("config.json", {"hidden_act": "gelu_new"}, "gelu_new"),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("config.json", {"is_decoder": True}, "is_decoder"),
        ("config.json", {"intermediate_size": None}, "intermediate_size is missing"),
        ("config.json", {"hidden_size": 2**64}, "hidden_size is 18446744073709551616"),
        ("config.json", {"layer_norm_eps": math.nan}, "layer_norm_eps is nan"),
        ("config.json", {"num_attention_heads": 7}, "num_attention_heads is 7; it must divide"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("sentence_bert_config.json", {"max_seq_length": True}, "max_seq_length is True"),
        ("sentence_bert_config.json", {"do_lower_case": "no"}, "do_lower_case is 'no'"),
        ("sentence_bert_config.json", {"max_seq_length": LIMIT + 3}, "max_seq_length"),
        ("sentence_bert_config.json", {"max_seq_length": 2}, "max_seq_length"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "neither mean nor cls"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode": "lasttoken"},
            "lasttoken",
        ),
    ],
)
def test_what_is_not_supported_is_refused(encoder_folder, part, changes, words):
    folder, _ = encoder_folder
    set_fields(folder / part, **changes)
    check_error(folder, str(folder / part), words)


def test_position_limit_is_exact(tmp_path):
    # MPNet spends two positions: 0 and padding.
    for kind, room in (("bert", LIMIT + 2), ("mpnet", LIMIT)):
        folder = make_folder(tmp_path / kind, make_encoder(kind, 5), kind)
        set_fields(folder / "sentence_bert_config.json", max_seq_length=room)
        assert SentenceEncoder.from_folder(folder).embed(["w1 " * 400]).isfinite().all()
        set_fields(folder / "sentence_bert_config.json", max_seq_length=room + 1)
        check_error(folder, str(room + 1), f"{room} positions")


def test_the_longest_text_as_newer_folders_have_it(encoder_folder):
    """Without max_seq_length the tokenizer's model_max_length counts, up to the positions."""
    folder, kind = encoder_folder
    set_fields(folder / "sentence_bert_config.json", max_seq_length=None)
    check_error(folder, str(folder / "tokenizer_config.json"))
    path = folder / "tokenizer_config.json"
    for given, limit in ((100, 100), (10**30, LIMIT + 2 * (kind == "bert"))):
        path.write_text(json.dumps({"model_max_length": given}))
        tokenizer = SentenceEncoder.from_folder(folder).tokenizer
        assert tokenizer.truncation["max_length"] == limit
    for wrong in (0, 2, math.nan, "256", None):
        path.write_text(json.dumps({"model_max_length": wrong}))
        check_error(folder, str(path), "model_max_length is ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(encoder_folder, value):
    folder, _ = encoder_folder
    weights = load_file(folder / "model.safetensors")
    key = random.Random(3).choice(sorted(key for key in weights if "pooler" not in key))
    weights[key].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors")
    check_error(folder, str(folder / "model.safetensors"), f"{key} holds NaN, infinity")


def test_numbers_that_overflow_are_refused(encoder_folder):
    folder, _ = encoder_folder
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(weights) if key.endswith("0.output.dense.weight"))
    save_file(weights | {key: torch.full_like(weights[key], 1e38)}, folder / "model.safetensors")
    encoder = SentenceEncoder.from_folder(folder)
    refused(lambda: encoder.cosine(["w1 w2"], ["w3"]), "not finite")


@pytest.mark.parametrize("module", ["../elsewhere", "/", 5, None])
def test_modules_outside_of_the_folder_are_refused(encoder_folder, module):
    folder, _ = encoder_folder
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = module
    (folder / "modules.json").write_text(json.dumps(modules))
    check_error(folder, str(folder / "modules.json"), "path is ")


def test_a_tokenizer_that_panics_or_knows_more_ids_is_refused(encoder_folder):
    folder, kind = encoder_folder
    path = folder / "tokenizer.json"
    for change in ({"ids": [10**6]}, None):
        make_tokenizer(kind).save(str(path))
        raw = json.loads(path.read_text())
        tokens = raw["post_processor"]["special_tokens"]
        if change is None:  # named and not defined: tokenizers panics, which is no `Exception`
            tokens.clear()
        else:
            next(iter(tokens.values())).update(change)
        path.write_text(json.dumps(raw))
        check_error(folder, str(path))


def test_a_dense_module_and_a_tokenizer_without_special_tokens_are_refused(encoder_folder):
    folder, kind = encoder_folder
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(modules.replace("Normalize", "Dense"))
    check_error(folder, str(folder / "modules.json"), "Dense")
    (folder / "modules.json").write_text(modules)
    tokenizer = make_tokenizer(kind)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tokenizer.save(str(folder / "tokenizer.json"))
    # An empty text would have nothing to average.
    check_error(folder, "special tokens (0, at least 1)")
