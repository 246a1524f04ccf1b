"""Benchmarks: the embedded world's, POPE, CHAIR on COCO, and answers for the judges of LLaVA-Bench
and MMHal-Bench.

    python -m minialign.evaluate                # the embedded world: hallucinations, POPE
    python -m minialign.evaluate --benchmark pope --data DIR_OR_FILE --images DIR --model DIR
    python -m minialign.evaluate --benchmark chair --data instances_val2014.json \\
        --captions captions_val2014.json --synonyms synonyms.txt --images DIR --model DIR
    python -m minialign.evaluate --benchmark llava-bench --data questions.jsonl \\
        --images DIR --model DIR
    python -m minialign.evaluate --benchmark mmhal --data response_template.json \\
        --images DIR --model DIR

CHAIR_i: share of mentioned objects that are not there; CHAIR_s: share of descriptions with at least
one; recall: share of the objects that are mentioned; POPE: yes/no questions about objects that are
there and objects that are not (random, popular, adversarial). Every figure has a bootstrap 95 %
interval over images. Decoding is greedy. A run on files leaves config.json, answers.jsonl and
result.json in --out, and what a judge's script reads; when it was killed, the same command goes on.
"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from minialign import edge
from minialign.claims import claim_folder, require_own_folder
from minialign.cli import require, require_at_least, require_device, require_seed, run_main
from minialign.data.images import PictureFolder
from minialign.data.templates import asked_form
from minialign.errors import UserError
from minialign.evaluation import judge_files
from minialign.evaluation.chair import read_chair
from minialign.evaluation.metrics import print_table, with_intervals
from minialign.evaluation.pope import read_pope
from minialign.evaluation.questions import (
    Benchmark,
    answers_of_earlier_run,
    ask,
    by_image,
    counts_per_image,
    digest,
)
from minialign.files import write_json
from minialign.model.hf_folder import fingerprint
from minialign.model.peft_folder import read_adapter_config
from minialign.sampling.assistant import Assistant
from minialign.toy.benchmark import ToyBenchmark

# The flags that a benchmark needs, and what stands for those that it takes and that are not given.
NEEDED = {
    "toy": (),
    "pope": ("data", "images"),
    "chair": ("data", "images", "captions", "synonyms"),
    "llava-bench": ("data", "images"),
    "mmhal": ("data", "images"),
}
ON_FILES = {"limit": None, "workers": 4, "max_new_tokens": 512, "skip_bad_records": False}
ON_FILES |= {"batch_size": 8}
OF_CHAIR = {"limit": 500, "seed": 0, "question": "Please describe this image in detail."}
DEFAULTS = {
    "toy": {"images": "500", "split": "test", "batch_size": 50},
    "pope": ON_FILES | {"out": "runs/eval-pope", "max_new_tokens": 16},
    "chair": ON_FILES | {"out": "runs/eval-chair"} | OF_CHAIR,
    "llava-bench": ON_FILES | {"out": "runs/eval-llava-bench"},
    "mmhal": ON_FILES | {"out": "runs/eval-mmhal"},
}


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.evaluate`."""

    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    adapter: str | None = None  # adapter folder that train_dpo.py wrote
    # form of conversation: vicuna_v1, llava_v1, mistral, chatml, short, a file; else the model's
    template: str | None = None
    benchmark: Literal["toy", "pope", "chair", "llava-bench", "mmhal"] = "toy"  # what to run
    # pope: its file, or a folder of its three; chair: instances_*.json; else the questions
    data: str | None = None
    images: str | None = None  # folder of the pictures; toy: how many images (500)
    captions: str | None = None  # chair: COCO's captions_*.json
    synonyms: str | None = None  # chair: lines of comma-separated names, the object's own first
    question: str | None = None  # chair: what is asked (Please describe this image in detail.)
    out: str | None = None  # folder to write, or to continue (runs/eval-BENCHMARK); toy writes none
    limit: int | None = None  # the first so many pictures only; chair: so many random ones (500)
    seed: int | None = None  # chair: which random pictures (0)
    # toy (test): choices are made on validation, test comes last
    split: Literal["test", "validation"] | None = None
    max_new_tokens: int | None = None  # limit of an answer (pope: 16, else 512)
    # pictures whose questions are answered together (toy: 50, else 8)
    batch_size: int | None = None
    workers: int | None = None  # threads that decode pictures ahead (4)
    # leave out and count bad records and pictures instead of stopping
    skip_bad_records: bool = False
    device: str = "cpu"  # torch device
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    json: bool = False  # print one JSON object instead of the table


def completed(config: Config) -> Config:
    """The config with its defaults; refuses flags that do not go together or make no sense."""
    kind = config.benchmark
    flags = asdict(config)
    for name in NEEDED[kind]:
        message = f"--{name} is missing; --benchmark {kind} needs --{' --'.join(NEEDED[kind])}"
        require(flags[name] is not None, message)
    for name, kinds in takers().items():
        given = flags[name] is not None and flags[name] is not False
        message = f"--{name.replace('_', '-')}: not for --benchmark {kind}"
        require(kind in kinds or not given, f"{message}, only for {', '.join(kinds)}; name one")
    absent = {name: value for name, value in DEFAULTS[kind].items() if flags[name] is None}
    config = replace(config, **absent)

    require_at_least(config, batch_size=1, limit=1, max_new_tokens=1, workers=0)
    require_seed(config.seed or 0)
    asked = config.question is None or config.question.strip()
    require(bool(asked), "--question is empty; give what is to be asked")
    require_device(config.device)
    if kind == "toy":
        count = config.images.isdecimal() and int(config.images) > 0
        require(count, f"--images {config.images}: how many images; at least 1")
    else:
        message = f"--images {config.images}: no such folder; name that of the pictures"
        require(Path(config.images).is_dir(), message)
        require_own_folder(config, "evaluate")
    return config


def takers() -> dict[str, list[str]]:
    """{flag: the benchmarks that take it}, of the flags that are not for all."""
    found: dict[str, list[str]] = {}
    for kind in NEEDED:
        for name in {*NEEDED[kind], *DEFAULTS[kind]}:
            found.setdefault(name, []).append(kind)
    return found


def load_assistant(config: Config) -> Assistant:
    """The model with what belongs to it."""
    folder, dtype = edge.model_folder(config.model), getattr(torch, config.dtype)
    assistant = Assistant.from_folder(folder, config.device, dtype, config.template, config.adapter)
    assistant.announce(folder)
    return assistant


def read(config: Config) -> Benchmark:
    """The benchmark's questions, and how they count."""
    if config.benchmark == "pope":
        benchmark = read_pope(config.data, config.skip_bad_records)
    elif config.benchmark == "chair":
        benchmark = read_chair(
            config.data,
            config.captions,
            config.synonyms,
            config.question,
            config.seed,
            config.skip_bad_records,
        )
    elif config.benchmark == "llava-bench":
        benchmark = judge_files.read_llava_bench(config.data, config.skip_bad_records)
    else:
        benchmark = judge_files.read_mmhal(config.data, config.images, config.skip_bad_records)
    if not benchmark.questions:
        raise UserError(f"--data {config.data}: no usable question; give the benchmark's own file")
    return benchmark


def evaluate_toy(config: Config) -> dict:
    """The embedded world's figures."""
    benchmark = ToyBenchmark(config.split, int(config.images), config.batch_size)
    return with_intervals([benchmark.run(load_assistant(config)).counts])


def evaluate_files(config: Config) -> dict:
    """The figures of a benchmark on files, how many of its questions were answered, and what was
    written.
    """
    out, folder = Path(config.out), edge.model_folder(config.model)
    if config.adapter is not None:
        read_adapter_config(Path(config.adapter))  # a wrong name ends here, before the data is read
    benchmark = read(config)
    settings = asdict(config)
    settings["template"] = asked_form(config.template)
    settings["weights"] = fingerprint(folder, config.adapter)
    settings["questions"] = digest(benchmark.questions)

    # What an earlier run has answered is not asked again, and nobody else asks meanwhile.
    claim_folder(out, "evaluate")
    found = answers_of_earlier_run(out, settings)
    groups = by_image(benchmark.questions, config.limit)
    questions = [question for group in groups.values() for question in group]
    todo = [question for question in questions if question.id not in found]
    if found:
        print(f"{out}: {len(found)} answers are there, {len(todo)} to go")
    if todo:
        found |= ask(
            load_assistant(config),
            PictureFolder(config.images),
            by_image(todo),
            out,
            settings,
            config.max_new_tokens,
            config.batch_size,
            config.workers,
            config.skip_bad_records,
        )

    counts = counts_per_image(benchmark, groups, found)
    if not counts:
        message = f"--images {config.images}: no picture could be read"
        raise UserError(f"{message}; is it the right folder?")
    result = {
        "questions": len(questions),
        "answered": sum(question.id in found for question in questions),
        **with_intervals([counts], benchmark.figures),
        "file": write_answers(config, benchmark, found),
    }
    write_json(out / "result.json", result)
    return result


def write_answers(config: Config, benchmark: Benchmark, found: dict[str, str]) -> str:
    """The file of answers that a judge's script reads, where the benchmark has one; its name."""
    out, name = Path(config.out), "answers.jsonl"
    if config.benchmark == "llava-bench":
        name, model_id = "llava-bench.jsonl", Path(config.model).name
        if config.adapter is not None:
            model_id += f"+{Path(config.adapter).name}"
        judge_files.write_llava_bench(out / name, benchmark.questions, found, model_id)
    elif config.benchmark == "mmhal":
        name = "mmhal.json"
        judge_files.write_mmhal(out / name, benchmark.questions, found)
    return name


def main(config: Config) -> None:
    """Evaluate one model."""
    config = completed(config)
    with redirect_stdout(sys.stderr):  # what is printed on the way is no result
        result = evaluate_toy(config) if config.benchmark == "toy" else evaluate_files(config)
    if config.json:
        print(json.dumps(result))
        return
    figures = {name: value for name, value in result.items() if isinstance(value, dict)}
    print_table({config.split or config.benchmark: figures})
    if config.benchmark != "toy":
        answered = f"{result['answered']} of {result['questions']} questions answered"
        print(f"{answered}; the answers: {Path(config.out) / result['file']}")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
