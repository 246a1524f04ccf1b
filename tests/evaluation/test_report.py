"""The report page: escaped, self-contained, well formed, true to the masks, written whole or not at
all.
"""

import base64
import io
import math
import os
import re
from dataclasses import replace

import pytest
from html_page import EVIL, Page
from PIL import Image

from minialign.errors import UserError
from minialign.evaluation import report
from minialign.evaluation.report import ReportPair, write_report


def make_pair(**changes) -> ReportPair:
    pair = ReportPair(
        id="7",
        image=Image.new("RGB", (96, 96), (200, 40, 0)),
        visible=[True, False, False, True],
        prompt="Describe it.",
        chosen="A red ball.",
        rejected="A blue ball.",
        iterations=3,
        similarity=0.871,
        guided=True,
    )
    return replace(pair, **changes)


def make_metrics(steps: int) -> list[dict]:
    keys = [key for _, keys, _ in report.CHARTS for key in keys]
    rows = []
    for step in range(steps):
        rows.append({"step": step} | {key: i - step / 7 for i, key in enumerate(keys)})
    return rows


RESULT = {
    "before": {
        "chair_i": {"value": 0.2, "low": 0.18, "high": 0.22},
        "recall": {"value": 0.8, "low": 0.7, "high": 0.9},
    },
    "after": {
        "chair_i": {"value": 0.15, "low": 0.13, "high": 0.17},
        "length": {"value": 81.26, "low": 80, "high": 82},
    },
}


def write(
    tmp_path, title="Run", config=None, pairs=(), metrics=(), result=None
) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    write_report(path, title, config or {}, list(pairs), list(metrics), result or {})
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def picture(page: Page, index: int = 0) -> Image.Image:
    head, data = page.all("img")[index]["src"].split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_full_page_is_well_formed_and_in_order(tmp_path):
    pairs = [make_pair(), make_pair(visible=None, iterations=None, similarity=None, guided=None)]
    config = {"seed": 0, "data": {"root": "x"}}
    source, page = write(tmp_path, "Run 1", config, pairs, make_metrics(9), RESULT)
    order = [
        "Run 1",
        "UTC · seed 0",
        "Results",
        "Training",
        "Sampled pairs",
        "Configuration",
        '"root": "x"',
    ]
    places = [page.text.index(part, page.text.index("UTC") - 30) for part in order]
    assert places == sorted(places)
    assert source.startswith("<!DOCTYPE html>")
    assert any("width=device-width" in meta.get("content", "") for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in source
    assert len(page.all("article")) == len(page.all("img")) == 2
    facts = " ".join(page.text.split())
    assert "iterations 3 · similarity 0.871 · guided yes · visible patches 2 of 4" in facts
    assert "iterations – · similarity – · guided – · visible patches –" in facts


def test_everything_from_outside_stays_text(tmp_path):
    pair = make_pair(id=EVIL, prompt=EVIL, chosen=EVIL + " one", rejected=EVIL + " two")
    config = {"name": EVIL, EVIL: 1}
    cell = {"value": 0.5, "low": 0.4, "high": 0.6}
    metrics = [{"step": 1, "loss": 0.5, EVIL: 1.0}]
    result = {EVIL: {EVIL: cell}, "a": {}, "b": {}}
    source, page = write(tmp_path, EVIL, config, [pair], metrics, result)
    assert not page.all("script") and "<script" not in source.lower()
    assert len(page.all("img")) == 1 and not any("onerror" in attrs for _, attrs in page.tags)
    # Letter by letter: title, h1, two in the summary, two names of the table, four texts of a pair.
    assert page.text.count(EVIL) == 10
    assert page.all("img")[0]["alt"].startswith(f"Picture of pair {EVIL}")


def test_nothing_is_loaded_from_outside(tmp_path):
    source, page = write(tmp_path, "Run", {"seed": 0}, [make_pair()], make_metrics(9), RESULT)
    markup = source.replace(page.all("img")[0]["src"], "")
    assert not re.search(r"https?:|//|url\(|@import|@font-face", markup)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert not {"href", "xlink:href", "srcset", "data", "action", "background", "poster"} & set(
            attrs
        )
        assert attrs.get("src", "data:").startswith("data:")
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy and policy[0].startswith("default-src 'none'")


@pytest.mark.parametrize(
    "chosen, rejected, left, right",
    [
        ("A red ball.", "A blue ball.", "A <ins>red</ins> ball.", "A <del>blue</del> ball."),
        ("same words", "same words", "same words", "same words"),
        ("a dog", "a dog and  two cats", "a dog", "a dog <del>and  two cats</del>"),
        ("a dog.", "a dog", "a dog<ins>.</ins>", "a dog"),
        ("one two three", "one three", "one <ins>two</ins> three", "one three"),
        ("a <b>", "a", "a <ins>&lt;b&gt;</ins>", "a"),
        ("", "all new", "", "<del>all new</del>"),
        (
            "it's <b> & so",
            "it's <i> & so",
            "it&#x27;s &lt;<ins>b</ins>&gt; &amp; so",
            "it&#x27;s &lt;<del>i</del>&gt; &amp; so",
        ),
        (
            "x a y b z",
            "x c y d z",
            "x <ins>a</ins> y <ins>b</ins> z",
            "x <del>c</del> y <del>d</del> z",
        ),
    ],
)
def test_word_diff_marks_exactly_the_differing_words(chosen, rejected, left, right):
    assert report.word_diff(chosen, rejected) == (left, right)


def test_word_diff_of_long_texts_ignores_no_frequent_word():
    # From 200 words on, difflib would by default treat frequent words as junk and mark them all.
    text = " ".join(["the cat and the dog"] * 60)
    marked = (f"<ins>left</ins> {text}", f"<del>right</del> {text}")
    assert report.word_diff("left " + text, "right " + text) == marked


@pytest.mark.parametrize(
    "size, shown", [((96, 96), (288, 288)), ((7, 5), (287, 205)), ((640, 480), (288, 216))]
)
def test_shown_patches_are_the_mask(tmp_path, size, shown):
    visible = [True, False, True, False, False, True, False, True, False]
    colour = (200, 40, 0)
    _, page = write(
        tmp_path, pairs=[make_pair(image=Image.new("RGB", size, colour), visible=visible)]
    )
    image = picture(page)
    assert image.size == shown
    dimmed = tuple(round(128 * 0.75 + part * 0.25) for part in colour)
    for index, flag in enumerate(visible):
        row, column = divmod(index, 3)
        # Only pixels that lie in the patch as a whole: an edge may fall inside a pixel.
        left, right = math.ceil(column * shown[0] / 3), (column + 1) * shown[0] // 3
        top, bottom = math.ceil(row * shown[1] / 3), (row + 1) * shown[1] // 3
        area = (right - left) * (bottom - top)
        assert image.crop((left, top, right, bottom)).getcolors() == [
            (area, colour if flag else dimmed)
        ]


def test_unknown_visibility_leaves_the_picture_alone_and_small_pixels_stay_square(tmp_path):
    image = Image.frombytes("RGB", (2, 1), bytes([255, 0, 0, 0, 0, 255]))
    _, page = write(tmp_path, pairs=[make_pair(image=image, visible=None)])
    shown = picture(page)
    assert shown.size == (288, 144)
    assert shown.crop((0, 0, 144, 144)).getcolors() == [(144 * 144, (255, 0, 0))]
    assert shown.crop((144, 0, 288, 144)).getcolors() == [(144 * 144, (0, 0, 255))]
    assert image.size == (2, 1)


def test_table_shows_values_intervals_and_dashes(tmp_path):
    source, page = write(tmp_path, result=RESULT)
    rows = [re.sub("<[^>]+>", " ", row).split() for row in re.findall("<tr>(.*?)</tr>", source)]
    assert rows[0] == ["metric", "before", "after"]
    assert rows[1][-6:] == ["0.200", "[0.180,", "0.220]", "0.150", "[0.130,", "0.170]"]
    assert rows[2][-4:] == ["0.800", "[0.700,", "0.900]", "–"]
    assert rows[3] == ["length", "–", "81.3", "[80.0,", "82.0]"]
    _, page = write(tmp_path, result={"before": {"x": dict.fromkeys(("value", "low", "high"))}})
    assert "x–" in page.text and "None" not in page.text


def test_empty_inputs_are_said_in_words(tmp_path):
    _, page = write(tmp_path)
    for sentence in ("No results were", "No training metrics were", "No pairs were"):
        assert sentence in page.text
    assert not page.all("svg")


def test_what_is_missing_or_not_finite_is_left_out(tmp_path):
    losses = [0.5, 0.25, math.nan, 1.5, math.inf, 0.75]
    metrics = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    source, page = write(tmp_path, metrics=[*metrics, {"step": 8}])
    assert "Rewards of the pairs" not in page.text  # what was not logged has no chart
    chart = re.search("<svg viewBox.*?</svg>", source).group()
    path = re.search('<path class="line s0" d="([^"]*)"', chart).group(1)
    assert path.count("M") == 1 and path.count("L") == 3
    assert "nan" not in chart and "inf" not in chart
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", chart)
    assert ticks == ["0.25", "1.5", "0", "5", "step"]
    _, page = write(tmp_path, metrics=[{"step": 1, "loss": math.nan}])
    assert not page.all("svg")


def test_charts_of_rlhf(tmp_path):
    objective = {"objective/scores": 1.0, "objective/kl": 2.0, "objective/entropy": 3.0}
    metrics = [{"step": step, "loss": 1.0, **objective} for step in (1, 2)]
    _, page = write(tmp_path, metrics=metrics)
    titles = ("Loss", *(f"{what} of the policy's answers" for what in ("Rewards", "KL", "Entropy")))
    assert all(title in page.text for title in titles)
    assert "Reward accuracy" not in page.text


def test_charts_have_legends_labels_and_ticks_where_the_values_lie(tmp_path):
    metrics = [
        {"step": 10, "rewards/chosen": -1.0, "rewards/margins": 3.0},
        {"step": 30, "rewards/chosen": 1.0},
    ]
    source, page = write(tmp_path, metrics=metrics)
    chart = re.search("<svg viewBox.*?</svg>", source).group()
    assert re.findall(r"<text[^>]*>([^<]*)</text>", chart) == [
        "−1",
        "0",
        "3",
        "10",
        "30",
        "step",
    ]
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert f"<span>{key}</span>" in source
    # From the lower left corner of the frame to its right edge, half way up.
    left, right, bottom, top = report.LEFT, report.RIGHT, report.BOTTOM, report.TOP
    assert f'd="M{left:.1f} {bottom:.1f}L{right:.1f} {(bottom + top) / 2:.1f}h0"' in chart
    assert f'd="M{left:.1f} {top:.1f}h0"' in chart  # one value: a dot


def test_accuracy_spans_zero_to_one(tmp_path):
    source, _ = write(tmp_path, metrics=[{"step": s, "rewards/accuracies": 0.6} for s in (1, 2)])
    chart = re.search("<svg viewBox.*?</svg>", source).group()
    assert re.findall(r"<text[^>]*>([^<]*)</text>", chart) == [
        "0",
        "1",
        "1",
        "2",
        "step",
    ]


def test_long_runs_are_averaged():
    line = report.curve(make_metrics(1000), "loss", 5)
    assert len(line) == 200
    assert line[0] == (4, pytest.approx(-2 / 7)) and line[-1][0] == 999
    rows = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": math.nan},
        {"step": 3},
        {"step": 4, "loss": 4.0},
        {"step": 5, "loss": math.nan},
    ]
    assert report.curve(rows, "loss", 2) == [(4, 2.5)]


def test_long_runs_keep_the_page_small(tmp_path):
    source, page = write(tmp_path, metrics=make_metrics(20_000))
    assert "Each point is the mean of 100 logged values." in page.text
    assert len(source) < 60_000


@pytest.mark.parametrize("fault", ["rename", "render"])
def test_a_fault_leaves_the_old_page_and_no_partial_one(tmp_path, monkeypatch, fault):
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    pairs = [make_pair(), make_pair(guided="perhaps" if fault == "render" else None)]
    if fault == "rename":
        # The whole text lies beside the page at this point; the page itself is still the old one.
        def refuse(source, target):
            assert path.read_text(encoding="utf-8") == "old"
            assert os.path.dirname(source) == os.path.dirname(target) == str(tmp_path)
            raise OSError("no space")

        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises((UserError, KeyError)):
        write_report(path, "Run", {}, pairs, make_metrics(3), RESULT)
    assert path.read_text(encoding="utf-8") == "old"
    if fault == "render":
        assert list(tmp_path.iterdir()) == [path]
