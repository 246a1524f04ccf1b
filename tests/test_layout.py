"""The house: who imports whom, by the source alone, and that every program is listed."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

import minialign.__main__

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("sample_bdhs", "train_dpo", "train_online")
ROOMS = ("model", "data", "sampling", "align", "rlhf", "evaluation", "training")
# What a porter takes: no program, no file reader, no command line behind any of them.
PURE = {
    "minialign.align.losses",
    "minialign.model.masks",
    "minialign.rlhf.losses",
    "minialign.rlhf.rewards",
    "minialign.sampling.bdhs",
    "minialign.sampling.noise",
}


def name_of(path: Path) -> str:
    """A file's module: minialign/toy/edge.py -> minialign.edge."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {
    name_of(path): path
    for path in [*(ROOT / f"{script}.py" for script in SCRIPTS), *ROOT.glob("minialign/**/*.py")]
    if path.name != "__init__.py"
}


@cache
def imports_of(module: str) -> frozenset[str]:
    """All that a module imports, in functions too, whether it is ours or not."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"  # `from minialign import edge`
                found.add(inner if inner in FILES else node.module)
    return frozenset(found)


def ours(module: str) -> list[str]:
    """Of these, the project's own."""
    return sorted(name for name in imports_of(module) if name in FILES)


@cache
def floor_of(module: str, above: tuple[str, ...] = ()) -> int:
    """On which floor a module stands: one above the highest that it imports. A circle is an
    error."""
    if module in above:
        raise AssertionError(f"a circle: {' -> '.join((*above[above.index(module) :], module))}")
    return 1 + max((floor_of(name, (*above, module)) for name in ours(module)), default=0)


def behind(module: str) -> set[str]:
    """All that a module rests on, ours and not, however far away."""
    found, todo = set(), [module]
    while todo:
        for name in imports_of(todo.pop()):
            if name not in found:
                found.add(name)
                todo += [name] if name in FILES else []
    return found


def test_files_were_found():
    assert len(FILES) > 40 and "minialign.align.losses" in FILES
    assert "minialign.align.losses" in ours("train_dpo") and "torch" in imports_of("train_dpo")


def test_no_circle_and_a_dozen_floors_at_most():
    assert max(floor_of(module) for module in FILES) <= 12


def test_a_circle_is_seen(monkeypatch):
    monkeypatch.setitem(globals(), "ours", lambda m: {"a": ["b"], "b": ["c"], "c": ["a"]}[m])
    with pytest.raises(AssertionError, match="a circle: a -> b -> c -> a"):
        floor_of("a")


def is_program(module: str) -> bool:
    """Whether a module is run as one: what imports the embedded world at its edge."""
    return 'if __name__ == "__main__"' in FILES[module].read_text("utf-8")


@pytest.mark.parametrize("room", ROOMS)
def test_the_core_knows_neither_toy_nor_study(room):
    """No file of a room imports them or asks for "toy"; and a library, unlike a program, does not
    rest on them either."""
    modules = [module for module in FILES if module.startswith(f"minialign.{room}.")]
    assert modules
    for module in modules:
        for name in imports_of(module) if is_program(module) else behind(module):
            assert not name.startswith(("minialign.toy", "minialign.study")), (module, name)
        asked = re.search(r"""[=!]= ["']toy""", FILES[module].read_text("utf-8"))
        assert asked is None, (module, asked)


def test_only_programs_of_rlhf_stand_in_a_room():
    programs = {m for m in FILES if is_program(m) and m.split(".")[1:2] and m.count(".") == 2}
    rooms = {module for module in programs if module.split(".")[1] in ROOMS}
    assert rooms == {f"minialign.rlhf.{name}" for name in ("ppo", "reward_model", "rloo")}


def test_no_library_imports_a_program():
    for module in FILES:
        if not is_program(module):
            programs = [name for name in ours(module) if is_program(name)]
            assert not programs, (module, programs)


def test_losses_import_torch_alone():
    assert imports_of("minialign.align.losses") == {"torch", "torch.nn.functional"}


@pytest.mark.parametrize("module", sorted(PURE))
def test_what_a_porter_takes_is_pure(module):
    """It rests on torch, pictures and the standard library's plain parts."""
    outside = {name.split(".")[0] for name in behind(module) if name not in FILES}
    plain = {"torch", "numpy", "PIL", "dataclasses", "functools", "collections", "random", "re"}
    assert outside <= plain, outside - plain
    pure = PURE | {"minialign.errors"}
    assert {name for name in behind(module) if name in FILES} <= pure


def test_every_program_is_listed():
    """`python -m minialign` names each program, by the command that starts it, and no other."""
    listed = re.findall(r"^python (?:-m )?([\w.]+)", minialign.__main__.__doc__, re.MULTILINE)
    programs = set()
    for module in FILES:
        if is_program(module) and module != "minialign.__main__":
            command = module.removesuffix(".__main__")
            programs.add(f"{command}.py" if module in SCRIPTS else command)
    assert sorted(listed) == sorted(programs)


def test_dependencies_are_those_of_the_card():
    """Nothing else is imported at run time."""
    allowed = {"torch", "safetensors", "tokenizers", "PIL", "numpy", "tqdm"}
    for module in FILES:
        outside = {name.split(".")[0] for name in imports_of(module) if name not in FILES}
        outside -= {"minialign", *SCRIPTS} | sys.stdlib_module_names
        assert outside <= allowed, (module, outside - allowed)
