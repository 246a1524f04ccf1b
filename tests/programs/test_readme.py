"""What the README says: every entry of its map resolves, every command exists with those flags, the
quick ones run."""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import RAW, expected, photographs
from input_files import pairs_in

from minialign.data.images import PictureFolder

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENTRIES = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", README)))
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(re.sub(r"^torchrun --nproc-per-node \d+", "python", part.strip()), comments=True)
    for block in BLOCKS
    for line in block.splitlines()
    for part in line.split("&&")
    if part.strip().startswith(("python ", "torchrun "))
]


def class_of(file: str, name: str) -> ast.ClassDef:
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)


def config_fields(path: str) -> set[str]:
    """The field names of a program's `Config`, and of the flags that all trainings share."""
    classes = [class_of(path, "Config")]
    if classes[0].bases:
        classes.append(class_of("minialign/training/flags.py", "TrainingFlags"))
    items = [item for each in classes for item in each.body if isinstance(item, ast.AnnAssign)]
    return {item.target.id for item in items}


def test_the_map_is_there():
    assert len(ENTRIES) >= 8 and len(COMMANDS) >= 6


@pytest.mark.parametrize(("file", "name"), ENTRIES)
def test_map_entry_resolves(file, name):
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert name in {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_exists_with_its_flags(command):
    path = command[1]
    if command[1] == "-m":
        path = command[2].replace(".", "/")
        path += "/__main__.py" if (ROOT / path).is_dir() else ".py"
    fields = config_fields(path)
    flags = [word for word in command[2:] if word.startswith("--")]
    assert {flag[2:].replace("-", "_") for flag in flags} <= fields


@pytest.mark.parametrize("command", [c for c in COMMANDS if "minialign.chat" in c], ids=" ".join)
def test_quick_command_runs(command):
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_every_file_named_exists():
    named = set(re.findall(r"`((?:minialign/|tests/|docs/)[\w/.-]+\.(?:py|md))", README))
    assert all((ROOT / name).exists() for name in named), named


def parts(*texts: str | None) -> list[dict]:
    """Content parts as parquet has them, each with all fields; None is the picture."""
    return [{"text": text, "type": "image" if text is None else "text"} for text in texts]


@pytest.mark.parametrize("form", ["rlhf-v", "rlaif-v", "trl-lib/rlaif-v"])
def test_parquet_becomes_json_lines(tmp_path, form):
    """The README's program on a parquet file as the hub has it; the pictures' bytes stay what they
    were."""
    datasets = pytest.importorskip("datasets")
    pictures = photographs(tmp_path / "original")
    raws, wanted = RAW.get(form, RAW["rlaif-v"]), expected(form if form in RAW else "rlaif-v")
    rows = [
        raw | {"image": {"bytes": (pictures / raw["image"]).read_bytes(), "path": None}}
        for raw in raws
    ]
    if form in RAW:
        data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    else:  # a list of pictures, and messages with parts
        wanted = [replace(record, id=str(i + 1)) for i, record in enumerate(wanted)]
        rows = [
            {
                "images": [row["image"]],
                "prompt": [{"role": "user", "content": parts(None, row["question"])}],
                "chosen": [{"role": "assistant", "content": parts(row["chosen"])}],
                "rejected": [{"role": "assistant", "content": parts(row["rejected"])}],
            }
            for row in rows
        ]
        images = datasets.List(datasets.Image())
        data = datasets.Dataset.from_list(rows).cast_column("images", images)
    data.to_parquet(tmp_path / "train-00000.parquet")
    (tmp_path / "pictures").mkdir()
    program = next(
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "parquet" in block
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    (tmp_path / "pairs.jsonl").write_text(
        subprocess.run([sys.executable, "-c", program], **run).stdout
    )
    found = pairs_in(tmp_path / "pairs.jsonl")
    assert found == [replace(record, image=str(i)) for i, record in enumerate(wanted)]
    for i, raw in enumerate(raws):
        assert (tmp_path / "pictures" / str(i)).read_bytes() == (
            pictures / raw["image"]
        ).read_bytes()
        assert (
            PictureFolder(str(tmp_path / "pictures"))(str(i)).size
            == PictureFolder(str(pictures))(raw["image"]).size
        )
