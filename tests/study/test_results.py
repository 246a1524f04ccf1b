"""What the pages show of the study is what docs/results.json holds; how it is shown."""

import json
import re

import pytest
from study_json import study_json

from minialign.cli import guarded
from minialign.study.page import tables
from tests import results
from tests.results import MARKED, PAGES, RESULTS, blocks, filled

STUDY = json.loads(RESULTS.read_text("utf-8"))
COVERAGE = [
    {"ratio": 0, "seeds": 3, "coverage": 0.95},
    {"ratio": 10, "seeds": 3, "coverage": 0.7654},
]


def cells(table: str) -> list[list[str]]:
    """The cells of the tables in a block, line by line, heads first."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if "---" not in line[0]]


@pytest.fixture
def study() -> dict:
    return study_json() | {"coverage": COVERAGE}


# ---------------------------------------------------------------- the pages as they are


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_page_shows_the_figures_of_results_json(path):
    page = path.read_text("utf-8")
    remedy = "run python -m tests.results docs/results.json"
    assert filled(page, blocks(STUDY)) == page, (
        f"{path.name} is not what results.json says; {remedy}"
    )


def test_every_block_stands_on_a_page_once():
    names = [match[2] for path in PAGES for match in MARKED.finditer(path.read_text("utf-8"))]
    assert sorted(names) == sorted(blocks(STUDY))
    marks = sum(path.read_text("utf-8").count("<!--") for path in PAGES)
    assert marks == 2 * len(names)


def by_hand(page: str) -> str:
    """The study's section of docs/results.md without its blocks, and without the numbers that
    are names.
    """
    section = re.search(r"^## The study\n.*?(?=^## )", page, re.DOTALL | re.MULTILINE)[0]
    return re.sub(r"(Sec\. |LLaVA-)[\d.]+", "", MARKED.sub("", section))


def test_no_figure_of_the_study_is_written_by_hand():
    page = PAGES[0].read_text("utf-8")
    text = by_hand(page)
    assert "### What this says" in text and "On a GPU" not in text
    assert re.findall(r".*\d\.\d.*", text) == []
    assert re.findall(r"\d\.\d", by_hand(page.replace("- **RLHF", "- 0.5 **RLHF"))) == ["0.5"]


def test_the_rows_of_results_json_are_described():
    """In the table that is written by hand."""
    page = PAGES[0].read_text("utf-8")
    table = page[page.index("### What the rows are") :].split("\n### ")[0]
    described = re.findall(r"`([\w-]+)`", "".join(line[0] for line in cells(table)))
    assert sorted(described) == sorted(row["row"] for row in STUDY["rows"])


# ---------------------------------------------------------------- how a study is shown


def test_how_it_was_run(study):
    text = " ".join(blocks(study)["made"].split())
    assert text.startswith("2000-01-02, torch 9.9, OMP_NUM_THREADS 1; 2,000 records for most rows")
    assert "5 test images, seeds 0-2, and more of rows whose seeds" in text
    assert "than their images do: `another`." in text and "bdhs" not in text
    study["rows"].pop()
    assert "seeds 0-2. Intervals are" in " ".join(blocks(study)["made"].split())


def test_tables_are_those_of_the_page(study):
    found = blocks(study)
    for name, table in tables(study).items():
        assert cells(found[name]) == [table.heads, *table.lines]
    assert len(cells(found["rows"])) == 4


def test_verdicts_are_counted_and_their_intervals_coverage_said(study):
    text = " ".join(blocks(study)["verdicts"].split())
    assert text.startswith("6 differences, of which 4 have a verdict (2 yes, 2 no, 0 open)")
    assert "0.3 of them miss the true value" in text  # 0.05 of 6
    assert "deviate 0, 10 times as much as images do" in text
    assert text.endswith(": 95.0, 76.5 % with 3 seeds.")


def test_the_readme_has_before_and_after(study):
    study["rows"][1]["metrics"] = dict(study["rows"][1]["metrics"])
    study["rows"][1]["metrics"]["recall"] = {"value": 0.9, "low": 0.8, "high": 1}
    text = blocks(study)["readme"]
    assert text.startswith("Over 3 seeds")
    *_, recall, pope = cells(text)
    assert recall[1:] == ["0.500 [0.250, 0.750]", "0.900 [0.800, 1.000]"] and pope[1] == pope[2]


# ---------------------------------------------------------------- the program


def test_a_page_is_filled_between_its_marks():
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n\nold\n\n<!-- end -->\nc\n"
    new = filled(page, {"one": "1\n", "two": ""})
    expected = "a\n<!-- one -->\n\n1\n\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\nc\n"
    assert new == expected and filled(new, {"one": "1\n", "two": ""}) == new


def test_the_program_writes_copy_and_pages(tmp_path, monkeypatch, study):
    """The copy has the coverage besides, which is not simulated a second time."""
    paths = [tmp_path / path.name for path in PAGES]
    for path, original in zip(paths, PAGES, strict=True):
        path.write_text(original.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(results, "PAGES", paths)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(results, "coverage", lambda: COVERAGE)
    del study["coverage"]
    (tmp_path / "study.json").write_text(json.dumps(study), "utf-8")
    results.main(results.argparse.Namespace(study=str(tmp_path / "study.json")))
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert found == study | {"coverage": COVERAGE}
    for path, original in zip(paths, PAGES, strict=True):
        assert path.read_text("utf-8") == filled(original.read_text("utf-8"), blocks(found))
        assert path.read_text("utf-8") != original.read_text("utf-8")

    monkeypatch.setattr(results, "coverage", None)  # not called
    results.main(results.argparse.Namespace(study=str(tmp_path / "results.json")))
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == found


@pytest.mark.parametrize(
    ("remove", "message"),
    [("made", "has no `made`; name the study.json"), ("bdhs", "has no row bdhs, of which")],
)
def test_what_is_no_study_ends_in_one_line(tmp_path, capsys, study, remove, message):
    study.pop(remove, None)
    study["rows"] = [row for row in study["rows"] if row["row"] != remove]
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study), "utf-8")
    before = [page.read_text("utf-8") for page in PAGES]
    with pytest.raises(SystemExit) as caught:
        guarded(results.main, results.argparse.Namespace(study=str(path)))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith(f"error: {path}: {message}")
    assert said.count("\n") == 1
    assert [page.read_text("utf-8") for page in PAGES] == before
