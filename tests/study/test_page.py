"""The study's page: the figures, their range, the findings and Table 7 in order, everything
escaped.
"""

import re

from html_page import EVIL, Page

from minialign.study.page import ASKED, RANGED, SHOWN, write_study

NOTHING = dict.fromkeys(("value", "low", "high"))


def cell(value: float, spread: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def figures(chair: float, recall: float) -> dict[str, dict]:
    return dict.fromkeys(SHOWN, cell(0.5)) | {"chair_i": cell(chair), "recall": cell(recall)}


def row_json(row: str, metrics: dict[str, dict], seeds: int = 1) -> dict:
    """A row of study.json; its seeds are at 0.1, 0.2, ..."""
    values = [0.1 * (seed + 1) for seed in range(seeds)]
    by_seed = dict.fromkeys(RANGED, values) | {"recall": [0.9, *values[1:]]}
    facts = {"row": row, "seeds": seeds, "steps": 4, "pairs": 1000}
    return facts | {"metrics": metrics, "by_seed": by_seed}


TABLE = {"base": figures(0.19, 0.71), "bdhs": figures(0.02, 0.97), "sft": figures(0.05, 0.93)}
ROWS_JSON = [row_json(row, metrics) for row, metrics in TABLE.items()]
FINDINGS = [
    {
        "claim": "BDHS against the base",
        "rows": "bdhs - base",
        "table": "Table 6",
        "metric": "recall",
        "paper": 7.45,
        "difference": {"value": 0.2, "low": 0.1, "high": 0.3},
        "status": "reproduced",
    }
]


def write(tmp_path, config: dict, rows: list, findings: list, rewards: list) -> tuple[str, Page]:
    write_study(tmp_path / "study.html", config, rows, findings, rewards)
    source = (tmp_path / "study.html").read_text(encoding="utf-8")
    return source, Page(source)


def test_the_page_is_whole_and_in_order(tmp_path):
    source, page = write(tmp_path, {"seeds": 3}, ROWS_JSON, FINDINGS, [])
    text = " ".join(page.text.split())
    assert "all seeds together: bdhs 1,000 in 4, sft 1,000 in 4." in text
    places = [text.index(part, 100) for part in ("Results", "base", "bdhs", "sft", "Findings")]
    assert places == sorted(places) and "UTC · seeds 3" in text
    assert "Table 7" not in text
    rows = re.findall("<tr><th>(.*?)</th>(<td>[\\d.].*?)</tr>", source)
    assert [row for row, _ in rows] == ["base", "bdhs", "sft"]
    for (_, cells), metrics in zip(rows, TABLE.values(), strict=True):
        values = [float(value) for value in re.findall(r"<td>([\d.]+)<small>", cells)]
        assert values == [metrics[name]["value"] for name in SHOWN]
    assert "BDHS against the basebdhs - base" in page.text
    cells = "objects mentioned ↑+7.45, Table 6+0.200 [+0.100, +0.300]reproduced"
    assert cells in page.text
    assert not re.search(r"(src|href|url)\s*[=(]", source)  # self-contained


def test_everything_stays_text(tmp_path):
    findings = [FINDINGS[0] | dict.fromkeys(("claim", "rows", "table", "status"), EVIL)]
    metrics = figures(0.1, 0.8) | dict.fromkeys(ASKED, cell(0.5))
    rows = [row_json(EVIL, metrics, seeds=2)]
    rewards = [{"learned_from": EVIL, "asked_about": EVIL, "accuracy": [0.5]}]
    _, page = write(tmp_path, {"rows": EVIL}, rows, findings, rewards)
    assert not page.all("script") and not any("onerror" in attrs for _, attrs in page.tags)
    # Settings; the row, with what it learned from, and in two more tables; a finding; both heads of
    # Table 7.
    assert page.text.count(EVIL) == 1 + 2 + 2 + 4 + 2


def test_what_was_not_measured_is_a_dash(tmp_path):
    metrics = figures(0.1, 0.5) | {"chair_i": NOTHING}
    source, _ = write(tmp_path, {}, [row_json("base", metrics)], [], [])
    assert "<td>–</td><td>0.500<small>" in source


def test_range_over_seeds(tmp_path):
    """Of the rows that have more than one; the least and the most, in any order, of those that were
    measured.
    """
    rows = [row_json("base", TABLE["base"]), row_json("sft", TABLE["sft"], seeds=3)]
    rows[1]["by_seed"]["chair_s"] = [None, 0.4, None]
    rows[1]["by_seed"]["chair_i"] = [None] * 3
    source, _ = write(tmp_path, {}, rows, [], [])
    table = source[source.index("Range over seeds") : source.index("Findings")]
    heads, *lines = re.findall("<tr>(.*?)</tr>", table)
    assert re.findall("<th>(.*?)</th>", heads) == ["row", "seeds", *RANGED]
    [line] = lines
    expected = ["sft", "3", "–", "0.400-0.400", "0.200-0.900", "0.100-0.300"]
    assert re.findall("<t[hd]>(?:<small>)?(.*?)<", line) == expected
    source, _ = write(tmp_path, {}, ROWS_JSON, [], [])
    assert "Range over seeds" not in source


def test_direct_questions_have_a_table_where_they_were_asked(tmp_path):
    asked = {name: cell(0.1 * i) for i, name in enumerate(ASKED, start=1)}
    rows = [row_json("base", TABLE["base"]), row_json("sft", TABLE["sft"] | asked)]
    source, _ = write(tmp_path, {}, rows, [], [])
    table = source[source.index("Direct questions") : source.index("Findings")]
    heads, *lines = re.findall("<tr>(.*?)</tr>", table)
    assert re.findall("<th>(.*?)</th>", heads) == ["row", *ASKED]
    [line] = [line for line in lines if line.startswith("<th>sft")]
    values = re.findall(r"<td>([\d.]+)<small>", line)
    assert values == [f"{figure['value']:.3f}" for figure in asked.values()]
    source, _ = write(tmp_path, {}, ROWS_JSON, [], [])
    assert "Direct questions" not in source


def test_table_7_has_mean_and_range_of_the_seeds(tmp_path):
    rewards = [
        {"learned_from": "corrupted", "asked_about": "bdhs", "accuracy": [0.5, 0.9, 0.7]},
        {"learned_from": "ranked", "asked_about": "bdhs", "accuracy": [0.6, 0.6, 0.6]},
    ]
    source, page = write(tmp_path, {}, ROWS_JSON, [], rewards)
    table = source[source.index("Table 7") :]
    found = re.findall("<tr><th>(.*?)</th><td>(.*?)<small>(.*?)</small></td></tr>", table)
    assert found == [
        ("learned from corrupted", "0.700", "[0.500, 0.900]"),
        ("learned from ranked", "0.600", "[0.600, 0.600]"),
    ]
    assert "asked about bdhs" in page.text
