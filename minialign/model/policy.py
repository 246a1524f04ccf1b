"""The policy of a training run: a LLaVA with adapters on top, from its folder."""

from pathlib import Path
from typing import Literal

import torch

from minialign.model.hf_folder import empty_model, load_weights, set_parameter
from minialign.model.llava import Llava
from minialign.model.lora import LoraLinear, add_adapters, keep_reference, new_update
from minialign.model.peft_folder import fill_adapter
from minialign.model.scalar_head import HEAD, new_head, set_head


def empty_policy(folder: Path, config, head: Literal["value", "reward"] | None = None) -> Llava:
    """The model of a training run on the meta device, with adapters on top and perhaps a head.

    `config` has a training script's flags. Switched off, the adapters leave the reference.
    """
    model = empty_model(folder, getattr(torch, config.dtype))
    with torch.device("meta"):
        add_adapters(model, config.lora_rank, config.lora_alpha)
        if head:
            set_head(model, new_head(model, head))
    return model


def load_policy_weights(
    model: Llava, folder: Path, config, head: Literal["value", "reward"] | None = None
) -> None:
    """Fill in what `empty_policy` has made: the base, then adapters, new or `config.adapter`'s.

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
