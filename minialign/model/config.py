"""config.json: the model's sizes.

Sparse files are completed with transformers' defaults, and what is not computed here is refused.
"""

from pathlib import Path

from minialign.data.anyres import PINPOINTS, Size
from minialign.errors import UserError
from minialign.files import read_json
from minialign.model.clip import ClipConfig
from minialign.model.llama import LlamaConfig
from minialign.model.llava import LlavaConfig

# The numbers that are read. One that a file lacks is `LlamaConfig`'s or `ClipConfig`'s default.
TEXT_NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
)
VISION_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "layer_norm_eps",
)
NOT_WHOLE = ("rms_norm_eps", "layer_norm_eps", "rope_theta")

# transformers' defaults of a vision_config that is there but sparse.
SPARSE_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
# Where Mistral's defaults are not Llama's.
SPARSE_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def read_config(folder: Path) -> LlavaConfig:
    """config.json as a `LlavaConfig`; a `UserError` names what is malformed or not supported."""
    path = folder / "config.json"
    raw = read_json(path, "a model folder needs Hugging Face's config.json")
    if raw.get("model_type") not in ("llava", "llava_next"):
        message = "only 'llava' and 'llava_next' are supported, as in the hub's -hf conversions"
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}; {message}")
    text = section(path, raw, "text_config")
    vision = section(path, raw, "vision_config")
    rope = section(path, text, "rope_parameters") or section(path, text, "rope_scaling")

    choices = [
        (raw, "vision_feature_select_strategy", "default"),
        (raw, "projector_hidden_act", "gelu"),
        (vision, "hidden_act", "quick_gelu"),
        (text, "hidden_act", "silu"),
        (text, "attention_bias", False),
        (text, "mlp_bias", False),
        (text, "sliding_window", None),
        (rope, "rope_type", "default"),
        (rope, "type", "default"),  # transformers 4's name of it
    ]
    for values, name, supported in choices:
        if values.get(name, supported) != supported:
            raise UserError(f"{path}: {name} is {values[name]!r}; only {supported!r} is supported")

    if vision:
        vision = SPARSE_VISION | vision
    tower = ClipConfig(**numbers(path, vision, VISION_NUMBERS))

    if text.get("model_type") == "mistral":
        text = SPARSE_MISTRAL | text
    if "rope_theta" in rope:
        text = {"rope_theta": rope["rope_theta"]} | text
    sizes = numbers(path, text, TEXT_NUMBERS)
    heads = sizes.get("num_attention_heads", LlamaConfig.num_attention_heads)
    width = sizes.get("hidden_size", LlamaConfig.hidden_size)
    sizes = {"num_key_value_heads": heads, "head_dim": width // heads} | sizes
    tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    decoder = LlamaConfig(**sizes, tie_word_embeddings=tied)

    layer, blocks = raw.get("vision_feature_layer", -2), tower.num_hidden_layers
    if type(layer) is not int or not -blocks - 1 <= layer <= blocks:
        message = f"it must be one of the tower's {blocks} layers"
        raise UserError(f"{path}: vision_feature_layer is {layer!r}; {message}")
    image_id = raw.get("image_token_index", raw.get("image_token_id"))
    if image_id is None:
        image_id = LlavaConfig.image_token_id
    elif type(image_id) is not int or not 0 <= image_id < decoder.vocab_size:
        message = f"no id below vocab_size {decoder.vocab_size}; mend it"
        raise UserError(f"{path}: image_token_index is {image_id!r}, {message}")
    pinpoints = ()
    if raw["model_type"] == "llava_next":
        pinpoints = read_pinpoints(path, raw, tower.image_size)
    return LlavaConfig(decoder, tower, image_id, layer, pinpoints, raw)


def section(path: Path, values: dict, name: str) -> dict:
    """A nested object of config.json, without nulls: they stand for defaults. May be missing."""
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: {name} must be a JSON object; download the folder again")
    return {key: value for key, value in found.items() if value is not None}


def numbers(path: Path, values: dict, names: tuple[str, ...]) -> dict[str, float]:
    """Those of the named numbers that are there; each must be above 0."""
    found = {name: values[name] for name in names if name in values}
    for name, value in found.items():
        right = type(value) is int or (type(value) is float and name in NOT_WHOLE)
        if not right or value <= 0:
            message = "not a number above 0; download the folder again"
            raise UserError(f"{path}: {name} is {value!r}, {message}")
    return found


def read_pinpoints(path: Path, raw: dict, tile: int) -> tuple[Size, ...]:
    """The resolutions of LLaVA-1.6: (height, width) pairs of whole tiles."""
    given = raw.get("image_grid_pinpoints") or [list(size) for size in PINPOINTS]
    try:
        pinpoints = tuple((height, width) for height, width in given)
        right = all(side > 0 and side % tile == 0 for pair in pinpoints for side in pair)
    except (TypeError, ValueError):  # no list, no pair, no number
        right = False
    if not right:
        message = f"no pairs of multiples of {tile} pixels"
        raise UserError(f"{path}: image_grid_pinpoints: {str(given)[:80]} are {message}")
    return pinpoints
