"""Files appear whole or not at all; a file of lines never keeps half a line."""

import json
import os
import shutil
from pathlib import Path

from minialign.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_folder_whole(folder: Path, write) -> None:
    """Call `write(partial_folder)`, then put the result in the place of `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    write(partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def write_json(path: Path, value: object) -> None:
    """Write one JSON document, whole."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, remedy: str) -> dict:
    """Read one JSON object; a missing or malformed file is a `UserError` that ends in `remedy`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; {remedy}")
    return value
