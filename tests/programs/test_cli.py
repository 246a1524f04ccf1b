"""Command lines: a field is a flag, its comment its help; bad input is one line on stderr and exit
code 2.
"""

import dataclasses
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from minialign.cli import (
    field_comments,
    parse_config,
    require,
    require_device,
    run_main,
    under_torchrun,
)
from minialign.edge import with_defaults
from minialign.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


# Every program's module: what parses flags into a Config. Found in the sources, so that a new one
# is tested too.
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("minialign/**/*.py")]
    if "run_main(main, Config" in path.read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Config:
    """Flags of every kind."""

    steps: int = 3  # how often
    share: float = 0.5  # 50 % of the whole: {a} \\d
    max_length: int | None = None  # the longest; none by default
    mode: Literal["fast", "slow"] = "fast"  # which way
    loud: bool = False  # say more
    safe: bool = True  # look twice
    # what it is
    # called
    name: str = "a, b"


def parse(*argv: str) -> Config:
    return parse_config(Config, "Words about it.\n\n    an example 100 %", list(argv))


def test_defaults_by_model_are_in_the_help(capsys):
    """A flag that stands for the paper's value, or the toy model's, says both."""
    defaults = {"max_length": (4096, 64), "share": (0.5, 0.5)}
    with pytest.raises(SystemExit):
        parse_config(Config, "", ["--help"], defaults)
    text = " ".join(capsys.readouterr().out.split())
    assert "none by default [4096; toy: 64]" in text and "[0.5]" in text


def test_defaults():
    assert parse() == Config()


@pytest.mark.parametrize(
    "argv,changes",
    [
        (["--steps", "7"], {"steps": 7}),
        (["--steps=-7"], {"steps": -7}),
        (["--share", "1e-3"], {"share": 0.001}),
        (["--max-length", "12"], {"max_length": 12}),
        (["--mode", "slow"], {"mode": "slow"}),
        (["--loud", "--no-safe"], {"loud": True, "safe": False}),
        (["--no-loud", "--safe"], {}),
        (["--name", "two words"], {"name": "two words"}),
        (["--name", ""], {"name": ""}),
        (["--name", "x", "--steps", "1", "--name", "y"], {"name": "y", "steps": 1}),
    ],
)
def test_a_field_is_a_flag(argv, changes):
    assert parse(*argv) == dataclasses.replace(Config(), **changes)
    for name in changes:
        assert type(getattr(parse(*argv), name)) is type(changes[name])


@pytest.mark.parametrize(
    "argv",
    [
        ["--stepps", "7"],  # a typo
        ["--step", "7"],  # an abbreviation
        ["--max_length", "7"],
        ["--mode", "slo"],
        ["--mode", "Fast"],
        ["--steps", "1.5"],
        ["--steps", "many"],
        ["--share", "half"],
        ["--max-length", "None"],
        ["--steps"],
        ["--loud", "yes"],
        ["--no-steps"],
        ["stray"],
    ],
)
def test_what_is_no_flag_ends_with_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert any(word in err.splitlines()[-1] for word in argv)  # it names what it cannot read


def test_the_comment_is_the_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Words about it. an example 100 %" in shown
    comments = field_comments(Config)
    assert comments["share"] == "50 % of the whole: {a} \\\\d" and len(comments) == 7
    assert comments["name"] == "what it is called"  # on lines of its own
    for field in dataclasses.fields(Config):
        default = "" if field.default is None else f" [{field.default}]"
        assert f"{comments[field.name]}{default}" in shown
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "{fast,slow}" in shown and "--no-safe" in shown


def test_a_flag_that_is_no_text(capsys):
    """Bytes that are no UTF-8 come as half surrogate pairs."""
    with pytest.raises(UserError, match="^--name: not UTF-8; type it anew$"):
        parse("--name", "a\udcff")
    assert parse("--name", "Zürich 東京").name == "Zürich 東京"


def test_inherited_flags_come_behind_a_programs_own(capsys):
    @dataclass(frozen=True)
    class Inner(Config):
        extra: int = 1  # one of its own

    with pytest.raises(SystemExit):
        parse_config(Inner, "", ["--help"])
    shown = capsys.readouterr().out
    assert shown.index("one of its own") < shown.index("how often")
    assert parse_config(Inner, "", ["--steps", "4"]) == Inner(steps=4)


def test_programs_are_found():
    known = {
        "sample_bdhs",
        "train_dpo",
        "minialign.chat",
        "minialign.evaluate",
        "minialign.rlhf.ppo",
    }
    assert known | {"minialign.study.__main__", "minialign.toy.__main__"} <= set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_field_has_a_comment(program):
    config = importlib.import_module(program).Config
    comments, fields = field_comments(config), dataclasses.fields(config)
    assert config.__dataclass_params__.frozen
    for field in fields:
        assert len(comments.get(field.name, "")) >= 10, f"{program}: {field.name} has no sentence"
    assert comments.keys() == {field.name for field in fields}


def run_program(program: str, *argv: str) -> int:
    """Run it as `python program.py` or `python -m program` would, in this process; its exit
    code.
    """
    before = sys.argv
    sys.argv = [program, *argv]
    try:
        if "." in program:
            sys.modules.pop(program, None)  # runpy warns where the module is there already
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / f"{program}.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def modules():
    """Modules as they were, after programs were run."""
    before = dict(sys.modules)
    yield
    sys.modules.update(before)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_program(program, capsys, modules):
    fields = dataclasses.fields(importlib.import_module(program).Config)
    comments = field_comments(importlib.import_module(program).Config)
    doc = importlib.import_module(program).__doc__
    assert run_program(program, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert " ".join(doc.split()) in shown  # the docstring says what the program does
    for field in fields:
        assert f"--{field.name.replace('_', '-')}" in shown
        default = "" if field.default is None else f" [{field.default}]"
        text = " ".join(f"{comments[field.name]}{default}".split())
        assert re.sub(r"\s", "", text) in re.sub(r"\s", "", shown), (
            f"{program}: help of {field.name}"
        )


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_typo_ends_every_program(program, capsys, modules):
    assert run_program(program, "--devise", "cpu") == 2
    err = capsys.readouterr().err
    assert "--devise" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--stepps", "; did you mean --steps?"),
        ("--step=7", "; did you mean --steps?"),
        ("--max_length", "; did you mean --max-length?"),
        ("--qqqqqq", "\n"),  # nothing is near
    ],
)
def test_a_typo_is_met_with_the_nearest_flag(typed, meant, capsys):
    with pytest.raises(SystemExit):
        parse(typed)
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {typed}{meant.strip()}\n")


def test_help_names_the_page_of_metrics(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "docs/running.md" in capsys.readouterr().out


def test_defaults_replace_what_was_not_given():
    @dataclass(frozen=True)
    class Partial:
        rate: float | None = None
        size: int | None = None
        rest: str = "as it is"
        model: str = "toy"

    defaults = {"rate": (0.5, 0.1), "size": (128, 4)}  # the paper's, the toy model's
    assert with_defaults(Partial(), defaults) == Partial(0.1, 4)
    other = Partial(model="runs/mine")
    assert with_defaults(other, defaults) == Partial(0.5, 128, model="runs/mine")
    zeros = Partial(rate=0.0, size=0)
    assert with_defaults(zeros, defaults) == zeros  # 0 was given
    assert with_defaults(Partial(size=2), defaults) == Partial(0.1, 2)


def test_require():
    require(True, "never seen")
    with pytest.raises(UserError, match="^--steps 0: at least 1$"):
        require(False, "--steps 0: at least 1")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_devices_that_are_not_there(device):
    require_device("cpu")
    with pytest.raises(UserError, match=f"^--device {re.escape(device)}: ") as caught:
        require_device(device)
    assert len(str(caught.value)) < 400


def failing(error: BaseException):
    def main(config):
        raise error

    return main


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """Of pytest's own."""
    monkeypatch.setattr(sys, "argv", ["program"])


def test_run_main(capsys):
    run_main(lambda config: print("done"), Config, "")
    assert capsys.readouterr() == ("done\n", "")
    with pytest.raises(SystemExit) as caught:
        run_main(failing(UserError("--data x: no such file")), Config, "")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: --data x: no such file\n")
    with pytest.raises(SystemExit) as caught:
        run_main(failing(KeyboardInterrupt()), Config, "")
    assert caught.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        run_main(failing(OSError(28, "No space left on device", "a\nb")), Config, "")
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "No space left" in message and "make room" in message and message.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a bug stays a traceback
        run_main(failing(ZeroDivisionError()), Config, "")


def test_a_message_is_one_line_whatever_stands_in_it(capsys):
    with pytest.raises(SystemExit):
        run_main(
            failing(UserError("file 'a\nb\r\x1b[31m\u2028\x00\ud800': no such file")), Config, ""
        )
    assert capsys.readouterr().err == "error: file 'a b  [31m   ': no such file\n"


def test_a_message_is_never_longer_than_a_screen(capsys):
    """Its head says where, its end what to do."""
    with pytest.raises(SystemExit):
        run_main(failing(UserError(f"--data {'x' * 10**6}: no such file; give one")), Config, "")
    message = capsys.readouterr().err
    assert len(message) < 1100 and message.startswith("error: --data xxx")
    assert message.endswith("xxx: no such file; give one\n")


@pytest.mark.parametrize(
    "error,remedy",
    [
        (OSError(28, "No space left on device"), "make room for it"),
        (OSError(122, "Disk quota exceeded"), "make room for it"),
        (PermissionError(13, "Permission denied", "a"), "allow it, or name another"),
        (OSError(30, "Read-only file system", "a"), "allow it, or name another"),
        (FileNotFoundError(2, "No such file or directory", "a"), "put it back"),
        (NotADirectoryError(20, "Not a directory", "a"), "mend it, or name another"),
    ],
)
def test_a_remedy_by_the_cause(error, remedy, capsys):
    with pytest.raises(SystemExit):
        run_main(failing(error), Config, "")
    assert f"; {remedy}" in capsys.readouterr().err


SAYS = """
from dataclasses import dataclass
from minialign.cli import run_main
from minialign.errors import UserError

@dataclass(frozen=True)
class Config:
    pass

def main(config):
    print("ü")
    raise UserError("ü is missing")

run_main(main, Config, "")
"""


@pytest.mark.parametrize("redirected", ["", " 2>&-", " >&-", " >&- 2>&-"])
def test_a_terminal_of_ascii_and_none_at_all(redirected, tmp_path):
    """What cannot be shown or heard does not change how a program ends."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    (tmp_path / "says.py").write_text(SAYS)
    words = f"{shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'says.py'))}{redirected}"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == ("" if "2>&-" in redirected else "error: \\xfc is missing\n")
    assert done.stdout == ("" if " >&-" in redirected else "\\xfc\n")


def test_torchrun_is_more_than_one_inherited_variable(monkeypatch):
    """As a shell has it that torchrun's worker has left behind."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert not under_torchrun()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    assert under_torchrun()


def test_bad_input_in_a_shell():
    """Once as a user would see it: one line on stderr, nothing else, exit code 2."""
    done = subprocess.run(
        [sys.executable, "sample_bdhs.py", "--model", "/nowhere/at all"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: --model /nowhere/at all: no such folder")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("module", ["minialign.toy", "minialign.rlhf.rloo"])
def test_usage_is_the_command_that_starts_it(module):
    words = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: python -m {module} [")
