"""config.json: the model's sizes.

Sparse files are completed with transformers' defaults, and what is not computed here is refused.
"""

from dataclasses import replace
from pathlib import Path

from minialign.data.anyres import PINPOINTS, Size
from minialign.errors import UserError
from minialign.fields import (
    ANYTHING,
    Field,
    broken_rule,
    flag,
    list_of,
    number,
    object_of,
    one_of,
    read_fields,
    whole,
)
from minialign.files import read_json
from minialign.model.clip import ClipConfig
from minialign.model.llama import LlamaConfig
from minialign.model.llava import LlavaConfig

POSITIONS = whole(1, 2**31 - 1, default=LlamaConfig.max_position_embeddings)
NOT_QUANTISED = Field(
    "only weights in floating point are supported, no quantised ones",
    fits=lambda value: not value,
    default=None,
)

LLAMA = {
    "model_type": one_of("llama", "mistral", default="llama"),
    "vocab_size": whole(1, 2**22, default=LlamaConfig.vocab_size),
    "hidden_size": whole(1, 2**16, default=LlamaConfig.hidden_size),
    "intermediate_size": whole(1, 2**20, default=LlamaConfig.intermediate_size),
    "num_hidden_layers": whole(1, 512, default=LlamaConfig.num_hidden_layers),
    "num_attention_heads": whole(1, 2**12, default=LlamaConfig.num_attention_heads),
    "num_key_value_heads": whole(1, 2**12, default=None),  # as many as there are heads
    "head_dim": whole(1, 2**12, default=None),  # the heads' share of hidden_size
    "rms_norm_eps": number(1e-30, 1, default=LlamaConfig.rms_norm_eps),
    "rope_theta": number(1, 1e12, default=LlamaConfig.rope_theta),
    "rope_parameters": object_of(ANYTHING, default={}),
    "rope_scaling": object_of(ANYTHING, default={}),  # transformers 4's name of it
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": flag(default=False),
    "hidden_act": one_of("silu", default="silu"),
    "attention_bias": one_of(False, default=False),
    "mlp_bias": one_of(False, default=False),
    "quantization_config": NOT_QUANTISED,
}
MISTRAL = LLAMA | {
    "intermediate_size": replace(LLAMA["intermediate_size"], default=14336),
    "num_key_value_heads": replace(LLAMA["num_key_value_heads"], default=8),
    "max_position_embeddings": replace(POSITIONS, default=131072),
    "sliding_window": replace(POSITIONS, default=None),
}
ROPE = {
    "rope_type": one_of("default", default="default"),
    "type": one_of("default", default="default"),  # transformers 4's name of it
    "rope_theta": replace(LLAMA["rope_theta"], default=None),
    "partial_rotary_factor": one_of(1, 1.0, default=1.0),
}

# The defaults are those of a vision_config that is there, but sparse.
CLIP = {
    "model_type": one_of("clip_vision_model", default="clip_vision_model"),
    "hidden_size": whole(1, 2**14, default=768),
    "intermediate_size": whole(1, 2**16, default=3072),
    "num_hidden_layers": whole(1, 512, default=12),
    "num_attention_heads": whole(1, 2**10, default=12),
    "num_channels": one_of(3, default=3),
    "image_size": whole(1, 2**12, default=224),
    "patch_size": whole(1, 2**10, default=32),
    "layer_norm_eps": number(1e-30, 1, default=ClipConfig.layer_norm_eps),
    "hidden_act": one_of("quick_gelu", default="quick_gelu"),
}

LLAVA = {
    "model_type": Field(
        "only 'llava' and 'llava_next' are supported, as in the hub's -hf conversions",
        fits=lambda value: value in ("llava", "llava_next"),
    ),
    "text_config": object_of(ANYTHING, default={}),
    "vision_config": object_of(ANYTHING, default=None),
    "vision_feature_layer": whole(-1000, 1000, default=LlavaConfig.vision_feature_layer),
    "vision_feature_select_strategy": one_of("default", default="default"),
    "projector_hidden_act": one_of("gelu", default="gelu"),
    "multimodal_projector_bias": one_of(True, default=True),
    "image_token_index": whole(0, 2**22, default=None),
    "image_token_id": whole(0, 2**22, default=LlavaConfig.image_token_id),  # the same
    "image_grid_pinpoints": list_of(
        list_of(whole(1, 2**12), count=2), default=[list(size) for size in PINPOINTS]
    ),
    "tie_word_embeddings": flag(default=False),
    "quantization_config": NOT_QUANTISED,
}


def read_config(folder: Path) -> LlavaConfig:
    """config.json as a `LlavaConfig`; a `UserError` names what is malformed or not supported."""
    path = folder / "config.json"
    raw = read_json(path, "a model folder needs Hugging Face's config.json")
    values = read_fields(path, raw, LLAVA)
    beyond = raw.keys() - LLAVA.keys()
    if "text_config" not in raw and any(n.startswith("mm_") or n in LLAMA for n in beyond):
        message = "in LLaVA's original form, without text_config and vision_config"
        remedy = "give the hub's -hf conversion of this model, or convert it as transformers does"
        raise UserError(f"{path}: {message}; {remedy}")

    decoder, tower = read_decoder(path, values), read_tower(path, values["vision_config"])
    layer, blocks = values["vision_feature_layer"], tower.num_hidden_layers
    if not -blocks - 1 <= layer <= blocks:
        rule = f"it must be one of the tower's {blocks} layers"
        raise broken_rule(path, "vision_feature_layer", layer, rule)
    image_id = values["image_token_index"]
    if image_id is None:
        image_id = values["image_token_id"]
    if image_id >= decoder.vocab_size:
        rule = f"it must be an id below vocab_size {decoder.vocab_size}"
        raise broken_rule(path, "image_token_index", image_id, rule)
    pinpoints = ()
    if raw["model_type"] == "llava_next":
        pinpoints = whole_tiles(path, values["image_grid_pinpoints"], tower.image_size)
    return LlavaConfig(decoder, tower, image_id, layer, pinpoints, raw)


def read_decoder(path: Path, llava: dict) -> LlamaConfig:
    """text_config's sizes; what is not there has the default of the family."""
    raw, where = llava["text_config"], "text_config."
    family = read_fields(path, raw, {"model_type": LLAMA["model_type"]}, where)["model_type"]
    text = read_fields(path, raw, MISTRAL if family == "mistral" else LLAMA, where)
    name = "rope_scaling" if text["rope_scaling"] else "rope_parameters"
    rope = read_fields(path, text[name], ROPE, f"{where}{name}.")

    width, heads = text["hidden_size"], text["num_attention_heads"]
    head_dim, kv_heads = text["head_dim"], text["num_key_value_heads"] or heads
    if head_dim is None:
        require_divides(path, f"{where}num_attention_heads", heads, "hidden_size", width)
        head_dim = width // heads
    require_divides(path, f"{where}num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if head_dim % 2:
        raise broken_rule(path, f"{where}head_dim", head_dim, "it must be even, for RoPE's pairs")

    # Mistral sees so many tokens back. A sequence that is no longer than that is exact without a
    # window, so the window is a limit of positions here. A file that does not say has 4096.
    positions = text["max_position_embeddings"]
    if family == "mistral":
        window = text["sliding_window"] if "sliding_window" in raw else 4096
        positions = min(positions, window or positions)
    return LlamaConfig(
        vocab_size=text["vocab_size"],
        hidden_size=width,
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=rope["rope_theta"] or text["rope_theta"],
        max_position_embeddings=positions,
        tie_word_embeddings=llava["tie_word_embeddings"] or text["tie_word_embeddings"],
    )


def read_tower(path: Path, raw: dict | None) -> ClipConfig:
    """vision_config's sizes; one that is not there at all is CLIP ViT-L/14's at 336 pixels."""
    if raw is None:
        return ClipConfig()
    where = "vision_config."
    vision = read_fields(path, raw, CLIP, where)
    heads, width = vision["num_attention_heads"], vision["hidden_size"]
    require_divides(path, f"{where}num_attention_heads", heads, "hidden_size", width)
    if vision["patch_size"] > vision["image_size"]:
        rule = f"it must be at most image_size {vision['image_size']}"
        raise broken_rule(path, f"{where}patch_size", vision["patch_size"], rule)
    return ClipConfig(
        hidden_size=width,
        intermediate_size=vision["intermediate_size"],
        num_hidden_layers=vision["num_hidden_layers"],
        num_attention_heads=heads,
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        layer_norm_eps=vision["layer_norm_eps"],
    )


def require_divides(path: Path, name: str, value: int, of: str, total: int) -> None:
    """Refuse a number of heads that does not divide what is dealt out to them."""
    if total % value:
        raise broken_rule(path, name, value, f"it must divide {of} {total}")


def whole_tiles(path: Path, given: list, tile: int) -> tuple[Size, ...]:
    """The resolutions of LLaVA-1.6: (height, width) pairs of whole tiles."""
    if not given or any(side % tile for pair in given for side in pair):
        rule = f"it must be pairs of multiples of {tile} pixels, one at least"
        raise broken_rule(path, "image_grid_pinpoints", given, rule)
    return tuple((height, width) for height, width in given)
