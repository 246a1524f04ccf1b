"""PEFT adapter folders in and out."""

import math
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from minialign.errors import UserError
from minialign.files import read_json, write_folder_whole, write_json
from minialign.model.hf_folder import NAMES, check_tensors, read_tensors, rename
from minialign.model.llava import Llava
from minialign.model.lora import PROJECTOR, TARGETS, adapter_state, add_adapters
from minialign.training import parallel


def merged(trained: dict[str, Tensor], scaling: float) -> Callable[[str, Tensor], Tensor]:
    """What makes the plain model that does the same of the base's stored tensors, by our names.

    Updates are folded in, the projector's copy takes its place, all else stays.
    """

    def change(name: str, stored: Tensor) -> Tensor:
        linear = name.removesuffix(".weight")
        if f"{linear}.lora_A" in trained:
            return (
                stored.float() + trained[f"{linear}.lora_B"] @ trained[f"{linear}.lora_A"] * scaling
            )
        return trained.get(name.replace(f"{PROJECTOR}.", f"{PROJECTOR}.copy."), stored)

    return change


def peft_name(name: str) -> str:
    """Our name of a trained tensor -> its key in PEFT's adapter_model.safetensors."""
    name = name.replace(f"{PROJECTOR}.copy.", f"{PROJECTOR}.")
    name = name.replace(".lora_A", ".lora_A.weight").replace(".lora_B", ".lora_B.weight")
    return f"base_model.model.model.{name}"


def save_adapter(
    trained: dict[str, Tensor], rank: int, alpha: float, base: str, folder: Path
) -> None:
    """Write a folder that `PeftModel.from_pretrained` reads, whole."""
    tensors = {
        peft_name(name): tensor.detach().cpu().contiguous() for name, tensor in trained.items()
    }

    def write(partial: Path) -> None:
        """Tensors and config into the folder that takes its place when it is whole."""
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(
            partial / "adapter_config.json",
            {
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
            },
        )

    write_folder_whole(folder, write)


def our_name(key: str) -> str:
    """A key of PEFT's adapter_model.safetensors, under any layout of the model's keys -> our
    name."""
    name = rename(key.removeprefix("base_model.model."), NAMES)
    name = name.replace(".lora_A.weight", ".lora_A").replace(".lora_B.weight", ".lora_B")
    return name.replace(f"{PROJECTOR}.", f"{PROJECTOR}.copy.")


def part_of(name: str) -> str:
    """The linear that a trained tensor belongs to, or the projector: a part comes whole or not at
    all."""
    return name.rpartition(".lora_")[0] or PROJECTOR


# What would change the meaning of the same tensors; of the initialisations these leave the base
# weights as they are.
FOREIGN = (
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
PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json of a PEFT folder, if this is a plain LoRA adapter."""
    raw = read_json(
        folder / "adapter_config.json", "an adapter folder needs PEFT's adapter_config.json"
    )
    if raw.get("peft_type") != "LORA" or not {"r", "lora_alpha"} <= raw.keys():
        raise UserError(
            f"{folder}: no LoRA adapter (peft_type {raw.get('peft_type')!r}); give one of train_dpo.py's"
        )
    rank, alpha = raw["r"], raw["lora_alpha"]
    if not (
        type(rank) is int
        and 1 <= rank <= 2**16
        and type(alpha) in (int, float)
        and 0 < alpha < math.inf
    ):
        raise UserError(
            f"{folder}: r {rank!r} or lora_alpha {alpha!r} is no number above 0; give another adapter"
        )
    foreign = [k for k in FOREIGN if raw.get(k)]
    if (
        raw.get("init_lora_weights") not in PLAIN_INITIALISATIONS
    ):  # pissa, olora, ...: the base was changed, too
        foreign.append("init_lora_weights")
    if foreign:
        raise UserError(
            f"{folder}: {', '.join(foreign)} is set, and not supported; give one of train_dpo.py's"
        )
    return raw


def load_adapter(model: Llava, folder: Path) -> None:
    """Add the adapters of a PEFT folder, made here or elsewhere."""
    raw = read_adapter_config(folder)
    add_adapters(model, raw["r"], raw["lora_alpha"])
    fill_adapter(model, folder)


def fill_adapter(model: Llava, folder: Path) -> None:
    """Fill in the adapters of a PEFT folder; the model has some of its rank.

    Linears that the folder leaves out keep their update, which is zero, and a projector that it
    leaves out is the base's.
    """
    raw = read_adapter_config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(
            f"{file}: no such file; adapters are read from safetensors only, never from pickle"
        )
    found = {our_name(key): tensor for key, tensor in read_tensors(file)}
    if not found:
        raise UserError(f"{file}: holds no tensors; give another adapter")
    parts = {part_of(name) for name in found}
    if PROJECTOR in (raw.get("modules_to_save") or []):
        parts.add(PROJECTOR)
    wanted = {name: p for name, p in adapter_state(model).items() if part_of(name) in parts}
    shapes = [{name: t.shape for name, t in tensors.items()} for tensors in (wanted, found)]
    check_tensors(folder, *shapes)
    for name, parameter in wanted.items():
        parallel.fill_in(parameter, found[name])
