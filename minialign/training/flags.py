"""What all training programs take: the flags that no algorithm owns, and which values have no
sense."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minialign.cli import (
    require,
    require_at_least,
    require_device,
    require_seed,
    require_torchrun,
)
from minialign.data.records import FormatName
from minialign.model.peft_folder import read_adapter_config

# On a GPU, torch 2.11's analysis of tilings fails on lengths that are not constant, where it has no
# use either.
COMPILE_OPTIONS = {"triton.coalesce_tiling_analysis": False}


@dataclass(frozen=True)
class TrainingFlags:
    """Flags of every training; a program's Config adds those of its algorithm, and its DEFAULTS
    hold what stands for those that are not given."""

    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    format: FormatName | None = None  # of the data file; else that of its first record
    images: str = "toy"  # folder of the pictures, or `toy`
    # form of conversation: vicuna_v1, llava_v1, mistral, chatml, short, a file; else the model's
    template: str | None = None
    # PEFT adapter folder that the policy starts from; its rank and alpha are kept
    adapter: str | None = None
    # with --adapter: what the policy is held against
    reference: Literal["base", "adapter"] | None = None
    lr: float | None = None  # peak learning rate of the adapters
    projector_lr: float | None = None  # peak learning rate of the projector
    lora_rank: int | None = None  # rank of the adapters
    lora_alpha: float | None = None  # updates are scaled by alpha / rank (twice the rank)
    epochs: int | None = None  # passes over the records
    steps: int | None = None  # so many steps, instead of --epochs
    batch_size: int | None = None  # records per step
    accumulate: int = 1  # split each batch into so many forward passes
    warmup: float | None = None  # share of the steps in which the rate rises
    # how it falls to zero, if at all
    schedule: Literal["cosine", "linear", "constant"] | None = None
    clip: float = 1.0  # gradient norm limit
    max_response_tokens: int = 512  # longer stored responses are refused
    truncate: bool = False  # cut longer responses at their end instead
    limit: int | None = None  # a random subset of so many records, which follows from --seed
    save_every: int = 50  # steps between checkpoints
    seed: int = 0  # everything that is drawn follows from it, and the order of the data
    # choices are made on validation; test is looked at last
    eval_split: Literal["test", "validation"] = "test"
    eval_images: int = 500  # before and after, where --images is toy; 0 skips both
    resume: bool = False  # continue from --out/checkpoint
    device: str = "cpu"  # torch device
    # of the frozen weights; adapters and losses are float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    # under torchrun: a whole model per process, or FSDP2's shards of one
    shard: Literal["none", "full"] = "none"
    # keep no activations of the decoder's layers: the backward pass computes them again
    recompute: bool = False
    # compile the decoder's layers: the first step takes 30 s on a GPU, minutes on a CPU
    compile: bool = False
    workers: int | None = None  # threads that read and decode pictures ahead
    skip_bad_records: bool = False  # skip and count malformed records instead of stopping


def check_training(config: TrainingFlags) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    require_at_least(
        config,
        lora_rank=1,
        epochs=1,
        steps=1,
        batch_size=1,
        accumulate=1,
        save_every=1,
        limit=1,
        max_response_tokens=1,
        eval_images=0,
        workers=0,
    )
    require(0 < config.lr <= 1e30, f"--lr {config.lr}: above 0, at most 1e30")
    require(
        0 < config.lora_alpha <= 1e30, f"--lora-alpha {config.lora_alpha}: above 0, at most 1e30"
    )
    require(
        0 <= config.projector_lr <= 1e30,
        f"--projector-lr {config.projector_lr}: 0 or more, at most 1e30",
    )
    require(config.clip > 0, f"--clip {config.clip}: above 0")
    require(0 <= config.warmup < 1, f"--warmup {config.warmup}: a share of the steps, below 1")
    require_seed(config.seed)

    compiler = os.environ.get("CXX") or "g++"
    missing = f"needs a C++ compiler, and there is no {compiler}"
    require(
        not config.compile or shutil.which(compiler) is not None,
        f"--compile: {missing}; install it, or leave --compile out",
    )
    together = "name the policy's start, and `base` or `adapter` as its reference"
    require(
        (config.adapter is None) == (config.reference is None),
        f"--adapter and --reference go together: {together}",
    )
    require_device(config.device)
    require_torchrun(config.shard)


def check_beta(beta: float) -> None:
    """Refuse a pull to the reference that is none."""
    require(0 < beta <= 1e30, f"--beta {beta}: above 0, at most 1e30")


def with_shape_of_adapter(config: TrainingFlags) -> TrainingFlags:
    """The config with its alpha, twice the rank unless given; where training starts from an
    adapter, rank and alpha are that one's."""
    if config.adapter is None:
        alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        return replace(config, lora_alpha=alpha)
    raw = read_adapter_config(Path(config.adapter))
    return replace(config, lora_rank=raw["r"], lora_alpha=raw["lora_alpha"])
