"""What the flags of the training scripts may be, and which of them have no sense together."""

import os
import shutil
from pathlib import Path

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


def check_training(config) -> None:
    """Refuse values that make no sense, before anything is loaded; `config` has a training script's flags."""
    require_at_least(config, lora_rank=1, epochs=1, steps=1, batch_size=1, accumulate=1, save_every=1, limit=1,
                     max_response_tokens=1, eval_images=0, workers=0)  # fmt: skip
    for name in ("beta", "lr", "lora_alpha"):
        value = getattr(config, name)
        require(0 < value <= 1e30, f"--{name.replace('_', '-')} {value}: above 0, at most 1e30")
    require(0 <= config.projector_lr <= 1e30, f"--projector-lr {config.projector_lr}: 0 or more, at most 1e30")
    require(config.gamma is None or 0 <= config.gamma <= 1, f"--gamma {config.gamma}: between 0 and 1")
    require(config.clip > 0, f"--clip {config.clip}: above 0")
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


def require_torchrun(shard: str) -> None:
    """Refuse shards where there is one process to hold them."""
    said = "--shard full: start with torchrun, as in `torchrun --nproc-per-node 8 train_dpo.py ...`, or leave it out"
    require(shard == "none" or under_torchrun(), said)


def adapter_shape(config) -> dict:
    """Rank and alpha of the adapter that training starts from, and that --out does not hold it; {} without one."""
    if config.adapter is None:
        return {}
    require_outside(Path(config.out), "--adapter", Path(config.adapter))
    raw = read_adapter_config(Path(config.adapter))
    return {"lora_rank": raw["r"], "lora_alpha": raw["lora_alpha"]}
