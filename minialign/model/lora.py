"""LoRA adapters by hand; switched off, the model is the reference policy.

The numerics and the exported folder follow PEFT: W x + (alpha / rank) B A x, with B zero at the
start, and the projector trained as a full copy beside its original (PEFT calls that
`modules_to_save`).
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minialign.model.llava import Llava
from minialign.model.scalar_head import HEAD
from minialign.training import parallel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTOR = "multi_modal_projector"


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update, and perhaps another that belongs to
    the reference.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.enabled = True
        A, B = new_update(rank, base.in_features, base.out_features)
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(B.to(base.weight.device))
        # Buffers, as these go where the model goes.
        self.register_buffer("reference_A", None, persistent=False)
        self.register_buffer("reference_B", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """W x + (alpha / rank) B A x, (..., in) -> (..., out).

        Switched off, with the reference's own update, or none.
        """
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
    """A (rank, in) as nn.Linear draws its weights, and B (out, rank) of zeros, float32."""
    A = torch.empty(rank, in_features)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, torch.zeros(out_features, rank)


class TrainableCopy(nn.Module):
    """A module trained in full, with its original kept for the reference."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.float()
        self.copy = copy.deepcopy(base).float()
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return self.copy(x) if self.enabled else self.base(x)

    def keep_reference(self) -> None:
        """From now on the reference has the copy as it is."""
        self.base.load_state_dict(self.copy.state_dict())


def add_adapters(model: Llava, rank: int, alpha: float) -> None:
    """Freeze the model; add an update to each decoder linear, a trainable copy to the projector."""
    model.requires_grad_(False)
    for layer in model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                setattr(block, name, LoraLinear(linear, rank, alpha))
    model.multi_modal_projector = TrainableCopy(model.multi_modal_projector)
    model.multi_modal_projector.copy.requires_grad_(True)


def adapter_modules(model: Llava) -> list[LoraLinear | TrainableCopy]:
    """All that `add_adapters` has put into the model."""
    return [module for module in model.modules() if isinstance(module, LoraLinear | TrainableCopy)]


@contextmanager
def adapters_off(model: Llava) -> Iterator[None]:
    """Inside, the model is the reference: the base, or what `keep_reference` has kept.

    There are no gradients inside.
    """
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
    """Optimizer groups: adapters and a head at `lr`, the projector at its own rate (App. A); at a
    rate of 0 it is frozen, and has no part in clipping.
    """
    projector = list(model.multi_modal_projector.copy.parameters())
    lora = [p for m in model.modules() if isinstance(m, LoraLinear) for p in (m.lora_A, m.lora_B)]
    if model.scalar_head is not None:
        lora.append(model.scalar_head.weight)
    if projector_lr == 0:
        model.multi_modal_projector.copy.requires_grad_(False)
        return [{"params": lora, "lr": lr}]
    return [{"params": lora, "lr": lr}, {"params": projector, "lr": projector_lr}]


def adapter_state(model: Llava) -> dict[str, Tensor]:
    """The trained tensors by our names."""
    marks = ("lora_", f"{PROJECTOR}.copy.", HEAD)
    return {name: p for name, p in model.named_parameters() if any(mark in name for mark in marks)}


def reference_state(model: Llava) -> dict[str, Tensor]:
    """The tensors that the reference is made of: what is not trained, and its own updates, scaled.

    An update whose B is zero does nothing and does not count, whatever A was drawn.
    """
    trained = adapter_state(model).keys()
    state = {name: tensor for name, tensor in model.named_parameters() if name not in trained}
    for name, module in model.named_modules():
        B = getattr(module, "reference_B", None)
        if B is not None and B.any():
            state[f"{name}.reference_A"] = module.reference_A
            state[f"{name}.reference_B"] = B * module.scaling
    return state


def keep_reference(model: Llava) -> None:
    """The policy as it is now becomes the reference: what `adapters_off` gives from here on."""
    for module in adapter_modules(model):
        module.keep_reference()
