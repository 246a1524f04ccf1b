"""Hugging Face LLaVA folders in and out.

A folder holds config.json, model.safetensors (or shards with an index), tokenizer.json and
preprocessor_config.json. `NAMES` is the whole mapping between Hugging Face's keys and this code's.
"""

import hashlib
import re
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minialign.clip import ClipConfig
from minialign.errors import UserError
from minialign.files import read_json, write_folder_whole, write_json
from minialign.llama import LlamaConfig
from minialign.llava import Llava, LlavaConfig

TOY = Path(__file__).parent / "assets" / "toy-llava"

# Hugging Face's key (any of the layouts in use) -> ours. The first pattern that matches is applied.
NAMES = [
    (r"^(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower."),
    (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(language_model\.model|model\.language_model|model)\.", "language_model."),
]
# Ours -> the layout of the hub's llava-hf folders, which is the one that is written.
HUB_NAMES = [
    (r"^vision_tower\.", "vision_tower.vision_model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.", "language_model.model."),
]
IGNORED = re.compile(r"(position_ids|\.inv_freq)$")
# transformers' defaults of a vision_config that is there but sparse; without any, the tower is `ClipConfig()`.
SPARSE_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "special_tokens_map.json")


def rename(key: str, table: list[tuple[str, str]]) -> str:
    """Apply the first pattern of `table` that matches."""
    for pattern, replacement in table:
        renamed, count = re.subn(pattern, replacement, key, count=1)
        if count:
            return renamed
    return key


def resolve_model(model: str) -> Path:
    """`toy` names the embedded checkpoint; anything else is a folder."""
    folder = TOY if model == "toy" else Path(model)
    if not folder.is_dir():
        raise UserError(f"--model {model}: no such folder; give a Hugging Face LLaVA folder, or `toy`")
    return folder


def read_config(folder: Path) -> LlavaConfig:
    """config.json as a `LlavaConfig`; sparse files are completed with the defaults."""
    path = folder / "config.json"
    raw = read_json(path, "a model folder needs Hugging Face's config.json")
    if raw.get("model_type") != "llava":
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}; only 'llava' is supported")
    text, vision = section(path, raw, "text_config"), section(path, raw, "vision_config")
    if vision:
        vision = SPARSE_VISION | vision
    rope = section(path, text, "rope_parameters") or section(path, text, "rope_scaling")
    expected = [
        ("vision_feature_select_strategy", raw, "default"),
        ("projector_hidden_act", raw, "gelu"),
        ("hidden_act", vision, "quick_gelu"),
        ("hidden_act", text, "silu"),
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
    text["head_dim"] = text.get("head_dim") or text.get("hidden_size", LlamaConfig.hidden_size) // heads
    text["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))

    def known(section: dict, kind: type) -> dict:
        return {f.name: section[f.name] for f in fields(kind) if f.name in section}

    tower, layer = ClipConfig(**known(vision, ClipConfig)), raw.get("vision_feature_layer", -2)
    blocks = tower.num_hidden_layers
    if not isinstance(layer, int) or not -blocks - 1 <= layer <= blocks:
        raise UserError(f"{path}: vision_feature_layer is {layer!r}; it must be one of the tower's {blocks} layers")
    decoder, image_id = LlamaConfig(**known(text, LlamaConfig)), raw.get("image_token_index", raw.get("image_token_id"))
    if image_id is not None and not (isinstance(image_id, int) and 0 <= image_id < decoder.vocab_size):
        raise UserError(f"{path}: image_token_index {image_id!r} is none of the {decoder.vocab_size} token ids")
    return LlavaConfig(
        text=decoder,
        vision=tower,
        image_token_id=32000 if image_id is None else image_id,
        vision_feature_layer=layer,
        raw=raw,
    )


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
        right = isinstance(value, int | float if field.type is float else int) and not isinstance(value, bool)
        if not right or value <= 0:
            raise UserError(f"{path}: {field.name} is {value!r}, not a number above 0; download the folder again")


def weights_dtype(folder: Path) -> torch.dtype:
    """The type that config.json says the weights have: `dtype`, or `torch_dtype` as transformers 4 wrote."""
    raw = read_config(folder).raw
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{folder / 'config.json'}: dtype {name!r} is none of torch's; write float16, say")
    return dtype


def fingerprint(folder: Path) -> str:
    """A short name of the folder's weights: from sizes, first and last MiB of its files, as 14 GB take long to read."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files. Pickle is never loaded."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index, "download the folder again").get("weight_map", {}).values()
        files = [folder / name for name in sorted(set(names))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if file.exists():
            continue
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise UserError(
                f"{folder}: only pickle weights (.bin, .pt), which are never loaded; convert them to safetensors"
            )
        raise UserError(f"{file}: no such file; a model folder needs model.safetensors or its shards with an index")
    return files


def read_tensors(file: Path, device: str = "cpu", dtype: torch.dtype | None = None):
    """Yield (key, tensor) one tensor at a time, moved to `device` and `dtype` on the way."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                yield key, tensors.get_tensor(key).to(device, dtype)
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); download or save it again") from None


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Llava:
    """Read a LLaVA folder onto `device` in `dtype`, in eval mode.

    A missing, unexpected or wrongly shaped tensor is a `UserError` that names the keys.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = Llava(config)
    wanted = model.state_dict()
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for key, tensor in read_tensors(file, device, dtype):
            if not IGNORED.search(key):
                state[rename(key, NAMES)] = tensor
    embedding = state.get("language_model.embed_tokens.weight")
    if config.text.tie_word_embeddings and embedding is not None:
        state.setdefault("lm_head.weight", embedding)
    check_tensors(folder, wanted, state)
    model.load_state_dict(state, assign=True)
    if state["lm_head.weight"] is embedding:  # assign made two parameters of it
        model.lm_head.weight = model.language_model.embed_tokens.weight
    return model.eval()


def check_tensors(where: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse missing, unexpected and wrongly shaped tensors, by name."""
    problems = []
    for title, keys in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if keys:
            shown = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            problems.append(f"{title} tensors: {shown}")
    for key in sorted(wanted.keys() & found.keys()):
        if wanted[key].shape != found[key].shape:
            problems.append(f"{key} has shape {list(found[key].shape)}, config.json says {list(wanted[key].shape)}")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems[:5])}; config.json and the weights must belong together")


def save_model(state: dict[str, Tensor], raw_config: dict, source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder whole: `state` by our names, the config as read, companions copied."""

    def write(partial: Path) -> None:
        tied = state["lm_head.weight"].data_ptr() == state["language_model.embed_tokens.weight"].data_ptr()
        kept = {k: v for k, v in state.items() if not (tied and k == "lm_head.weight")}
        tensors = {rename(k, HUB_NAMES): v.detach().to("cpu", dtype).contiguous() for k, v in kept.items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        write_json(partial / "config.json", raw_config | {"dtype": str(dtype).removeprefix("torch.")})
        for name in COMPANIONS:
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)

    write_folder_whole(folder, write)
