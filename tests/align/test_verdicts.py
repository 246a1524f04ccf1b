"""What a model's log-probs, words and denials say of two responses, held against the plain way on
trained weights and on random ones."""

import pytest
import torch
from helpers import (
    plain_logp,
    random_toy,
    toy_assistant,
    toy_features,
    toy_model,
    toy_processor,
    toy_tokenizer,
)
from policies import adapted

from minialign.align import annotators, claims
from minialign.align.annotators import Comparison, ModelAnnotator, Verdict, question
from minialign.align.claims import Claim, claims_of, denied_claims
from minialign.align.verdicts import NAMES, lead_of, leads_by_logprobs
from minialign.data.records import Record
from minialign.model.llava import Llava
from minialign.toy import claims as toy_claims
from minialign.toy import world

# What an answer says: 1 for the first response, -1 for the second, None where it is not plain.
ANSWERS = {
    "Response 1": 1,
    "Response 2.": -1,
    " Response 1": 1,
    "response 1": 1,
    "**Response 2** is better": -1,
    '"Response 2" is the better one.': -1,
    "Response 2\n\nIt is.": -1,
    "Response 1. Response 2 names a dog that is not there.": 1,
    "Response 1 because it rests on the image": 1,
    "Response 1, because it rests on the image.": 1,
    "Response 2 is a better response.": -1,
    "I would choose Response 1.": 1,
    "Response 1 is better. However, Response 2 is better.": None,
    "Response 1 is better. But Response 2 is the best.": None,
    "Response 1 is more accurate. However, Response 2 is better overall.": None,
    "Response 1 is better. Actually, Response 2 is better.": None,
    "Response 1 is better. No, wait.": None,
    "Response 1 is better. That is false.": None,
    "Response 1 is better: false": None,
    "Response 1 is better, wrong": None,
    "Response 1 is better, I doubt it": None,
    "Response 2 is better, however it is wrong": None,
    "Response 1 is better, yet the second is the true one": None,
    "Response 1 because the other one is better": None,
    "Response 1 is better than Response 2": 1,
    "Response 1 is better than Response 2 because it does not name a dog.": 1,
    "Response 1 is better, since it says less.": 1,
    "Response 2 is clearly the best response.": -1,
    "Response 2 is more accurate": -1,
    "Based on the image content, Response 2 is better as it mentions the red cup": -1,
    "So Response 2 is better": -1,
    "I think that Response 1 is preferable.": 1,
    "I prefer Response 1": 1,
    "I prefer Response 1 over Response 2.": 1,
    "The better one is Response 2": -1,
    "The better is Response 1": 1,
    "There is a cup in the image. Response 2 is better.": -1,
    # Turned round, compared the other way, of both or of neither.
    "Response 1 is worse than Response 2": None,
    "Response 1 is not better": None,
    "Response 1 isn't better than Response 2": None,
    "Response 2 is less accurate": None,
    "Response 2 is no better": None,
    "Response 1 is better in no way": None,
    "Neither Response 1 nor Response 2 is better": None,
    "Neither is right. Response 1 is worse.": None,
    "Response 1 and Response 2 are equal": None,
    "Response 1 and Response 2 is better": None,
    "Response 1 or Response 2": None,
    "Response 1 or Response 2 is better": None,
    "Response 1 & Response 2": None,
    "Response 1 & Response 2 are alike": None,
    "Response 1/Response 2": None,
    "Response 1/2": None,
    "**Response 1** and **Response 2** tie": None,
    "Response 1 is better. Response 2 is better.": None,
    "Response 1. I prefer Response 2.": None,
    "Response 1 is better, but Response 2 is more accurate": None,
    "Response 1 is better, and so is Response 2": None,
    "Response 1 is better: not": None,
    "Response 1 is better, unless one looks": None,
    "Neither Response 1 nor\nResponse 2 is better": None,
    "Response 1 is better if one does not look": None,
    "Response 1 is better written": None,
    "Response 1 hallucinates a dog, so Response 2 is better": None,
    "Response 1 because it is worse": None,
    "I don't think Response 1 is better": None,
    "It is wrong that Response 2 is better": None,
    "Based on the image it is not true, Response 2 is better": None,
    "Given no Response 1, Response 2 is better": None,
    "Is Response 1 better?": None,
    "Response 1?": None,
    # Other words, and what is no response of the two.
    "Response 1: A red cup.": None,
    "Response 1 orders the objects well": None,
    "Response 2, android or not": None,
    "The response that begins": None,
    "Response 12": None,
    "Response 12 is better": None,
    "Response 1.5": None,
    "Response 3": None,
    "Response One is better": None,
    "Response1": None,
    "Yes.": None,
    "1": None,
    "": None,
}


@pytest.mark.parametrize("answer", ANSWERS, ids=repr)
def test_every_form_of_answer(answer):
    assert lead_of(answer) == ANSWERS[answer]


@pytest.mark.parametrize("answer", [a for a, lead in ANSWERS.items() if lead], ids=repr)
def test_the_other_number_is_the_other_response(answer):
    turned = answer.translate(str.maketrans("12", "21"))
    assert lead_of(turned) == -ANSWERS[answer]


# ---------------------------------------------------------------- log-probs


def comparison(*responses: str, index: int = 0, asked: str = "What is there?") -> Comparison:
    """Two responses about a scene of the validation split."""
    name = world.image_name("validation", index)
    record = Record(f"id-{index}", name, [("user", asked)], "chosen", "rejected")
    return Comparison(record, responses, world.open_picture(name))


@pytest.mark.parametrize("model", [toy_model, random_toy], ids=["trained", "random"])
@torch.no_grad()
def test_leads_are_those_of_the_plain_way(model):
    """One or two questions about each picture: a sequence per question and name, the end token left
    out."""
    assistant, tokenizer = toy_assistant(model()), toy_tokenizer()
    images = [toy_processor().prepare(comparison("", "", index=i).picture) for i in range(3)]
    features = toy_features((0, 1, 2))
    asked = [["Which one?", "A cup or a car, or neither of them?"], ["Is it?"], ["A", "B"]]
    leads = leads_by_logprobs(assistant, images, features, asked)
    assert [len(row) for row in leads] == [2, 1, 2]
    for picture, row, questions in zip(features, leads, asked, strict=True):
        for lead, text in zip(row, questions, strict=True):
            prompt = tokenizer.prompt([("user", text)])
            names = [tokenizer.response(name)[:-1] for name in NAMES]
            first, second = (plain_logp(model(), prompt, ids, picture) for ids in names)
            assert lead == pytest.approx((first - second).item(), abs=1e-4)


def test_the_likelier_name_is_the_verdict(monkeypatch):
    """In the order in which they were shown; an exact draw, and two orders that disagree, tie."""
    given = {"first": 0.25, "second": -3.0, "draw": 0.0}
    monkeypatch.setattr(
        annotators,
        "leads_by_logprobs",
        lambda assistant, images, features, questions: [
            [given[text.split("Question: ")[1].split("\n")[0]] for text in row] for row in questions
        ],
    )
    judge, both = ModelAnnotator(toy_assistant()), ModelAnnotator(toy_assistant(), both_orders=True)
    for i in range(6):
        first, second, draw = (comparison("a", "b", index=i, asked=asked) for asked in given)
        [order] = judge.orders(first)
        assert judge.choose([first, second, draw]) == [
            Verdict(order[0], first=True),
            Verdict(order[1], first=False),
            Verdict(None, "tie"),
        ]
        assert both.choose([first, second]) == [
            Verdict(None, "tie", first=True),
            Verdict(None, "tie", first=False),
        ]


@pytest.mark.parametrize("verdict", ["logprobs", "claims"])
def test_one_forward_pass_judges_all(monkeypatch, verdict):
    calls, real = [], Llava.forward
    monkeypatch.setattr(Llava, "forward", lambda *args: calls.append(1) or real(*args))
    judge = ModelAnnotator(toy_assistant(), verdict, both_orders=True)
    found = judge.choose([comparison("A cup.", "A car. A dog.", index=i) for i in range(3)])
    assert len(found) == 3 and len(calls) == 1


@torch.no_grad()
def test_the_policys_own_base_judges():
    """With `adapters_off` the verdicts are those of the base, by the plain way; the adapters are on
    again after it."""
    base, tokenizer = random_toy(), toy_tokenizer()
    policy = toy_assistant(adapted(base, 4, 8.0, scale=1.0))
    comparisons = [comparison("A red cup.", f"A blue car {i}.", index=i) for i in range(8)]
    off, on = ModelAnnotator(policy, adapters_off=True), ModelAnnotator(policy)
    with_adapters = on.choose(comparisons)
    by_base, verdicts = [], off.choose([looked_at(each, base) for each in comparisons])
    for each in comparisons:
        [order] = off.orders(each)
        prompt = tokenizer.prompt([("user", question(each, order))])
        _, tower = looked_at(each, base).seen
        names = [tokenizer.response(name)[:-1] for name in NAMES]
        first, second = (plain_logp(base, prompt, ids, tower[0]) for ids in names)
        by_base.append(order[int(second > first)])
    assert [verdict.better for verdict in verdicts] == by_base
    assert [verdict.better for verdict in with_adapters] != by_base
    assert on.choose(comparisons) == with_adapters


def looked_at(each: Comparison, model: Llava) -> Comparison:
    """The same, with what the model's tower sees."""
    image = toy_processor().prepare(each.picture)
    seen = (image, model.encode_images(image.pixels))
    return Comparison(each.record, each.responses, each.picture, seen)


# ---------------------------------------------------------------- claims


@pytest.mark.parametrize("model", [toy_model, random_toy], ids=["trained", "random"])
@torch.no_grad()
def test_denied_claims_are_those_of_the_plain_way(model):
    """By the answers alone, each behind its own question in a sequence of its own; a picture about
    which nothing is claimed has none denied."""
    assistant, tokenizer = toy_assistant(model()), toy_tokenizer()
    asked = [
        toy_claims.claims_of("", "A cup, a car and a dog. The north kite is red."),
        [],
        claims_of("What is there?", "A red cup. It is small!"),
    ]
    images = [toy_processor().prepare(comparison("", "", index=i).picture) for i in range(3)]
    features = toy_features((0, 1, 2))
    found = denied_claims(assistant, images, features, asked)
    for picture, about, denied in zip(features, asked, found, strict=True):
        for claim in about:
            prompt = tokenizer.prompt([("user", claim.question)])
            answers = [tokenizer.response(text)[:-1] for text in (claim.affirm, claim.deny)]
            affirmed, no = (plain_logp(model(), prompt, ids, picture) for ids in answers)
            assert (claim in denied) == (no > affirmed)
        assert denied <= set(about)


def test_the_trained_model_denies_what_is_not_there():
    """Of most objects, as it was taught to answer; so the truer description is the better one."""
    right = total = 0
    judge = ModelAnnotator(toy_assistant(), "claims", claims_of=toy_claims.claims_of)
    comparisons = []
    for index in range(12):
        scene = world.make_scene("validation", index)
        there = [name for name, _ in scene.cells.values()][:2]
        absent = [name for name in world.OBJECTS if name not in scene.objects][:2]
        texts = [" ".join(f"There is a {name}." for name in names) for names in (absent, there)]
        comparisons.append(comparison(*texts, index=index))
    for verdict in judge.choose(comparisons):
        total += verdict.better is not None
        right += verdict.better == 1
    assert total >= 9 and right >= 0.8 * total


def test_sentences_are_claims():
    first, second = claims_of("Where?", "A cup is here. Dr. No sits by it!")
    assert "Where?" in first.question and "A cup is here." in first.question
    assert "Dr. No sits by it!" in second.question and "A cup" not in second.question
    assert (first.affirm, first.deny) == ("Yes", "No") and claims_of("Where?", " ") == []


def test_the_toys_claims():
    """Every object that is named as there or denied, once, in the words of its own questions."""
    text = "This is a park. The north umbrella is red. The south umbrella is blue. There is no cup."
    assert toy_claims.claims_of("", text) == [
        Claim("Is there an umbrella?", "Yes, there is an umbrella.", "No, there is no umbrella."),
        Claim("Is there a cup?", "No, there is no cup.", "Yes, there is a cup."),
    ]
    assert toy_claims.claims_of("", "This is a park.") == []


DENIALS = [  # claims of both responses, which of them are denied, the better response
    ("ab", "cd", "c", 0),
    ("ab", "cd", "a", 1),
    ("ab", "cd", "ad", None),
    ("ab", "cd", "", None),
    ("ab", "ac", "a", None),
    ("ab", "ac", "ac", 0),
    ("aa", "ab", "a", 1),
    ("", "a", "a", 0),
    ("", "a", "", None),
]


@pytest.mark.parametrize(("first", "second", "denied", "better"), DENIALS)
def test_fewer_denied_claims_win(monkeypatch, first, second, denied, better):
    """However many claims there are; one that both make is asked about once."""
    asked = []

    def say(assistant, images, features, claims):
        asked.extend(claims)
        return [{claim for claim in row if claim.question in denied} for row in claims]

    monkeypatch.setattr(annotators, "denied_claims", say)
    judge = ModelAnnotator(
        toy_assistant(), "claims", claims_of=lambda _, text: [Claim(c, "Yes", "No") for c in text]
    )
    [verdict] = judge.choose([comparison(first, second)])
    assert verdict == Verdict(better, "" if better is not None else "tie")
    assert sorted(claim.question for claim in asked[0]) == sorted(set(first + second))


def test_a_picture_is_computed_once_for_all_its_claims(monkeypatch):
    """The trunk is what stands before the first question, with the picture in it."""
    trees, real = [], claims.branch_logps

    def noted(model, tree, features):
        trees.append(tree)
        return real(model, tree, features)

    monkeypatch.setattr(claims, "branch_logps", noted)
    judge = ModelAnnotator(toy_assistant(), "claims")
    judge.choose([comparison("A cup. A car.", "A cup. A dog. A bus.")])
    [tree] = trees
    assert tree.branch.max() == 2 * 4 and int((tree.feature >= 0).sum()) == 36
