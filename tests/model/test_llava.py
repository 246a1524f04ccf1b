"""Decoder, tower, projector and the whole against transformers: random sizes, then the embedded
checkpoint.
"""

import random
from dataclasses import replace

import pytest
import torch
from helpers import randomize, toy_model, toy_processor, toy_tokenizer, worst

from minialign.edge import CHECKPOINT
from minialign.model.clip import Clip, ClipConfig
from minialign.model.config import read_config
from minialign.model.hf_folder import load_model
from minialign.model.llama import KVCache, Llama, LlamaConfig
from minialign.model.llava import Projector
from minialign.model.masks import Sequence, build_tree, dense_mask
from minialign.toy import world

SEEDS = range(6)


def text_tree(rows: list[list[int]]):
    """Plain text as trunks; no image."""
    return build_tree([Sequence(row) for row in rows], image_token_id=-1, pad_id=0)


def our_logits(model, ids: list[int], pixels, visible=None, drop_hidden: bool = True):
    """(positions, logits) of one sequence as a trunk."""
    tree = build_tree(
        [
            Sequence(
                ids,
                [],
                model.config.vision.patches,
                None if visible is None else torch.tensor(visible),
            )
        ],
        model.config.image_token_id,
        0,
        drop_hidden,
    )
    with torch.no_grad():
        return tree.positions[0], model.lm_head(model(tree, model.encode_images(pixels[None])))[0]


# ---------------------------------------------------------------- decoder


def decoders(oracle, seed: int):
    """(transformers' decoder, ours with its weights, a source of randomness); odd seeds group their
    queries.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * (rng.choice([2, 3]) if seed % 2 else 1)
    config = LlamaConfig(
        vocab_size=rng.randrange(30, 70),
        hidden_size=heads * rng.choice([2, 3, 8]),
        intermediate_size=rng.randrange(10, 50),
        num_hidden_layers=rng.choice([1, 2, 4]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([2, 6, 16]),
        rms_norm_eps=rng.choice([1e-6, 1e-2]),
        rope_theta=rng.choice([20.0, 1e4, 1e6]),
    )
    choices = dict(vars(config))
    choices["rope_parameters"] = {"rope_type": "default", "rope_theta": choices.pop("rope_theta")}
    theirs = oracle.transformers.LlamaModel(oracle.transformers.LlamaConfig(**choices)).eval()
    randomize(theirs, seed, 1.5)
    ours = Llama(config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, rng


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_decoder_with_a_causal_trunk(oracle, seed):
    theirs, ours, rng = decoders(oracle, seed)
    width = rng.randrange(2, 40)
    ids = torch.randint(0, ours.config.vocab_size, (3, width))
    tree = text_tree(ids.tolist())
    hidden = ours(ours.embed_tokens(ids), tree.positions, dense_mask(tree, tree))
    assert worst(hidden, theirs(input_ids=ids).last_hidden_state) < 1e-5


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_decoder_under_any_mask_and_positions(oracle, seed, additive):
    theirs, ours, rng = decoders(oracle, seed)
    width = rng.randrange(2, 40)
    ids = torch.randint(0, ours.config.vocab_size, (2, width))
    # With gaps.
    positions = torch.stack([torch.randperm(300)[:width].sort().values for _ in range(2)])
    mask = (torch.rand(2, 1, width, width) < 0.4) | torch.eye(width).bool()
    given = (
        torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        if additive
        else mask
    )
    expected = theirs(input_ids=ids, attention_mask=given, position_ids=positions).last_hidden_state
    assert worst(ours(ours.embed_tokens(ids), positions, mask), expected) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_forward(oracle, seed):
    theirs, ours, rng = decoders(oracle, seed)
    width = rng.randrange(6, 30)
    ids = torch.randint(0, ours.config.vocab_size, (2, width))
    expected = theirs(input_ids=ids).last_hidden_state
    tree = text_tree(ids.tolist())
    mask = dense_mask(tree, tree)
    cache = KVCache(ours.config, 2, width + 3, expected)
    cuts = [0, *sorted(rng.sample(range(1, width), 3)), width]
    for start, end in zip(cuts, cuts[1:], strict=False):
        piece = ours.embed_tokens(ids[:, start:end])
        hidden = ours(piece, tree.positions[:, start:end], mask[:, :, start:end, :end], cache)
        assert worst(hidden, expected[:, start:end]) < 1e-5


# ---------------------------------------------------------------- tower and projector


def towers(oracle, seed: int):
    """(transformers' tower, ours with its weights)."""
    rng = random.Random(seed)
    heads, patch = rng.choice([1, 2, 4]), rng.randrange(3, 9)
    config = ClipConfig(
        hidden_size=heads * rng.choice([4, 6, 16]),
        intermediate_size=rng.randrange(10, 60),
        num_hidden_layers=rng.randrange(2, 6),
        num_attention_heads=heads,
        image_size=patch * rng.randrange(1, 5) + rng.randrange(patch),
        patch_size=patch,
        layer_norm_eps=rng.choice([1e-5, 1e-2]),
    )
    theirs = oracle.transformers.CLIPVisionModel(
        oracle.transformers.CLIPVisionConfig(**vars(config))
    ).eval()
    randomize(theirs, seed, 2.0)
    ours = Clip(config)
    ours.load_state_dict(
        {
            key.removeprefix("vision_model."): value
            for key, value in theirs.state_dict().items()
            if not key.endswith("position_ids")
        }
    )
    return theirs, ours


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_tower_features_of_every_layer(oracle, seed):
    theirs, ours = towers(oracle, seed)
    size, layers = ours.embeddings.image_size, len(ours.encoder.layers)
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))
    states = theirs(pixels, output_hidden_states=True).hidden_states
    assert len(states) == layers + 1
    for layer in range(-layers - 1, layers + 1):
        assert worst(ours(pixels, layer), states[layer][:, 1:]) < 1e-5
    assert torch.equal(ours(pixels), ours(pixels, -2))


def test_tower_refuses_another_picture_size():
    tower = Clip(ClipConfig(8, 8, 1, 1, image_size=12, patch_size=4))
    for shape in [(1, 3, 12, 16), (1, 3, 16, 12), (1, 3, 24, 24)]:
        with pytest.raises(ValueError, match="12x12"):
            tower(torch.zeros(shape))


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_projector(oracle, seed):
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    model = oracle.make(seed)
    theirs = LlavaMultiModalProjector(model.config)
    randomize(theirs, seed, 1.5)
    vision, text = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    ours = Projector(vision, text)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, vision, generator=torch.Generator().manual_seed(seed)) * 2
    assert worst(ours(x), theirs(x)) < 1e-5


# ---------------------------------------------------------------- the whole, random


@pytest.mark.parametrize("feature_layer", [-1, -2, 1])
@pytest.mark.parametrize("seed", range(4))
def test_whole_model_saved_by_transformers(oracle, tmp_path, seed, feature_layer):
    theirs = oracle.make(seed, feature_layer)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.vision_feature_layer == feature_layer and not ours.training
    rng = random.Random(seed)
    size, image = ours.config.vision.image_size, ours.config.image_token_id
    text = [i for i in range(ours.config.text.vocab_size) if i != image]
    for _ in range(2):
        pixels = torch.randn(3, size, size)
        ids = [
            *rng.choices(text, k=rng.randrange(1, 5)),
            image,
            *rng.choices(text, k=rng.randrange(1, 20)),
        ]
        visible = [rng.random() < 0.5 for _ in range(ours.config.vision.patches)]
        assert worst(our_logits(ours, ids, pixels)[1], oracle.logits(theirs, ids, pixels)) < 1e-4
        positions, logits = our_logits(ours, ids, pixels, visible)
        assert worst(logits, oracle.logits(theirs, ids, pixels, visible)[positions]) < 1e-4


@torch.no_grad()
def test_rows_of_a_batch_do_not_touch_one_another(oracle, tmp_path):
    theirs = oracle.make(3)
    theirs.save_pretrained(tmp_path)
    ours, rng = load_model(tmp_path), random.Random(3)
    image, patches, size = (
        ours.config.image_token_id,
        ours.config.vision.patches,
        ours.config.vision.image_size,
    )
    text = [i for i in range(ours.config.text.vocab_size) if i != image]
    pixels = torch.randn(3, 3, size, size)
    rows = [[*rng.choices(text, k=2), image, *rng.choices(text, k=count)] for count in (3, 11, 6)]
    sequences = [Sequence(row, [], patches) for row in rows]
    sequences.insert(1, Sequence([text[0], text[5]]))  # a row without a picture among the others
    tree = build_tree(sequences, image, 0)
    logits = ours.lm_head(ours(tree, ours.encode_images(pixels)))[[0, 2, 3]]
    for row, picture, found in zip(rows, pixels, logits, strict=True):
        expected = oracle.logits(theirs, row, picture)
        assert worst(found[: len(expected)], expected) < 1e-4


# ---------------------------------------------------------------- the whole, embedded checkpoint


@pytest.fixture(scope="module")
def toy_oracle(oracle):
    """The embedded checkpoint as transformers reads it, in float32."""
    model, info = oracle.transformers.LlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    return model.eval()


def toy_case(index: int, answer: bool = True):
    """(ids, pixels by transformers' preprocessing, visible patches) of a real picture, question and
    answer.
    """
    rng = random.Random(index)
    scene = world.make_scene("test", index)
    kind = rng.choice(["description", "existence", "attribute"])
    turns = world.conversation(scene, kind, rng)
    tokenizer = toy_tokenizer()
    ids = tokenizer.prompt(turns[:-1]) + tokenizer.response(turns[-1][1])
    patches = toy_model().config.vision.patches
    hidden = rng.choice([0.3, 0.9, 1.0])
    return (
        ids,
        toy_processor()(world.picture(scene))[0],
        [rng.random() >= hidden for _ in range(patches)],
    )


@pytest.mark.parametrize("index", range(5))
def test_toy_plain(oracle, toy_oracle, index):
    ids, pixels, _ = toy_case(index)
    assert (
        worst(our_logits(toy_model(), ids, pixels)[1], oracle.logits(toy_oracle, ids, pixels))
        < 1e-4
    )


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("drop_hidden", [True, False])
@pytest.mark.parametrize("index", range(5))
def test_toy_with_hidden_image_tokens(oracle, toy_oracle, index, drop_hidden, additive):
    """Eq. 6: transformers gets a 4-D mask that hides the columns from every query."""
    ids, pixels, visible = toy_case(index)
    positions, logits = our_logits(toy_model(), ids, pixels, visible, drop_hidden)
    assert len(positions) == len(ids) - 1 + (sum(visible) if drop_hidden else len(visible))
    expected = oracle.logits(toy_oracle, ids, pixels, visible, additive)
    assert worst(logits, expected[positions]) < 1e-4
    # The mask matters: without it the text's logits are others.
    text = positions >= ids.index(toy_tokenizer().image_id) + len(visible)
    assert worst(logits[text], oracle.logits(toy_oracle, ids, pixels)[positions[text]]) > 1e-3


@pytest.mark.parametrize("layer", [-1, -2, 1, 3])
@torch.no_grad()
def test_toy_at_other_feature_layers(oracle, toy_oracle, layer):
    model = load_model(CHECKPOINT)
    model.config = replace(model.config, vision_feature_layer=layer)
    ids, pixels, visible = toy_case(7)
    for seen in (None, visible):
        positions, logits = our_logits(model, ids, pixels, seen)
        expected = oracle.logits(toy_oracle, ids, pixels, seen, vision_feature_layer=layer)
        assert worst(logits, expected[positions]) < 1e-4


def test_toy_folder_end_to_end(oracle, toy_oracle):
    """Text and picture in, logits out, by transformers' own processor on one side and ours on the
    other.
    """
    scene = world.make_scene("test", 11)
    picture, question = world.picture(scene), "Where is the cup?\nSay it."
    tokenizer = oracle.transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    processor = oracle.transformers.CLIPImageProcessorPil.from_pretrained(CHECKPOINT)
    ids = tokenizer(f"<s>USER: <image>\n{question} ASSISTANT:", add_special_tokens=False).input_ids
    pixels = processor(picture, return_tensors="pt").pixel_values[0]
    _, logits = our_logits(
        toy_model(), toy_tokenizer().prompt([("user", question)]), toy_processor()(picture)[0]
    )
    assert worst(logits, oracle.logits(toy_oracle, ids, pixels)) < 1e-4


def test_toy_config_is_the_one_transformers_reads(toy_oracle):
    ours, theirs = read_config(CHECKPOINT), toy_oracle.config
    for name in vars(ours.text):
        if name != "rope_theta":
            assert getattr(ours.text, name) == getattr(theirs.text_config, name), name
    assert ours.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    for name in vars(ours.vision):
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, name), name
    assert ours.image_token_id == theirs.image_token_id
