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

WITHOUT_ENCODER = (
    "no --encoder: similarity is that of word trigrams, and keeps rephrasings of y+ that the "
    "paper's all-mpnet-base-v2 would have sampled again"
)


def load_similarity(encoder: str | None, device: str = "cpu") -> Similarity:
    """The pairwise phi: `similarity(sampled, chosen)` takes two lists of N texts and returns N
    cosines; lists of unlike length are a `ValueError`.

    With a folder: the cosine of its encoder's embeddings, in [-1, 1]; a `UserError` where the
    folder is not usable. With None: `lexical_cosine`, in [0, 1].
    """
    # Differs from the paper: without an encoder there are no embeddings of MPNet.
    if encoder is None:
        return lexical_cosines
    return SentenceEncoder.from_folder(encoder, device).cosine


def lexical_cosines(first: list[str], second: list[str]) -> list[float]:
    """`lexical_cosine` of `first[i]` and `second[i]`."""
    return [lexical_cosine(a, b) for a, b in zip(first, second, strict=True)]


def word_trigrams(text: str) -> Counter:
    """How often each three consecutive words occur; the text's start and end count as words."""
    words = ["", *re.findall(r"\w+", text.lower()), ""]
    return Counter(zip(words, words[1:], words[2:], strict=False))


def lexical_cosine(a: str, b: str) -> float:
    """Cosine of the two bags of lower-cased word trigrams, in [0, 1]; needs no encoder.

    Not single words: one wrong word among fifty gives 0.94, below eps_s = 0.97, where words alone
    would give 0.99. Two texts without words give 1, one without gives 0.
    """
    first, second = word_trigrams(a), word_trigrams(b)
    if not first or not second:
        return float(not first and not second)
    dot = sum(count * second[words] for words, count in first.items())
    first_square = sum(count * count for count in first.values())
    second_square = sum(count * count for count in second.values())
    return dot / math.sqrt(first_square * second_square)  # whole numbers in it, so never above 1
