"""What RLOO, PPO and the reward model do before their loops: data, policy, compile, shards."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint

from minialign.cli import require_outside
from minialign.data.collate import PairCollator, StepLoader
from minialign.data.images import ImageProcessor
from minialign.data.record_files import Records, usable_pairs
from minialign.data.tokenizer import Tokenizer
from minialign.model.hf_folder import fingerprint
from minialign.model.policy import empty_policy, load_policy_weights
from minialign.sampling.assistant import Assistant
from minialign.training import parallel
from minialign.training.flags import COMPILE_OPTIONS, TrainingFlags
from minialign.training.optimizer import batches_of_run
from minialign.training.progress import begin


@dataclass(frozen=True)
class Setup:
    """A policy, ready to be trained, and its data."""

    assistant: Assistant
    records: Records
    loader: StepLoader
    schedule: list[list[int]]  # the record numbers of every step


def prepare(
    config: TrainingFlags,
    folder: Path,
    records: Records,
    pictures: Callable[[str], Image.Image],
    head: Literal["value", "reward"] | None = None,
    reward: str = "",
) -> Setup:
    """Everything that comes before the loop, in the order of train_dpo.py.

    Prompts alone are read of the records, but for a reward model, which needs the rejected
    response. reward: what pays, whose weights a resumed run must find unchanged.
    """
    out = Path(config.out)
    require_outside(out, "the model", folder)
    policy = empty_policy(folder, config, head)  # names and shapes, no memory yet
    assistant = Assistant(
        policy, Tokenizer.from_folder(folder, config.template), ImageProcessor.from_folder(folder)
    )
    of_pairs = head == "reward"
    collate = PairCollator(
        assistant.tokenizer,
        assistant.processor,
        pictures,
        config.max_response_tokens,
        assistant.positions,
        truncate=config.truncate or not of_pairs,
        rejected=("rejected",) if of_pairs else (),
        keep_pictures=not of_pairs,
        device=config.device,
    )
    records = usable_pairs(
        records, collate.check, config.limit, config.seed, config.skip_bad_records
    )
    loader = StepLoader(records, collate, config.accumulate, config.skip_bad_records)

    # torch.compile, one decoder layer at a time: all share the code.
    if config.compile:
        for layer in policy.language_model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True, options=COMPILE_OPTIONS)

    # Of a layer its input alone is kept for the backward pass, which runs the layer again.
    if config.recompute:
        for layer in policy.language_model.layers:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )

    # FSDP2: a process keeps its rows of every tensor, and a layer is gathered for its turn.
    if config.shard == "full":
        from torch.distributed.fsdp import fully_shard  # here, as it takes a second

        mesh = parallel.mesh(config.device)
        for unit in (*policy.language_model.layers, policy.vision_tower, policy):
            fully_shard(unit, mesh=mesh)
        parallel.after_sharding(policy)

    load_policy_weights(policy, folder, config, head)  # each process reads its rows
    assistant.announce(folder)
    begin(out, config, records, fingerprint(folder, config.adapter, reward))
    schedule = batches_of_run(
        records.numbers, config.batch_size, config.seed, config.epochs, config.steps
    )
    return Setup(assistant, records, loader, schedule)
