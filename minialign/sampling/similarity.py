"""Alg. 1, line 18: how similar a sampled response is to the chosen one.

phi is the cosine of two sentence embeddings; a sample with phi >= eps_s (0.97) says too nearly the
same. Without a sentence encoder it is the cosine of word trigrams, which needs no download.
"""

import math
import re
from collections import Counter
from collections.abc import Callable

from minialign.sampling.sentence_encoder import SentenceEncoder

Similarity = Callable[[list[str], list[str]], list[float]]  # N texts, N texts -> N cosines


def load_similarity(encoder: str | None, device: str = "cpu") -> Similarity:
    """The pairwise phi: `similarity(sampled, chosen)` takes two lists of N texts and returns N
    cosines.

    With a folder: the cosine of its encoder's embeddings, in [-1, 1]. With None: `lexical_cosine`,
    in [0, 1]. A folder that is not usable is a `UserError` here, lists of unlike length are a
    `ValueError` later."""
    if encoder is not None:
        return SentenceEncoder.from_folder(encoder, device).cosine
    return lambda first, second: [lexical_cosine(a, b) for a, b in zip(first, second, strict=True)]


def word_trigrams(text: str) -> Counter:
    """How often each three consecutive words occur; the text's start and end count as words."""
    words = ["", *re.findall(r"\w+", text.lower()), ""]
    return Counter(zip(words, words[1:], words[2:], strict=False))


def lexical_cosine(a: str, b: str) -> float:
    """Cosine of the two bags of lower-cased word trigrams, in [0, 1]; needs no encoder.

    Not single words: one wrong word among fifty gives 0.94, below eps_s = 0.97, where words alone
    would give 0.99. Two texts without words give 1, one without gives 0."""
    first, second = (word_trigrams(text) for text in (a, b))
    if not first or not second:
        return float(not first and not second)
    dot = sum(count * second[word] for word, count in first.items())
    squares = (sum(count * count for count in words.values()) for words in (first, second))
    return dot / math.sqrt(math.prod(squares))  # all whole numbers, so never above 1
