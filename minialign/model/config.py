"""config.json: the model's sizes, sparse files completed with transformers' defaults, what is
unsupported refused."""

from dataclasses import fields
from pathlib import Path

from minialign.data.anyres import PINPOINTS, Size
from minialign.errors import UserError
from minialign.files import read_json
from minialign.model.clip import ClipConfig
from minialign.model.llama import LlamaConfig
from minialign.model.llava import LlavaConfig

# transformers' defaults of a vision_config that is there but sparse; without any, the tower is
# `ClipConfig()`.
SPARSE_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
# The others are `LlamaConfig`'s.
SPARSE_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def read_config(folder: Path) -> LlavaConfig:
    """config.json as a `LlavaConfig`; sparse files are completed with the defaults."""
    path = folder / "config.json"
    raw = read_json(path, "a model folder needs Hugging Face's config.json")
    if raw.get("model_type") not in ("llava", "llava_next"):
        said = "only 'llava' and 'llava_next' are supported, as in the hub's -hf conversions"
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}; {said}")
    text, vision = section(path, raw, "text_config"), section(path, raw, "vision_config")
    if vision:
        vision = SPARSE_VISION | vision
    if text.get("model_type") == "mistral":
        text = SPARSE_MISTRAL | text
    rope = section(path, text, "rope_parameters") or section(path, text, "rope_scaling")
    expected = [
        ("vision_feature_select_strategy", raw, "default"),
        ("projector_hidden_act", raw, "gelu"),
        ("hidden_act", vision, "quick_gelu"),
        ("hidden_act", text, "silu"),
        ("attention_bias", text, False),
        ("mlp_bias", text, False),
        ("sliding_window", text, None),
        ("rope_type", {"rope_type": rope.get("type", "default")} | rope, "default"),
    ]
    for name, found, value in expected:
        if found.get(name, value) != value:
            raise UserError(f"{path}: {name} is {found[name]!r}; only {value!r} is supported")
    if text.get("rope_theta") is None:
        text["rope_theta"] = rope.get("rope_theta", LlamaConfig.rope_theta)
    require_numbers(path, text, LlamaConfig)
    require_numbers(path, vision, ClipConfig)
    heads = text.get("num_attention_heads", LlamaConfig.num_attention_heads)
    text["num_key_value_heads"] = text.get("num_key_value_heads") or heads
    text["head_dim"] = (
        text.get("head_dim") or text.get("hidden_size", LlamaConfig.hidden_size) // heads
    )
    text["tie_word_embeddings"] = bool(
        raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    )

    def known(section: dict, kind: type) -> dict:
        return {f.name: section[f.name] for f in fields(kind) if f.name in section}

    tower, layer = ClipConfig(**known(vision, ClipConfig)), raw.get("vision_feature_layer", -2)
    if tower.hidden_size % tower.num_attention_heads or heads % text["num_key_value_heads"]:
        raise UserError(
            f"{path}: a number of attention heads does not go into what it divides; download it again"
        )
    blocks = tower.num_hidden_layers
    if not isinstance(layer, int) or not -blocks - 1 <= layer <= blocks:
        raise UserError(
            f"{path}: vision_feature_layer is {layer!r}; it must be one of the tower's {blocks} layers"
        )
    decoder, image_id = (
        LlamaConfig(**known(text, LlamaConfig)),
        raw.get("image_token_index", raw.get("image_token_id")),
    )
    if image_id is not None and not (
        isinstance(image_id, int) and 0 <= image_id < decoder.vocab_size
    ):
        raise UserError(
            f"{path}: image_token_index {image_id!r} is none of the {decoder.vocab_size} token ids"
        )
    return LlavaConfig(
        text=decoder,
        vision=tower,
        image_token_id=32000 if image_id is None else image_id,
        vision_feature_layer=layer,
        pinpoints=read_pinpoints(path, raw, tower.image_size)
        if raw["model_type"] == "llava_next"
        else (),
        raw=raw,
    )


def read_pinpoints(path: Path, raw: dict, tile: int) -> tuple[Size, ...]:
    """The resolutions of LLaVA-1.6: (height, width) pairs of whole tiles."""
    given = raw.get("image_grid_pinpoints") or [list(pinpoint) for pinpoint in PINPOINTS]
    for pinpoint in given if isinstance(given, list) else [given]:
        pair = (
            isinstance(pinpoint, list)
            and len(pinpoint) == 2
            and all(type(n) is int for n in pinpoint)
        )
        if not pair or any(n <= 0 or n % tile for n in pinpoint):
            raise UserError(
                f"{path}: image_grid_pinpoints: {pinpoint!r} is no pair of multiples of {tile} pixels"
            )
    return tuple(map(tuple, given))


def section(path: Path, raw: dict, name: str) -> dict:
    """A copy of a nested object of config.json; empty where there is none."""
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} must be a JSON object; download the folder again")
    return dict(value)


def require_numbers(path: Path, values: dict, kind: type) -> None:
    """Refuse sizes that are no positive numbers; null stands for the default in two of them."""
    for field in fields(kind):
        value, optional = values.get(field.name), field.name in ("num_key_value_heads", "head_dim")
        if field.type is bool or field.name not in values or (value is None and optional):
            continue
        right = isinstance(value, int | float if field.type is float else int) and not isinstance(
            value, bool
        )
        if not right or value <= 0:
            raise UserError(
                f"{path}: {field.name} is {value!r}, not a number above 0; download the folder again"
            )
