"""Lexical cosine, the similarity without an encoder: against values by hand, and its bounds."""

import math
import random

import pytest

from minialign.sampling.similarity import lexical_cosine, load_similarity


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("", "", 1.0),
        ("a", "", 0.0),
        ("", "a", 0.0),
        ("...", "?!", 1.0),  # no words on either side
        ("a b", "c d", 0.0),
        ("The cat.", "the CAT", 1.0),
        ("a b", "b a", 0.0),
        ("a b c d e", "a b c d x", 3 / 5),  # .ab abc bcd are shared of .ab abc bcd cde de.
        ("a a a a", "a a a", 4 / math.sqrt(18)),  # .aa 2aaa aa. and .aa aaa aa.: 4 / sqrt(6 * 3)
        ("a", "a b", 0.0),  # .a. and .ab ab.
        # One word is in three trigrams.
        ("the cat sat on the mat", "the cat lay on the mat", 3 / 6),
        ("Été déjà", "été DÉJÀ", 1.0),
    ],
)
def test_lexical_cosine_by_hand(a, b, expected):
    assert lexical_cosine(a, b) == pytest.approx(expected, abs=1e-12)
    assert load_similarity(None)([a, "x"], [b, "x"]) == [lexical_cosine(a, b), 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_lexical_cosine_is_bounded_symmetric_and_falls_as_words_change(seed):
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(rng.randint(5, 40))]
    text = rng.sample(words, len(words))
    previous, changed = 1.0, list(text)
    assert lexical_cosine(" ".join(text), " ".join(text)) == 1.0
    for i in rng.sample(range(len(text)), len(text)):
        changed[i] = f"other{i}"
        phi = lexical_cosine(" ".join(text), " ".join(changed))
        assert 0.0 <= phi <= previous < 1.0 or phi < previous == 1.0
        assert phi == lexical_cosine(" ".join(changed), " ".join(text))
        previous = phi
    assert previous == 0.0
