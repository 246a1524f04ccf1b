"""What a training run leaves when it is done: weights, figures and a page to look at."""

from dataclasses import asdict
from pathlib import Path

from minialign import lora
from minialign.checkpoint import save_changed
from minialign.distributed import once, whole
from minialign.files import write_json
from minialign.flags import TrainingFlags
from minialign.heads import HEAD
from minialign.llava import Llava
from minialign.metrics import Counts, print_table, with_intervals
from minialign.report import ReportPair, write_report
from minialign.reward_model import save_head
from minialign.rewards import Whitening


def save_weights(
    model: Llava, folder: Path, config: TrainingFlags, out: Path, whitening: Whitening | None = None
) -> None:
    """`out`/adapter in PEFT's form, and `out`/merged: the base's folder with the trained tensors in their places.

    With `whitening`, a reward model's, its head goes beside these; the head of PPO's values is nobody's afterwards.
    """
    trained = whole(lora.adapter_state(model))
    head = trained.pop(HEAD, None)
    named = {} if config.template is None else {"minialign_template": config.template}

    def write() -> None:
        """By one process, while the others wait."""
        lora.save_adapter(trained, config.lora_rank, config.lora_alpha, str(folder), out / "adapter")
        change = lora.merged(trained, config.lora_alpha / config.lora_rank)
        add = (lambda merged: save_head(head, whitening, merged)) if whitening else None
        save_changed(folder, change, model.config.raw | named, out / "merged", add)

    once(write)


def save_results(
    out: Path,
    title: str,
    config,
    pairs: list[ReportPair],
    rows: list[dict],
    counts: dict[str, list[Counts]],
    facts: dict[str, float],
) -> None:
    """counts.json, result.json and report.html: `counts` per image before and after, and other `facts`."""
    result = {when: with_intervals([each]) for when, each in counts.items()}
    if result:
        write_json(out / "counts.json", counts)
        print_table(result)
    write_json(out / "result.json", result | facts)
    own = type(config).__annotations__  # the script's own flags come first: what the run was, at a glance
    settings = dict(sorted(asdict(config).items(), key=lambda setting: setting[0] not in own))
    write_report(out / "report.html", title, settings, pairs, rows, result)
