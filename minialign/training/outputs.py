"""What a training run leaves when it is done: weights, figures and a page to look at."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from minialign.data.images import ImageProcessor
from minialign.data.record_files import Records
from minialign.data.templates import KEY, asked_form
from minialign.evaluation.metrics import Counts, print_table, with_intervals
from minialign.evaluation.report import ReportPair, write_report
from minialign.files import write_json
from minialign.model.hf_folder import save_changed
from minialign.model.llava import Llava
from minialign.model.lora import adapter_state
from minialign.model.masks import mask_of_seed
from minialign.model.peft_folder import merged, save_adapter
from minialign.model.scalar_head import HEAD
from minialign.sampling.noise import noise_of_seed
from minialign.training.flags import TrainingFlags
from minialign.training.parallel import on_rank0, whole


def save_weights(
    policy: Llava,
    folder: Path,
    config: TrainingFlags,
    out: Path,
    add: Callable[[Path], None] | None = None,
) -> None:
    """`out`/adapter in PEFT's form, and `out`/merged: the base's folder with the trained tensors in
    their places. `add(folder)` puts files of its own into `merged`."""
    trained = whole(adapter_state(policy))
    trained.pop(HEAD, None)
    raw = policy.config.raw
    if config.template is not None:  # so that `merged` is asked in it without the flag
        raw = raw | {KEY: asked_form(config.template)}

    def write() -> None:
        """By one process, while the others wait."""
        save_adapter(trained, config.lora_rank, config.lora_alpha, str(folder), out / "adapter")
        change = merged(trained, config.lora_alpha / config.lora_rank)
        save_changed(folder, change, raw, out / "merged", add)

    on_rank0(write)


def save_results(
    out: Path,
    title: str,
    config: TrainingFlags,
    pairs: list[ReportPair],
    rows: list[dict],
    counts: dict[str, list[Counts]],
    facts: dict[str, object],
) -> None:
    """counts.json, result.json and report.html: `counts` per image before and after, and other
    `facts`."""
    result = {when: with_intervals([each]) for when, each in counts.items()}
    if result:
        write_json(out / "counts.json", counts)
        print_table(result)
    write_json(out / "result.json", result | facts)
    write_report(out / "report.html", title, settings_at_a_glance(config), pairs, rows, result)


def settings_at_a_glance(config: TrainingFlags) -> dict:
    """What the run was: the model, then what is not as it is when nothing is said, the program's
    own flags before the rest."""
    own, usual = type(config).__annotations__, asdict(type(config)())
    settings = asdict(config)
    order = sorted(settings, key=lambda name: (settings[name] == usual[name], name not in own))
    return {"model": config.model} | {name: settings[name] for name in order}


def report_pairs(
    records: Records, processor: ImageProcessor, pictures: Callable[[str], Image.Image]
) -> list[ReportPair]:
    """What the report shows of the first pairs: the whole picture as the tower saw it, its visible
    patches, the texts."""
    shown = []
    for record in (records.parse(number) for number in records.numbers[:8]):
        picture, visible = pictures(record.image), None
        seed, rho_th = record.bdhs.get("mask_seed"), record.bdhs.get("rho_th")
        if rho_th and seed is not None:
            mask = mask_of_seed(len(processor.layout(picture)[1]), rho_th, seed)
            visible = mask[: processor.patches].tolist()  # AnyRes: the whole picture comes first
        if record.bdhs.get("noise_steps") and seed is not None:
            picture = noise_of_seed(picture, record.bdhs["noise_steps"], seed)
        shown.append(
            ReportPair(
                id=record.id,
                image=processor.crop(picture),
                visible=visible,
                prompt=record.turns[-1][1],
                chosen=record.chosen,
                rejected=record.rejected,
                iterations=record.bdhs.get("iterations"),
                similarity=record.bdhs.get("similarity"),
                guided=record.bdhs.get("guided"),
            )
        )
    return shown
