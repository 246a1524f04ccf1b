"""What both training scripts take: the flags that no algorithm owns, and which values have no
sense."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minialign.cli import (
    require,
    require_at_least,
    require_device,
    require_images,
    require_outside,
    require_seed,
    under_torchrun,
)
from minialign.lora import read_adapter_config
from minialign.records import FormatName

# What stands for a flag that is not given: the paper's value (App. A), or the toy model's, chosen
# on validation.
PAPER = {
    "beta": 0.1,
    "lr": 5e-7,
    "projector_lr": 2e-6,
    "lora_rank": 128,
    "epochs": 3,
    "batch_size": 16,
    "warmup": 0.1,
    "schedule": "cosine",
    "workers": 4,
}
TOY = PAPER | {"lr": 2e-4, "projector_lr": 3e-5, "lora_rank": 64, "epochs": 1, "workers": 0}
RL = ("rloo", "ppo")  # the methods of Eq. 2
# On a GPU, torch 2.11's analysis of tilings fails on lengths that are not constant, where it has no
# use either.
COMPILE_OPTIONS = {"triton.coalesce_tiling_analysis": False}


@dataclass(frozen=True)
class TrainingFlags:
    """Flags of both; a script's Config adds those of its algorithms."""

    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    format: FormatName | None = None  # of the data file; else that of its first record
    images: str = "toy"  # folder of the pictures, or `toy`
    template: str | None = None  # vicuna, llava_v1, mistral, chatml or short; else the model's own
    # PEFT adapter folder that the policy starts from; its rank and alpha are kept
    adapter: str | None = None
    # with --adapter: what the policy is held against
    reference: Literal["base", "adapter"] | None = None
    beta: float | None = None  # strength of the pull to the reference (0.1)
    lr: float | None = None  # peak learning rate of the adapters (5e-7; toy: 2e-4)
    projector_lr: float | None = None  # peak learning rate of the projector (2e-6; toy: 3e-5)
    lora_rank: int | None = None  # rank of the adapters (128; toy: 64)
    lora_alpha: float | None = None  # updates are scaled by alpha / rank (twice the rank)
    epochs: int | None = None  # passes over the records (3; toy: 1)
    steps: int | None = None  # so many steps, instead of --epochs
    batch_size: int | None = None  # records per step (16)
    accumulate: int = 1  # split each batch into so many forward passes
    warmup: float | None = None  # share of the steps in which the rate rises (0.1)
    # how it falls to zero, if at all (cosine)
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
    workers: int | None = None  # threads that read and decode pictures ahead (4; toy: 0)
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
    for name in ("beta", "lr", "lora_alpha"):
        value, free = getattr(config, name), name == "beta" and getattr(config, "method", "") in RL
        said = "0 or more" if free else "above 0"  # rewards alone, without a pull to the reference
        require(
            0 < value <= 1e30 or free and value == 0,
            f"--{name.replace('_', '-')} {value}: {said}, at most 1e30",
        )
    require(
        0 <= config.projector_lr <= 1e30,
        f"--projector-lr {config.projector_lr}: 0 or more, at most 1e30",
    )
    require(config.clip > 0, f"--clip {config.clip}: above 0")
    require(
        config.gamma is None or 0 <= config.gamma <= 1, f"--gamma {config.gamma}: between 0 and 1"
    )  # each has it
    compiler = os.environ.get("CXX") or "g++"
    said = f"--compile: needs a C++ compiler, and there is no {compiler}; install it, or leave --compile out"
    require(not config.compile or shutil.which(compiler) is not None, said)
    require(0 <= config.warmup < 1, f"--warmup {config.warmup}: a share of the steps, below 1")
    said = "--adapter and --reference go together: name the policy's start, and `base` or `adapter` as its reference"
    require((config.adapter is None) == (config.reference is None), said)
    require_seed(config.seed)
    require(not Path(config.out).is_file(), f"--out {config.out}: is a file; name a folder")
    require_images(config.images)
    require_device(config.device)
    require_torchrun(config.shard)


def check_rlhf(config) -> None:
    """The flags of rloo and ppo; `config` has train_online.py's, and may name another method."""
    used = config.method in RL
    said = f"with --method {config.method}: is for rloo and ppo; leave it out, or name one of these"
    for name, idle in (("reward", "oracle"), ("k", None), ("kl_stop", None)):
        require(used or getattr(config, name) == idle, f"--{name.replace('_', '-')} {said}")
    require_at_least(config, k=2 if config.method == "rloo" else 1, updates=1)
    for name in ("ratio_clip", "value_clip", "kl_stop"):
        value = getattr(config, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} {value}: above 0")
    require(0 <= config.gae_lambda <= 1, f"--gae-lambda {config.gae_lambda}: between 0 and 1")
    require(
        0 <= config.value_coef <= 1e6,
        f"--value-coef {config.value_coef}: 0 or more, at most a million",
    )
    said = f"with --method {config.method}: the gradient is that of temperature 1 and top-p 1; leave them out"
    require(not used or config.temperature == config.top_p == 1, f"--temperature or --top-p {said}")
    said = (
        "no such folder of a reward model, and no FILE.py:FUNCTION or `oracle`; give one of these"
    )
    known = (
        config.reward in ("oracle", "toy") or config.reward != "" and Path(config.reward).is_dir()
    )
    require(
        known or Path(config.reward.rpartition(":")[0]).is_file(),
        f"--reward {config.reward}: {said}",
    )
    for name in ("reward", "annotator"):
        if Path(getattr(config, name)).is_dir():
            require_outside(Path(config.out), f"--{name}", Path(getattr(config, name)))


def require_torchrun(shard: str) -> None:
    """Refuse shards where there is one process to hold them."""
    said = "--shard full: start with torchrun, as in `torchrun --nproc-per-node 8 train_dpo.py ...`, or leave it out"
    require(shard == "none" or under_torchrun(), said)


def adapter_shape(config: TrainingFlags) -> dict:
    """Rank and alpha of the adapter that training starts from, and that --out does not hold it; {}
    without one."""
    if config.adapter is None:
        return {}
    require_outside(Path(config.out), "--adapter", Path(config.adapter))
    raw = read_adapter_config(Path(config.adapter))
    return {"lora_rank": raw["r"], "lora_alpha": raw["lora_alpha"]}
