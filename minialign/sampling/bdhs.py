"""Eq. 7 and Algorithm 1, l. 9-16: y+ cut into beginnings of sentences, and joined with what the
policy makes of them. Pure functions of strings and token ids; the loop is in sample_bdhs.py.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

# Silent in the paper: what ends a sentence. The full stops of Chinese and Japanese wherever they
# stand, with what closes behind them; the others before white space or the end.
CLOSERS = "\"'”’»)\\]」』）】》"
SENTENCE_END = re.compile(rf"([。！？｡]|．(?!\d))+[{CLOSERS}]*|[.!?؟۔।॥]+(?=\s|$)")
FULL_STOP = re.compile(rf"[.。｡．۔।॥][{CLOSERS}\s]*$")  # at the end of a token
# What ends no sentence: a list's number, `U.S.` and `e.g.`, what stands before a name.
NO_END = re.compile(
    r"(^|[\n:])\s*\(?\d{1,3}\.$|\b([^\W\d_]{1,2}\.){2,}$"
    r"|\b(Mr|Mrs|Ms|Dr|Prof|St|Mt|Sgt|Capt|Lt|Col|Gen|Gov|Sen|Rep|Rev|Hon|Fig|vs|approx|cf)\.$"
)
# Where a sentence may be cut: before a word, and in scripts without spaces (Thai to Khmer, Chinese,
# Japanese) before a letter, to which its marks and what punctuation follows belong.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fff\u3040-\u4dbf\u4e00-\ua4cf\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}][^\s\w]*|[^\s{UNSPACED}]+")

# Differs from the paper: the pattern ends with its word, so that `Nobody`, `No-one` and `Yesterday`
# stay whole.
YES_NO = re.compile(r"(Yes|yes|No|no)\b(?!-)")  # Alg. 1 l. 12
SWAP = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


@dataclass(frozen=True)
class Cut:
    """One sentence of y+ cut in two: what a completion goes on from."""

    separator: str  # the white space before the sentence
    kept: str  # the sentence up to the cut
    kept_ids: list[int]  # of all of y+ before the sentence, and of what is kept
    shared: int  # leading tokens of kept_ids that are y+'s, so that the trunk holds them already


WHOLE_RESPONSE = Cut("", "", [], 0)  # nothing is kept: what l. 6 samples, unguided


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character spans of the sentences, without the white space around them."""
    text = text.rstrip()
    spans, start = [], 0
    for stop in [*SENTENCE_END.finditer(text), None]:
        end = len(text) if stop is None else stop.end()
        sentence = text[start:end].lstrip()
        if sentence and (end == len(text) or not NO_END.search(sentence)):
            spans.append((end - len(sentence), end))
            start = end
    return spans


def can_be_cut(text: str) -> bool:
    """Whether there is more to a text than one sentence of one word, of which nothing is kept."""
    return len(split_sentences(text)) > 1 or len(WORD.findall(text)) > 1 or bool(YES_NO.match(text))


def cut_sentence(
    text: str,
    span: tuple[int, int],
    ids: list[int],
    encode: Callable[[str], list[int]],
    rng: random.Random,
) -> Cut:
    """Alg. 1 l. 11-14 for one sentence of y+: perhaps swap Yes and No, then cut at a random word.

    ids: those of all of y+. encode: a response's beginning to its ids, as they follow a prompt.
    """
    start, end = span
    sentence = text[start:end]

    # l. 12-13: a sentence that begins with Yes or No begins with the other every other time.
    match = YES_NO.match(sentence)
    swapped = SWAP[match[1]] if match and rng.random() >= 0.5 else ""
    if swapped:
        sentence = swapped + sentence[match.end() :]

    # l. 14: keep what is before a random word.
    # Silent in the paper: a cut falls on a word boundary, and may keep nothing.
    places = [word.start() for word in WORD.finditer(sentence)]
    # Silent in the paper: a swapped word is never cut away again.
    if swapped:
        places = places[1:] or [len(swapped)]
    kept = sentence[: rng.choice(places)].rstrip()

    # A swapped word belongs to its own sentence: the text before it is always the true one (Eq. 7).
    before = text[:start] if kept else text[:start].rstrip()
    kept_ids = encode(before + kept)
    shared = 0
    while shared < min(len(kept_ids), len(ids)) and kept_ids[shared] == ids[shared]:
        shared += 1
    separator = text[len(text[:start].rstrip()) : start]
    return Cut(separator, kept, kept_ids, shared)


def join(cuts: list[Cut], completions: list[list[int]], decode: Callable[[list[int]], str]) -> str:
    """Alg. 1 l. 15-16: every kept part with the ids of its completion, in order, as one text."""
    parts = []
    for cut, new_ids in zip(cuts, completions, strict=True):
        tail = decode(cut.kept_ids + new_ids)[len(decode(cut.kept_ids)) :]
        sentence = cut.kept + (tail if cut.kept else tail.lstrip())
        if sentence:
            parts.append(cut.separator + sentence)
    return "".join(parts).strip()
