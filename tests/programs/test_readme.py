"""What the README and the pages of docs/ say: every entry of a map resolves, every command exists
with those flags, the quick ones run, every link leads somewhere."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import RAW, expected, photographs
from input_files import pairs_in

from minialign import annotate
from minialign.data.images import PictureFolder
from minialign.evaluation.metrics import TOY_FIGURES, pope_figures

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[tuple[str, ...]]:
    """The project's own commands in a page's bash blocks, in words, each from `python` on; programs
    from elsewhere are left out."""
    found = []
    for block in blocks(page, "bash"):
        lines = block.replace("\\\n", " ").splitlines()
        for part in (part.strip() for line in lines for part in line.split("&&")):
            part = re.sub(r"^(\w+=\S+ +)+", "", part)  # OMP_NUM_THREADS=1 python ...
            part = re.sub(r"^torchrun --nproc-per-node \d+", "python", part)
            if part.startswith("python "):
                found.append(tuple(shlex.split(part, comments=True)))
    return found


ENTRIES = sorted({e for page in PAGES.values() for e in re.findall(r"`([\w/]+\.py)::(\w+)`", page)})
COMMANDS = sorted({command for page in PAGES.values() for command in commands(page)})


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
    # Commands of the pages, not of the README alone: one with an environment, one on two lines.
    words = {" ".join(command[1:3]) for page in ("running", "results") for command in of(page)}
    assert {"-m minialign.evaluate", "-m tests.bench", "-m tests.bench.cards"} <= words
    assert any("--ref-cache" in command for command in of("running"))


def of(page: str) -> list[tuple[str, ...]]:
    """The commands of a page of docs/."""
    return commands(PAGES[f"docs/{page}.md"])


@pytest.mark.parametrize(("file", "name"), ENTRIES)
def test_map_entry_resolves(file, name):
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert name in {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_exists_with_its_flags(command):
    path = command[1]
    if command[1] == "-m":  # METHOD of docs/sweep.md stands for rloo and ppo
        path = command[2].replace(".", "/").replace("METHOD", "rloo")
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
    pattern = r"`((?:minialign/|tests/|docs/)[\w/.-]+\.(?:py|md))"
    named = {name for page in PAGES.values() for name in re.findall(pattern, page)}
    named |= set(re.findall(r"`([\w/]+\.py)`", PAGES["README.md"]))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_every_metric_is_explained():
    """All keys that the programs log or report stand in the glossary of docs/running.md, in its
    tables' first columns."""
    logged = [*ROOT.glob("train_*.py"), *ROOT.glob("minialign/rlhf/*.py")]
    logged.append(ROOT / "minialign/align/losses.py")
    pattern = r'"((?:rewards|logps|sampled|bdhs|annotator|objective|loss|policy|time)/\w+)"'
    keys = {key for path in logged for key in re.findall(pattern, path.read_text("utf-8"))}
    assert {"rewards/margins", "objective/rlhf_reward", "policy/clipfrac_avg"} <= keys
    keys |= TOY_FIGURES.keys() | pope_figures("SETTING").keys() | annotate.FIGURES.keys()
    keys = {re.sub("pope_(random|popular|adversarial)", "pope_SETTING", key) for key in keys}

    page = PAGES["docs/running.md"]
    rows = re.findall(r"^\| (`.*?) \|", page[page.index("\n## Metrics") :], re.MULTILINE)
    assert keys <= {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def test_departures_from_the_paper_are_marked_and_listed():
    """As many marks in a file as items that name it: none is in the code or in the list alone."""
    page = PAGES["README.md"]
    items = page[page.index("## Differences from the paper") :].split("\n- ")[1:]
    assert all(re.search(r"`[\w/]+\.py`\s*$", item) for item in items)
    listed = Counter(name for item in items for name in re.findall(r"`([\w/]+\.py)`", item))
    marked = Counter()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("minialign/**/*.py")]:
        found = re.findall(r"# (?:Differs from|Silent in) the paper: ", path.read_text("utf-8"))
        marked += Counter({path.relative_to(ROOT).as_posix(): len(found)})
    assert listed == marked and len(items) >= 20


# ---------------------------------------------------------------- links


def anchors(page: str) -> set[str]:
    """What `#...` may stand behind a page's name, by GitHub's rule: a heading's text in lower case,
    without punctuation, spaces as hyphens; a second one like it gets -1."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", FENCE.sub("", page), re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


def broken_links(path: Path) -> list[str]:
    """The relative links of a page, pictures included, that lead to no file or to no heading."""
    page = path.read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page)):
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    assert not broken_links(path)


def test_broken_links_are_found(tmp_path):
    """A missing file, a missing heading here and there, a comment in a block that is no heading;
    what is right is not found."""
    other = "# Other: `a_b`, and more\n\n## Twice\n\n## Twice\n\n```bash\n# no heading\n```\n"
    (tmp_path / "other.md").write_text(other)
    right = [
        "other.md",
        "#here",
        "other.md#other-a_b-and-more",
        "other.md#twice-1",
        "https://a.b/#c",
    ]
    wrong = ["none.md", "#there", "other.md#twice-2", "other.md#no-heading", "other.md#Twice"]
    text = " ".join(f"[a\nlink]({link})" for link in [*right, *wrong])
    (tmp_path / "page.md").write_text(f"# Here\n\n{text}\n\n```python\na[0](none)\n```\n")
    assert broken_links(tmp_path / "page.md") == wrong


# ---------------------------------------------------------------- the program for parquet files


def parts(*texts: str | None) -> list[dict]:
    """Content parts as parquet has them, each with all fields; None is the picture."""
    return [{"text": text, "type": "image" if text is None else "text"} for text in texts]


@pytest.mark.parametrize("form", ["rlhf-v", "rlaif-v", "trl-lib/rlaif-v"])
def test_parquet_becomes_json_lines(tmp_path, form):
    """docs/running.md's program on a parquet file as the hub has it; the pictures' bytes stay what
    they were."""
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
    page = PAGES["docs/running.md"]
    program = next(block for block in blocks(page, "python") if "parquet" in block)
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
