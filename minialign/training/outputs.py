"""What a training run leaves when it is done: weights, figures and a page to look at."""

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from minialign.data.record_files import Records
from minialign.data.records import Record
from minialign.data.templates import KEY, asked_form
from minialign.evaluation.metrics import print_table, with_intervals
from minialign.evaluation.report import (
    Answer,
    Evaluation,
    ReportPair,
    Span,
    StepAnswers,
    write_report,
)
from minialign.files import write_json
from minialign.model.hf_folder import save_changed
from minialign.model.llava import Llava
from minialign.model.lora import adapter_state
from minialign.model.masks import mask_of_seed
from minialign.model.peft_folder import merged, save_adapter
from minialign.model.scalar_head import HEAD
from minialign.sampling.assistant import Assistant
from minialign.sampling.bdhs import cut_sentence, split_sentences
from minialign.sampling.noise import noise_of_seed
from minialign.training.flags import TrainingFlags
from minialign.training.parallel import on_rank0, whole

SHOWN = 8  # pairs in the report
Truth = Callable[[str, str], list[Span]]  # a picture's name, a text -> what is not true of it


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
    evaluations: dict[str, Evaluation],
    rows: list[dict],
    facts: dict[str, object],
    pairs: list[ReportPair],
    sampled: list[StepAnswers],
) -> None:
    """counts.json, result.json and report.html: what the benchmark found before and after, and
    other `facts`."""
    counts = {when: each.counts for when, each in evaluations.items()}
    answers = {when: each.answers for when, each in evaluations.items()}
    result = {when: with_intervals([each]) for when, each in counts.items()}
    if result:
        write_json(out / "counts.json", counts)
        print_answers(answers)
        print_table(result)
    write_json(out / "result.json", result | facts)
    settings = settings_at_a_glance(config)
    path = out / "report.html"
    write_report(path, title, settings, pairs, rows, result, answers, sampled)


def print_answers(answers: dict[str, list[Answer]]) -> None:
    """One question, the first that was not answered truly at first, and its answer each time."""
    first = next(iter(answers.values()))
    number = next((i for i, answer in enumerate(first) if answer.false), 0)
    print(first[number].prompt)
    for when, given in answers.items():
        text = given[number].text
        false = ", ".join(text[start:end] for start, end in given[number].false)
        print(f"  {when}: {text} (false: {false or 'nothing'})")


def say_what_is_left(out: str, picture: str) -> None:
    """The end of a run: what lies where, and what to do with it."""
    print(f"{out}/adapter is PEFT's, {out}/merged a Hugging Face folder")
    print(f"pairs, answers and curves: {out}/report.html")
    print(f"ask it: python -m minialign.chat --model {out}/merged --image {picture}")


def settings_at_a_glance(config: TrainingFlags) -> dict:
    """What the run was: the model, then what is not as it is when nothing is said, the program's
    own flags before the rest."""
    own, usual = type(config).__annotations__, asdict(type(config)())
    settings = asdict(config)
    order = sorted(settings, key=lambda name: (settings[name] == usual[name], name not in own))
    return {"model": config.model} | {name: settings[name] for name in order}


def example(record: Record, answers: list[tuple[str, str]]) -> dict:
    """What a row of metrics.jsonl keeps of the policy's answers to a record: each with what came of
    it."""
    return {"image": record.image, "prompt": record.turns[-1][1], "answers": answers}


def sampled_answers(
    rows: list[dict], pictures: Callable[[str], Image.Image], truth: Truth | None
) -> list[StepAnswers]:
    """The policy's answers that the log has kept, as the report shows them."""
    shown = []
    for row in rows:
        kept = row.get("example")
        if kept is None:
            continue
        picture, answers = pictures(kept["image"]), []
        for note, words in kept["answers"]:
            false = truth(kept["image"], words) if truth else []
            answers.append((note, Answer(picture, kept["prompt"], words, false)))
        shown.append(StepAnswers(f"step {row['step']}, {kept['image']}", answers))
    return shown


def report_pairs(
    records: Records,
    assistant: Assistant,
    pictures: Callable[[str], Image.Image],
    truth: Truth | None,
) -> list[ReportPair]:
    """What the report shows of the first pairs: the whole picture as the tower saw it, its visible
    patches, the texts, and where BDHS cut them. truth: see `edge.truth_of`."""
    processor, encode = assistant.processor, assistant.tokenizer.answer
    shown = []
    for record in (records.parse(number) for number in records.numbers[:SHOWN]):
        picture, visible, tokens = pictures(record.image), None, "–"
        seed, rho_th = record.bdhs.get("mask_seed"), record.bdhs.get("rho_th")
        if rho_th and seed is not None:
            mask = mask_of_seed(len(processor.layout(picture)[1]), rho_th, seed)
            visible = mask[: processor.patches].tolist()  # AnyRes: the whole picture comes first
            tokens = f"{sum(visible)} of {len(visible)}"
            if len(mask) > len(visible):
                tokens += f" in the whole picture, {int(mask.sum())} of {len(mask)} with its tiles"
        if record.bdhs.get("noise_steps") and seed is not None:
            picture = noise_of_seed(picture, record.bdhs["noise_steps"], seed)

        cuts = false = ([], [])
        if record.bdhs.get("guided") and seed is not None:
            cuts = places_of_cuts(record.chosen, record.rejected, seed, encode)
        if truth is not None:
            false = truth(record.image, record.chosen), truth(record.image, record.rejected)
        crop = processor.crop(picture)
        shown.append(ReportPair(record, crop, visible, tokens, cuts, false))
    return shown


def places_of_cuts(
    chosen: str, rejected: str, seed: int, encode: Callable[[str], list[int]]
) -> tuple[list[int], list[int]]:
    """Where sample_bdhs.py cut each sentence of y+, and where that place is in y-: drawn again from
    the pair's seed. No places where y- does not go on from there, as after another tokenizer."""
    rng, ids = random.Random(seed), encode(chosen)
    sentences, completed = split_sentences(chosen), split_sentences(rejected)
    if len(sentences) != len(completed):
        return [], []
    in_chosen, in_rejected = [], []
    for span, (start, _) in zip(sentences, completed, strict=True):
        kept = cut_sentence(chosen, span, ids, encode, rng).kept
        if not rejected.startswith(kept, start):
            return [], []
        in_rejected.append(start + len(kept))
        if chosen.startswith(kept, span[0]):  # else Yes and No were swapped
            in_chosen.append(span[0] + len(kept))
    return in_chosen, in_rejected
