"""Yes and No at the start of a sentence are swapped half of the time, as words, and in that
sentence alone."""

import random

import pytest
from helpers import cuts, toy_tokenizer


class Scripted:
    """A source of randomness with one xi, that cuts before the last word."""

    def __init__(self, xi: float):
        self.xi, self.asked = xi, 0

    def random(self) -> float:
        self.asked += 1
        return self.xi

    def choice(self, words):
        return words[-1]


WHOLE_WORDS = (
    "Nobody Yesterday Note Nothing None Yesno No1 YES NO no_ No-one Now nor yesyes".split()
)


@pytest.mark.parametrize("word", [*WHOLE_WORDS, "Oh no", '"No'])
def test_no_swap_inside_a_word(word):
    text, rng = f"{word} it is so.", Scripted(0.99)
    [(_, cut)] = cuts(text, rng)
    assert cut.kept == f"{word} it is"
    assert rng.asked == 0


@pytest.mark.parametrize(
    ("word", "other"), [("Yes", "No"), ("No", "Yes"), ("yes", "no"), ("no", "yes")]
)
@pytest.mark.parametrize("behind", [",", ":", "", " -", ";"])
def test_swap_keeps_case_and_the_rest(word, other, behind):
    text = f"{word}{behind} there is no cup yes."
    for xi, said in ((0.5, other), (0.99, other), (0.49, word), (0.0, word)):
        [(_, cut)] = cuts(text, Scripted(xi))
        assert cut.kept == f"{said}{behind} there is no cup"


@pytest.mark.parametrize("word", ["Yes", "no"])
def test_swap_in_about_half_of_the_cases(word):
    kept = [
        cuts(f"{word}, it is a red cup.", random.Random(seed))[0][1].kept for seed in range(600)
    ]
    kept = [k for k in kept if k]
    assert len(kept) > 400
    swapped = sum(not k.startswith(word) for k in kept)
    assert abs(swapped / len(kept) - 0.5) < 0.08  # about four standard deviations


@pytest.mark.parametrize(("text", "said"), [("Yes.", "No"), ("no!", "yes"), ("No", "Yes")])
def test_a_swapped_word_is_never_cut_away(text, said):
    """In an answer of one word the cut falls behind it; in a longer one it may not fall before the
    second."""
    for seed in range(40):
        swaps = random.Random(seed).random() >= 0.5
        [(_, cut)] = cuts(text, random.Random(seed))
        assert cut.kept == (said if swaps else "")
        [(_, cut)] = cuts(f"{text[:2] if said != 'No' else 'Yes'}, it is so.", random.Random(seed))
        assert not swaps or cut.kept.startswith(said)


def test_the_swapped_word_belongs_to_its_own_sentence():
    """Later sentences, and the trunk, hold the true one (Eq. 7)."""
    text = "No, there is no cup. Yes, a dog is there. no lamp is there."
    (_, first), (_, second), (_, third) = cuts(text, Scripted(0.9))
    decode = toy_tokenizer().decode
    assert decode(first.kept_ids) == "Yes, there is no"
    assert decode(second.kept_ids) == "No, there is no cup. No, a dog is"
    assert decode(third.kept_ids) == "No, there is no cup. Yes, a dog is there. yes lamp is"
    ids = toy_tokenizer().encode(text)
    assert first.shared == 0 and decode(ids[: second.shared]) == "No, there is no cup."
    assert decode(ids[: third.shared]) == "No, there is no cup. Yes, a dog is there."
