"""What RLOO, PPO and the reward model do before their loops (data, policy, compile, shards), and
what RLOO and PPO leave behind theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint

from minialign.cli import require, require_at_least
from minialign.data.collate import PairCollator, StepLoader
from minialign.data.images import ImageProcessor
from minialign.data.record_files import Records, usable_pairs
from minialign.data.tokenizer import Tokenizer
from minialign.evaluation.report import Evaluation, StepAnswers
from minialign.model.hf_folder import fingerprint
from minialign.model.policy import empty_policy, load_policy_weights
from minialign.sampling.assistant import Assistant
from minialign.training import parallel
from minialign.training.flags import COMPILE_OPTIONS, TrainingFlags
from minialign.training.optimizer import batches_of_run
from minialign.training.outputs import save_results, say_what_is_left
from minialign.training.progress import TrainingLog, begin


@dataclass(frozen=True)
class Setup:
    """A policy, ready to be trained, and its data."""

    assistant: Assistant
    records: Records
    loader: StepLoader
    schedule: Sequence[list[int]]  # the record numbers of every step


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
    policy = empty_policy(folder, config, head)  # names and shapes, no memory yet
    tokenizer = Tokenizer.from_folder(folder, config.template)
    assistant = Assistant(policy, tokenizer, ImageProcessor.from_folder(folder))
    of_pairs = head == "reward"
    collate = PairCollator(
        tokenizer,
        assistant.processor,
        pictures,
        config.max_response_tokens,
        assistant.positions,
        truncate=config.truncate or not of_pairs,
        rejected=("rejected",) if of_pairs else (),
        device=config.device,
    )
    skip_bad = config.skip_bad_records
    records = usable_pairs(records, collate.check, config.limit, config.seed, skip_bad)
    loader = StepLoader(records, collate, config.accumulate, skip_bad)

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
    begin(config, records, fingerprint(folder, config.adapter, reward))
    schedule = batches_of_run(
        records.numbers, config.batch_size, config.seed, config.epochs, config.steps
    )
    return Setup(assistant, records, loader, schedule)


# ---------------------------------------------------------------- RLOO and PPO


def check_rlhf(config) -> None:
    """Refuse what both take and makes no sense, before anything is loaded."""
    # A beta of 0: rewards alone, without a pull to the reference.
    require(0 <= config.beta <= 1e30, f"--beta {config.beta}: 0 or more, at most 1e30")
    kl_stop = config.kl_stop
    require(kl_stop is None or kl_stop > 0, f"--kl-stop {kl_stop}: above 0")
    require_at_least(config, max_new_tokens=1)

    reward = config.reward
    is_folder = reward != "" and Path(reward).is_dir()
    is_file = Path(reward.rpartition(":")[0]).is_file()
    choices = "no such folder of a reward model, and no FILE.py:FUNCTION or `oracle`"
    known = reward == "oracle" or is_folder or is_file
    require(known, f"--reward {reward}: {choices}; give one of these")


def leave_results(
    name: str,
    config: TrainingFlags,
    log: TrainingLog,
    evaluations: dict[str, Evaluation],
    sampled: list[StepAnswers],
    picture: str,
) -> None:
    """result.json and report.html, and what is said in the end: how far the run came, how much was
    learned from, and where the scores went.
    """
    out, rows = Path(config.out), log.rows
    count = sum(row["responses"] for row in rows)
    facts, title = {"responses": count}, f"minialign: {name}"
    if log.stopped:
        facts["stopped"] = log.stopped
        title += f", ended early: {log.stopped}"
        print(f"ended early, {log.stopped}; --resume with another --kl-stop goes on")
    parallel.on_rank0(
        lambda: save_results(out, title, config, evaluations, rows, facts, [], sampled)
    )

    message = f"{len(rows)} steps, {count} responses"
    learned = [row for row in rows if row["responses"]]
    if learned:
        first, last = learned[0], learned[-1]
        message += f", score {first['objective/scores']:.2f} -> {last['objective/scores']:.2f}"
        message += f", KL {first['objective/kl']:.2f} -> {last['objective/kl']:.2f}"
    else:
        message += " (nothing was learned)"
    print(message)
    say_what_is_left(config.out, picture)
