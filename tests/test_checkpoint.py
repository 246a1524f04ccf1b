"""Model folders: every key layout gives the same logits, what is written is what transformers reads, and bad
folders are refused by name."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import worst
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minialign.checkpoint import TOY, load_model, read_config, resolve_model, save_model, weight_files
from minialign.errors import UserError
from minialign.masks import Sequence, build_tree

SEED = 5  # grouped queries, and a rope_theta that is not the default


@pytest.fixture(scope="module")
def theirs(oracle):
    """A tiny random model of transformers."""
    return oracle.make(SEED)


@pytest.fixture(scope="module")
def written(theirs, tmp_path_factory) -> Path:
    """The folder that transformers writes of it, and files of a tokenizer beside; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "written"
    theirs.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(TOY / name, folder / name)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of that folder, to be spoilt."""
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture(scope="module")
def memory(theirs) -> dict:
    """The state as transformers 5 has it in memory: `model.language_model.layers...`, `lm_head.weight`."""
    return {key: value for key, value in theirs.state_dict().items() if not key.endswith("position_ids")}


@pytest.fixture(scope="module")
def case(theirs):
    """(ids, pixels) to compare logits on."""
    rng, size = random.Random(SEED), theirs.config.vision_config.image_size
    image = theirs.config.image_token_id
    text = [i for i in range(theirs.config.text_config.vocab_size) if i != image]
    pixels = torch.randn(3, size, size, generator=torch.Generator().manual_seed(SEED))
    return [*rng.choices(text, k=2), image, *rng.choices(text, k=12)], pixels


@torch.no_grad()
def logits(model, case):
    """(T, V) logits of our model."""
    ids, pixels = case
    tree = build_tree([Sequence(ids, [], model.config.vision.patches)], model.config.image_token_id, 0)
    return model.lm_head(model(tree, model.encode_images(pixels[None])))[0]


@pytest.fixture(scope="module")
def expected(written, theirs, oracle, case):
    """Our logits of the folder as transformers wrote it, which are transformers' own."""
    found = logits(load_model(written), case)
    assert worst(found, oracle.logits(theirs, *case)) < 1e-4
    return found


def edit_json(path: Path, change) -> None:
    """Apply `change` to a JSON document in place."""
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def replace_weights(folder: Path, tensors: dict) -> None:
    """The folder's weights are these from now on."""
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def refused(call, *parts) -> str:
    """`call()` must raise a UserError of one line with these parts in it."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert str(part) in message, f"{part!r} is not in {message!r}"
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- layouts

# Prefixes of the in-memory layout -> those of another one, written out here rather than taken from the code.
LAYOUTS = {
    "in memory": {},
    "in memory of transformers 4": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "hub": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "fresh transformers 5": {
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "original": {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
    },
}


def laid_out(memory: dict, layout: str) -> dict:
    """The in-memory state under the keys of another layout."""
    renamed = {}
    for key, value in memory.items():
        prefixes = [prefix for prefix in LAYOUTS[layout] if key.startswith(prefix)]
        assert len(prefixes) <= 1
        renamed[LAYOUTS[layout][prefixes[0]] + key.removeprefix(prefixes[0]) if prefixes else key] = value
    assert len(renamed) == len(memory)
    return renamed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_identical_logits(folder, memory, case, expected, layout):
    replace_weights(folder, laid_out(memory, layout))
    assert torch.equal(logits(load_model(folder), case), expected)


def test_the_layouts_are_the_real_ones(written, memory):
    """What transformers 5 writes; and the hub's known keys."""
    assert load_file(written / "model.safetensors").keys() == laid_out(memory, "fresh transformers 5").keys()
    hub = laid_out(memory, "hub")
    for key in (
        "language_model.lm_head.weight", "language_model.model.embed_tokens.weight", "language_model.model.norm.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding", "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias",
    ):  # fmt: skip
        assert key in hub
    original = laid_out(memory, "original")
    for key in (
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight",
        "model.mm_projector.0.weight", "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
    ):  # fmt: skip
        assert key in original


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_of_older_versions_are_ignored(folder, memory, case, expected, layout):
    state = laid_out(memory, layout)
    tower = next(key for key in state if key.endswith("class_embedding")).removesuffix("class_embedding")
    layer = next(key for key in state if key.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in key)
    state[f"{tower}position_ids"] = torch.arange(5)[None]
    state[layer.replace("q_proj.weight", "rotary_emb.inv_freq")] = torch.rand(2)
    replace_weights(folder, state)
    assert torch.equal(logits(load_model(folder), case), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3])
def test_shards_with_an_index(folder, memory, case, expected, layout, count):
    state = laid_out(memory, layout)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    where = {key: names[i % count] for i, key in enumerate(state)}
    (folder / "model.safetensors").unlink()
    for name in names:
        save_file({key: value for key, value in state.items() if where[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load_model(folder), case), expected)
    (folder / names[-1]).unlink()
    refused(lambda: load_model(folder), folder / names[-1])


def test_shards_as_transformers_writes_them(theirs, tmp_path, case, expected):
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 2 and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(load_model(tmp_path), case), expected)


def test_dtype_of_the_loaded_model(written, case, expected):
    """Weights are cast on the way in; the model computes in that type."""
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 1.0)):
        model = load_model(written, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype} and not any(p.is_meta for p in model.parameters())
        found = logits(model, (case[0], case[1].to(dtype)))
        assert found.dtype == dtype and 0 < worst(found.float(), expected) < tolerance


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_what_transformers_reads(oracle, written, memory, tmp_path, case, dtype):
    model, out = load_model(written), tmp_path / "deep" / "out"
    save_model(model.state_dict(), model.config.raw, written, out, dtype)
    kind = oracle.transformers.LlavaForConditionalGeneration
    again, info = kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    rounded = oracle.make(SEED)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype).float()  # what the type keeps of the original
    assert torch.equal(oracle.logits(again.eval(), *case), oracle.logits(rounded, *case))
    assert kind.from_pretrained(out, dtype="auto").dtype == dtype
    assert torch.equal(logits(load_model(out), case), logits(load_model(written, dtype=dtype).float(), case))
    found = load_file(out / "model.safetensors")
    assert found.keys() == laid_out(memory, "hub").keys() and {v.dtype for v in found.values()} == {dtype}
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (written / name).read_bytes()
    raw = json.loads((out / "config.json").read_text())
    before = json.loads((written / "config.json").read_text())
    assert raw == before | {"dtype": str(dtype).removeprefix("torch.")}
    with safe_open(out / "model.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
    assert not list(tmp_path.rglob("*.partial"))


def test_saving_replaces_an_older_folder_whole(written, tmp_path, case, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_text("old")
    (out / "model.safetensors.index.json").write_text("{}")
    model = load_model(written)
    save_model(model.state_dict(), model.config.raw, written, out, torch.float32)
    assert torch.equal(logits(load_model(out), case), expected)
    assert not (out / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("where", ["top", "text", "both"])
def test_tied_embeddings(oracle, tmp_path, where):
    """A folder without lm_head; head and embedding stay one parameter, and are written once."""
    theirs = oracle.make(SEED, tied=True)
    theirs.save_pretrained(tmp_path / "in")
    assert not any("lm_head" in key for key in load_file(tmp_path / "in" / "model.safetensors"))

    def change(raw):
        raw["tie_word_embeddings"] = where != "text"
        raw["text_config"]["tie_word_embeddings"] = where != "top"

    edit_json(tmp_path / "in" / "config.json", change)
    ours = load_model(tmp_path / "in")
    assert ours.lm_head.weight is ours.language_model.embed_tokens.weight
    ids = [5 if i == theirs.config.image_token_id else i for i in range(9)]
    ids[2] = theirs.config.image_token_id
    size = theirs.config.vision_config.image_size
    pixels = torch.randn(3, size, size)
    assert worst(logits(ours, (ids, pixels)), oracle.logits(theirs, ids, pixels)) < 1e-4
    save_model(ours.state_dict(), ours.config.raw, tmp_path / "in", tmp_path / "out", torch.float32)
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(oracle.logits(again.eval(), ids, pixels), oracle.logits(theirs, ids, pixels))


# ---------------------------------------------------------------- spellings of config.json


def test_config_of_transformers_4(oracle, folder, theirs, case, expected):
    """`torch_dtype` and `rope_theta` where version 5 writes `dtype` and `rope_parameters`."""
    theta = theirs.config.text_config.rope_parameters["rope_theta"]
    assert theta != 10000.0  # not the default, so that not reading it would show

    def change(raw):
        raw["torch_dtype"] = raw.pop("dtype")
        assert raw["text_config"].pop("rope_parameters")["rope_theta"] == theta
        raw["text_config"] |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "float32"}

    edit_json(folder / "config.json", change)
    assert read_config(folder).text.rope_theta == theta
    assert torch.equal(logits(load_model(folder), case), expected)
    kind = oracle.transformers.LlavaForConditionalGeneration
    assert worst(oracle.logits(kind.from_pretrained(folder).eval(), *case), expected) < 1e-4
    model = load_model(folder)
    save_model(model.state_dict(), model.config.raw, folder, folder / "out", torch.bfloat16)
    assert kind.from_pretrained(folder / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["image_token_index", "image_token_id"])
def test_both_names_of_the_image_token(folder, name):
    def change(raw):
        for old in ("image_token_index", "image_token_id"):
            raw.pop(old, None)
        raw[name] = 17

    edit_json(folder / "config.json", change)
    assert read_config(folder).image_token_id == 17


SPARSE = [
    {},  # hub's 1.5: only what differs from Llama-7B
    {"text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064}},
    {"text_config": {"model_type": "llama", "num_attention_heads": 8, "hidden_size": 512}},
    {"text_config": {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12}},
    {"vision_config": {"model_type": "clip_vision_model", "hidden_size": 384}},  # not ViT-L's 16 heads
    {"vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}},
]


@pytest.mark.parametrize("sparse", SPARSE, ids=str)
def test_sparse_configs_are_completed_as_transformers_does(oracle, tmp_path, sparse):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | sparse))
    ours, theirs = read_config(tmp_path), oracle.transformers.LlavaConfig.from_pretrained(tmp_path)
    for section, whole in ((ours.text, theirs.text_config), (ours.vision, theirs.vision_config)):
        for name in vars(section):
            if name != "rope_theta":
                reference = getattr(whole, name)
                assert getattr(section, name) == reference, name
    assert ours.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    assert ours.image_token_id == theirs.image_token_id
    assert ours.vision_feature_layer == theirs.vision_feature_layer


# ---------------------------------------------------------------- bad folders

TENSORS = ["lm_head.weight", "layers.1.self_attn.k_proj.weight", "linear_2.bias", "class_embedding", "norm.weight"]


def pick(state: dict, tail: str) -> str:
    """The first key that ends so."""
    return next(key for key in sorted(state) if key.endswith(tail))


@pytest.mark.parametrize("tail", TENSORS)
@pytest.mark.parametrize("layout", ["hub", "original"])
def test_missing_tensor(folder, memory, layout, tail):
    state = laid_out(memory, layout)
    key = pick(memory, tail)
    del state[list(state)[list(memory).index(key)]]
    replace_weights(folder, state)
    message = refused(lambda: load_model(folder), folder, f"missing tensors: {key.removeprefix('model.')};")
    assert "unexpected tensors" not in message


@pytest.mark.parametrize("extra", ["model.image_newline", "vision_tower.vision_model.head.weight", "adapter.lora_A"])
def test_unexpected_tensor(folder, memory, extra):
    replace_weights(folder, laid_out(memory, "hub") | {extra: torch.zeros(3)})
    message = refused(lambda: load_model(folder), folder, "unexpected tensors: ", extra.split("model.")[-1])
    assert "missing tensors" not in message


@pytest.mark.parametrize("tail", TENSORS)
def test_wrongly_shaped_tensor(folder, memory, tail):
    key = pick(memory, tail)
    right = memory[key]
    wrong = torch.zeros(right.shape[0] + 1, *right.shape[1:])
    replace_weights(folder, memory | {key: wrong})
    shapes = str(list(wrong.shape)), str(list(right.shape))
    refused(lambda: load_model(folder), folder, f"{key.removeprefix('model.')} has shape {shapes[0]}", shapes[1])


def test_many_problems_are_still_one_short_line(folder, memory):
    replace_weights(folder, {"x.y": torch.zeros(1)})
    message = refused(lambda: load_model(folder), "missing tensors: ", "more", "unexpected tensors: x.y")
    assert len(message) < 1500


def test_no_embedding_in_a_tied_folder(folder, memory):
    edit_json(folder / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
    gone = ("embed_tokens.weight", "lm_head.weight")
    replace_weights(folder, {key: value for key, value in memory.items() if not key.endswith(gone)})
    refused(lambda: load_model(folder), folder, "missing tensors: language_model.embed_tokens.weight, lm_head.weight;")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_never_loaded(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x02.")
    refused(lambda: load_model(folder), folder, "pickle weights", "convert them to safetensors")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(lambda: load_model(folder), folder / "model.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.02, 0.5, 0.999])
def test_truncated_weights(folder, share):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(lambda: load_model(folder), path)


def test_garbled_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 50)
    refused(lambda: load_model(folder), path)


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(lambda: load_model(folder), folder / "config.json", "no such file")


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "llava",}', "[]", '"llava"', "null", "\x00"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json(folder, name, text):
    (folder / name).write_text(text)
    refused(lambda: load_model(folder), folder / name)


def test_config_that_is_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    refused(lambda: load_model(folder), folder / "config.json")


@pytest.mark.parametrize("kind", ["llama", "qwen2_vl", "", None])
def test_wrong_model_type(folder, kind):
    edit_json(folder / "config.json", lambda raw: raw.update(model_type=kind))
    refused(lambda: load_model(folder), folder / "config.json", f"model_type is {kind!r}", "only 'llava'")
    edit_json(folder / "config.json", lambda raw: raw.pop("model_type"))
    refused(lambda: load_model(folder), folder / "config.json", "model_type is None")


UNSUPPORTED = [
    ((), "vision_feature_select_strategy", "full"),
    ((), "projector_hidden_act", "relu"),
    (("vision_config",), "hidden_act", "gelu"),
    (("text_config",), "hidden_act", "gelu"),
    (("text_config", "rope_parameters"), "rope_type", "linear"),
    ((), "vision_feature_layer", [-2, -1]),
    ((), "vision_feature_layer", 99),
    ((), "vision_feature_layer", -99),
]


@pytest.mark.parametrize("path,name,value", UNSUPPORTED, ids=str)
def test_unsupported_choices_are_refused_not_ignored(folder, path, name, value):
    def change(raw):
        for part in path:
            raw = raw[part]
        raw[name] = value

    edit_json(folder / "config.json", change)
    refused(lambda: load_model(folder), folder / "config.json", f"{name} is {value!r}")


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_scaled_positions_of_transformers_4_are_refused(folder, name):
    def change(raw):
        raw["text_config"].pop("rope_parameters")
        raw["text_config"]["rope_scaling"] = {name: "linear", "factor": 2.0}

    edit_json(folder / "config.json", change)
    refused(lambda: load_model(folder), folder / "config.json", "rope_type is 'linear'")


def test_model_folder_is_named_when_it_is_not_there(tmp_path):
    refused(lambda: resolve_model(str(tmp_path / "nothing")), "--model", tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    refused(lambda: resolve_model(str(tmp_path / "file")), "--model", tmp_path / "file")
    assert resolve_model("toy") == TOY and resolve_model(str(tmp_path)) == tmp_path
