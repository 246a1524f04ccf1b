"""What the tour tells of one picture: answers, probabilities and log-probs.

Everything is measured on the spot. `Tour` holds it all; __main__.py fills one, stations.py and
idea.py draw it.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minialign.align.logps import token_logps
from minialign.data.images import PreparedImage
from minialign.data.records import Record, instruct_record
from minialign.model.masks import Branch, Sequence, TokenTree, build_tree
from minialign.sampling.assistant import Assistant
from minialign.sampling.bdhs import Cut, split_sentences
from minialign.sampling.generate import Completion, Sampling, generate
from minialign.toy.benchmark import POSITION
from minialign.toy.world import POSITIONS, Scene, alignment_records, open_picture, scene_of


@dataclass(frozen=True)
class Subject:
    """A picture of the embedded world, its truth, and a record: what is asked of it, and y+."""

    scene: Scene
    record: Record
    picture: Image.Image
    image: PreparedImage
    features: Tensor  # (1, patches, D) what the tower sees


@dataclass(frozen=True)
class Round:
    """One iteration of Algorithm 1, with all that sample_bdhs.py::sample lets go of."""

    seed: int
    guided: bool
    visible: Tensor  # (image tokens,) Eq. 6's mask
    cuts: list[Cut]
    swapped: list[bool]  # of each cut: whether Yes has become No, or No Yes
    sequence: Sequence  # trunk, and a branch for each cut
    completions: list[Completion]  # of each branch
    texts: list[str]  # of these
    likely: list[list[tuple[str, float]]]  # the likeliest first tokens of each, with probabilities
    response: str
    similarity: float
    again: bool  # too similar to y+, empty or cut off at the limit


@dataclass(frozen=True)
class Moved:
    """What is said of one place: how probable the picture's word is, and the prior's."""

    place: str
    picture_word: str
    prior_word: str  # the likeliest other one, by the base: what its language prior puts there
    before: tuple[float, float]  # of the picture's word and of the prior's, by the base
    after: tuple[float, float]  # by the trained policy


@dataclass(frozen=True)
class Tour:
    """All that the page shows."""

    subject: Subject
    answer: str  # of the base, to the whole picture
    masked: list[tuple[float, Tensor, str]]  # rho_th, mask, and the answer under it
    tree: TokenTree  # of one BDHS call on y+'s first sentences, completions and hidden columns too
    labels: list[str]  # of its columns
    chosen_at: int  # the position at which y+ begins in it
    rounds: list[Round]  # Algorithm 1 on the description
    eps_s: float  # a response this similar to y+ or more is sampled again
    yes_no: Subject  # the same picture, with a question for Yes or No
    yes_no_rounds: list[Round]
    beta: float
    training: str  # in words
    logps: list[Tensor]  # of every token of y+ and of y-, by the trained policy: (n,) each
    ref_logps: list[Tensor]
    words: list[list[str]]  # these tokens
    answer_after: str
    moved: list[Moved]
    differences: dict[str, float]  # of the shared computation from the plain one, by what it is of


def subject_of(assistant: Assistant, number: int) -> Subject:
    """Picture `number` of the validation split, which is even: the others are asked Yes or No."""
    record = instruct_record(alignment_records(1, "validation", number)[0])
    picture = open_picture(record.image)
    image = assistant.processor.prepare(picture)
    return Subject(scene_of(record.image), record, picture, image, assistant.encode([image]))


def token_words(assistant: Assistant, ids: list[int]) -> list[str]:
    """Each token as one reads it; one that has no text by its name."""
    fast = assistant.tokenizer.fast
    return [assistant.tokenizer.decode([i]).strip() or repr(fast.id_to_token(i))[1:-1] for i in ids]


def answer(assistant: Assistant, subject: Subject, visible: Tensor | None = None) -> str:
    """The greedy answer; visible (image tokens,): Eq. 6's mask."""
    sequence = assistant.sequence(subject.record.turns, subject.image, [[]], visible)
    tokenizer, greedy = assistant.tokenizer, Sampling(temperature=0.0)
    stops, pad = {tokenizer.eos_id}, tokenizer.pad_id
    rows = generate(assistant.model, [sequence], subject.features, greedy, stops, pad_id=pad)
    return tokenizer.decode(rows[0][0].ids)


@torch.no_grad()
def next_probabilities(assistant: Assistant, subject: Subject, sequence: Sequence) -> Tensor:
    """Of every token behind each branch: (S, V)."""
    tree = build_tree([sequence], assistant.tokenizer.image_id, assistant.tokenizer.pad_id)
    hidden = assistant.model(tree, subject.features)[0]  # (T, D)
    return assistant.model.lm_head(hidden[tree.tip[0]]).float().softmax(-1)


def likely_words(assistant: Assistant, probabilities: Tensor) -> list[list[tuple[str, float]]]:
    """The three likeliest tokens of each row (S, V)."""
    rows = []
    for row in probabilities:
        top = row.topk(3)
        words = token_words(assistant, top.indices.tolist())
        rows.append(list(zip(words, top.values.tolist(), strict=True)))
    return rows


def object_forks(assistant: Assistant, subject: Subject) -> dict[str, Sequence]:
    """By place: y+ up to where that place's object is named, and an empty branch that forks there.

    The trunk is image, prompt and y+.
    """
    text, tokenizer = subject.record.chosen, assistant.tokenizer
    prompt = tokenizer.prompt(subject.record.turns)
    trunk, image = prompt + tokenizer.answer(text), subject.image
    forks = {}
    for start, end in split_sentences(text):
        if place := POSITION.search(text, start, end):
            fork = Branch([], len(prompt) + len(tokenizer.answer(text[: place.end()])))
            forks[place[1]] = Sequence(trunk, [fork], image.features, packing=image.packing)
    return forks


def moved_words(base: Assistant, trained: Assistant, subject: Subject) -> list[Moved]:
    """How probable the picture's word and the prior's are at each place, before and after."""
    moved = []
    for place, sequence in object_forks(base, subject).items():
        cell = next(cell for cell, name in POSITIONS.items() if name == place)
        picture_id = base.tokenizer.answer(f"The {subject.scene.cells[cell][0]}")[1]
        before, after = (
            next_probabilities(assistant, subject, sequence)[0] for assistant in (base, trained)
        )
        prior_id = next(i for i in before.topk(2).indices.tolist() if i != picture_id)
        ids = [picture_id, prior_id]
        words = token_words(base, ids)
        moved.append(Moved(place, *words, tuple(before[ids].tolist()), tuple(after[ids].tolist())))
    return moved


@torch.no_grad()
def pair_logps(assistant: Assistant, subject: Subject, responses: list[list[int]]) -> list[Tensor]:
    """Log-probs of every token of some responses, as ONE sequence with a branch for each."""
    sequence = assistant.sequence(subject.record.turns, subject.image, responses)
    tree = build_tree([sequence], assistant.tokenizer.image_id, assistant.tokenizer.pad_id)
    _, branch, logps = token_logps(assistant.model, tree, subject.features)
    return [logps[branch == number] for number in range(len(responses))]


@torch.no_grad()
def plain_logps(
    assistant: Assistant, subject: Subject, ids: list[int], count: int, visible: Tensor | None
) -> Tensor:
    """Log-probs (count,) of the last tokens of a sequence of its own, nothing shared or dropped:
    hidden image tokens are computed like all others, and a mask keeps every query from them.
    """
    image = subject.image
    sequence = Sequence(ids, [], image.features, visible, image.packing)
    tokenizer = assistant.tokenizer
    tree = build_tree([sequence], tokenizer.image_id, tokenizer.pad_id, drop_hidden=False)
    hidden = assistant.model(tree, subject.features)[0]  # (T, D)
    logps = assistant.model.lm_head(hidden).float().log_softmax(-1)[-count - 1 : -1]
    return logps.gather(-1, tree.ids[0, -count:, None])[:, 0]


def differences(
    base: Assistant, trained: Assistant, subject: Subject, tour_round: Round, pair: list[list[int]]
) -> dict[str, float]:
    """The largest difference of a log-prob between the shared and the plain computation."""
    prompt = base.tokenizer.prompt(subject.record.turns)
    sampled = []
    for cut, done in zip(tour_round.cuts, tour_round.completions, strict=True):
        ids = prompt + cut.kept_ids + done.ids
        plain = plain_logps(base, subject, ids, len(done.ids), tour_round.visible)
        sampled.append((plain - torch.tensor(done.logps)).abs().max().item())
    scored = []
    for ids, shared in zip(pair, pair_logps(trained, subject, pair), strict=True):
        plain = plain_logps(trained, subject, prompt + ids, len(ids), None)
        scored.append((plain - shared).abs().max().item())
    return {
        "BDHS: every sentence a sequence of its own, hidden patches kept": max(sampled),
        "DPO: chosen and rejected as two sequences": max(scored),
    }
