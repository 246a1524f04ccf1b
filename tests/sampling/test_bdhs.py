"""Sentences of Algorithm 1: where they end, where they are cut, and how they are joined again."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from helpers import cuts, toy_tokenizer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from minialign.sampling.bdhs import (
    SWAP,
    WHOLE_RESPONSE,
    YES_NO,
    Cut,
    can_be_cut,
    cut_sentence,
    join,
    split_sentences,
)

TEXTS = [
    "This is a park. At the top left is a red cup. The bottom middle shows nothing.",
    "No, there is no cup.",
    "Yes, a red cup is at the top left. No. There is a dog",
    "It is 3.5 m long, is it not?! Nobody knows.\n\nYesterday: no.\tNothing else ...",
    "a",
    "Wait... what? The\nlamp, e.g. the blue one.",
    "Café „Größe“ – naïve 猫! no, 🐈 it is",
]


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One two. Three four.", ["One two.", "Three four."]),
        ("No. 5 is red.", ["No.", "5 is red."]),  # the rule: a stop that a space follows
        ("It is 3.5 m long. It is v1.2.", ["It is 3.5 m long.", "It is v1.2."]),
        ("What?! Yes!! Really...", ["What?!", "Yes!!", "Really..."]),
        ("A red cup. No stop at the end", ["A red cup.", "No stop at the end"]),
        ("A cup\non a table.\n\nA dog.\tA cat", ["A cup\non a table.", "A dog.", "A cat"]),
        ("  Led in by spaces.  Two between.  ", ["Led in by spaces.", "Two between."]),
        # A quote, not a space, follows the stop.
        ('He said "no." Then he left.', ['He said "no." Then he left.']),
        ("word", ["word"]),
        (".", ["."]),
        ("", []),
        (" \n ", []),
        # Chinese and Japanese put no space behind a stop; quotes close with the sentence.
        ("一只猫。它在睡！真的吗？是", ["一只猫。", "它在睡！", "真的吗？", "是"]),
        ("他说：“好。”然后走了。", ["他说：“好。”", "然后走了。"]),
        ("重３．５公斤．好", ["重３．５公斤．", "好"]),
        ("यह बिल्ली है। वह सोती है।", ["यह बिल्ली है।", "वह सोती है।"]),
        ("هل هذه قطة؟ نعم۔ إنها قطة.", ["هل هذه قطة؟", "نعم۔", "إنها قطة."]),
        # What a stop does not end.
        ("1. A cup. 2. A dog.\n3. A cat.", ["1. A cup.", "2. A dog.", "3. A cat."]),
        ("I see: 1. A cup. (2. None.)", ["I see: 1. A cup.", "(2. None.)"]),
        ("There are 2. One is red.", ["There are 2.", "One is red."]),
        ("St. Paul, Dr. No in the U.S. army.", ["St. Paul, Dr. No in the U.S. army."]),
        ("Fruit, e.g. pears, i.e. 3.5 kg. Yes.", ["Fruit, e.g. pears, i.e. 3.5 kg.", "Yes."]),
        ("First. 1.", ["First.", "1."]),
    ],
)
def test_split_sentences(text, sentences):
    assert [text[start:end] for start, end in split_sentences(text)] == sentences


@pytest.mark.parametrize("seed", range(20))
def test_sentences_and_the_space_between_make_the_text(seed):
    pieces = ["ab", "C", " ", "  ", "\n", ".", "!", "?", ",", "3", "é"]
    text = "".join(random.Random(seed).choices(pieces, k=60))
    spans, end = split_sentences(text), 0
    for span in spans:
        assert text[end : span[0]].strip() == "" and span[0] < span[1]
        sentence, end = text[span[0] : span[1]], span[1]
        assert not sentence[0].isspace()
        assert not re.search(r"\S[.!?]\s", sentence.removeprefix("3.")[:-1])  # a list's number
    assert text[end:].strip() == ""


# ---------------------------------------------------------------- cuts


@pytest.mark.parametrize("text", TEXTS)
def test_cuts_fall_on_word_boundaries(text):
    tokenizer, ids = toy_tokenizer(), toy_tokenizer().encode(text)
    kept_of: dict[int, Counter] = {}
    for seed in range(150):
        position = 0
        for number, (sentence, cut) in enumerate(cuts(text, random.Random(seed))):
            start = text.index(sentence, position)
            position = start + len(sentence)
            kept_of.setdefault(number, Counter())[cut.kept] += 1

            # A prefix of the sentence, perhaps with its first word swapped, and never all of it.
            swapped = re.sub(r"^(Yes|yes|No|no)\b", lambda found: SWAP[found[1]], sentence)
            whole = sentence if sentence.startswith(cut.kept) else swapped
            assert whole.startswith(cut.kept) and len(cut.kept) < len(whole)
            alone = whole is swapped and len(sentence.split()) == 1
            assert cut.kept == "" or alone or whole[len(cut.kept)].isspace()

            # What the branch continues: the true text before the sentence, and what is kept of it.
            before = text[:start] + cut.kept if cut.kept else text[:start].rstrip()
            assert cut.kept_ids == tokenizer.encode(before)
            assert cut.kept_ids[: cut.shared] == ids[: cut.shared]
            if cut.shared < min(len(cut.kept_ids), len(ids)):
                assert cut.kept_ids[cut.shared] != ids[cut.shared]
            assert re.fullmatch(r"\s*", cut.separator) and text[:start].endswith(cut.separator)
            if whole is sentence and number == 0:
                assert cut.shared == len(cut.kept_ids)  # nothing to force: it lies on the trunk

    # Every word boundary, the first included, is met, and about equally often.
    sentences = [text[a:b] for a, b in split_sentences(text)]
    for number, sentence in enumerate(sentences):
        words = len(sentence.split())
        plain = [kept for kept in kept_of[number] if sentence.startswith(kept)]
        assert len(plain) == words
        if not YES_NO.match(sentence):
            assert len(kept_of[number]) == words
            assert min(kept_of[number].values()) > 150 / words / 4


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(5))
def test_the_true_continuation_gives_the_true_text(text, seed):
    """Every cut continued as y+ goes on: joined, the sentences are y+ again, with its own white
    space."""
    tokenizer = toy_tokenizer()
    parts, completions = [], []
    spans, found = split_sentences(text), cuts(text, random.Random(seed))
    for (start, end), (sentence, cut) in zip(spans, found, strict=True):
        if not sentence.startswith(cut.kept):  # swapped: keep nothing
            cut = replace(cut, kept="", kept_ids=tokenizer.encode(text[:start].rstrip()))
        rest = tokenizer.encode(text[:end])
        assert rest[: len(cut.kept_ids)] == cut.kept_ids
        parts.append(cut)
        completions.append(rest[len(cut.kept_ids) :])
    assert join(parts, completions, tokenizer.decode) == text.strip()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("图中有猫。", {"", "图", "图中", "图中有"}),
        ("貓が3匹いる。", {"", "貓", "貓が", "貓が3", "貓が3匹", "貓が3匹い"}),
        ("a图b", {"", "a", "a图"}),
        ("ที่นี่", {"", "ที่"}),  # a vowel and a tone belong to their letter
        ("고양이가 있다.", {"", "고양이가"}),
        ("red cup.", {"", "red"}),
    ],
)
def test_cuts_inside_texts_without_spaces(text, kept):
    tokenizer, found = toy_tokenizer(), set()
    for seed in range(60):
        ids = tokenizer.answer(text)
        cut = cut_sentence(text, (0, len(text)), ids, tokenizer.answer, random.Random(seed))
        assert tokenizer.decode(cut.kept_ids) == cut.kept
        found.add(cut.kept)
    assert found == kept


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Cup.", False), ("Cup", False), ("猫。", False), ("Yes.", True), ("no", True)]
    + [("猫だ。", True), ("A cup.", True), ("Once. Twice.", True), ("Nobody.", False)],
)
def test_what_can_be_cut(text, expected):
    """Where nothing can, whole responses are sampled, and say so."""
    assert can_be_cut(text) == expected
    kept = {cut.kept for seed in range(50) for _, cut in cuts(text, random.Random(seed))}
    assert expected or kept == {""}


def test_join_by_hand():
    tokenizer = toy_tokenizer()

    def completion(text: str) -> list[int]:
        return [*tokenizer.encode(text), tokenizer.eos_id]

    first = Cut("", "At the", tokenizer.encode("At the"), 2)
    second = Cut("\n", "", tokenizer.encode("At the top is a cup."), 6)
    nothing = Cut(" ", "", tokenizer.encode("At the top is a cup.\nNo."), 8)
    third = Cut(" ", "Yes, a", tokenizer.encode("At the top is a cup.\nNo. Yes, a"), 8)
    done = [completion("left."), completion("This is a dog."), completion(""), completion("cup.")]
    joined = join([first, second, nothing, third], done, tokenizer.decode)
    assert joined == "At the left.\nThis is a dog. Yes, a cup."
    whole = join([WHOLE_RESPONSE], [completion("At the top.")], tokenizer.decode)
    assert whole == "At the top."


# ---------------------------------------------------------------- full stops


def test_tokens_that_end_a_sentence():
    tokenizer = toy_tokenizer()
    assert tokenizer.sentence_ends == {tokenizer.encode("a.")[-1], tokenizer.eos_id}
    pieces = ["<s>", "</s>", ".", "▁.", "...", "▁Inc.", "▁3.5", ".com", "!", "a"]
    pieces += ['."', ".)", ".\n\n", "。", "。」", "।", ".,", '"']
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    fast = FastTokenizer(models.WordLevel(vocabulary, unk_token="a"))
    fast.add_special_tokens(["<extra.>", "<end>."])  # control tokens are no text
    assert replace(tokenizer, fast=fast, eos_id=1).sentence_ends == {
        *(1, 2, 3, 4, 5),
        *(10, 11, 12, 13, 14, 15),
    }
