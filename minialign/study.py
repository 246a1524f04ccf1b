"""The comparison on the embedded world: every row trained from several seeds, one table, one verdict per finding.

    python -m minialign.study --out runs/study            # all rows, three seeds, on the test split
    python -m minialign.study --rows bdhs,sft --seeds 1 --split validation

A row is a set of flags of sample_bdhs.py and train_dpo.py. Rows and seeds that --out already holds are not run
again. Intervals are bootstrapped over images and seeds; differences between rows are paired by image.
Leaves study.json: {"rows": [...], "findings": [{"id", "status", "evidence"}]}.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from minialign.checkpoint import TOY, fingerprint
from minialign.cli import parse_config, require, run_main
from minialign.errors import UserError
from minialign.files import read_json, write_json
from minialign.metrics import Counts, bootstrap, interval, print_table
from minialign.resume import require_same_settings

SCRIPTS = Path(__file__).resolve().parent.parent
# name -> (flags of sample_bdhs.py, flags of train_dpo.py)
ROWS = {
    "bdhs": ([], []),
    "sft": ([], ["--loss", "sft", "--lr", "1e-3"]),  # its own best rate on validation
    "unguided": (["--no-guided"], []),
    "noise": (["--noise-steps", "500", "--rho-th", "0"], []),
}
# id -> (metric, row, the row it is compared with, direction in which the row should move it)
FINDINGS = {
    "bdhs lowers adversarial POPE error": ("pope_adversarial", "bdhs", "base", +1),
    "bdhs misses fewer objects": ("recall", "bdhs", "base", +1),
    "bdhs lowers CHAIR_i": ("chair_i", "bdhs", "base", -1),
    "bdhs beats supervised control on adversarial POPE": ("pope_adversarial", "bdhs", "sft", +1),
    "bdhs beats supervised control on recall": ("recall", "bdhs", "sft", +1),
    "bdhs beats supervised control on CHAIR_i": ("chair_i", "bdhs", "sft", -1),
    "guided beats unguided on adversarial POPE": ("pope_adversarial", "bdhs", "unguided", +1),
    "guided beats unguided on recall": ("recall", "bdhs", "unguided", +1),
    "guided beats unguided on CHAIR_i": ("chair_i", "bdhs", "unguided", -1),
    "attention mask beats pixel noise on adversarial POPE": ("pope_adversarial", "bdhs", "noise", +1),
    "attention mask beats pixel noise on recall": ("recall", "bdhs", "noise", +1),
    "attention mask beats pixel noise on CHAIR_i": ("chair_i", "bdhs", "noise", -1),
}


@dataclass(frozen=True)
class Config:
    """Flags."""

    out: str = "runs/study"  # folder to write, or to continue
    rows: str = ",".join(ROWS)  # comma-separated rows to run
    seeds: int = 3  # training seeds of every row: 0, 1, ...
    split: Literal["test", "validation"] = "test"  # choices are made on validation; test is looked at last
    images: int = 500  # images of the split
    limit: int | None = None  # the first so many pairs only


def run(script: str, flags: list[str]) -> None:
    """One of the top-level scripts, as a user would run it."""
    done = subprocess.run([sys.executable, str(SCRIPTS / script), *flags], check=False)
    if done.returncode:
        raise UserError(f"{script} {' '.join(flags)} ended with exit code {done.returncode}; run again to continue")


def run_row(row: str, seed: int, config: Config) -> dict[str, list[Counts]]:
    """Sample, train and evaluate one row from one seed, unless it is there; the evaluation's counts per image."""
    sample_flags, train_flags = ROWS[row]
    out = Path(config.out) / f"{row}-{seed}"
    if not (out / "report.html").exists():
        limit = [] if config.limit is None else ["--limit", str(config.limit)]
        pairs = out / "pairs.jsonl"
        run("sample_bdhs.py", ["--out", str(pairs), "--seed", str(seed), *limit, *sample_flags])
        resume = ["--resume"] if (out / "checkpoint/progress.safetensors").exists() else []
        evaluation = ["--eval-split", config.split, "--eval-images", str(config.images)]
        flags = ["--pairs", str(pairs), "--out", str(out), "--seed", str(seed), *evaluation, *train_flags, *resume]
        run("train_dpo.py", flags)
    return read_json(out / "counts.json", f"remove {out} and run again")


def same_settings(config: Config) -> None:
    """Refuse an --out whose rows were made with another split, other images, another limit, other flags or weights."""
    path, settings = Path(config.out) / "settings.json", asdict(config)
    kept = {name: settings[name] for name in ("split", "images", "limit")} | {"rows": ROWS, "weights": fingerprint(TOY)}
    if path.exists():
        require_same_settings(path, kept, (), "name another --out")
    write_json(path, kept)


def judge(metrics: dict[str, dict[str, np.ndarray]]) -> list[dict]:
    """Every finding whose rows were run: reproduced, not reproduced, or undecided where the interval holds zero."""
    findings = []
    for name, (metric, row, other, direction) in FINDINGS.items():
        if row not in metrics or other not in metrics:
            continue
        difference = interval(metrics[row][metric] - metrics[other][metric])
        if difference["value"] is None:
            status, shown = "undecided", "not measured"
        else:
            low, high = sorted((direction * difference["low"], direction * difference["high"]))
            status = "reproduced" if low > 0 else "not reproduced" if high < 0 else "undecided"
            shown = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)
        evidence = f"{metric} {row} - {other}: {shown}"
        findings.append({"id": name, "status": status, "evidence": evidence})
    return findings


def main() -> None:
    """Run what is missing, then print and write the table and the findings."""
    config = parse_config(Config, __doc__)
    rows = config.rows.split(",")
    for row in rows:
        require(row in ROWS, f"--rows {row}: no such row; there are {', '.join(ROWS)}")
    require(len(set(rows)) == len(rows), f"--rows {config.rows}: a row stands twice; name each once")
    require(config.seeds >= 1, f"--seeds {config.seeds}: at least 1")
    require(config.images >= 1, f"--images {config.images}: at least 1")
    same_settings(config)
    runs: dict[str, list[list[Counts]]] = {}
    for row in tqdm(rows, desc="rows"):
        for seed in range(config.seeds):
            counts = run_row(row, seed, config)
            runs.setdefault(row, []).append(counts["after"])
            base = counts["before"]
    runs = {"base": [base] * config.seeds} | runs
    metrics = {row: bootstrap(each) for row, each in runs.items()}
    table = {row: {name: interval(v) for name, v in m.items()} for row, m in metrics.items()}
    print_table(table)
    findings = judge(metrics)
    for finding in findings:
        print(f"{finding['status']:15} {finding['id']}: {finding['evidence']}")
    rows_json = [{"row": row, "seeds": config.seeds, "images": config.images, "metrics": m} for row, m in table.items()]
    write_json(Path(config.out) / "study.json", {"rows": rows_json, "findings": findings})
    print(json.dumps({"wrote": str(Path(config.out) / "study.json")}))


if __name__ == "__main__":
    run_main(main)
