"""Files appear whole or not at all; a file of lines never keeps half a line."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minialign.errors import UserError, remedy_of


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename: a reader sees the old file or the new one whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(text.encode("utf-8"))
        os.replace(partial, path)
    except OSError as error:
        raise not_written(path, error) from None
    finally:
        if partial.is_file():
            partial.unlink()


def not_written(path: Path, error: OSError) -> UserError:
    """What a disk without room, or without permission, is to the user."""
    return UserError(f"{path}: cannot be written ({error}); {remedy_of(error)}")


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which takes `folder`'s place when all is written.

    What was there stays whole until then, beside the new one.
    """
    folder = Path(os.path.realpath(folder))
    if folder == Path.cwd():
        raise UserError(f"{folder}: you are in it; name it from another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)  # a rename, as a folder being deleted is half a folder
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write one JSON document, whole."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, remedy: str, kind: type = dict) -> dict | list:
    """Read one JSON object (or array).

    A missing or malformed file is a `UserError` that ends in `remedy`.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would never end
        raise UserError(f"{path}: is no ordinary file; {remedy}")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {remedy}") from None
    if not isinstance(value, kind):
        expected = "object" if kind is dict else "array"
        raise UserError(f"{path}: expected a JSON {expected}; {remedy}")
    return value


def append_lines(path: Path, values: list[dict]) -> None:
    """Append JSON lines in one write, and see them onto the disk. A folder that has been removed
    is not made anew: what was in it is gone.
    """
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    try:
        with open(path, "ab") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise not_written(path, error) from None


def whole_lines(path: Path) -> list[str]:
    """The whole lines of a file that a killed run may have left; half a line at its end is cut."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return data[:whole].decode("utf-8").split("\n")[:-1]


def read_lines(path: Path, remedy: str) -> list[dict]:
    """The objects that `append_lines` wrote; a line that is none is a `UserError`."""
    try:
        values = [json.loads(line) for line in whole_lines(path)]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON Lines ({error}); {remedy}") from None
    if not all(isinstance(value, dict) for value in values):
        raise UserError(f"{path}: expected a JSON object in every line; {remedy}")
    return values


def require_same_settings(
    path: Path, settings: dict, may_change: tuple[str, ...], remedy: str
) -> None:
    """A continued run must have the settings that `path` notes of the run so far, but for those
    that `may_change`."""
    before = read_json(path, remedy)
    settings = json.loads(json.dumps(settings))  # as a file gives them back
    for name, value in settings.items():
        if name not in may_change and before.get(name) != value:
            message = f"of another {name}, which was {before.get(name)!r} and is {value!r} now"
            raise UserError(f"{path}: {message}; {remedy}")
