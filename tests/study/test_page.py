"""The study's page: every row a point at its figures, labels that do not meet, everything
escaped."""

import itertools
import random
import re

import pytest
from html_page import EVIL, Page

from minialign.study import page
from minialign.study.__main__ import ROWS
from minialign.study.page import (
    BOTTOM,
    LEFT,
    RIGHT,
    SHOWN,
    TOP,
    WIDTH,
    place,
    scatter,
    ticks,
    write_study,
)

NOTHING = dict.fromkeys(("value", "low", "high"))


def cell(value: float, spread: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def figures(chair: float, recall: float) -> dict[str, dict]:
    return dict.fromkeys(SHOWN, cell(0.5)) | {"chair_i": cell(chair), "recall": cell(recall)}


TABLE = {"base": figures(0.19, 0.71), "bdhs": figures(0.02, 0.97), "sft": figures(0.05, 0.93)}
ROWS_JSON = [
    {"row": row, "steps": 4, "pairs": 1000, "metrics": metrics} for row, metrics in TABLE.items()
]
FINDINGS = [
    {"id": "bdhs lowers CHAIR_i", "status": "reproduced", "evidence": "chair_i bdhs - base: -0.170"}
]


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?[\d.]+", text)]


def test_the_page_is_whole_and_in_order(tmp_path):
    write_study(tmp_path / "study.html", {"seeds": 3}, ROWS_JSON, FINDINGS, [])
    source = (tmp_path / "study.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "all seeds together: bdhs 1,000 in 4, sft 1,000 in 4." in page.text
    order = [
        "Recall against CHAIR_i",
        "base: CHAIR_i 0.190 [0.180, 0.200], recall 0.710",
        "Results",
        "Findings",
    ]
    places = [page.text.index(part, 100) for part in order]
    assert places == sorted(places) and "UTC · seeds 3" in page.text
    assert len(page.all("svg")) == 1 and len(page.all("circle")) == 3
    assert [attrs["data-column"] for attrs in page.all("td")] == [*SHOWN] * 3 + [
        "status",
        "evidence",
    ]
    assert "bdhs lowers CHAIR_ireproducedchair_i bdhs - base" in page.text
    assert not re.search(r"(src|href|url)\s*[=(]", source)  # self-contained


def test_everything_stays_text(tmp_path):
    findings = [dict.fromkeys(("id", "status", "evidence"), EVIL)]
    table = {EVIL: figures(0.1, 0.8), EVIL + "2": figures(0.1, 0.8) | {"recall": NOTHING}}
    rows = [
        {"row": row, "steps": 1, "pairs": 1, "metrics": metrics} for row, metrics in table.items()
    ]
    write_study(tmp_path / "study.html", {"rows": EVIL}, rows, findings, [])
    page = Page((tmp_path / "study.html").read_text(encoding="utf-8"))
    assert not page.all("script") and not any("onerror" in attrs for _, attrs in page.tags)
    # Settings; the point's title and label; below the chart; two rows of the table and twice below
    # it; a finding.
    assert page.text.count(EVIL) == 1 + 2 + 1 + 2 + 2 + 3 and f"Not measured: {EVIL}2." in page.text


def test_points_and_intervals_are_where_the_axes_say():
    """Ticks and points on one straight line per axis: what is read off the ticks is the figure."""
    source = scatter(TABLE)
    ends = re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(middle|end)">([\d.]+)</text>', source
    )
    across = sorted((float(text), float(x)) for x, _, anchor, text in ends if anchor == "middle")
    up = sorted((float(text), float(y) - 4) for _, y, anchor, text in ends if anchor == "end")
    assert (
        across[0][1] == LEFT and across[-1][1] == RIGHT and up[0][1] == BOTTOM and up[-1][1] == TOP
    )

    def where(value: float, axis: list[tuple[float, float]]) -> float:
        (low, start), (high, end) = axis[0], axis[-1]
        return start + (end - start) * (value - low) / (high - low)

    for row, (chair, recall) in {
        row: (f["chair_i"], f["recall"]) for row, f in TABLE.items()
    }.items():
        drawn = re.search(rf'<title>{row}: .*?d="(.*?)".*?cx="(.*?)" cy="(.*?)"', source)
        x, y = float(drawn[2]), float(drawn[3])
        assert x == pytest.approx(where(chair["value"], across), abs=0.06)
        assert y == pytest.approx(where(recall["value"], up), abs=0.06)
        expected = [where(chair["low"], across), y, where(chair["high"], across)]
        expected += [x, where(recall["low"], up), where(recall["high"], up)]
        assert numbers(drawn[1]) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.013, 0.188, [0, 0.05, 0.1, 0.15, 0.2]),
        (0.71, 0.98, [0.7, 0.8, 0.9, 1]),
        (0.5, 0.5, [0.5, 0.5002]),
        (0.0, 0.0, [0, 0.0002]),
    ],
)
def test_ticks_are_round_and_hold_both_ends(low, high, expected):
    assert ticks(low, high) == expected


def test_nothing_measured_is_said_and_not_drawn():
    assert (
        scatter({"base": figures(0.1, 0.5) | {"chair_i": NOTHING}})
        == '<p class="note">Not measured: base.</p>'
    )


@pytest.mark.parametrize("seed", range(4))
def test_names_do_not_meet_though_points_do(seed):
    rng = random.Random(seed)
    rows = ["base", *ROWS]
    points = {row: (rng.gauss(90, 8), rng.gauss(40, 8)) for row in rows}  # all in one corner
    taken = [(left - 4, top - 4, left + 4, top + 4) for left, top in points.values()]
    for row, (left, top) in points.items():
        taken.append(place(left, top, len(row) * page.LETTER, taken))
        assert (
            LEFT < taken[-1][0]
            and taken[-1][2] < WIDTH
            and 0 < taken[-1][1]
            and taken[-1][3] < BOTTOM
        )
    for a, b in itertools.combinations(taken[len(rows) :], 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for name in taken[len(rows) :]:
        for left, top in points.values():
            assert not (name[0] < left < name[2] and name[1] < top < name[3])


def test_a_name_far_from_its_point_has_a_line_to_it():
    assert "leader" not in scatter(TABLE)
    crowded = {row: figures(0.02, 0.97) for row in ROWS} | {"base": figures(0.19, 0.71)}
    assert scatter(crowded).count("leader") >= 4
