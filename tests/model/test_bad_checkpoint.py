"""Bad model folders are refused by name: tensors that are not right, pickle, broken JSON, what we
do not know.
"""

import json
import math
import random

import pytest
import torch
from helpers import refused
from llava_folders import edit_json, laid_out, replace_weights

from minialign.edge import CHECKPOINT, model_folder
from minialign.model.hf_folder import load_model

TENSORS = [
    "lm_head.weight",
    "layers.1.self_attn.k_proj.weight",
    "linear_2.bias",
    "class_embedding",
    "norm.weight",
]


def pick(state: dict, tail: str) -> str:
    """The first key that ends so."""
    return next(key for key in sorted(state) if key.endswith(tail))


@pytest.mark.parametrize("tail", TENSORS)
@pytest.mark.parametrize("layout", ["hub", "original"])
def test_missing_tensor(llava_folder, llava_state, layout, tail):
    state = laid_out(llava_state, layout)
    key = pick(llava_state, tail)
    del state[list(state)[list(llava_state).index(key)]]
    replace_weights(llava_folder, state)
    message = refused(
        lambda: load_model(llava_folder),
        llava_folder,
        f"missing tensors: {key.removeprefix('model.')};",
    )
    assert "unexpected tensors" not in message


@pytest.mark.parametrize(
    "extra", ["model.image_newline", "vision_tower.vision_model.head.weight", "adapter.lora_A"]
)
def test_unexpected_tensor(llava_folder, llava_state, extra):
    replace_weights(llava_folder, laid_out(llava_state, "hub") | {extra: torch.zeros(3)})
    message = refused(
        lambda: load_model(llava_folder),
        llava_folder,
        "unexpected tensors: ",
        extra.split("model.")[-1],
    )
    assert "missing tensors" not in message


@pytest.mark.parametrize("tail", TENSORS)
def test_wrongly_shaped_tensor(llava_folder, llava_state, tail):
    key = pick(llava_state, tail)
    right = llava_state[key]
    wrong = torch.zeros(right.shape[0] + 1, *right.shape[1:])
    replace_weights(llava_folder, llava_state | {key: wrong})
    name, *shapes = key.removeprefix("model."), str(list(wrong.shape)), str(list(right.shape))
    refused(
        lambda: load_model(llava_folder), llava_folder, f"{name} has shape {shapes[0]}", shapes[1]
    )


def test_many_problems_are_still_one_short_line(llava_folder, llava_state):
    replace_weights(llava_folder, {"x.y": torch.zeros(1)})
    message = refused(
        lambda: load_model(llava_folder), "missing tensors: ", "more", "unexpected tensors: x.y"
    )
    assert len(message) < 1500


def test_no_embedding_in_a_tied_folder(llava_folder, llava_state):
    edit_json(llava_folder / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
    gone = ("embed_tokens.weight", "lm_head.weight")
    replace_weights(
        llava_folder, {key: value for key, value in llava_state.items() if not key.endswith(gone)}
    )
    message = "missing tensors: language_model.embed_tokens.weight;"
    refused(lambda: load_model(llava_folder), llava_folder, message)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_never_loaded(llava_folder, name):
    (llava_folder / "model.safetensors").unlink()
    (llava_folder / name).write_bytes(b"\x80\x02.")
    refused(
        lambda: load_model(llava_folder),
        llava_folder,
        "pickle weights",
        "convert them to safetensors",
    )


def test_no_weights(llava_folder):
    (llava_folder / "model.safetensors").unlink()
    refused(lambda: load_model(llava_folder), llava_folder / "model.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_no_numbers(llava_folder, llava_state, dtype, value):
    """One number among all, anywhere: the file and the tensor are named."""
    rng = random.Random(f"{value} {dtype}")
    state = {key: tensor.to(dtype) for key, tensor in llava_state.items()}
    key = rng.choice(sorted(state))
    state[key] = state[key].clone()
    state[key].view(-1)[rng.randrange(state[key].numel())] = value
    replace_weights(llava_folder, state)
    message = f"{llava_folder / 'model.safetensors'}: {key} holds NaN, infinity"
    refused(lambda: load_model(llava_folder), message)


def test_large_numbers_of_either_sign_are_numbers(llava_folder, llava_state):
    """What overflows in a sum, or has no sum, is not refused."""
    state = {key: torch.full_like(tensor, 6e4) for key, tensor in llava_state.items()}
    key = pick(state, "lm_head.weight")
    state[key] = torch.randn(state[key].shape) * 1e37
    replace_weights(llava_folder, state)
    assert torch.equal(load_model(llava_folder).lm_head.weight, state[key])


def test_quantised_weights(llava_folder, llava_state):
    for kind in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool):
        state = llava_state | {"lm_head.weight": llava_state["lm_head.weight"].to(kind)}
        replace_weights(llava_folder, state)
        message = "lm_head.weight is of type", "only weights in floating point"
        refused(lambda: load_model(llava_folder), llava_folder, *message)


def test_a_tensor_that_stands_twice(llava_folder, llava_state):
    head = {"language_model.lm_head.weight": llava_state["lm_head.weight"] + 1}
    replace_weights(llava_folder, llava_state | head)
    refused(lambda: load_model(llava_folder), "stands for lm_head.weight", "holds twice")


WEIGHT_MAPS = [
    *(["a"], None, "x", 5, {"a": 5}, {"a": 5, "b": "model.safetensors"}, {"a": ["x"]}, {"a": ""}),
    *({"a": None}, {"a": "model.bin"}, {"a": "../model.safetensors"}, {"a": "/model.safetensors"}),
    *({"a": "a/../../b.safetensors"}, {"a": "x\0.safetensors"}, {"a": f"{'x' * 300}.safetensors"}),
]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("weight_map", WEIGHT_MAPS, ids=lambda value: str(value)[:30])
def test_an_index_that_is_none(llava_folder, weight_map, kept):
    """Whether or not model.safetensors, which would be read, lies beside it."""
    if not kept:
        (llava_folder / "model.safetensors").rename(llava_folder.parent / "model.safetensors")
    index = llava_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(lambda: load_model(llava_folder), index, "weight_map")


def test_an_adapter_is_no_model(llava_folder):
    (llava_folder / "model.safetensors").rename(llava_folder / "adapter_model.safetensors")
    (llava_folder / "adapter_config.json").write_text("{}")
    refused(lambda: load_model(llava_folder), llava_folder, "give it as --adapter")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.02, 0.5, 0.999])
def test_truncated_weights(llava_folder, share):
    path = llava_folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(lambda: load_model(llava_folder), path)


def test_garbled_weights(llava_folder):
    path = llava_folder / "model.safetensors"
    path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 50)
    refused(lambda: load_model(llava_folder), path)


def test_no_config(llava_folder):
    (llava_folder / "config.json").unlink()
    refused(lambda: load_model(llava_folder), llava_folder / "config.json", "no such file")


@pytest.mark.parametrize(
    "text", ["", "{", '{"model_type": "llava",}', "[]", '"llava"', "null", "\x00"]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json(llava_folder, name, text):
    (llava_folder / name).write_text(text)
    refused(lambda: load_model(llava_folder), llava_folder / name)


def test_config_that_is_no_text(llava_folder):
    (llava_folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    refused(lambda: load_model(llava_folder), llava_folder / "config.json")


@pytest.mark.parametrize("kind", ["llama", "qwen2_vl", "", None])
def test_wrong_model_type(llava_folder, kind):
    edit_json(llava_folder / "config.json", lambda raw: raw.update(model_type=kind))
    refused(
        lambda: load_model(llava_folder),
        llava_folder / "config.json",
        f"model_type is {'missing' if kind is None else repr(kind)}",
        "only 'llava'",
    )
    edit_json(llava_folder / "config.json", lambda raw: raw.pop("model_type"))
    refused(lambda: load_model(llava_folder), llava_folder / "config.json", "model_type is missing")


UNSUPPORTED = [
    ((), "vision_feature_select_strategy", "full"),
    ((), "quantization_config", {"bits": 4}),
    ((), "multimodal_projector_bias", False),
    (("text_config",), "model_type", "qwen2"),
    (("text_config",), "model_type", ["llama"]),
    (("text_config",), "quantization_config", {"bits": 4}),
    (("text_config",), "attention_bias", True),
    (("text_config", "rope_parameters"), "partial_rotary_factor", 0.5),
    (("vision_config",), "model_type", "siglip_vision_model"),
    ((), "projector_hidden_act", "relu"),
    (("vision_config",), "hidden_act", "gelu"),
    (("text_config",), "hidden_act", "gelu"),
    (("text_config", "rope_parameters"), "rope_type", "linear"),
    ((), "vision_feature_layer", [-2, -1]),
    ((), "vision_feature_layer", 99),
    ((), "vision_feature_layer", -99),
]


@pytest.mark.parametrize("path,name,value", UNSUPPORTED, ids=str)
def test_unsupported_choices_are_refused_not_ignored(llava_folder, path, name, value):
    def change(raw):
        for part in path:
            raw = raw[part]
        raw[name] = value

    edit_json(llava_folder / "config.json", change)
    refused(lambda: load_model(llava_folder), llava_folder / "config.json", f"{name} is {value!r}")


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_scaled_positions_of_transformers_4_are_refused(llava_folder, name):
    def change(raw):
        raw["text_config"].pop("rope_parameters")
        raw["text_config"]["rope_scaling"] = {name: "linear", "factor": 2.0}

    edit_json(llava_folder / "config.json", change)
    refused(lambda: load_model(llava_folder), llava_folder / "config.json", f"{name} is 'linear'")


def test_model_folder_is_named_when_it_is_not_there(tmp_path):
    refused(lambda: model_folder(str(tmp_path / "nothing")), "--model", tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    refused(lambda: model_folder(str(tmp_path / "file")), "--model", tmp_path / "file")
    assert model_folder("toy") == CHECKPOINT and model_folder(str(tmp_path)) == tmp_path
