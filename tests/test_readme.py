"""What the README says: every entry of its map resolves, every command exists with those flags, the quick ones run."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENTRIES = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", README)))
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(part, comments=True)
    for block in BLOCKS
    for line in block.splitlines()
    for part in line.split("&&")
    if part.strip().startswith("python ")
]


def config_fields(source: str) -> set[str]:
    """The field names of the `Config` class in a Python source."""
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == "Config"]
    return {item.target.id for node in classes for item in node.body if isinstance(item, ast.AnnAssign)}


def test_the_map_is_there():
    assert len(ENTRIES) >= 8 and len(COMMANDS) >= 6


@pytest.mark.parametrize(("file", "name"), ENTRIES)
def test_map_entry_resolves(file, name):
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert name in {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_exists_with_its_flags(command):
    module = command[1] == "-m"
    path = command[2].replace(".", "/") + ".py" if module else command[1]
    fields = config_fields((ROOT / path).read_text(encoding="utf-8"))
    flags = [word for word in command[2:] if word.startswith("--")]
    assert {flag[2:].replace("-", "_") for flag in flags} <= fields


@pytest.mark.parametrize("command", [c for c in COMMANDS if "minialign.chat" in c], ids=" ".join)
def test_quick_command_runs(command):
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_every_file_named_exists():
    named = set(re.findall(r"`((?:minialign/|tests/|docs/)[\w/.-]+\.(?:py|md))", README))
    assert all((ROOT / name).exists() for name in named), named
