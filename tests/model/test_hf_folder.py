"""Model folders: every layout and spelling gives the same logits, and what is written is what
transformers reads.
"""

import json
import random

import pytest
import torch
from helpers import refused, worst
from llava_folders import LAYOUTS, SEED, edit_json, laid_out, replace_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minialign.data import anyres
from minialign.model.config import read_config
from minialign.model.hf_folder import load_model, save_changed, save_model, weight_files
from minialign.model.masks import Sequence, build_tree


@pytest.fixture(scope="module")
def case(llava):
    """(ids, pixels) to compare logits on."""
    rng, size = random.Random(SEED), llava.config.vision_config.image_size
    image = llava.config.image_token_id
    text = [i for i in range(llava.config.text_config.vocab_size) if i != image]
    pixels = torch.randn(3, size, size, generator=torch.Generator().manual_seed(SEED))
    return [*rng.choices(text, k=2), image, *rng.choices(text, k=12)], pixels


@torch.no_grad()
def logits(model, case):
    """(T, V) logits of our model."""
    ids, pixels = case
    tree = build_tree(
        [Sequence(ids, [], model.config.vision.patches)], model.config.image_token_id, 0
    )
    return model.lm_head(model(tree, model.encode_images(pixels[None])))[0]


@pytest.fixture(scope="module")
def expected(written_llava, llava, oracle, case):
    """Our logits of the folder as transformers wrote it, which are transformers' own."""
    found = logits(load_model(written_llava), case)
    assert worst(found, oracle.logits(llava, *case)) < 1e-4
    return found


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_identical_logits(llava_folder, llava_state, case, expected, layout):
    replace_weights(llava_folder, laid_out(llava_state, layout))
    assert torch.equal(logits(load_model(llava_folder), case), expected)


def test_the_layouts_are_the_real_ones(written_llava, llava_state):
    """What transformers 5 writes; and the hub's known keys."""
    assert (
        load_file(written_llava / "model.safetensors").keys()
        == laid_out(llava_state, "fresh transformers 5").keys()
    )
    hub = laid_out(llava_state, "hub")
    for key in (
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias",
    ):
        assert key in hub
    original = laid_out(llava_state, "original")
    for key in (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
    ):
        assert key in original


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_of_older_versions_are_ignored(llava_folder, llava_state, case, expected, layout):
    state = laid_out(llava_state, layout)
    tower = next(key for key in state if key.endswith("class_embedding")).removesuffix(
        "class_embedding"
    )
    layer = next(
        key
        for key in state
        if key.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in key
    )
    state[f"{tower}position_ids"] = torch.arange(5)[None]
    state[layer.replace("q_proj.weight", "rotary_emb.inv_freq")] = torch.rand(2)
    replace_weights(llava_folder, state)
    assert torch.equal(logits(load_model(llava_folder), case), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3])
def test_shards_with_an_index(llava_folder, llava_state, case, expected, layout, count):
    state = laid_out(llava_state, layout)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    where = {key: names[i % count] for i, key in enumerate(state)}
    (llava_folder / "model.safetensors").unlink()
    for name in names:
        save_file(
            {key: value for key, value in state.items() if where[key] == name}, llava_folder / name
        )
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (llava_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load_model(llava_folder), case), expected)
    (llava_folder / names[-1]).unlink()
    refused(lambda: load_model(llava_folder), llava_folder / names[-1])


def test_shards_as_transformers_writes_them(llava, tmp_path, case, expected):
    llava.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 2 and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(load_model(tmp_path), case), expected)


def test_the_file_that_counts_is_transformers(llava, llava_state, tmp_path, case, expected):
    """model.safetensors goes before an index, whether or not the shards of that are still there."""
    llava.save_pretrained(tmp_path / "both", max_shard_size="20KB")
    replace_weights(tmp_path / "both", laid_out(llava_state, "hub"))
    for shard in (tmp_path / "both").glob("model-*.safetensors"):
        shard.write_bytes(b"no longer of this model")
    read_again = type(llava).from_pretrained(tmp_path / "both").state_dict()
    assert all(torch.equal(read_again[key], value) for key, value in llava_state.items())
    assert torch.equal(logits(load_model(tmp_path / "both"), case), expected)

    raw = read_config(tmp_path / "both").raw
    save_changed(tmp_path / "both", lambda name, weight: weight, raw, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    for shard in (tmp_path / "both").glob("model-*.safetensors"):
        shard.unlink()
    assert torch.equal(logits(load_model(tmp_path / "both"), case), expected)


def test_shards_in_folders_below(llava, tmp_path, case, expected):
    """Read, and written again where they were, for ourselves and for transformers."""
    llava.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    index = tmp_path / "in" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    for name in sorted(set(raw["weight_map"].values()))[1:]:
        # One of them has the name of a whole model's file.
        new = f"deep/{name}/model.safetensors"
        (tmp_path / "in" / new).parent.mkdir(parents=True)
        (tmp_path / "in" / name).rename(tmp_path / "in" / new)
        for key, file in raw["weight_map"].items():
            raw["weight_map"][key] = new if file == name else file
    index.write_text(json.dumps(raw))
    assert torch.equal(logits(load_model(tmp_path / "in"), case), expected)

    config = read_config(tmp_path / "in").raw
    save_changed(tmp_path / "in", lambda name, weight: weight, config, tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out"), case), expected)
    again, info = type(llava).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    files = [
        {path.relative_to(tmp_path / where) for path in (tmp_path / where).rglob("*.safetensors*")}
        for where in ("in", "out")
    ]
    assert files[0] == files[1] and len(files[0]) > 3


def test_what_overflows_the_files_type_is_not_written(llava_folder, llava_state, tmp_path):
    """And nothing is left of the folder."""
    state = {key: value.half() for key, value in llava_state.items()}
    replace_weights(llava_folder, state)
    raw = read_config(llava_folder).raw
    change = {"lm_head.weight": 1e9}
    refused(
        lambda: save_changed(
            llava_folder, lambda name, w: w.float() * change.get(name, 1), raw, tmp_path / "out"
        ),
        "lm_head.weight in torch.float16 holds NaN, infinity",
    )
    assert not (tmp_path / "out").exists()


def test_dtype_of_the_loaded_model(written_llava, case, expected):
    """Weights are cast on the way in; the model computes in that type."""
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 1.0)):
        model = load_model(written_llava, dtype=dtype)
        kinds = {
            (n.startswith("multi_modal_projector"), p.dtype) for n, p in model.named_parameters()
        }
        assert kinds == {(False, dtype), (True, torch.promote_types(dtype, torch.float32))}
        assert not any(p.is_meta for p in model.parameters())
        found = logits(model, (case[0], case[1].to(dtype)))
        assert found.dtype == dtype and 0 < worst(found.float(), expected) < tolerance


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_what_transformers_reads(
    oracle, written_llava, llava_state, tmp_path, case, dtype
):
    model, out = load_model(written_llava), tmp_path / "out"
    save_model(model.state_dict(), model.config.raw, written_llava, out, dtype)
    kind = oracle.transformers.LlavaForConditionalGeneration
    again, info = kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    rounded = oracle.make(SEED)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype).float()  # what the type keeps of the original
    assert torch.equal(oracle.logits(again.eval(), *case), oracle.logits(rounded, *case))
    assert kind.from_pretrained(out, dtype="auto").dtype == dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    assert torch.equal(logits(load_model(out), case), logits(model, case))
    found = load_file(out / "model.safetensors")
    assert found.keys() == laid_out(llava_state, "hub").keys()
    assert {value.dtype for value in found.values()} == {dtype}
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (written_llava / name).read_bytes()
    raw = json.loads((out / "config.json").read_text())
    before = json.loads((written_llava / "config.json").read_text())
    assert raw == before | {"dtype": str(dtype).removeprefix("torch.")}
    with safe_open(out / "model.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_of_every_layout(llava_folder, llava_state, tmp_path, layout, dtype):
    """The same keys, and under each the same bytes, but of what was changed on purpose."""
    state = {key: value.to(dtype) for key, value in laid_out(llava_state, layout).items()}
    replace_weights(llava_folder, state)
    changed = "language_model.layers.0.self_attn.q_proj.weight"
    raw = read_config(llava_folder).raw
    save_changed(
        llava_folder, lambda name, w: w.float() * 2 if name == changed else w, raw, tmp_path / "out"
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == state.keys()
    twice = [key for key in state if not torch.equal(found[key], state[key])]
    assert [key.endswith("layers.0.self_attn.q_proj.weight") for key in twice] == [True]
    assert torch.equal(found[twice[0]], state[twice[0]] * 2) and found[twice[0]].dtype == dtype
    kept = found.keys() - set(twice)
    assert all(
        found[key].numpy().tobytes() == state[key].contiguous().numpy().tobytes() for key in kept
    )


def test_round_trip_of_shards(llava, tmp_path, case):
    """Shard by shard under the same names, with the index, for ourselves and for transformers."""
    llava.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    save_changed(
        tmp_path / "in", lambda name, w: w * 1.5, read_config(tmp_path / "in").raw, tmp_path / "out"
    )
    names = [path.name for path in sorted((tmp_path / "in").glob("model*"))]
    assert (
        names == [path.name for path in sorted((tmp_path / "out").glob("model*"))]
        and len(names) > 3
    )
    again, info = type(llava).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    before, after = llava.state_dict(), again.state_dict()
    assert all(
        torch.equal(after[key], before[key] * 1.5)
        for key in before
        if before[key].is_floating_point()
    )
    for file in weight_files(tmp_path / "in"):
        assert load_file(file).keys() == load_file(tmp_path / "out" / file.name).keys()


def test_saving_replaces_an_older_folder_whole(written_llava, tmp_path, case, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_text("old")
    (out / "model.safetensors.index.json").write_text("{}")
    model = load_model(written_llava)
    save_model(model.state_dict(), model.config.raw, written_llava, out, torch.float32)
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
    save_changed(tmp_path / "in", lambda name, weight: weight, ours.config.raw, tmp_path / "out")
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(oracle.logits(again.eval(), ids, pixels), oracle.logits(theirs, ids, pixels))


# ---------------------------------------------------------------- spellings of config.json


def test_config_of_transformers_4(oracle, llava_folder, llava, case, expected):
    """`torch_dtype` and `rope_theta` where version 5 writes `dtype` and `rope_parameters`."""
    theta = llava.config.text_config.rope_parameters["rope_theta"]
    assert theta != 10000.0  # not the default, so that not reading it would show

    def change(raw):
        raw["torch_dtype"] = raw.pop("dtype")
        assert raw["text_config"].pop("rope_parameters")["rope_theta"] == theta
        raw["text_config"] |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "float32"}

    edit_json(llava_folder / "config.json", change)
    assert read_config(llava_folder).text.rope_theta == theta
    assert torch.equal(logits(load_model(llava_folder), case), expected)
    kind = oracle.transformers.LlavaForConditionalGeneration
    assert worst(oracle.logits(kind.from_pretrained(llava_folder).eval(), *case), expected) < 1e-4
    model = load_model(llava_folder)
    save_model(
        model.state_dict(), model.config.raw, llava_folder, llava_folder / "out", torch.bfloat16
    )
    assert kind.from_pretrained(llava_folder / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["image_token_index", "image_token_id"])
def test_both_names_of_the_image_token(llava_folder, name):
    def change(raw):
        for old in ("image_token_index", "image_token_id"):
            raw.pop(old, None)
        raw[name] = 17

    edit_json(llava_folder / "config.json", change)
    assert read_config(llava_folder).image_token_id == 17


SPARSE = [
    {},  # hub's 1.5: only what differs from Llama-7B
    {"text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064}},
    {"text_config": {"model_type": "llama", "num_attention_heads": 8, "hidden_size": 512}},
    {
        "text_config": {
            "model_type": "llama",
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 12,
        }
    },
    {"text_config": {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}},
    {"text_config": {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default"}}},
    {"text_config": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 7.0}}},
    {"text_config": {"model_type": "mistral", "sliding_window": None}},
    {"text_config": {"model_type": "mistral", "sliding_window": None, "hidden_size": 512}},
    # Not ViT-L's 16 heads.
    {"vision_config": {"model_type": "clip_vision_model", "hidden_size": 384}},
    {"vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}},
    {"vision_config": {}},
    {"vision_config": None},
]


@pytest.mark.parametrize("sparse", SPARSE, ids=str)
def test_sparse_configs_are_completed_as_transformers_does(oracle, tmp_path, sparse):
    text = {"vocab_size": 32064} | sparse.get("text_config", {})  # has the default image token
    raw = {"model_type": "llava"} | sparse | {"text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, theirs = read_config(tmp_path), oracle.transformers.LlavaConfig.from_pretrained(tmp_path)
    for section, whole in ((ours.text, theirs.text_config), (ours.vision, theirs.vision_config)):
        for name in vars(section):
            if name != "rope_theta":
                reference = getattr(whole, name)
                assert getattr(section, name) == reference, name
    assert ours.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    assert ours.image_token_id == theirs.image_token_id
    assert ours.vision_feature_layer == theirs.vision_feature_layer


def test_a_sliding_window_limits_the_positions(oracle, tmp_path):
    """A sequence up to the window is exact; one more token behind it is not, and is refused."""
    theirs = oracle.make_next(SEED, "mistral")
    theirs.save_pretrained(tmp_path)
    for window, limit in ((50, 50), (None, 131072), (2**20, 131072), ("left out", 4096)):

        def change(raw, window=window):
            raw["text_config"]["sliding_window"] = window
            if window == "left out":
                del raw["text_config"]["sliding_window"]

        edit_json(tmp_path / "config.json", change)
        assert read_config(tmp_path).text.max_position_embeddings == limit

    edit_json(tmp_path / "config.json", lambda raw: raw["text_config"].update(sliding_window=50))
    windowed, ours = type(theirs).from_pretrained(tmp_path).eval(), load_model(tmp_path)
    size = theirs.config.vision_config.image_size
    picture = {"image_sizes": torch.tensor([[size, size]])}
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(SEED))
    features = ours.encode_images(pixels)
    _, packing = anyres.packing((size, size), size, 4, ours.config.pinpoints)
    image, count = theirs.config.image_token_id, len(packing)
    for length in (50, 60):
        rest = [5 + i % 20 + (5 + i % 20 >= image) for i in range(length - count)]
        tree = build_tree([Sequence([image, *rest], [], 3 * 16, packing=packing)], image, 0)
        with torch.no_grad():
            found = ours.lm_head(ours(tree, features))[0]
            wanted = oracle.logits(windowed, [image, *rest], pixels, count=count, **picture)
        assert len(found) == length
        assert worst(found[:50], wanted[:50]) < 1e-4
        assert length == 50 or worst(found[50:], wanted[50:]) > 1e-3


# As on the pages of the original checkpoints; what none of it is read as is our own default.
FLAT = [
    {"mm_hidden_size": 1024, "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
    {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 32000},
    {"mm_projector_type": "linear"},
]


@pytest.mark.parametrize("fields", FLAT, ids=str)
def test_the_original_form_of_config_json_is_refused_by_name(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | fields))
    refused(lambda: read_config(tmp_path), "config.json", "original form", "-hf conversion")
