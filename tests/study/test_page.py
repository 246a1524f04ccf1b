"""The study's tables: every figure in its place; and its page, in order, everything escaped."""

import numpy as np
import pytest
from html_page import EVIL, Page
from study_json import row_json, study_json

from minialign.study.findings import CLAIMS, METRICS, OURS, judge
from minialign.study.page import ASKED, HEADS, SHOWN, tables, text_table, write_study

NOTHING = dict.fromkeys(("value", "low", "high"))
TABLES = ["Results", "Direct questions", "The range over seeds", "Findings", "Reward models (Table"]


@pytest.fixture
def study() -> dict:
    return study_json()


# ---------------------------------------------------------------- tables


def test_rows_are_shown_in_their_order_with_their_figures(study):
    table = tables(study)["rows"]
    assert table.heads == ["row", *(HEADS[name] for name in SHOWN), "seeds", "pairs or responses"]
    base, bdhs, another = table.lines
    figures = ["0.500 [0.250, 0.750]"] * 4 + ["0.500"] * 2 + ["34.0"]
    assert base == ["base", *figures, "", ""]
    assert bdhs == ["bdhs", *figures, "3", "10"]
    assert another == ["another", *figures, "5", "0"]
    study["rows"][2]["metrics"] |= {"colour_errors": NOTHING, "recall": NOTHING}
    another = tables(study)["rows"].lines[2]
    assert another[3] == another[5] == "not measured" and another[6] == "0.500"


def test_range_over_seeds(study):
    """Of rows that have more than one: the least and the most, in any order, of those that were
    measured.
    """
    study["rows"][2]["by_seed"] |= {"chair_i": [None] * 5, "chair_s": [None, 0.4, None, 0.2, 0.3]}
    table = tables(study)["ranges"]
    assert table.heads == ["row", "seeds", "CHAIR_i", "CHAIR_s", "recall", "POPE adversarial"]
    bdhs, another = table.lines
    same = "0.100-0.100"
    assert bdhs == ["bdhs", "3", same, same, "0.300-0.900", same]
    assert another == ["another", "5", "not measured", "0.200-0.400", same, same]
    study["rows"] = study["rows"][:1]
    assert "ranges" not in tables(study)


def test_direct_questions_of_each_kind(study):
    for i, name in enumerate(ASKED):
        value = 0.1 * i
        study["rows"][1]["metrics"][name] = {"value": value, "low": value, "high": 1}
    table = tables(study)["asked"]
    assert table.heads == [
        "row", "all", "what is in a place", "colour", "place", "number", "setting",
    ]  # fmt: skip
    base, bdhs, _ = table.lines
    assert base == ["base", *["0.500 [0.250, 0.750]"] * 6]
    assert bdhs == ["bdhs", *(f"{0.1 * i:.3f} [{0.1 * i:.3f}, 1.000]" for i in range(6))]


def test_findings_stand_beside_the_papers(study):
    difference = "+0.100 [-0.250, +0.200]"
    table = tables(study)["findings"]
    assert table.heads[3:] == ["POPE adversarial", "recall", "CHAIR_i"]
    first, second = table.lines
    assert first[:3] == ["bdhs beats base", "bdhs - base", "+2.35, -1.00 (Table 6)"]
    assert first[3:] == [f"yes, {difference}", f"no, {difference}", difference]
    # A row that learned from nothing: by default.
    assert second[3:] == [f"yes (*), {difference}", f"no (*), {difference}", difference]

    study["findings"][1]["status"] = "undecided"
    for each in study["findings"][:3]:
        each["table"] = OURS
    first, _ = tables(study)["findings"].lines
    assert first[2] == "a control of our own" and first[4] == f"open, {difference}"


def test_findings_of_a_study_can_be_shown(study):
    """Those that `judge` makes, of all claims."""
    rows = {row for claim in CLAIMS for row in (claim.row, claim.other)}
    study["findings"] = judge(dict.fromkeys(rows, dict.fromkeys(METRICS, np.zeros(9))))
    assert len(tables(study)["findings"].lines) == len(CLAIMS)


def test_table_7_has_mean_and_range_of_the_seeds(study):
    study["rewards"] += [
        {"learned_from": "a", "asked_about": "c", "accuracy": [0.25]},
        {"learned_from": "d", "asked_about": "b", "accuracy": [0.6, 0.6]},
        {"learned_from": "d", "asked_about": "c", "accuracy": [0.1, 0.2]},
    ]
    table = tables(study)["rewards"]
    assert table.heads == ["learned from", "asked about b", "asked about c"]
    assert table.lines[0] == ["a", "0.70 (0.50-0.90)", "0.25 (0.25-0.25)"]
    assert table.lines[1] == ["d", "0.60 (0.60-0.60)", "0.15 (0.10-0.20)"]
    study["rewards"] = []
    assert "rewards" not in tables(study)


def test_columns_are_aligned_in_a_terminal(study):
    title, heads, *lines = text_table(tables(study)["ranges"]).splitlines()
    assert title == "The range over seeds" and heads.startswith("row      seeds  CHAIR_i      CH")
    assert lines[0].startswith("bdhs     3      0.100-0.100  0.100") and len(lines) == 2


# ---------------------------------------------------------------- the page


def written(tmp_path, study: dict) -> tuple[str, Page]:
    write_study(tmp_path / "study.html", study)
    source = (tmp_path / "study.html").read_text(encoding="utf-8")
    return source, Page(source)


def test_the_page_is_whole_and_in_order(tmp_path, study):
    source, page = written(tmp_path, study)
    text = " ".join(page.text.split())
    assert "UTC · torch 9.9 · threads 1 · split test" in text
    places = [source.index(f"<h2>{title}") for title in TABLES]
    assert places == sorted(places)
    assert "<tr><th>bdhs</th><td>0.500<small>[0.250, 0.750]</small></td>" in source
    assert "<td>+2.35, -1.00 (Table 6)</td><td>yes, +0.100<small>[-0.250, +0.200]<" in source
    for table in tables(study).values():
        lines = [[line[0], *(cell.replace(" [", "[") for cell in line[1:])] for line in table.lines]
        for line in (table.heads, *lines):
            assert "".join(line) in page.text
    assert not any(name in {"src", "href"} for _, attrs in page.tags for name in attrs)


def test_a_table_without_lines_is_left_out(tmp_path, study):
    study |= {"rows": [row_json("base", 1, 0)], "findings": [], "rewards": []}
    source, _ = written(tmp_path, study)
    assert [title for title in TABLES if f"<h2>{title}" in source] == TABLES[:2]


def test_everything_stays_text(tmp_path, study):
    study["made"] = {"rows": EVIL}
    study["rows"] = [study["rows"][1] | {"row": EVIL}]
    for each in study["findings"]:
        each |= dict.fromkeys(("claim", "rows", "table"), EVIL)
    study["rewards"] = [{"learned_from": EVIL, "asked_about": EVIL, "accuracy": [0.5]}]
    _, page = written(tmp_path, study)
    assert not page.all("script") and not any("onerror" in attrs for _, attrs in page.tags)
    # Settings; the row in three tables; a finding; a line and a head of Table 7.
    assert page.text.count(EVIL) == 1 + 3 + 3 + 2
