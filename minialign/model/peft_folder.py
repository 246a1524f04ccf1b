"""PEFT adapter folders in and out."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Size, Tensor

from minialign.errors import UserError
from minialign.fields import list_of, number, one_of, read_fields, text, whole
from minialign.files import folder_written_whole, read_json, write_json
from minialign.model.hf_folder import (
    NAMES,
    check_tensors,
    places_of,
    read_tensors,
    rename,
    set_parameter,
    some_of,
)
from minialign.model.llava import Llava
from minialign.model.lora import PROJECTOR, TARGETS, adapter_state, add_adapters
from minialign.training import parallel

ADAPTER = "adapter_model.safetensors"
MERGE = "merge it with PEFT's merge_and_unload, save that model, and give its folder as --model"

CONFIG = {
    "peft_type": one_of("LORA"),
    "r": whole(1, 2**16),
    "lora_alpha": number(1e-30, 1e30),
    "bias": one_of("none", "all", "lora_only", default="none"),
    "modules_to_save": list_of(text(), default=[]),
    # pissa, olora, ... change the base's weights.
    "init_lora_weights": one_of(True, False, "gaussian", "eva", "orthogonal", default=True),
}
# What else may be set: it does not change what the tensors mean. Whatever is not listed may.
WITHOUT_MEANING = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}

# Files with the endings of weights, and those of them that transformers' Trainer leaves and that
# are none.
WEIGHTS = (".bin", ".ckpt", ".gguf", ".pkl", ".pt", ".pth", ".safetensors")
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pth?)")

# What a stored tensor may be to the parameter W that it changes, by the end of its key. Of an
# embedding, whose W has a row for each token, the update is transposed.
ROLES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
}
PARTNERS = {"A": "B", "B": "A"}
# What training leaves as it is, by the beginning of our names.
FROZEN = {
    "vision_tower": "the vision tower",
    "lm_head": "the LM head",
    "language_model": "embeddings, norms or whole matrices of the decoder",
    "image_newline": "image_newline",
}


def merged(trained: dict[str, Tensor], scaling: float) -> Callable[[str, Tensor], Tensor]:
    """What makes a plain model that does the same: a function of the base's stored tensors and our
    names of them, as `save_changed` takes it.
    """
    return partial(merged_tensor, trained, scaling)


def merged_tensor(trained: dict[str, Tensor], scaling: float, name: str, stored: Tensor) -> Tensor:
    """W + (alpha / rank) B A for an adapted linear, the trained copy for the projector's tensors,
    and anything else as it is.
    """
    linear = name.removesuffix(".weight")
    if f"{linear}.lora_A" in trained:
        update = trained[f"{linear}.lora_B"] @ trained[f"{linear}.lora_A"] * scaling
        return stored.float() + update
    return trained.get(name.replace(f"{PROJECTOR}.", f"{PROJECTOR}.copy."), stored)


def peft_name(name: str) -> str:
    """Our name of a trained tensor -> its key in PEFT's adapter_model.safetensors."""
    name = name.replace(f"{PROJECTOR}.copy.", f"{PROJECTOR}.")
    name = name.replace(".lora_A", ".lora_A.weight").replace(".lora_B", ".lora_B.weight")
    return f"base_model.model.model.{name}"


def change_of(key: str) -> tuple[str, str]:
    """A key of PEFT's adapter_model.safetensors, of any layout of the model's keys -> our name of
    the parameter that the tensor changes, and its role: of `ROLES`, or "copy", in its place.
    """
    name = rename(key.removeprefix("base_model.model."), NAMES).replace(".base_layer.", ".")
    for end, role in ROLES.items():
        if name.endswith(end):
            return f"{name.removesuffix(end)}.weight", role
    return name, "copy"


def save_adapter(
    trained: dict[str, Tensor], rank: int, alpha: float, base: str, folder: Path
) -> None:
    """Write a folder that `PeftModel.from_pretrained` reads."""
    tensors = {}
    for name, tensor in trained.items():
        tensors[peft_name(name)] = tensor.detach().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": rf".*language_model\.layers\..*\.({'|'.join(TARGETS)})",
        "modules_to_save": [PROJECTOR],
    }
    with folder_written_whole(folder) as new:
        save_file(tensors, new / ADAPTER, metadata={"format": "pt"})
        write_json(new / "adapter_config.json", config)


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json of a PEFT folder, if this is a plain LoRA adapter: `CONFIG`'s fields."""
    path = folder / "adapter_config.json"
    raw = read_json(path, "an adapter folder needs PEFT's adapter_config.json")
    config = read_fields(path, raw, CONFIG)
    beyond = sorted(name for name in raw.keys() - CONFIG.keys() - WITHOUT_MEANING if raw[name])
    if beyond:
        raise UserError(f"{path}: {', '.join(beyond)} is set, and not supported; {MERGE}")
    return config


def adapter_file(folder: Path) -> Path:
    """The adapter's weights; others beside them are a `UserError`, as nobody would read them."""
    if not (folder / ADAPTER).is_file():
        message = "adapters are read from safetensors only, never from pickle"
        raise UserError(f"{folder / ADAPTER}: no such file; {message}")
    for file in sorted(folder.iterdir()):
        if file.suffix in WEIGHTS and file.name != ADAPTER and not NO_WEIGHTS.fullmatch(file.name):
            message = f"weights beside {ADAPTER}, which alone is read"
            remedy = "add its tensors there (torch.load with weights_only=True, save_file)"
            raise UserError(f"{file}: {message}; {remedy} and remove it, or just remove it")
    return folder / ADAPTER


def load_adapter(model: Llava, folder: Path) -> None:
    """Put the adapter of a PEFT folder, made here or elsewhere, into a model that is only read.

    Whatever it changes beside the decoder's linears is merged into the weights.
    """
    config = read_adapter_config(folder)
    add_adapters(model, config["r"], config["lora_alpha"])
    fill_adapter(model, folder, trained_only=False)


def fill_adapter(model: Llava, folder: Path, trained_only: bool = True) -> None:
    """Fill in the adapters of a PEFT folder; the model has some of its rank.

    A linear that the folder leaves out keeps its update, which is zero, and a projector that it
    leaves out is the base's. With `trained_only` a folder that changes what training leaves as it
    is, such as the vision tower, is a `UserError`.
    """
    config, file = read_adapter_config(folder), adapter_file(folder)
    changes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file):
        name, role = change_of(key)
        changes.setdefault(name, {})[role] = tensor
    if not changes:
        raise UserError(f"{file}: holds no tensors; give another adapter")

    places, trained = places_of(model), adapter_state(model)
    check_changes(folder, model, changes, config)
    outside = {
        name
        for name, parts in changes.items()
        if places[name][-1] not in trained and not is_linear_update(name, parts, trained)
    }
    if trained_only and outside:
        parts = " and ".join(sorted({FROZEN[name.split(".")[0]] for name in outside}))
        message = f"updates {parts}, which training leaves as it is ({some_of(outside)})"
        raise UserError(f"{folder}: {message}; {MERGE}")

    for name, parts in changes.items():
        if is_linear_update(name, parts, trained):
            for role, tensor in parts.items():
                parallel.fill_in(trained[f"{name.removesuffix('.weight')}.{role}"], tensor)
        else:
            parameter = model.get_parameter(places[name][-1])
            value = changed(parameter, parts, config["lora_alpha"] / config["r"])
            set_parameter(model, places[name][-1], value, parameter.device)


def is_linear_update(name: str, parts: dict[str, Tensor], trained: dict[str, Tensor]) -> bool:
    """Whether it is the update of one of the decoder's linears, which stays an update."""
    return "copy" not in parts and f"{name.removesuffix('.weight')}.lora_A" in trained


def check_changes(
    folder: Path, model: Llava, changes: dict[str, dict[str, Tensor]], config: dict
) -> None:
    """Refuse tensors that are missing, unexpected or of another shape: A and B come together, and
    of a module that is saved whole all tensors.
    """
    places, rank = places_of(model), config["r"]
    tied = {"lm_head.weight", "language_model.embed_tokens.weight"} & changes.keys()
    if tied and model.config.text.tie_word_embeddings:
        message = f"changes {min(tied)}, and the model has one tensor for embedding and LM head"
        raise UserError(f"{folder}: {message}; give an adapter that leaves both as they are")

    saved_whole = {name.rpartition(".")[2] for name in config["modules_to_save"]}
    if config["bias"] == "none" and any(
        name.startswith(PROJECTOR) and "copy" in parts for name, parts in changes.items()
    ):
        saved_whole.add(PROJECTOR)

    wanted, found = {}, {}
    for name in places:
        roles = set(changes.get(name, {}))
        roles |= {role[:-1] + PARTNERS[role[-1]] for role in roles - {"copy"}}
        if not saved_whole.isdisjoint(name.split(".")):
            roles.add("copy")
        shape = model.get_parameter(places[name][0]).shape
        for role in roles:
            wanted[label(name, role)] = shape_of(role, shape, rank)
    for name, parts in changes.items():
        found |= {label(name, role): tensor.shape for role, tensor in parts.items()}
    check_tensors(folder, wanted, found)


def label(name: str, role: str) -> str:
    """What a tensor of an adapter is called in errors."""
    return name if role == "copy" else f"{name.removesuffix('.weight')}.{role}"


def shape_of(role: str, shape: Size, rank: int) -> Size:
    """The shape of a tensor in this role to a parameter (out, in, ...)."""
    shapes = {
        "copy": shape,
        "lora_A": (rank, *shape[1:]),
        "lora_B": (shape[0], rank, *(1 for _ in shape[2:])),  # a convolution's are 1 x 1
        "lora_embedding_A": (rank, shape[0]),
        "lora_embedding_B": (*shape[1:], rank),
    }
    return Size(shapes[role])


def changed(parameter: Tensor, parts: dict[str, Tensor], scaling: float) -> Tensor:
    """The parameter's new value, float32: the copy in its place, or itself, and the update."""
    value = parts.get("copy", parallel.full(parameter.detach())).cpu().float()
    if "lora_A" in parts:
        update = parts["lora_B"].flatten(1).float() @ parts["lora_A"].flatten(1).float()
        value = value + scaling * update.view_as(value)
    if "lora_embedding_A" in parts:
        update = parts["lora_embedding_B"].float() @ parts["lora_embedding_A"].float()
        value = value + scaling * update.t()
    return value
