"""Annotators by hand: the embedded world's truth, and a model as the judge, scripted and real."""

import random

import pytest
import torch
from helpers import plain_greedy, random_toy, toy_features, toy_processor, toy_tokenizer
from judges import absent_objects, script, shown
from policies import adapted

from minialign.align.annotators import Comparison, ModelAnnotator, Verdict, question
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


def annotator(model: Llava | None = None, **changes) -> ModelAnnotator:
    """A model, else a random one, with the toy model's tokenizer."""
    return ModelAnnotator(
        Assistant(model or random_toy(), toy_tokenizer(), toy_processor()), **changes
    )


def choose(judge: ModelAnnotator, comparisons: list[Comparison], features=None) -> list[Verdict]:
    """Its verdicts, features of the pictures given, else some that nobody looks at."""
    images = [toy_processor().prepare(each.picture) for each in comparisons]
    return judge.choose(comparisons, (images, torch.zeros(0) if features is None else features))


PLACES = {
    "Response 1": 0,
    "Response 2": 1,
    "Response 1 is better, since it says less.": 0,
    "Response 2.": 1,
    "**Response 2** is better": 1,
    " Response 1": 0,
    '\n"Response 2": it rests on the image.': 1,
    "Response 1 is better than Response 2.": 0,
    "Response 2\n\nIt is.": 1,
    "response 1": None,
    "RESPONSE 1": None,
    "Response 12": None,
    "Response 3": None,
    "Response": None,
    "Response One": None,
    "Response1": None,
    "1": None,
    "": None,
    "The better is Response 1": None,
    "Response 1 and Response 2 are equal": None,
    "Response 1 or Response 2": None,
    "Response 1 and 2": None,
    "Response 1/2": None,
    "Response 1/Response 2": None,
    "Response 2 / Response 1": None,
    "Response 1 & Response 2 are alike": None,
    "Response 1&2": None,
    "**Response 1** and **Response 2** tie": None,
    "Response 1 orders the objects well": 0,
    "Response 2, android or not": 1,
}


@pytest.mark.parametrize("answer", PLACES, ids=repr)
def test_every_form_of_answer(monkeypatch, answer):
    """A verdict begins with one of the two; it means the response that stood in that place."""
    asked = script(monkeypatch, lambda text, number: answer)
    comparisons = [comparison("alpha", "omega", index=i) for i in range(12)]
    verdicts = choose(annotator(), comparisons)
    assert {shown(row[0]) for row in asked} == {("alpha", "omega"), ("omega", "alpha")}
    for (text,), verdict in zip(asked, verdicts, strict=True):
        place = PLACES[answer]
        if place is None:
            assert verdict == Verdict(None, "unparsable")
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
    asked = script(monkeypatch, lambda q, number: f"Response {1 + ('good' in shown(q)[1])} it is")
    rng = random.Random(3)
    goods = [rng.randrange(2) for _ in range(60)]
    comparisons = []
    for i, good in enumerate(goods):
        two = ("bad", "good") if good else ("good", "bad")
        comparisons.append(comparison(*two, index=i))
    verdicts = choose(annotator(both_orders=both), comparisons)
    assert [verdict.better for verdict in verdicts] == goods
    firsts = [verdict.first for verdict in verdicts]
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
        (("Response 1", "Both."), Verdict(None, "unparsable")),
        (("", "Response 2"), Verdict(None, "unparsable")),
        (("", ""), Verdict(None, "unparsable")),
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
    judge = annotator(both_orders=True, max_new_tokens=1)
    choose(judge, [comparison(TYPED, "A cup.")], toy_features((0,)))
    (sequence,) = seen
    assert len(sequence.branches) == 2
    for branch in sequence.branches:
        ids = sequence.trunk + branch.ids
        assert ids.count(tokenizer.image_id) == 1 and tokenizer.eos_id not in ids
        text = tokenizer.decode(ids)
        assert all(f"Response {n}: " in text for n in (1, 2)) and TYPED in text and "A cup." in text


def said_by(monkeypatch, judge: ModelAnnotator, comparisons, features) -> list[list[str]]:
    """What the judge's model answers; without features it looks at the pictures itself."""
    said, real = [], Assistant.answers

    def noted(*args):
        said.extend(real(*args))
        return said

    with monkeypatch.context() as patch:
        patch.setattr(Assistant, "answers", noted)
        if features is None:
            judge.choose(comparisons)
        else:
            choose(judge, comparisons, features)
    return said


def test_the_policys_own_base_judges(monkeypatch):
    """With `adapters_off` the answers are those of the base, by the plain way; the adapters are on
    again after it."""
    base, tokenizer, limit = random_toy(), toy_tokenizer(), 5
    model = adapted(base, 4, 8.0, scale=1.0)
    off = annotator(model, adapters_off=True, max_new_tokens=limit)
    on = annotator(model, max_new_tokens=limit)
    comparisons = [comparison("A red cup.", f"A blue car {i}.", index=i) for i in range(3)]
    features = toy_features((0, 1, 2))
    expected = []
    for each, picture in zip(comparisons, features, strict=True):
        prompt = tokenizer.prompt([("user", question(each, off.orders(each)[0]))])
        ids, _ = plain_greedy(base, prompt, picture, {tokenizer.eos_id}, limit)
        expected.append([tokenizer.decode(ids)])
    with_adapters = said_by(monkeypatch, on, comparisons, features)
    assert said_by(monkeypatch, off, comparisons, features) == expected
    assert all(a != b for a, b in zip(with_adapters, expected, strict=True))
    assert said_by(monkeypatch, on, comparisons, features) == with_adapters


def test_given_features_spare_the_tower(monkeypatch):
    """The tower looks at the pictures where no features are given, and only there; the answers are
    the same."""
    judge, real, calls = annotator(max_new_tokens=4), Llava.encode_images, []
    comparisons = [comparison("A red cup.", f"A blue car {i}.", index=i) for i in range(2)]
    pixels = torch.cat([toy_processor()(each.picture) for each in comparisons])
    features = judge.assistant.model.encode_images(pixels)
    monkeypatch.setattr(Llava, "encode_images", lambda *args: calls.append(args) or real(*args))
    given = said_by(monkeypatch, judge, comparisons, features)
    assert not calls
    assert said_by(monkeypatch, judge, comparisons, None) == given and len(calls) == 1
    assert said_by(monkeypatch, judge, comparisons, features.flip(0)) != given  # they matter


@pytest.mark.parametrize("both", [False, True])
def test_what_is_too_long_to_be_judged_is_dropped(both):
    """It does not end the run, and the others' verdicts stay what they were."""
    judge = annotator(both_orders=both)
    short = [comparison("A red cup.", f"A blue car {i}.", index=i) for i in range(2)]
    long = comparison("A red cup. " * 400, "A car.", index=2)
    verdicts = judge.choose([short[0], long, short[1]])
    assert verdicts[1] == Verdict(None, "unparsable")
    assert [verdicts[0], verdicts[2]] == judge.choose(short)
