"""What a training run leaves when it is done: weights, figures and a page to look at."""

from dataclasses import asdict
from pathlib import Path

from minialign import lora
from minialign.checkpoint import save_changed
from minialign.files import write_json
from minialign.flags import TrainingFlags
from minialign.heads import HEAD
from minialign.llava import Llava
from minialign.metrics import Counts, print_table, with_intervals
from minialign.parallel import on_rank0, whole
from minialign.report import ReportPair, write_report
from minialign.resume import Run
from minialign.reward_model import save_head
from minialign.rewards import Whitening


def save_weights(
    model: Llava, folder: Path, config: TrainingFlags, out: Path, whitening: Whitening | None = None
) -> None:
    """`out`/adapter in PEFT's form, and `out`/merged: the base's folder with the trained tensors in
    their places.

    With `whitening`, a reward model's, its head goes beside these; the head of PPO's values is
    nobody's afterwards."""
    trained = whole(lora.adapter_state(model))
    head = trained.pop(HEAD, None)
    named = {} if config.template is None else {"minialign_template": config.template}

    def write() -> None:
        """By one process, while the others wait."""
        lora.save_adapter(
            trained, config.lora_rank, config.lora_alpha, str(folder), out / "adapter"
        )
        change = lora.merged(trained, config.lora_alpha / config.lora_rank)
        add = (lambda merged: save_head(head, whitening, merged)) if whitening else None
        save_changed(folder, change, model.config.raw | named, out / "merged", add)

    on_rank0(write)


def told(run: Run, facts: dict) -> str:
    """The last word on an online run: how far it came, what was learned from, and where the rewards
    went."""
    remedy = "--resume with another --kl-stop goes on"
    said = f"ended early, {run.stopped}; {remedy}\n" if run.stopped else ""
    [(unit, count)] = [(unit, facts[unit]) for unit in ("pairs", "responses") if unit in facts]
    said += f"{len(run.rows)} steps, {count} {unit}"
    if not count:
        return f"{said} (nothing was learned: metrics.jsonl says why answers were dropped)"
    first, last = run.rows[0], run.rows[-1]
    names = {"score": "objective/scores", "KL": "objective/kl"} if unit == "responses" else {}
    return ", ".join(
        [said, *(f"{name} {first[key]:.2f} -> {last[key]:.2f}" for name, key in names.items())]
    )


def save_results(
    out: Path,
    title: str,
    config,
    pairs: list[ReportPair],
    rows: list[dict],
    counts: dict[str, list[Counts]],
    facts: dict[str, float],
) -> None:
    """counts.json, result.json and report.html: `counts` per image before and after, and other
    `facts`."""
    result = {when: with_intervals([each]) for when, each in counts.items()}
    if result:
        write_json(out / "counts.json", counts)
        print_table(result)
    write_json(out / "result.json", result | facts)
    # What the run was, at a glance: first what is not as it is when nothing is said, the script's
    # own before the rest.
    own, usual = type(config).__annotations__, asdict(type(config)())
    order = sorted(
        asdict(config).items(), key=lambda item: (usual[item[0]] == item[1], item[0] not in own)
    )
    settings = {"model": config.model} | dict(order)
    write_report(out / "report.html", title, settings, pairs, rows, result)
