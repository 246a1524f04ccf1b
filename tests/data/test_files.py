"""Files appear whole or not at all; a file of lines never keeps half a line."""

import json
import os
import random
import string

import pytest

from minialign import files
from minialign.errors import UserError
from minialign.files import (
    append_lines,
    folder_written_whole,
    read_json,
    read_lines,
    whole_lines,
    write_json,
    write_whole,
)

# With what str.splitlines would split at.
ODD = 'Zürich 東京 🚲 \u2028 \u2029 \x85 \x0b \x0c \x1c \t " \\ \r\n </script>'


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


class Stop(Exception):
    """What ends a write midway."""


def stop(*_, **__):
    raise Stop


# ---------------------------------------------------------------- one file


def test_write_whole_replaces(tmp_path):
    path = tmp_path / "deep" / "er" / "file.txt"
    for text in ("old\n", ODD, "", "new\n"):
        write_whole(path, text)
        assert contents(tmp_path) == {"deep/er/file.txt": text.encode("utf-8")}


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["replace", "write"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, where, error):
    path = tmp_path / "file.txt"
    write_whole(path, "old\n")

    def fail(self, data=b""):
        with open(self, "wb") as file:
            file.write(data[:3])
        raise error

    def fail_replace(source, target):
        assert open(source, "rb").read() == b"new text\n" and open(target, "rb").read() == b"old\n"
        raise error

    if where == "write":
        monkeypatch.setattr(files.Path, "write_bytes", fail)
    else:
        monkeypatch.setattr(files.os, "replace", fail_replace)
    with pytest.raises(UserError if error is OSError else error):
        write_whole(path, "new text\n")
    assert contents(tmp_path) == {"file.txt": b"old\n"}


def test_a_text_that_cannot_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file.txt", "half a pair \ud800")
    assert contents(tmp_path) == {}


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below.json", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot be written") as caught:
            write_json(path, {})
        assert str(path) in str(caught.value)
    assert contents(tmp_path) == {"file": b"in the way"}


def test_json_round_trip(tmp_path):
    path, value = tmp_path / "x.json", {"text": ODD, "n": [1, 2.5, None, True], "deep": {"ü": {}}}
    write_json(path, value)
    assert read_json(path, "never seen") == value
    assert "東京" in path.read_text(encoding="utf-8") and path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'"text"',
        b"\xff\xfe\x00",
        b"{'a': 1}",
        b"[" * 100_000,
        b"1" * 5000,
        b"{} {}",
    ],
)
def test_what_is_no_json_object(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match="; download it again$") as caught:
        read_json(path, "download it again")
    assert str(caught.value).startswith(f"{path}: ")


def test_a_json_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "no" / "folder.json"):
        with pytest.raises(UserError, match="; look elsewhere$") as caught:
            read_json(path, "look elsewhere")
        assert str(path) in str(caught.value)


# ---------------------------------------------------------------- a folder


def write_files(folder, **texts) -> None:
    """The folder, with these files and nothing of an earlier try."""
    with folder_written_whole(folder) as partial:
        assert list(partial.iterdir()) == []
        for name, text in texts.items():
            (partial / name).write_text(text)


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "deep" / "model"
    folder.parent.mkdir()
    write_files(folder, a="1", b="2")
    assert contents(tmp_path) == {"deep/model/a": b"1", "deep/model/b": b"2"}
    write_files(folder, b="3", c="4")
    # `a` was the old folder's.
    assert contents(tmp_path) == {"deep/model/b": b"3", "deep/model/c": b"4"}
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_fails_midway_leaves_the_old_one(tmp_path, there, error):
    folder = tmp_path / "model"
    if there:
        write_files(folder, a="1")
    before = contents(tmp_path)

    with pytest.raises(error), folder_written_whole(folder) as partial:
        (partial / "a").write_text("half")
        assert contents(folder) == ({"a": b"1"} if there else {})
        raise error
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == there


def test_a_killed_write_leaves_no_trace_in_the_next(tmp_path):
    """Killed outright, nothing is tidied up; the next write does."""
    folder = tmp_path / "model"
    write_files(folder, a="0")
    for name in (".model.partial", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("half")
    write_files(folder, a="1")
    assert contents(tmp_path) == {"model/a": b"1"} and len(list(tmp_path.iterdir())) == 1


def test_no_reader_sees_half_a_folder(tmp_path, monkeypatch):
    """At every call into the file system the folder is the old one, the new one or, between two
    renames, absent.
    """
    folder, seen = tmp_path / "model", []
    write_files(folder, a="1", b="1")

    def watched(function):
        def call(*args, **options):
            seen.append(contents(folder))
            result = function(*args, **options)
            seen.append(contents(folder))
            return result

        return call

    monkeypatch.setattr(files.os, "replace", watched(os.replace))
    monkeypatch.setattr(files.os, "unlink", watched(os.unlink))
    monkeypatch.setattr(files.shutil, "rmtree", watched(files.shutil.rmtree))
    write_files(folder, a="2", b="2")
    assert all(state in ({"a": b"1", "b": b"1"}, {}, {"a": b"2", "b": b"2"}) for state in seen)
    assert seen[-1] == {"a": b"2", "b": b"2"}


# ---------------------------------------------------------------- a file of lines


def test_lines_round_trip(tmp_path):
    path = tmp_path / "x.jsonl"
    values = [{"text": ODD, "n": i} for i in range(5)]
    append_lines(path, values[:2])
    append_lines(path, [])
    append_lines(path, values[2:])
    assert path.read_bytes().count(b"\n") == 5
    assert len(whole_lines(path)) == 5 and read_lines(path, "never seen") == values
    assert "東京" in path.read_text(encoding="utf-8")


def test_lines_of_a_file_that_is_not_there(tmp_path):
    assert (
        whole_lines(tmp_path / "none.jsonl") == [] and read_lines(tmp_path / "none.jsonl", "") == []
    )
    assert contents(tmp_path) == {}


def test_appending_is_one_write_on_the_disk(tmp_path, monkeypatch):
    """A kill falls before or behind a batch's lines, and what is behind it was synced."""
    synced = []
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size)
    )
    append_lines(tmp_path / "x.jsonl", [{"n": i, "text": "long " * 5000} for i in range(9)])
    assert synced == [(tmp_path / "x.jsonl").stat().st_size]


@pytest.mark.parametrize("seed", range(30))
def test_half_a_line_is_cut_off(tmp_path, seed):
    """Cut anywhere, in the middle of a character too: what is left are the whole lines, and
    appending goes on.
    """
    rng, path = random.Random(seed), tmp_path / "x.jsonl"
    letters = string.printable + ODD
    values = [
        {"id": i, "text": "".join(rng.choices(letters, k=rng.randrange(20)))} for i in range(4)
    ]
    append_lines(path, values)
    data = path.read_bytes()
    cut = rng.randrange(len(data) + 1)
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    assert [json.loads(line) for line in whole_lines(path)] == values[:whole]
    assert path.read_bytes() == data[: data[:cut].rfind(b"\n") + 1]
    append_lines(path, values[whole:])
    assert path.read_bytes() == data and read_lines(path, "never seen") == values


def test_windows_line_ends(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\r\n{"a": 2}\r\n{"a"')
    assert read_lines(path, "never seen") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "data", [b"[1]\n", b"{\n", b"\n", b"\xff\n", b'{"a": 1}\nnull\n', b"[" * 100_000 + b"\n"]
)
def test_lines_that_are_no_objects(tmp_path, data):
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match="; remove it$") as caught:
        read_lines(path, "remove it")
    assert str(caught.value).startswith(f"{path}: ") and path.read_bytes() == data
