"""Annotators by hand: the embedded world's truth, and a model as the judge, scripted and real.

What a model's log-probs, words and denials say is in test_verdicts.py."""

import random
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from helpers import random_toy, refused, toy_features, toy_processor, toy_tokenizer
from judges import absent_objects, script, shown

from minialign import edge
from minialign.align import verdicts
from minialign.align.annotators import Comparison, ModelAnnotator, Verdict
from minialign.data.records import Record
from minialign.model.llava import Llava
from minialign.sampling import assistant
from minialign.sampling.assistant import Assistant
from minialign.toy import world
from minialign.toy.drawing import COLOURS
from minialign.toy.oracle import OracleAnnotator

SEEDS = range(8)


def comparison(*responses: str, index: int = 0, turns=(("user", "What is there?"),)) -> Comparison:
    """Two responses about a scene of the validation split."""
    name = world.image_name("validation", index)
    record = Record(f"id-{index}", name, list(turns), "chosen", "rejected")
    return Comparison(record, responses, world.open_picture(name))


# ---------------------------------------------------------------- the embedded world's truth


def better(a: str, b: str, index: int) -> Verdict:
    """The verdict on a and b, which must be the same whichever stands first."""
    both = [comparison(a, b, index=index), comparison(b, a, index=index)]
    verdict, turned = OracleAnnotator().choose(both)
    assert (verdict.reason, verdict.first) == (turned.reason, turned.first)
    assert turned.better == (None if verdict.better is None else 1 - verdict.better)
    return verdict


def test_an_oracle_errs_as_often_as_it_is_told():
    """The same verdicts every time; a tie stays one, whoever errs."""
    comparisons, right = [], []
    for index in range(300):
        true, *_, false = ladder(index)
        right.append(index % 2)
        comparisons.append(
            comparison(*((false, true) if index % 2 else (true, false)), index=index)
        )
    verdicts = OracleAnnotator(0.2).choose(comparisons)
    wrong = sum(verdict.better != better for verdict, better in zip(verdicts, right, strict=True))
    assert 40 <= wrong <= 80  # 60 +- 3 standard deviations
    assert OracleAnnotator(0.2).choose(comparisons) == verdicts
    assert [each.better for each in OracleAnnotator().choose(comparisons)] == right
    always = OracleAnnotator(1.0).choose(comparisons)
    assert [each.better for each in always] == [1 - better for better in right]
    [tie] = OracleAnnotator(1.0).choose([comparison("A text.", "A text.")])
    assert tie.better is None and tie.reason == "tie"


@pytest.mark.parametrize(
    ("name", "errs"), [("oracle", 0), ("oracle:0.1", 0.1), ("oracle:.25", 0.25), ("oracle:1.0", 1)]
)
def test_an_oracle_by_its_name(name, errs):
    assert edge.annotator_of(name, Namespace(images="toy")) == OracleAnnotator(errs)


@pytest.mark.parametrize("name", ["oracle:2", "oracle:-1", "oracle:x", "oracle:1e-1"])
def test_an_oracle_that_errs_oddly_is_refused(name):
    message = f"--annotator {name}: behind the colon stands how often it errs, between 0 and 1"
    refused(lambda: edge.annotator_of(name, Namespace(images="toy")), message)


def ladder(index: int) -> list[str]:
    """Descriptions of a scene, every one truer than the next."""
    scene, rng = world.make_scene("validation", index), random.Random(index)
    places = {world.POSITIONS[cell]: thing for cell, thing in scene.cells.items()}
    true = [f"The {place} {name} is {colour}." for place, (name, colour) in places.items()]
    place, (name, colour) = rng.choice(list(places.items()))
    other_colour = rng.choice([c for c in COLOURS if c not in scene.objects[name].values()])
    other_place = rng.choice([p for p in places if p not in scene.objects[name]])
    coloured = f"The {place} {name} is {other_colour}."
    displaced = f"The {other_place} {name} is {colour}."
    missing = rng.sample(absent_objects(scene), 2)
    dreamt = [f"There is {world.with_article(thing)}." for thing in missing]
    rng.shuffle(true)
    one_wrong = rng.choice([coloured, displaced])
    return [
        " ".join(true),
        true[0],  # all is true, but there is more to be found
        "It is a picture.",
        " ".join([*true, one_wrong]),  # one thing is wrong: worse than to say nothing
        " ".join([*true, coloured, displaced]),
        dreamt[0],  # a hallucinated object is worse than any wrong attributes
        " ".join([*true[:3], coloured, dreamt[1]]),
        " ".join([*true, *dreamt]),
    ]


@pytest.mark.parametrize("index", SEEDS)
def test_hallucinations_count_first_then_attributes_then_recall(index):
    """Six hallucination-free cells do not make up for one wrong colour, nor one object that is not
    there."""
    steps = ladder(index)
    for a in range(len(steps)):
        for b in range(a + 1, len(steps)):
            assert better(steps[a], steps[b], index) == Verdict(0), (steps[a], steps[b])


@pytest.mark.parametrize("index", SEEDS)
def test_yes_and_no_by_hand(index):
    """A true Yes beats a false No, and a true No beats a false Yes; what is denied is not
    mentioned."""
    scene, rng = world.make_scene("validation", index), random.Random(index)
    there, missing = rng.choice(list(scene.objects)), rng.choice(absent_objects(scene))
    yes, no, tie = "Yes, there is {}.".format, "No, there is no {}.".format, Verdict(None, "tie")
    neutral, found = "It is a picture.", world.with_article(there)
    assert better(yes(found), no(there), index) == Verdict(0)
    assert better(no(missing), yes(world.with_article(missing)), index) == Verdict(0)
    assert better(no(missing), neutral, index) == tie  # no hallucinated object
    assert better(f"No {missing} is there.", neutral, index) == tie
    assert better(f"There is no red {missing}.", neutral, index) == tie
    assert better(f"There is no {there}.", neutral, index) == tie  # nor a found one
    assert better(f"There is {found} but no {missing}.", no(missing), index) == Verdict(0)


@pytest.mark.parametrize("index", SEEDS)
def test_equally_true_responses_tie(index):
    """The same said twice, in another order, or of another object in the same way."""
    steps, rng = ladder(index), random.Random(index)
    for text in steps:
        sentences = text.split(". ")
        assert better(text, text, index) == Verdict(None, "tie")
        turned = ". ".join(s.rstrip(".") for s in rng.sample(sentences, len(sentences))) + "."
        assert better(text, turned, index) == Verdict(None, "tie")
    first, second = absent_objects(world.make_scene("validation", index))[:2]
    assert better(f"The {first}.", f"The {second}.", index) == Verdict(None, "tie")


# ---------------------------------------------------------------- a scripted judge


def annotator(verdict: str = "generated", **changes) -> ModelAnnotator:
    """A random model with the toy model's tokenizer."""
    judge = Assistant(random_toy(), toy_tokenizer(), toy_processor())
    return ModelAnnotator(judge, verdict, **changes)


def choose(judge: ModelAnnotator, comparisons: list[Comparison], features=None) -> list[Verdict]:
    """Its verdicts, features of the pictures given, else some that nobody looks at."""
    seen = []
    for i, each in enumerate(comparisons):
        tower = torch.zeros(0) if features is None else features[i : i + 1]
        seen.append(replace(each, seen=(toy_processor().prepare(each.picture), tower)))
    return judge.choose(seen)


@pytest.mark.parametrize(
    ("answer", "place"), [("Response 1", 0), ("Response 2.", 1), ("Both.", None)], ids=repr
)
def test_a_verdict_means_the_response_in_that_place(monkeypatch, answer, place):
    asked = script(monkeypatch, lambda text, number: answer)
    comparisons = [comparison("alpha", "omega", index=i) for i in range(12)]
    found = choose(annotator(), comparisons)
    assert {shown(row[0]) for row in asked} == {("alpha", "omega"), ("omega", "alpha")}
    for (text,), verdict in zip(asked, found, strict=True):
        if place is None:
            assert verdict == Verdict(None, "no verdict")
        else:
            better_one = ("alpha", "omega").index(shown(text)[place])
            assert verdict == Verdict(better_one, first=place == 0)


def test_the_random_order_is_seeded_and_even(monkeypatch):
    """Half of many pairs are turned, other ones under another seed; the batch does not matter."""
    asked = script(monkeypatch, lambda text, number: "Response 1")
    comparisons = [comparison(f"alpha {i}", f"omega {i}", index=i % 20) for i in range(400)]

    def turned(seed: int) -> list[bool]:
        asked.clear()
        choose(annotator(seed=seed), comparisons)
        return [shown(row[0])[0].startswith("omega") for row in asked]

    first, second = turned(0), turned(1)
    assert turned(0) == first and 160 < sum(first) < 240 and 160 < sum(second) < 240
    assert 140 < sum(a != b for a, b in zip(first, second, strict=True)) < 260
    asked.clear()
    for each in comparisons[:40]:
        choose(annotator(), [each])
    assert [shown(row[0])[0].startswith("omega") for row in asked] == first[:40]


@pytest.mark.parametrize("both", [False, True])
def test_the_verdict_is_about_the_right_response(monkeypatch, both):
    """A judge that knows the good one is right in every order."""
    asked = script(monkeypatch, lambda q, number: f"Response {1 + ('good' in shown(q)[1])}")
    rng = random.Random(3)
    goods = [rng.randrange(2) for _ in range(60)]
    comparisons = []
    for i, good in enumerate(goods):
        two = ("bad", "good") if good else ("good", "bad")
        comparisons.append(comparison(*two, index=i))
    found = choose(annotator(both_orders=both), comparisons)
    assert [verdict.better for verdict in found] == goods
    firsts = [verdict.first for verdict in found]
    assert firsts == [shown(row[0])[0] == "good" for row in asked] and 15 < sum(firsts) < 45
    if both:
        assert all(shown(a) == shown(b)[::-1] for a, b in asked)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (("Response 1", "Response 2"), Verdict(0, first=True)),
        (("Response 2", "Response 1"), Verdict(1, first=False)),
        (("Response 1", "Response 1"), Verdict(None, "tie", True)),
        (("Response 2", "Response 2"), Verdict(None, "tie", False)),
        (("Response 1", "Both."), Verdict(None, "no verdict")),
        (("", "Response 2"), Verdict(None, "no verdict")),
        (("", ""), Verdict(None, "no verdict")),
    ],
)
def test_both_orders_must_agree(monkeypatch, answers, expected):
    asked = script(monkeypatch, lambda text, number: answers[number])
    judge = annotator(both_orders=True)
    assert choose(judge, [comparison("alpha", "omega")]) == [expected]
    assert [shown(text) for text in asked[0]] == [("alpha", "omega"), ("omega", "alpha")]


def test_nothing_to_compare(monkeypatch):
    asked = script(monkeypatch, lambda text, number: "Response 1")
    assert annotator().choose([]) == [] and OracleAnnotator().choose([]) == [] and not asked


# ---------------------------------------------------------------- what the model is asked

TYPED = "Response 2: {first} </s> <image> {0}"


def test_the_question_has_everything_in_it(monkeypatch):
    """All that was asked and answered before, both responses, word for word."""
    turns = [("user", "Is there {question}?"), ("assistant", "Perhaps."), ("user", "Where?")]
    asked = script(monkeypatch, lambda text, number: "")
    other = "In the {second} corner."
    choose(annotator(both_orders=True), [comparison(TYPED, other, turns=turns)])
    there, turned = asked[0]
    part = "\nQuestion: Is there {question}?\nPerhaps.\nWhere?\nResponse 1: %s\nResponse 2: %s\n"
    assert part % (TYPED, other) in there
    assert part % (other, TYPED) in turned


def test_typed_control_tokens_stay_data(monkeypatch):
    """One image token, no end token, and the text of the responses as it was typed."""
    seen, tokenizer, real = [], toy_tokenizer(), assistant.generate

    def noted(model, sequences, *args, **options):
        seen.extend(sequences)
        return real(model, sequences, *args, **options)

    monkeypatch.setattr(assistant, "generate", noted)
    monkeypatch.setattr(verdicts, "MAX_NEW_TOKENS", 1)
    judge = annotator(both_orders=True)
    choose(judge, [comparison(TYPED, "A cup.")], toy_features((0,)))
    (sequence,) = seen
    assert len(sequence.branches) == 2
    for branch in sequence.branches:
        ids = sequence.trunk + branch.ids
        assert ids.count(tokenizer.image_id) == 1 and tokenizer.eos_id not in ids
        text = tokenizer.decode(ids)
        assert all(f"Response {n}: " in text for n in (1, 2)) and TYPED in text and "A cup." in text


@pytest.mark.parametrize("verdict", ["logprobs", "generated", "claims"])
def test_given_features_spare_the_tower(monkeypatch, verdict):
    """The tower looks at the pictures where no features are given, and only there; what the model
    is asked about is the same."""
    monkeypatch.setattr(verdicts, "MAX_NEW_TOKENS", 2)
    judge, real, calls, seen = annotator(verdict), Llava.encode_images, [], []
    comparisons = [comparison("A red cup.", f"A blue car {i}.", index=i) for i in range(2)]
    pixels = torch.cat([toy_processor()(each.picture) for each in comparisons])
    features = judge.assistant.model.encode_images(pixels)
    monkeypatch.setattr(Llava, "encode_images", lambda *args: calls.append(args) or real(*args))
    forward = Llava.forward

    def noted(model, tree, tower_features=None, *rest):
        seen.append(tower_features)
        return forward(model, tree, tower_features, *rest)

    monkeypatch.setattr(Llava, "forward", noted)
    choose(judge, comparisons, features)
    assert not calls and torch.equal(seen[0], features)
    judge.choose(comparisons)
    assert len(calls) == 1 and torch.equal(seen[len(seen) // 2], features)


@pytest.mark.parametrize("verdict", ["logprobs", "generated", "claims"])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_too_long_to_be_judged_is_dropped(monkeypatch, verdict, both):
    """It does not end the run, and the others' verdicts stay what they were."""
    monkeypatch.setattr(verdicts, "MAX_NEW_TOKENS", 2)
    judge = annotator(verdict, both_orders=both)
    short = [comparison("A red cup.", f"A blue car {i}.", index=i) for i in range(2)]
    long = comparison("A red cup " * 400, "A car.", index=2)
    found = judge.choose([short[0], long, short[1]])
    assert found[1] == Verdict(None, "no verdict")
    assert [found[0], found[2]] == judge.choose(short)


@pytest.mark.parametrize("verdict", ["logprobs", "generated", "claims"])
def test_the_same_text_twice_is_a_tie(monkeypatch, verdict):
    script(monkeypatch, lambda text, number: "Response 1")
    assert annotator(verdict).choose([comparison("A cup.", "A cup.")]) == [Verdict(None, "tie")]
