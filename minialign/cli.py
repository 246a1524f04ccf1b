"""Command lines from one frozen dataclass per program: a field is a flag, its comment its help."""

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import signal
import sys
import types
import typing
from collections.abc import Callable

from safetensors import SafetensorError

from minialign.errors import UserError, remedy_of


def parse_config(
    kind: type, doc: str, argv: list[str] | None = None, defaults: dict[str, tuple] | None = None
):
    """Read `argv` (default: the command line) into a `kind`.

    A `Literal` gives the choices, `bool` a --flag / --no-flag pair; a typo ends with exit code 2.
    The help lists a program's own flags first, then those that `kind` inherits; `defaults`, as
    `with_defaults` takes them, are only named there.
    """
    # As it was started: `python -m minialign.toy`, where argparse alone would say `__main__.py`.
    module = getattr(sys.modules["__main__"].__spec__, "name", "").removesuffix(".__main__")
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}" if module.startswith("minialign.") else None,
        description=doc,
        epilog="docs/running.md explains data, files, and every metric.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(kind)
    helps = field_comments(kind)
    fields = dataclasses.fields(kind)
    own = [field for field in fields if field.name in kind.__annotations__]
    for field in own + [field for field in fields if field not in own]:
        default = "" if field.default is None else f" [{field.default}]"
        if field.name in (defaults or {}):
            paper, toy = defaults[field.name]
            default = f" [{paper}]" if paper == toy else f" [{paper}; toy: {toy}]"
        text = f"{helps.get(field.name, '')}{default}".replace("%", "%%")
        options = {"default": field.default, "help": text}
        hint = hints[field.name]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):  # `str | None`
            hint = next(t for t in typing.get_args(hint) if t is not type(None))
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is typing.Literal:
            options["choices"] = typing.get_args(hint)
        else:
            options |= {"type": hint, "metavar": hint.__name__.upper()}
        parser.add_argument(flag_of(field.name), **options)

    values, unknown = parser.parse_known_args(argv)
    values = vars(values)
    if unknown:
        flags = [flag_of(name) for name in values]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    for name, value in values.items():
        # Bytes that are no UTF-8 come as half surrogate pairs, which no file can hold.
        text = value if isinstance(value, str) else ""
        whole = text.encode("utf-8", "ignore").decode()
        require(text == whole, f"{flag_of(name)}: not UTF-8; type it anew")
    return kind(**values)


def flag_of(name: str) -> str:
    """A field's flag: lora_rank -> --lora-rank."""
    return "--" + name.replace("_", "-")


def field_comments(kind: type) -> dict[str, str]:
    """The comment of every field of a dataclass, its own or inherited, read from the source.

    It stands at the end of the field's line, or on the lines above it.
    """
    comments, above = {}, []
    for each in reversed(kind.__mro__[:-1]):
        for line in inspect.getsource(each).splitlines():
            if line.strip().startswith("# "):
                above.append(line.strip()[2:])
                continue
            field = re.match(r"\s+(\w+)\s*:[^#]*(?:#\s*(.+))?", line)
            if field and "ClassVar" not in line:
                comments[field[1]] = field[2] or " ".join(above)
            above = []
    return comments


def require(condition: bool, message: str) -> None:
    """Refuse a flag's value: `message` says which, and the remedy."""
    if not condition:
        raise UserError(message)


def require_at_least(config, **least: int) -> None:
    """Refuse flags below their least value; one that is None is not given."""
    for name, bound in least.items():
        value = getattr(config, name)
        message = f"{flag_of(name)} {value}: at least {bound}"
        require(value is None or value >= bound, message)


def require_temperature(temperature: float) -> None:
    """Refuse a temperature by which logits cannot be divided."""
    message = f"--temperature {temperature}: 0 (greedy), or between 0.001 and 1000"
    require(temperature == 0 or 0.001 <= temperature <= 1000, message)


def require_seed(seed: int) -> None:
    """Refuse a seed that torch cannot take."""
    require(-(2**63) <= seed < 2**63, f"--seed {seed}: a number of 64 bits")


def require_device(device: str) -> None:
    """Refuse a torch device that this machine does not have."""
    import torch  # here, so that a program's --help does not wait for it

    asked = device
    if device == "cuda":  # under torchrun its own, so that not all processes open the first
        asked = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=asked).item()
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        message = f"--device {device}: not to be had here ({first}); `cpu` always is"
        raise UserError(message) from None


def require_torchrun(shard: str) -> None:
    """Refuse shards where there is one process to hold them."""
    start = "start with torchrun, as in `torchrun --nproc-per-node 8 train_dpo.py ...`"
    require(shard == "none" or under_torchrun(), f"--shard full: {start}, or leave it out")


def under_torchrun() -> bool:
    """Whether torchrun has started this process; known before torch is loaded."""
    return {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory has run out, on a CPU or on a GPU.

    A CPU's comes as any RuntimeError, so that the words decide.
    """
    signs = ("out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def out_of_memory(config) -> str:
    """What to do when memory has run out: what this program has flags for and was not told yet."""
    flags = {field.name for field in dataclasses.fields(config)}
    half = ""
    if "dtype" in flags and config.dtype != "bfloat16":
        half = ", or --dtype bfloat16"

    if "accumulate" not in flags:
        smaller = [name for name in ("batch_size", "max_new_tokens") if name in flags]
        given = " or ".join(f"a smaller {flag_of(name)}" for name in smaller)
        return f"out of memory; give {given}{half}"

    remedies = []
    if config.batch_size is None or config.accumulate < config.batch_size:
        remedies.append(f"--accumulate {2 * config.accumulate} or more (a step in so many parts)")
    if not config.recompute:
        remedies.append("--recompute")
    if config.shard == "none":
        remedies.append("--shard full (torchrun)")
    if not remedies:
        remedies.append("more processes (torchrun)")
    anew = f"{half} in another --out" if half else ""
    return f"out of memory; go on by --resume with {' or '.join(remedies)}{anew}"


def terminated(*_) -> None:
    """SIGTERM: end in order, as schedulers want; files are whole at any moment."""
    print("terminated; what was written so far is whole", file=sys.stderr)
    sys.exit(0)


def run_main(
    main: Callable, kind: type, doc: str, defaults: dict[str, tuple] | None = None
) -> None:
    """Run a program: `main` with the command line as a `kind`, whose help begins with `doc`.

    Bad input becomes one line on stderr and exit code 2, never a traceback. One of torchrun's
    processes ends without Python's own tidying up, in which torch's threads may abort it.
    """
    # Where nobody listens, nothing is said; a terminal without the letters shows their codes.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")

    if not under_torchrun():
        guarded(main, parse_config(kind, doc, defaults=defaults))
        return

    code = 0
    try:
        guarded(main, parse_config(kind, doc, defaults=defaults))
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def guarded(main: Callable, config) -> None:
    """Run a program, and say in one line how it ended if it did not end well."""
    signal.signal(signal.SIGTERM, terminated)
    try:
        main(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        message = how_it_ended(error, config)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was written so far is whole", file=sys.stderr)
        sys.exit(130)


def how_it_ended(error: Exception, config) -> str | None:
    """One line for what a program cannot help: no memory, no room on the disk, another process's
    death; None for what is a fault of its own.
    """
    if is_out_of_memory(error):
        return out_of_memory(config)
    if isinstance(error, (OSError, SafetensorError)):
        return f"{UserError(str(error))}; {remedy_of(error)}"
    # What gloo and NCCL say where another process has died.
    if "gloo/transport" in str(error) or "remote process exited" in str(error):
        reason = "another process has ended, for a reason that stands elsewhere here"
        return f"{reason}; --resume goes on from the last checkpoint"
    return None
