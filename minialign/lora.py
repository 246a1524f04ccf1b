"""LoRA adapters by hand; switched off, the model is the reference policy.

The numerics and the exported folder follow PEFT: W x + (alpha / rank) B A x, with B zero at the
start, and the projector trained as a full copy beside its original (PEFT calls that
`modules_to_save`)."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from minialign import parallel
from minialign.checkpoint import (
    NAMES,
    check_tensors,
    empty_model,
    load_weights,
    read_tensors,
    rename,
    set_parameter,
)
from minialign.errors import UserError
from minialign.files import read_json, write_folder_whole, write_json
from minialign.heads import HEAD, new_head, set_head
from minialign.llava import Llava

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTOR = "multi_modal_projector"


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update, and perhaps another that belongs to
    the reference."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scaling, self.enabled = base, alpha / rank, True
        A, B = new_update(rank, base.in_features, base.out_features)
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(B.to(base.weight.device))
        self.register_buffer(
            "reference_A", None, persistent=False
        )  # buffers go where the model goes
        self.register_buffer("reference_B", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """W x + (alpha / rank) B A x, (..., in) -> (..., out); switched off, with the reference's
        own update, or none."""
        out = self.base(x)
        A, B = (self.lora_A, self.lora_B) if self.enabled else (self.reference_A, self.reference_B)
        if A is None:
            return out

        # A and B are float32, and multiplied in the type of what comes in, as under autocast.
        low = F.linear(x, A.to(x.dtype)).flatten(0, -2)  # (tokens, rank)
        update = torch.addmm(out.flatten(0, -2), low, B.to(x.dtype).t(), alpha=self.scaling)
        return update.view_as(out)

    def keep_reference(self) -> None:
        """From now on the reference has the update as it is."""
        self.reference_A = parallel.full(self.lora_A.detach()).clone()
        self.reference_B = parallel.full(self.lora_B.detach()).clone()


def new_update(rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) as nn.Linear draws its weights, and B (out, rank) of zeros, float32, on the
    CPU."""
    A = torch.empty(rank, in_features)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, torch.zeros(out_features, rank)


class TrainableCopy(nn.Module):
    """A module trained in full, with its original kept for the reference."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.copy, self.enabled = base.float(), copy.deepcopy(base).float(), True

    def forward(self, x: Tensor) -> Tensor:
        return self.copy(x) if self.enabled else self.base(x)

    def keep_reference(self) -> None:
        """From now on the reference has the copy as it is."""
        self.base.load_state_dict(self.copy.state_dict())


def add_adapters(model: Llava, rank: int, alpha: float) -> None:
    """Freeze the model; give every decoder linear a LoRA update and the projector a trainable
    copy."""
    model.requires_grad_(False)
    for layer in model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if name in TARGETS:
                    setattr(block, name, LoraLinear(child, rank, alpha))
    model.multi_modal_projector = TrainableCopy(model.multi_modal_projector)
    model.multi_modal_projector.copy.requires_grad_(True)


def adapter_modules(model: Llava) -> list[LoraLinear | TrainableCopy]:
    """All that `add_adapters` has put into the model."""
    return [module for module in model.modules() if isinstance(module, LoraLinear | TrainableCopy)]


@contextmanager
def adapters_off(model: Llava) -> Iterator[None]:
    """Inside, the model is the reference: the base, or what `keep_reference` has kept; no
    gradients."""
    adapters = adapter_modules(model)
    for module in adapters:
        module.enabled = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in adapters:
            module.enabled = True


def trainable_groups(model: Llava, lr: float, projector_lr: float) -> list[dict]:
    """Optimizer groups: the adapters, and a head if there is one, at `lr`, the projector at its own
    rate (App. A)."""
    projector = list(model.multi_modal_projector.copy.parameters())
    lora = [p for m in model.modules() if isinstance(m, LoraLinear) for p in (m.lora_A, m.lora_B)]
    lora += [] if model.scalar_head is None else [model.scalar_head.weight]
    return [{"params": lora, "lr": lr}, {"params": projector, "lr": projector_lr}]


def adapter_state(model: Llava) -> dict[str, Tensor]:
    """The trained tensors by our names."""
    marks = "lora_", f"{PROJECTOR}.copy.", HEAD
    return {name: p for name, p in model.named_parameters() if any(mark in name for mark in marks)}


def reference_state(model: Llava) -> dict[str, Tensor]:
    """The tensors that the reference is made of: all that are not trained, and its own updates,
    scaled."""
    trained = adapter_state(model).keys()
    state = {name: tensor for name, tensor in model.named_parameters() if name not in trained}
    for name, module in model.named_modules():
        if (
            isinstance(module, LoraLinear)
            and module.reference_B is not None
            and module.reference_B.any()
        ):
            state[f"{name}.reference_A"] = (
                module.reference_A
            )  # where B is zero A is drawn, and does nothing
            state[f"{name}.reference_B"] = module.reference_B * module.scaling
    return state


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


def empty_policy(folder: Path, config, head: Literal["value", "reward"] | None = None) -> Llava:
    """The model of a training run on the meta device, with adapters on top and perhaps a head.

    `config` has a training script's flags. Switched off, the adapters leave the reference.
    """
    model = empty_model(folder, getattr(torch, config.dtype))
    add_adapters(model, config.lora_rank, config.lora_alpha)
    if head:
        set_head(model, new_head(model, head).to("meta"))
    return model


def load_policy_weights(
    model: Llava, folder: Path, config, head: Literal["value", "reward"] | None = None
) -> None:
    """Fill in what `empty_policy` has made: the base, then adapters, new ones or
    `config.adapter`'s.

    Loaded adapters are the policy's start, and with `--reference adapter` the reference too. What
    new ones, or those that a folder leaves out, begin with follows from the seed, whatever the
    device and the number of processes.
    """
    load_weights(model, folder, config.device)
    torch.manual_seed(config.seed)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            A, B = new_update(*module.lora_A.shape, len(module.lora_B))
            set_parameter(model, f"{name}.lora_A", A, config.device)
            set_parameter(model, f"{name}.lora_B", B, config.device)
    if config.adapter is not None:
        fill_adapter(model, Path(config.adapter))
    if config.reference == "adapter":
        keep_reference(model)
    if head:
        set_parameter(model, HEAD, new_head(model, head), config.device)


def keep_reference(model: Llava) -> None:
    """The policy as it is now becomes the reference: what `adapters_off` gives from here on."""
    for module in adapter_modules(model):
        module.keep_reference()
