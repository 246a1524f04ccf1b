"""Which of two responses leads, of a model that is shown both: by log-probs, or in its own words.

A lead is positive where `Response 1`, the one shown first, is the better one, negative for
`Response 2`, 0 for neither, and None where there is no verdict.
"""

import re

import torch
from torch import Tensor

from minialign.align.logps import branch_logps
from minialign.data.images import PreparedImage
from minialign.model.masks import build_tree
from minialign.sampling.assistant import Assistant
from minialign.training import parallel

NAMES = ("Response 1", "Response 2")
MAX_NEW_TOKENS = 64  # a verdict may come behind a few words (Fig. 8)


@torch.no_grad()
def leads_by_logprobs(
    assistant: Assistant,
    images: list[PreparedImage],
    features: Tensor,
    questions: list[list[str]],
) -> list[list[float]]:
    """By how much `Response 1` is likelier than `Response 2` behind every question, in nats.

    One forward pass: a question with its picture is the trunk, the two names are branches. features
    (tiles, patches, D): of all the pictures, each of which may have several questions.
    """
    # Differs from the paper: its annotator answers in words.
    tokenizer = assistant.tokenizer
    names = [tokenizer.answer(name) for name in NAMES]
    sequences, seen = [], []
    tiles = [len(image.pixels) for image in images]
    for image, tower, asked in zip(images, features.split(tiles), questions, strict=True):
        sequences += [assistant.sequence([("user", text)], image, names) for text in asked]
        seen += [tower] * len(asked)

    tree = build_tree(sequences, tokenizer.image_id, tokenizer.pad_id).to(assistant.model.device)
    logps = branch_logps(assistant.model, tree, torch.cat(seen))  # (questions, 2)
    leads = iter((logps[:, 0] - logps[:, 1]).tolist())
    return [[next(leads) for _ in asked] for asked in questions]


def leads_in_words(
    assistant: Assistant,
    images: list[PreparedImage],
    features: Tensor,
    questions: list[list[str]],
) -> list[list[int | None]]:
    """What the model's greedy answers to the questions say. Of a model in shards every process
    holds the whole meanwhile."""
    with parallel.unsharded(assistant.model):
        answers = assistant.answers(features, images, questions, MAX_NEW_TOKENS)
    return [[lead_of(answer) for answer in row] for row in answers]


# ---------------------------------------------------------------- what an answer says

# A sentence says a verdict if it has one of these forms from its beginning on. Between what is
# listed nothing may stand: a `not`, a `worse`, another response or a condition fits no form.
OPENING = (
    r"(?:(?:based on|according to|judging by|looking at|given) (?:(?!response|\bnot?\b)[^,])*, "
    r"|(?:so|thus|hence|therefore|overall|clearly|however|but),? )?"
    r"(?:i (?:think|believe) (?:that )?)?"
)
BETTER = r"(?:better|best|preferable|preferred|superior|more (?:accurate|faithful|truthful))"
THING = r"(?: (?:one|response|answer|choice|option))?"
# Behind it no `but` and no condition: nothing, what it is compared with, a reason, or more words
# that neither name a response nor deny.
PLAIN = (
    r"(?!.*\b(?:but|though|although|however|yet|if|unless|except|worse|worst|false|doubt)\b"
    r"|[:,] wrong\b)"
)
ENDING = (
    rf"{PLAIN}(?: (?:than|over|to) (?:response [12]|the other)\b{THING})?"
    r"(?=$|,? (?:because|since|as its?|while|whereas)\b|[,;:](?!.*\b(?:response|not?)\b))"
)
VERDICT = re.compile(
    rf"{OPENING}(?:response ([12]) is (?:(?:clearly|much|slightly) )?(?:the |a )?{BETTER}{THING}"
    rf"|(?:i (?:would )?(?:prefer|choose)|the {BETTER}{THING} is) response ([12])\b){ENDING}",
    re.IGNORECASE,
)
# The first sentence may be a name alone, as it was asked for. (The empty group stands for VERDICT's
# second.)
ALONE = re.compile(
    rf"response ([12])(){PLAIN}(?=$|,? (?:because|since|as its?)\b(?!.*\bother\b))", re.IGNORECASE
)
# What takes a verdict back, or weighs another.
DOUBT = re.compile(r"(?:no|wait|actually|however|but|yet|that is|then again)\b", re.IGNORECASE)


def lead_of(answer: str) -> int | None:
    """1 for the first response, -1 for the second; None where the answer does not say it plainly.

    The first sentence that names a response must be a verdict, and none behind it another one, or
    begin with a doubt.
    """
    text = re.sub(r"[ \t]+", " ", re.sub(r"[*_\"“”`#]", "", answer)).strip()
    sentences = [sentence.strip() for sentence in re.split(r"[.!](?=\s|$)|\n", text)]
    found = [VERDICT.match(sentence) for sentence in sentences if "response" in sentence.lower()]
    if alone := ALONE.match(sentences[0]):
        found[0] = alone
    if not found or not found[0] or any(DOUBT.match(sentence) for sentence in sentences[1:]):
        return None
    leads = {{"1": 1, "2": -1}[match[1] or match[2]] for match in found if match}
    return leads.pop() if len(leads) == 1 else None
