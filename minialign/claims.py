"""Where a program may write: nothing of the user's is overwritten, and no two runs mix.

A folder that a program writes is new, empty, or an earlier run's of the same program: a run leaves
its name there in `.minialign`. That mark is locked while the run lasts, and so a second one is kept
out; the system lets go of the lock with the process, however that ends.
"""

import fcntl
import itertools
import os
from pathlib import Path

from minialign.cli import flag_of, require
from minialign.errors import UserError

MARK = ".minialign"
# The flags that name what is read, in any program.
READ = (
    "model",
    "adapter",
    "data",
    "pairs",
    "images",
    "rank",
    "encoder",
    "annotator",
    "reward",
    "captions",
    "synonyms",
    "template",
)
# The locks of this process, by their paths; they are held by files that stay open.
HELD: dict[str, int] = {}


def require_place(config, name: str = "out") -> None:
    """Refuse a place to write, by the flag that names it: an empty path, one that cannot be
    written, or one on, above or below anything that is read.
    """
    value, flag = getattr(config, name), flag_of(name)
    require(value.strip() != "", f"{flag} is empty; name a place to write")
    # Behind a folder that is not there `..` leads nowhere yet, and elsewhere once it is made.
    steps = (Path(value), *Path(value).parents)
    there = all(path.parent.is_dir() for path in steps if path.name == "..")
    missing = "goes through a folder that is not there; name the place without `..`"
    require(there, f"{flag} {value}: {missing}")

    place = Path(os.path.realpath(value))
    for other in READ:
        for path in paths_of(getattr(config, other, None)):
            path = Path(os.path.realpath(path))
            apart = not path.is_relative_to(place) and not place.is_relative_to(path)
            where = "is" if path == place else "lies in" if path in place.parents else "holds"
            message = f"{where} {flag_of(other)} {path}, which is read; name a place outside of it"
            require(apart, f"{flag} {value}: {message}")

    above = next(path for path in (place.parent, *place.parents) if path.exists())
    require(above.is_dir(), f"{flag} {value}: {above} is a file; name another place")
    allowed = os.access(place if place.exists() else above, os.W_OK)
    require(allowed, f"{flag} {value}: no permission to write there; name another place")


def paths_of(value: str | None) -> list[str]:
    """What a flag names, as far as it is there: a path, several with commas between, or
    FILE:FUNCTION. The embedded world's names are no paths.
    """
    if not isinstance(value, str) or value in ("", "toy", "oracle", "self"):
        return []
    if os.path.exists(value):
        return [value]
    found = [*value.split(","), value.rpartition(":")[0]]
    return [path for path in found if path and os.path.exists(path)]


def require_new_file(config, name: str = "out") -> None:
    """Refuse a file to write that is there: none is ever written over."""
    require_place(config, name)
    flag, path = flag_of(name), Path(getattr(config, name))
    require(not path.is_dir(), f"{flag} {path}: is a folder; name the file to write")
    message = "is there already; name another file, or remove it"
    require(not os.path.lexists(path), f"{flag} {path}: {message}")


def require_own_folder(config, program: str, name: str = "out") -> None:
    """Refuse a folder to write that is there and that no run of `program` has made."""
    require_place(config, name)
    flag, folder = flag_of(name), Path(getattr(config, name))
    require(not folder.is_file(), f"{flag} {folder}: is a file; name a folder")
    maker = maker_of(folder)
    if maker != program and folder.is_dir() and any(p.name != MARK for p in folder.iterdir()):
        made = f"was made by {maker}" if maker else "is there, and no run has made it"
        raise UserError(f"{flag} {folder}: {made}; name a new folder for {program}")


def maker_of(folder: Path) -> str:
    """The program whose run has made a folder; empty where it is nobody's."""
    mark = folder / MARK
    return mark.read_text("utf-8", errors="replace").strip()[:80] if mark.is_file() else ""


def claim_folder(folder: Path, program: str, alone: bool = True) -> None:
    """Make a folder, if it is not there, and mark it as the program's. With `alone` others are
    refused until this process ends.
    """
    folder = Path(os.path.realpath(folder))  # a link may lead to what is not there yet
    folder.mkdir(parents=True, exist_ok=True)
    if alone:
        lock(folder / MARK)
    if maker_of(folder) != program:
        (folder / MARK).write_text(f"{program}\n", "utf-8")


def claim_file(path: Path) -> None:
    """Keep others from writing a file until this process ends; the lock is a file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock(path.with_name(f".{path.name}.lock"))


def lock(path: Path) -> None:
    """Lock a file, which is made; a `UserError` where another process has it."""
    name = os.path.realpath(path)
    if name in HELD:  # an earlier run's of this process
        os.close(HELD.pop(name))
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        message = "another program is writing there; wait until it ends, or name another place"
        raise UserError(f"{path.parent}: {message}") from None
    except OSError:  # a file system without locks keeps nobody out
        pass
    HELD[name] = held


def set_aside(folder: Path) -> None:
    """Give a folder another name: FOLDER.1, or the next number that is free."""
    place = Path(os.path.realpath(folder))  # and not a link to it
    if Path.cwd().is_relative_to(place):
        message = "a finished run's folder, which gets another name, and you are in it"
        raise UserError(f"--out {folder}: {message}; change to another folder first")
    names = (place.with_name(f"{place.name}.{number}") for number in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    os.rename(place, aside)
    print(f"{folder}: the finished run there is {aside} now")
