"""The report page: escaped, self-contained, well formed, true to the masks, written whole or not at
all.
"""

import base64
import html
import io
import math
import os
import random
import re
from dataclasses import replace

import pytest
from html_page import EVIL, Page
from PIL import Image

from minialign.data.records import Record
from minialign.errors import UserError
from minialign.evaluation import charts, report
from minialign.evaluation.report import Answer, ReportPair, StepAnswers, write_report

BDHS = {"iterations": 3, "similarity": 0.871, "guided": True}


def make_record(**changes) -> Record:
    turns = [("user", "Describe it.")]
    return replace(Record("7", "a.png", turns, "A red ball.", "A blue ball.", bdhs=BDHS), **changes)


def make_pair(**changes) -> ReportPair:
    pair = ReportPair(
        record=make_record(),
        image=Image.new("RGB", (96, 96), (200, 40, 0)),
        visible=[True, False, False, True],
        tokens="2 of 4",
    )
    return replace(pair, **changes)


def make_metrics(steps: int) -> list[dict]:
    keys = [key for _, keys, _ in charts.CHARTS for key in keys]
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
    unknown = make_pair(record=make_record(bdhs={}), visible=None, tokens="–")
    pairs = [make_pair(), unknown]
    config = {"seed": 0, "data": {"root": "x"}}
    source, page = write(tmp_path, "Run 1", config, pairs, make_metrics(9), RESULT)
    order = [
        "Run 1",
        "UTC · seed 0",
        "Results",
        "Training",
        "Pairs",
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
    assert "iterations 3 · similarity 0.871 · guided yes · visible image tokens 2 of 4" in facts
    assert "iterations – · similarity – · guided – · visible image tokens –" in facts


def test_everything_from_outside_stays_text(tmp_path):
    turns = [("user", EVIL)]
    record = make_record(id=EVIL, turns=turns, chosen=EVIL + " one", rejected=EVIL + " two")
    pair = make_pair(record=record)
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
    of_chosen, of_rejected = report.word_diff(chosen, rejected)
    assert report.tagged(chosen, {"ins": of_chosen}) == left
    assert report.tagged(rejected, {"del": of_rejected}) == right


def test_word_diff_of_long_texts_ignores_no_frequent_word():
    # From 200 words on, difflib would by default treat frequent words as junk and mark them all.
    text = " ".join(["the cat and the dog"] * 60)
    assert report.word_diff("left " + text, "right " + text) == ([(0, 4)], [(0, 5)])


def test_marks_that_overlap_and_cuts():
    """Each piece is in all elements that cover it, and a cut falls between two letters."""
    spans = {"del": [(2, 6)], "false": [(4, 8)]}
    assert report.tagged("ab<def>hij", spans, [0, 5]) == (
        '<span class="cut"></span>ab<del>&lt;d</del>'
        '<span class="false"><del>e</del></span>'
        '<span class="cut"></span><span class="false"><del>f</del></span>'
        '<span class="false">&gt;h</span>ij'
    )
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("a<&>b \n") for _ in range(rng.randint(0, 20)))
        cut = sorted(rng.randint(0, len(text)) for _ in range(4))
        marked = report.tagged(text, {"ins": [tuple(cut[:2])], "x": [tuple(cut[1:3])]}, cut[3:])
        assert html.unescape(re.sub("<[^>]+>", "", marked)) == text


def test_false_words_and_cuts_of_pairs(tmp_path):
    """They are marked on both sides and explained, and neither is where nothing is known."""
    source, page = write(tmp_path, pairs=[make_pair()])
    assert "the picture shows it otherwise" not in page.text and "has cut" not in page.text
    known = make_pair(cuts=([2], [2]), false=([(2, 5)], [(2, 6)]))
    source, page = write(tmp_path, pairs=[known])
    assert 'A <span class="cut"></span><span class="false"><ins>red</ins></span> ball.' in source
    assert 'A <span class="cut"></span><span class="false"><del>blue</del></span> ball.' in source
    assert "The chosen response may be wrong, too" in " ".join(page.text.split())


def test_answers_before_and_after_and_samples_of_steps(tmp_path):
    picture = Image.new("RGB", (8, 8))
    texts = ("A <b>cat</b>.", "A dog.")
    before, after = (Answer(picture, "What is it?", text, [(2, 5)]) for text in texts)
    sampled = [StepAnswers("step 3, a.png", [("preferred", after), ("not preferred", before)])]
    path = tmp_path / "report.html"
    answers = {"before": [before], "after": [after]}
    write_report(path, "Run", {}, [], [], {}, answers, sampled)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    words = " ".join(page.text.split())
    assert "What is it? beforeA <b>cat</b>. afterA dog." in words and "step 3, a.png" in words
    assert "preferredA dog. not preferredA <b>cat</b>." in words
    assert source.count('A <span class="false">dog</span>.') == 2 and len(page.all("img")) == 2


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
    assert rows[3] == [*"words in a description length – 81.3 [80.0, 82.0]".split()]
    _, page = write(tmp_path, result={"before": {"x": dict.fromkeys(("value", "low", "high"))}})
    assert "x–" in page.text and "None" not in page.text


def test_empty_inputs_are_said_in_words(tmp_path):
    _, page = write(tmp_path)
    for sentence in ("No results were", "No training metrics were"):
        assert sentence in page.text
    assert not page.all("svg") and "Pairs" not in page.text


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
    assert ticks == ["0.5", "1", "1.5", "0", "1", "2", "3", "4", "5", "step"]
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
        "1",
        "2",
        "3",
        *("10", "20", "30", "step"),
    ]
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert f"<span>{key}</span>" in source
    # From the lower left corner of the frame to its right edge, half way up.
    left, right, bottom, top = charts.LEFT, charts.RIGHT, charts.BOTTOM, charts.TOP
    assert f'd="M{left:.1f} {bottom:.1f}L{right:.1f} {(bottom + top) / 2:.1f}h0"' in chart
    assert f'd="M{left:.1f} {top:.1f}h0"' in chart  # one value: a dot


def test_accuracy_spans_zero_to_one(tmp_path):
    source, _ = write(tmp_path, metrics=[{"step": s, "rewards/accuracies": 0.6} for s in (1, 2)])
    chart = re.search("<svg viewBox.*?</svg>", source).group()
    found = re.findall(r"<text[^>]*>([^<]*)</text>", chart)
    assert found == ["0", "0.2", "0.4", "0.6", "0.8", "1", "1", "2", "step"]


def test_no_accuracy_of_a_step_in_which_the_policy_is_the_reference():
    """All rewards are 0 there, or nearly: which of two is larger says nothing."""
    rows = [
        {"step": 1, "rewards/accuracies": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 1e-7},
        {"step": 2, "rewards/accuracies": 0.5, "rewards/chosen": 0.1, "rewards/rejected": 0.0},
    ]
    assert charts.curve(rows, "rewards/accuracies", 1) == [(2, 0.5)]


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.07, 0.08, [-0.05, 0, 0.05]),
        (1, 374, [100, 200, 300]),
        (5, 5, [5]),
        (0.6931, 0.6932, [0.6931, 0.69312, 0.69314, 0.69316, 0.69318, 0.6932]),
    ],
)
def test_ticks_are_round_numbers(low, high, found):
    assert charts.ticks(low, high) == pytest.approx(found)


def test_random_ticks():
    rng = random.Random(0)
    for _ in range(2000):
        low = rng.uniform(-10, 10) * 10 ** rng.randint(-5, 5)
        high = low + rng.uniform(0.1, 10) * 10 ** rng.randint(-5, 5)
        found = charts.ticks(low, high)
        slack = 1e-6 * (high - low)
        assert 2 <= len(found) <= 6 and low - slack <= found[0] and found[-1] <= high + slack


def test_moving_mean():
    """A straight line stays what it is, to its ends; noise is averaged."""
    line = [(float(i), 3.0 * i) for i in range(100)]
    found = [value for _, value in charts.moving_mean(line)]
    assert found == pytest.approx([value for _, value in line])
    noise = [(i, (-1.0) ** i) for i in range(100)]
    assert max(abs(value) for _, value in charts.moving_mean(noise)[10:-10]) < 0.1


def test_values_where_one_points(tmp_path):
    metrics = [{"step": s, "logps/chosen": -s, "logps/rejected": -2 * s} for s in range(1, 9)]
    source, _ = write(tmp_path, metrics=metrics)
    titles = re.findall("<title>(step.*?)</title>", source)
    assert titles == [f"step {s}, logps/chosen −{s}, logps/rejected −{2 * s}" for s in range(1, 9)]


def test_long_runs_are_averaged():
    line = charts.curve(make_metrics(1000), "loss", 5)
    assert len(line) == 200
    assert line[0] == (4, pytest.approx(-2 / 7)) and line[-1][0] == 999
    rows = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": math.nan},
        {"step": 3},
        {"step": 4, "loss": 4.0},
        {"step": 5, "loss": math.nan},
    ]
    assert charts.curve(rows, "loss", 2) == [(4, 2.5)]


def test_long_runs_keep_the_page_small(tmp_path):
    source, page = write(tmp_path, metrics=make_metrics(20_000))
    assert "Each point is the mean of 100 logged values." in page.text
    assert len(source) < 120_000


@pytest.mark.parametrize("fault", ["rename", "render"])
def test_a_fault_leaves_the_old_page_and_no_partial_one(tmp_path, monkeypatch, fault):
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    guided = "perhaps" if fault == "render" else None
    pairs = [make_pair(), make_pair(record=make_record(bdhs={"guided": guided}))]
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
