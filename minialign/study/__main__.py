"""The comparison on the embedded world: every row trained from several seeds, one table, and what
it says of the paper's findings.

    python -m minialign.study --out runs/study            # all rows, three seeds, on the test split
    python -m minialign.study --rows bdhs,sft --seeds 1 --split validation

A row is a list of commands, run in order; what of them --out already holds is not run again. So
rows that begin with the same command share its pairs; where several studies run side by side in one
--out, such rows belong to the same one, and a last one, of all rows, makes the table. All rows draw
on the same pictures, once, in batches of the same size (ppo with four updates in each); on more or
fewer, twice, or with other questions or answers, where the row's name says so. A row whose figures
vary much more from seed to seed than from one sample of images to another gets two seeds more.

Intervals are bootstrapped over images and seeds; differences between rows are paired by image.
Leaves study.html and study.json: {"made": how, "rows": [...], "findings": [...], "rewards": [...]};
a row has its figures, and each of them seed by seed; the findings are as `findings.judge` has them;
the rewards are Table 7, of the reward models that pay a row.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from minialign.claims import claim_folder, require_own_folder
from minialign.cli import require, require_at_least, run_main
from minialign.edge import CHECKPOINT
from minialign.errors import UserError
from minialign.evaluation.metrics import Counts, bootstrap, interval
from minialign.files import read_json, read_lines, require_same_settings, write_json
from minialign.model.hf_folder import fingerprint
from minialign.study.findings import judge
from minialign.study.page import tables, text_table, write_study
from minialign.study.rows import (
    EXPORT_HELD,
    HELD,
    HELD_OUT,
    LAST,
    REWARD_MODELS,
    ROWS,
    SIZES,
    reward_folder,
)
from minialign.study.seeds import SEEDS_MORE, by_seed, seeds_dominate
from minialign.toy.world import TOY_RECORDS
from minialign.training.progress import PROGRESS

SCRIPTS = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.study`."""

    out: str = "runs/study"  # folder to write, or to continue
    rows: str = ",".join(ROWS)  # comma-separated rows to run
    seeds: int = 3  # training seeds of every row: 0, 1, ...; two more where they differ much
    # choices are made on validation; test is looked at last
    split: Literal["test", "validation"] = "test"
    images: int = 500  # images of the split
    limit: int = TOY_RECORDS  # records that a row is trained on, unless its name says otherwise


def run(program: str, flags: list[str]) -> None:
    """A top-level script or a module, as a user would run it."""
    start = [str(SCRIPTS / program)] if program.endswith(".py") else ["-m", program]
    done = subprocess.run([sys.executable, *start, *flags], check=False)
    if done.returncode:
        message = f"{program} {' '.join(flags)} ended with exit code {done.returncode}"
        raise UserError(f"{message}; run again to continue")


def run_commands(commands: list[str], row: str, seed: int, config: Config) -> Path:
    """Run those of the commands that are not done; returns what the last one writes, which its
    first flag names.
    """
    places = {"study": config.out, "row": row, "seed": seed}
    places |= {"split": config.split, "images": config.images}
    # Once over the records; rows that lost pairs see some of theirs again.
    places |= {"limit": config.limit, "steps": math.ceil(config.limit / 16)}
    for size, share in SIZES.items():
        limit = math.ceil(config.limit * share)
        places |= {size: limit, f"{size}_steps": math.ceil(limit / 16)}
    for command in commands:
        program, *flags = (word.format(**places) for word in command.split())
        out = flags[1]
        last = Path(out + LAST[f"{program} {flags[0]}"])
        if not last.exists():
            begun = Path(out, PROGRESS).exists()
            run(program, flags + ["--resume"] * begun)
            # A training that is told to end does so with 0.
            require(last.exists(), f"{out}: ended before it was done; run again to continue")
    return Path(out)


def run_row(row: str, seed: int, config: Config) -> dict[str, list[Counts]]:
    """Run a row's commands; the evaluation's counts per image, before and after, of the last one,
    which trains.
    """
    out = run_commands(ROWS[row], row, seed, config)
    return read_json(out / "counts.json", f"remove {out} and run again")


def table_7(kinds: list[str], config: Config) -> list[dict]:
    """Accuracy of reward models of these kinds of pairs on held-out pairs: what they learned from,
    what they are asked about, by seed.
    """
    run_commands([EXPORT_HELD, *HELD_OUT.values()], "held-out", 0, config)
    held = ",".join(f"{HELD}/{kind}.jsonl" for kind in HELD_OUT)
    rows = []
    for learned_from in kinds:
        model = reward_folder(learned_from)
        ask = f"minialign.annotate --out {model}-accuracy.json --pairs {held}"
        commands = [*REWARD_MODELS[learned_from], f"{ask} --annotator {model}/merged"]
        found = []
        for seed in range(config.seeds):
            path = run_commands(commands, learned_from, seed, config)
            found.append(read_json(path, "remove it and run again"))
        for kind in HELD_OUT:
            pairs = f"{HELD}/{kind}.jsonl".format(study=config.out)
            accuracy = [figures[pairs]["accuracy"]["value"] for figures in found]
            rows.append({"learned_from": learned_from, "asked_about": kind, "accuracy": accuracy})
    return rows


def learned(row: str, seeds: int, config: Config) -> dict[str, int]:
    """The steps, and the pairs or responses that were learned from, all seeds together; some may
    have been dropped.
    """
    if row == "base":
        return {"steps": 0, "pairs": 0}
    steps = []
    for seed in range(seeds):
        out = Path(config.out) / f"{row}-{seed}"
        steps += read_lines(out / "metrics.jsonl", f"remove {out} and run again")
    pairs = sum(step.get("pairs", step.get("responses")) for step in steps)
    return {"steps": len(steps), "pairs": pairs}


def require_same_study(config: Config) -> None:
    """Refuse an --out made with another split, other images, limit or weights, or with other
    commands for one of these rows.
    """
    path, remedy = Path(config.out) / "settings.json", "name another --out"
    settings = {"split": config.split, "images": config.images, "limit": config.limit}
    settings["weights"] = fingerprint(CHECKPOINT)
    rows = {f"row {row}": ROWS[row] for row in config.rows.split(",")}
    noted = {}
    if path.exists():
        noted = read_json(path, remedy)
        known = {row: commands for row, commands in rows.items() if row in noted}
        require_same_settings(path, settings | known, (), remedy)
    # Of studies side by side that go on none writes: two would be in each other's way.
    if noted != noted | settings | rows:
        write_json(path, noted | settings | rows)


def main(config: Config) -> None:
    """Run what is missing, then print and write the table and the findings."""
    rows = config.rows.split(",")
    for row in rows:
        require(row in ROWS, f"--rows {row}: no such row; there are {', '.join(ROWS)}")
    twice = f"--rows {config.rows}: a row stands twice; name each once"
    require(len(set(rows)) == len(rows), twice)
    require_at_least(config, seeds=1, images=1, limit=1)
    comma = "a comma in a folder's name parts the files of Table 7; name another"
    require("," not in config.out, f"--out {config.out}: {comma}")
    require_own_folder(config, "study")
    claim_folder(Path(config.out), "study", alone=False)
    require_same_study(config)

    # Every row from every seed: {row: the counts per image of each seed}. The base, with which most
    # of them begin, has none.
    begins = next((row for row in rows if "--adapter" not in ROWS[row][-1]), None)
    other = "begins with another row's adapter; name a row as well that begins with the base"
    require(begins, f"--rows {config.rows}: {other}")
    runs: dict[str, list[list[Counts]]] = {"base": [run_row(begins, 0, config)["before"]]}
    for row in tqdm(rows, desc="rows"):
        runs[row] = [run_row(row, seed, config)["after"] for seed in range(config.seeds)]
        if seeds_dominate(runs[row]):
            more = range(config.seeds, config.seeds + SEEDS_MORE)
            runs[row] += [run_row(row, seed, config)["after"] for seed in more]
    trainings = " ".join(ROWS[row][-1] for row in rows)
    kinds = [kind for kind in REWARD_MODELS if reward_folder(kind) in trainings]
    rewards = table_7(kinds, config) if kinds else []

    # Figures with their intervals, and what they say of the paper's findings.
    metrics = {row: bootstrap(each) for row, each in runs.items()}
    rows_json = []
    for row, figures in metrics.items():
        seeds = len(runs[row])
        facts = {"row": row, "seeds": seeds, "images": config.images}
        facts |= learned(row, seeds, config)
        facts["metrics"] = {name: interval(values) for name, values in figures.items()}
        rows_json.append(facts | {"by_seed": by_seed(runs[row])})

    made = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "split": config.split,
        "images": config.images,
        "limit": config.limit,
        "seeds": config.seeds,
    }
    out = Path(config.out)
    study = {"made": made, "rows": rows_json, "findings": judge(metrics), "rewards": rewards}
    for table in tables(study).values():
        print(text_table(table))
    write_json(out / "study.json", study)
    write_study(out / "study.html", study)
    print(json.dumps({"wrote": [str(out / "study.json"), str(out / "study.html")]}))


if __name__ == "__main__":
    run_main(main, Config, __doc__)
