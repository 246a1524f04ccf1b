"""Malformed config.json, preprocessor_config.json and tokenizer.json: one line that names file and
field.
"""

import json
import math
import shutil

import pytest
from helpers import refused

from minialign.data.images import ImageProcessor
from minialign.data.tokenizer import Tokenizer
from minialign.edge import CHECKPOINT
from minialign.model.config import read_config

PREPROCESSOR, CONFIG = "preprocessor_config.json", "config.json"
CASES = [
    (PREPROCESSOR, {"crop_size": {"shortest_edge": 96}}, "crop_size"),
    (PREPROCESSOR, {"crop_size": "96", "size": "96"}, "size is '96'; only 96"),
    (PREPROCESSOR, {"crop_size": 96, "size": 64}, "size is 64; only 96"),
    (PREPROCESSOR, {"crop_size": {"height": 96, "width": 90}}, "crop_size"),
    (PREPROCESSOR, {"crop_size": 64}, "crop_size is 64; only 96"),
    (PREPROCESSOR, {"do_normalize": False}, "do_normalize"),
    (PREPROCESSOR, {"do_center_crop": False}, "do_center_crop"),
    (PREPROCESSOR, {"resample": 2}, "resample"),
    (PREPROCESSOR, {"rescale_factor": 1.0}, "rescale_factor"),
    (PREPROCESSOR, {"image_std": [0, 0, 0]}, "image_std"),
    (PREPROCESSOR, {"image_std": [1, 1]}, "image_std"),
    (PREPROCESSOR, {"image_mean": ["a", "b", "c"]}, "image_mean"),
    (CONFIG, {"text_config": [1]}, "text_config"),
    (CONFIG, {"vision_config": "x"}, "vision_config"),
    (CONFIG, {"image_token_index": -200}, "image_token_index is -200"),
    (CONFIG, {"image_token_index": 10**6}, "image_token_index is 1000000"),
    (CONFIG, {"text_config": {"hidden_size": "128"}}, "hidden_size"),
    (CONFIG, {"text_config": {"num_hidden_layers": 2.5}}, "num_hidden_layers"),
    (CONFIG, {"text_config": {"num_attention_heads": True}}, "num_attention_heads"),
    (CONFIG, {"text_config": {"rope_scaling": "linear"}}, "rope_scaling"),
    (CONFIG, {"vision_config": {"patch_size": 0}}, "patch_size"),
    (CONFIG, {"vision_config": {"patch_size": 97}}, "patch_size is 97; it must be at most"),
    (CONFIG, {"vision_config": {"patch_size": 2**31}}, "patch_size is 2147483648"),
    (
        CONFIG,
        {"vision_config": {"num_attention_heads": 7}},
        "num_attention_heads is 7; it must div",
    ),
    (CONFIG, {"text_config": {"head_dim": 7}}, "head_dim is 7; it must be even"),
    (CONFIG, {"text_config": {"num_key_value_heads": 3}}, "num_key_value_heads is 3; it must div"),
    (CONFIG, {"text_config": {"head_dim": None, "num_attention_heads": 7}}, "is 7; it must divide"),
    (CONFIG, {"text_config": {"intermediate_size": 2**64}}, "intermediate_size is 184467440737"),
    (CONFIG, {"text_config": {"rms_norm_eps": 10**30}}, "rms_norm_eps is 1000000000"),
    (CONFIG, {"text_config": {"rope_theta": math.nan}}, "rope_theta is nan"),
    (CONFIG, {"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers is 1000000"),
    (CONFIG, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    (CONFIG, {"minialign_template": ["x"]}, "minialign_template"),
    ("tokenizer.json", {"added_tokens": [1]}, "added_tokens"),
]
READERS = {PREPROCESSOR: ImageProcessor.from_folder, "tokenizer.json": Tokenizer.from_folder}


@pytest.mark.parametrize(("name", "changes", "field"), CASES, ids=lambda value: str(value)[:40])
def test_malformed_files_are_refused(tmp_path, name, changes, field):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    raw = json.loads((folder / name).read_text(encoding="utf-8"))
    for key, value in changes.items():
        nested = isinstance(value, dict) and key.endswith("_config")
        raw[key] = raw[key] | value if nested else value
    (folder / name).write_text(json.dumps(raw), encoding="utf-8")
    reader = (
        Tokenizer.from_folder if "minialign_template" in changes else READERS.get(name, read_config)
    )
    refused(lambda: reader(folder), field, name)


@pytest.mark.parametrize("changes", [{"image_mean": None}, {"crop_size": 96, "size": 96}])
def test_sparse_files_are_completed(tmp_path, changes):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    raw = json.loads((folder / PREPROCESSOR).read_text(encoding="utf-8")) | changes
    (folder / PREPROCESSOR).write_text(json.dumps(raw), encoding="utf-8")
    assert ImageProcessor.from_folder(folder) == ImageProcessor.from_folder(CHECKPOINT)
