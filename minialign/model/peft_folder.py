"""PEFT adapter folders in and out."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from minialign.errors import UserError
from minialign.files import folder_written_whole, read_json, write_json
from minialign.model.hf_folder import NAMES, check_tensors, read_tensors, rename
from minialign.model.llava import Llava
from minialign.model.lora import PROJECTOR, TARGETS, adapter_state, add_adapters
from minialign.training import parallel

# What would change the meaning of the same tensors.
NOT_SUPPORTED = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "use_bdlora",
)
# These initialisations leave the base weights as they are; pissa, olora, ... change them.
PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


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


def our_name(key: str) -> str:
    """A key of PEFT's adapter_model.safetensors, of any layout of the model's keys -> our name."""
    name = rename(key.removeprefix("base_model.model."), NAMES)
    name = name.replace(".lora_A.weight", ".lora_A").replace(".lora_B.weight", ".lora_B")
    return name.replace(f"{PROJECTOR}.", f"{PROJECTOR}.copy.")


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
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(new / "adapter_config.json", config)


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json of a PEFT folder, if this is a plain LoRA adapter."""
    path = folder / "adapter_config.json"
    raw = read_json(path, "an adapter folder needs PEFT's adapter_config.json")
    if raw.get("peft_type") != "LORA" or not {"r", "lora_alpha"} <= raw.keys():
        message = f"no LoRA adapter (peft_type {raw.get('peft_type')!r})"
        raise UserError(f"{folder}: {message}; give one of train_dpo.py's")

    rank, alpha = raw["r"], raw["lora_alpha"]
    right = type(rank) is int and 1 <= rank <= 2**16
    if not right or type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        message = f"r {rank!r} or lora_alpha {alpha!r} is no number above 0"
        raise UserError(f"{folder}: {message}; give another adapter")

    found = [name for name in NOT_SUPPORTED if raw.get(name)]
    if raw.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        found.append("init_lora_weights")
    if found:
        message = f"{', '.join(found)} is set, and not supported; give one of train_dpo.py's"
        raise UserError(f"{folder}: {message}")
    return raw


def load_adapter(model: Llava, folder: Path) -> None:
    """Add the adapters of a PEFT folder, made here or elsewhere."""
    raw = read_adapter_config(folder)
    add_adapters(model, raw["r"], raw["lora_alpha"])
    fill_adapter(model, folder)


def fill_adapter(model: Llava, folder: Path) -> None:
    """Fill in the adapters of a PEFT folder; the model has some of its rank.

    A linear that the folder leaves out keeps its update, which is zero, and a projector that it
    leaves out is the base's.
    """
    raw = read_adapter_config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        message = "adapters are read from safetensors only, never from pickle"
        raise UserError(f"{file}: no such file; {message}")
    found = {our_name(key): tensor for key, tensor in read_tensors(file)}
    if not found:
        raise UserError(f"{file}: holds no tensors; give another adapter")

    # A linear's A and B, or the projector's tensors, come together or not at all.
    parts = {part_of(name) for name in found}
    if PROJECTOR in (raw.get("modules_to_save") or []):
        parts.add(PROJECTOR)
    wanted = {name: p for name, p in adapter_state(model).items() if part_of(name) in parts}
    check_tensors(
        folder,
        wanted={name: parameter.shape for name, parameter in wanted.items()},
        found={name: tensor.shape for name, tensor in found.items()},
    )
    for name, parameter in wanted.items():
        parallel.fill_in(parameter, found[name])


def part_of(name: str) -> str:
    """The linear that a trained tensor belongs to, or the projector."""
    return name.rpartition(".lora_")[0] or PROJECTOR
