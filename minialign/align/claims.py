"""Claim by claim, as RLAIF-V judges: every claim of a response as a yes/no question.

A judge that cannot weigh two long responses against each other may well tell whether one thing is
in a picture. All claims about a picture are branches of one trunk, the picture: one forward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minialign.align.logps import branch_logps
from minialign.data.images import PreparedImage
from minialign.model.masks import build_tree
from minialign.sampling.assistant import Assistant
from minialign.sampling.bdhs import split_sentences

INSTRUCTION = """\
Somebody was asked this about the image: {question}
Part of the answer was: {sentence}
Look at the image. Is this part true, in every object, attribute and place that it names? \
Answer Yes or No."""


@dataclass(frozen=True)
class Claim:
    """A yes/no question; the answer that says that the claim holds, and one of like length that
    denies it.
    """

    question: str
    affirm: str
    deny: str


NO_CLAIM = Claim("", "Yes", "No")  # asked where there is none, so that no row is empty


def claims_of(question: str, response: str) -> list[Claim]:
    """Each sentence of a response to `question` as a claim."""
    sentences = [response[start:end] for start, end in split_sentences(response)]
    return [
        Claim(INSTRUCTION.format(question=question, sentence=s), "Yes", "No") for s in sentences
    ]


@torch.no_grad()
def denied_claims(
    assistant: Assistant,
    images: list[PreparedImage],
    features: Tensor,
    claims: list[list[Claim]],
) -> list[set[Claim] | None]:
    """Of the claims about each picture those that the model denies; None where one of them leaves
    the decoder's positions.

    features (tiles, patches, D): of all the pictures. A claim stands on two branches, followed by
    either answer: its question has the same log-probs on both, which cancel in the difference.
    """
    tokenizer, sequences, fit = assistant.tokenizer, [], []
    for image, about in zip(images, claims, strict=True):
        prompts = both_answers(assistant, about or [NO_CLAIM])
        taken = max(map(len, prompts)) - 1 + len(image.packing)
        fit.append(taken <= assistant.positions)
        if not fit[-1]:
            prompts = both_answers(assistant, [NO_CLAIM])
        sequences.append(assistant.together(image, prompts))

    tree = build_tree(sequences, tokenizer.image_id, tokenizer.pad_id).to(assistant.model.device)
    logps = branch_logps(assistant.model, tree, features)  # (B, 2 K): affirmed, denied, affirmed...
    denied = (logps[:, 1::2] > logps[:, 0::2]).tolist()  # (B, K)

    found: list[set[Claim] | None] = []
    for about, row, fits in zip(claims, denied, fit, strict=True):
        found.append({claim for claim, no in zip(about, row, strict=False) if no} if fits else None)
    return found


def both_answers(assistant: Assistant, claims: list[Claim]) -> list[list[int]]:
    """The ids of every claim's question with the affirming, then with the denying answer."""
    tokenizer, prompts = assistant.tokenizer, []
    for claim in claims:
        asked = tokenizer.prompt([("user", claim.question)])
        prompts.append(asked + tokenizer.answer(claim.affirm))
        prompts.append(asked + tokenizer.answer(claim.deny))
    return prompts
