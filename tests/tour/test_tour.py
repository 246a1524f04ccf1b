"""The tour: its page, its drawing and its document; what they say against what is computed anew."""

import html
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers import toy_assistant
from html_page import Page

import sample_bdhs
import train_dpo
from minialign.edge import with_defaults
from minialign.errors import UserError
from minialign.sampling.similarity import lexical_cosines
from minialign.tour import __main__ as tour_program
from minialign.tour import facts, stations
from minialign.tour.__main__ import Config, algorithm_1, main, measure
from minialign.tour.facts import Tour
from minialign.tour.idea import idea
from minialign.toy import world
from minialign.toy.benchmark import count_description, false_words
from minialign.toy.oracle import truth

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Config(pairs=8, steps=4)


def train_here(config: Config, out: Path) -> None:
    """What `train` does, without a process of its own, and at a rate by which a few steps tell."""
    flags = {"limit": config.pairs, "steps": config.steps, "batch_size": 8, "lora_rank": 4}
    train_dpo.main(train_dpo.Config(**flags, lr=3e-3, eval_images=0, out=str(out)))


@pytest.fixture(scope="module")
def tour(tmp_path_factory) -> Tour:
    """Measured once; changed by no test."""
    run = tmp_path_factory.mktemp("tour") / "run"
    train_here(CONFIG, run)
    return measure(CONFIG, run)


@pytest.fixture(scope="module")
def source(tour, tmp_path_factory) -> str:
    """The page."""
    path = tmp_path_factory.mktemp("page") / "tour.html"
    stations.write_stations(path, tour, CONFIG)
    return path.read_text("utf-8")


def sections(source: str) -> list[str]:
    """Of the page's eight stations, what stands in each."""
    return re.findall(r'<section id="station-\d">.*?</section>', source, re.DOTALL)


def numbers(text: str) -> list[float]:
    """What is printed in a text, true minus signs included."""
    return [float(n.replace("−", "-")) for n in re.findall(r"[−-]?\d+\.\d+", text)]


def test_the_page_has_every_station_in_order(source):
    page = Page(source)
    assert re.findall(r'id="station-(\d)"', source) == list("12345678")
    assert len(page.all("figure")) == len(page.all("section")) == 8
    assert len(page.all("h2")) == 8


@pytest.mark.parametrize("where", ["page", "docs/tour.md"])
def test_every_line_of_code_that_is_named_exists(source, where):
    text = source if where == "page" else (ROOT / where).read_text("utf-8")
    named = set(re.findall(r"([\w/]+\.py)::(\w+)", text))
    assert len(named) > 8
    for file, name in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text("utf-8"), re.M), name


def test_nothing_is_loaded_from_outside_and_nothing_runs(source, tour):
    for text in (source, idea(tour)):
        markup = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
        markup = markup.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//|url\(|@import|@font-face|<script|\bon\w+=", markup)
        assert "prefers-color-scheme: dark" in markup


def test_words_that_are_marked_are_those_the_oracle_counts():
    """On descriptions of one scene by another's, in which all kinds of errors occur."""
    seen = Counter()
    for i in range(200):
        scene = world.make_scene("validation", i)
        raw = world.alignment_records(1, "validation", 2 * i + 2)[0]
        text = raw["conversations"][1]["value"]
        if i % 3 == 0:  # and of its own, where colours may be wrong
            cells = [f"The {world.POSITIONS[c]} {o} is blue." for c, (o, _) in scene.cells.items()]
            text = " ".join(cells) + " There is no cup."
        objects, attributes, _ = truth(scene, text)
        marked = false_words(scene, text)
        settings = count_description(scene, text)["wrong_setting"]
        assert len(marked) == -objects - attributes + settings, text
        seen.update(text[start:end] in world.COLOURS for start, end in marked)
    assert min(seen[True], seen[False]) > 50


def test_false_words_of_the_page_are_marked(source, tour):
    """As many in the base's answer as the truth counts, and each of them says what is false."""
    counts = count_description(tour.subject.scene, tour.answer)
    marked = re.findall(r'<span class="false">(\w+)</span>', sections(source)[1])
    wrong = counts["hallucinated"] + counts["wrong_place"] + counts["wrong_colour"]
    wrong += counts["wrong_setting"]
    assert len(marked) == wrong > 0
    assert not set(marked) <= tour.subject.scene.objects.keys()


def test_algorithm_1_is_the_scripts(tour):
    """Iteration by iteration it does what sample_bdhs.py::sample does."""
    config = with_defaults(sample_bdhs.Config(), sample_bdhs.DEFAULTS)
    assistant = toy_assistant()
    again = replace(config, eps_s=0.5, seed=7)  # so that it goes through several iterations
    for subject in (tour.subject, tour.yes_no):
        for settings in (config, again):
            [expected] = sample_bdhs.sample(assistant, lexical_cosines, [subject], settings)
            rounds = algorithm_1(assistant, subject, settings)
            last = rounds[-1]
            assert expected.rejected == last.response and expected.iterations == len(rounds)
            assert expected.mask_seed == last.seed and expected.guided == last.guided
            assert expected.similarity == round(last.similarity, 4)


def test_yes_no_goes_through_every_line(tour):
    rounds = tour.yes_no_rounds
    assert rounds[0].again and len(rounds) > 1
    assert any(swap for each in rounds for swap in each.swapped)
    for each in rounds:
        for cut, swapped in zip(each.cuts, each.swapped, strict=True):
            assert swapped == (not tour.yes_no.record.chosen.startswith(cut.kept))


def test_first_words_have_the_probabilities_of_sampling(tour):
    """A completion whose first token is among the likeliest was drawn at that probability."""
    found = 0
    for each in (*tour.rounds, *tour.yes_no_rounds):
        for completion, likely in zip(each.completions, each.likely, strict=True):
            [word] = facts.token_words(toy_assistant(), completion.ids[:1])
            if word in dict(likely):
                found += 1
                assert math.exp(completion.logps[0]) == pytest.approx(dict(likely)[word], abs=1e-5)
    assert found > 3


def test_eq_3_follows_from_the_log_probs_that_are_printed(source, tour):
    section = sections(source)[5]
    cells = numbers(" ".join(re.findall(r"<td>(.*?)</td>", section)))
    chosen, ref_chosen, difference, rejected, ref_rejected, other = cells
    assert difference == pytest.approx(chosen - ref_chosen, abs=2e-4)
    assert other == pytest.approx(rejected - ref_rejected, abs=2e-4)
    equation = re.search(r'id="eq3">(.*?)</p>', section, re.DOTALL)[1]
    h, beta, scaled, sigmoid, loss = numbers(html.unescape(equation))
    assert beta == 0.1 and h == pytest.approx(difference - other, abs=3e-4) and abs(h) > 0.1
    assert scaled == pytest.approx(beta * h, abs=1e-4)
    assert sigmoid == pytest.approx(1 / (1 + math.exp(-beta * h)), abs=1e-4)
    assert loss == pytest.approx(-math.log(sigmoid), abs=2e-4)


def test_the_matrix_is_the_rule(source, tour):
    """A cell is drawn where a plain reading of the rule allows it, and nowhere else."""
    tree, expected = tour.tree, set()
    rows = list(
        zip(tree.positions[0], tree.branch[0], tree.fork[0], tree.visible[0].tolist(), strict=True)
    )
    for q, (position, branch, fork, _) in enumerate(rows):
        for k, (key_position, key_branch, _, visible) in enumerate(rows):
            near = key_branch == branch or (key_branch == 0 and key_position < fork)
            if visible and key_position <= position and near:
                expected.add((k + 3, q + 3))
    cells = re.findall(
        r'<rect class="\w+" x="(\d+)" y="(\d+)" width="1" height="1"/><text', sections(source)[3]
    )
    assert {(int(x), int(y)) for x, y in cells} == expected and len(cells) == len(expected)


def test_probabilities_have_moved_and_are_the_models(tour):
    """Against a plain forward pass of each beginning, and printed."""
    assistant, [first, *_] = toy_assistant(), tour.moved
    text = tour.subject.record.chosen
    ids = assistant.tokenizer.prompt(tour.subject.record.turns)
    ids += assistant.tokenizer.answer(text[: text.index(f" {first.place} ") + len(first.place) + 1])
    shares = {}
    for word in world.OBJECTS:
        one = [*ids, assistant.tokenizer.answer(f"The {word}")[1]]
        shares[word] = math.exp(facts.plain_logps(assistant, tour.subject, one, 1, None).item())
    words = (first.picture_word, first.prior_word)
    assert first.before == pytest.approx([shares[word] for word in words], abs=1e-5)
    assert first.picture_word in tour.subject.scene.objects
    assert max(shares, key=lambda word: shares[word] * (word != words[0])) == words[1]
    assert any(each.before != each.after for each in tour.moved)


def test_shared_and_plain_agree(source, tour):
    assert len(tour.differences) == 2 and max(tour.differences.values()) < 1e-5
    printed = [float(n) for n in re.findall(r"\d\.\de[−-]\d+", sections(source)[7])]
    assert printed == pytest.approx(list(tour.differences.values()), rel=0.1)


def test_the_drawing_shows_the_whole_idea(tour):
    drawing = ElementTree.fromstring(idea(tour))
    names = [element.tag.rpartition("}")[2] for element in drawing.iter()]
    assert names.count("image") == 2 and drawing.get("width") == "900"
    texts = " ".join("".join(element.itertext()) for element in drawing.iter() if element.text)
    for words in ("1  A picture", "2  Hide", "3  Let", "4  DPO", "before:", "after:"):
        assert words in texts
    marked = [e.text for e in drawing.iter() if e.get("class") == "false"]
    counts = count_description(tour.subject.scene, tour.answer)
    assert len(marked) > counts["hallucinated"] > 0
    committed = ElementTree.fromstring((ROOT / "docs/idea.svg").read_text("utf-8"))
    assert names[:3] == [element.tag.rpartition("}")[2] for element in committed.iter()][:3]


@pytest.mark.parametrize("name", ["tour.html", "idea.svg"])
def test_the_command_writes_what_its_name_says(tmp_path, monkeypatch, tour, name):
    monkeypatch.setattr(tour_program, "train", lambda config, out: None)
    monkeypatch.setattr(tour_program, "measure", lambda config, run: tour)
    out = tmp_path / name
    main(replace(CONFIG, out=str(out)))
    text = out.read_text("utf-8")
    assert text.startswith("<svg" if name.endswith("svg") else "<!DOCTYPE html>")
    with pytest.raises(UserError, match="is there already"):
        main(replace(CONFIG, out=str(out)))


@pytest.mark.parametrize("number", [-2, 7, 10**9])
def test_a_scene_that_is_none_is_refused_before_anything_is_done(tmp_path, number):
    with pytest.raises(UserError, match="--scene"):
        main(Config(out=str(tmp_path / "tour.html"), scene=number))


def test_a_training_that_fails_is_told(tmp_path):
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(UserError, match=r"train_dpo\.py .* ended with exit code 2"):
        tour_program.train(CONFIG, tmp_path / "run")


def test_the_document_runs():
    """Its blocks are one program."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tour.md").read_text("utf-8"), re.S)
    assert len(blocks) == 8
    exec("\n".join(blocks), {"__name__": "tour"})
