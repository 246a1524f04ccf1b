"""Token trees to test with: random ones, and pairs about the embedded world's pictures."""

import random

import torch
from helpers import IMAGE, toy_features, toy_model, toy_tokenizer

from minialign.model.masks import Branch, Sequence, build_tree
from minialign.toy import world


def random_sequence(rng: random.Random, image: bool, hide: float) -> Sequence:
    """Any trunk that begins with a text token, and any branches that do not fork at its very
    start.
    """
    trunk = [rng.randrange(4, 99) for _ in range(rng.randrange(1, 9))]
    patches = rng.randrange(1, 7) if image else 0
    visible = None
    if image:
        trunk.insert(rng.randrange(1, len(trunk) + 1), IMAGE)
        if rng.random() < 0.8:
            visible = torch.tensor([rng.random() >= hide for _ in range(patches)])
    forks = [None, *range(1, len(trunk) + 1)]
    if visible is not None and not visible[-1]:  # not right behind a hidden token
        forks = [
            fork
            for fork in forks
            if (len(trunk) if fork is None else fork) != trunk.index(IMAGE) + 1
        ]
    count = rng.choice([0, 1, 2, 4]) if forks else 0
    answers = [[rng.randrange(4, 99) for _ in range(rng.randrange(5))] for _ in range(count)]
    return Sequence(trunk, [Branch(ids, rng.choice(forks)) for ids in answers], patches, visible)


def random_sequences(seed: int) -> list[Sequence]:
    """One to four sequences, with and without a picture."""
    rng = random.Random(seed)
    return [
        random_sequence(rng, rng.random() < 0.7, rng.choice([0.3, 0.9]))
        for _ in range(rng.randrange(1, 5))
    ]


def toy_rows(seed: int, count: int = 2, hide: float = 0.5):
    """[(prompt, chosen, rejected, visible)] for real pictures, and the tower's features of
    those.
    """
    rng, tokenizer = random.Random(seed), toy_tokenizer()
    indices = tuple(rng.sample(range(500), count))
    rows = []
    for index in indices:
        scene, other = (world.make_scene("validation", i) for i in (index, index + 1000))
        kind = rng.choice(["description", "existence", "attribute"])
        turns = world.conversation(scene, kind, rng)
        chosen, rejected = turns[-1][1], world.conversation(other, kind, rng)[-1][1]
        visible = torch.tensor(
            [rng.random() >= hide for _ in range(toy_model().config.vision.patches)]
        )
        visible[:2] = torch.tensor([True, False])  # some of each
        ids = (
            tokenizer.prompt(turns[:-1]),
            tokenizer.response(chosen),
            tokenizer.response(rejected),
        )
        rows.append((*ids, visible))
    return rows, toy_features(indices)


def toy_tree(sequences: list[Sequence], drop_hidden: bool = True):
    """A batch for the embedded checkpoint."""
    return build_tree(
        sequences, toy_model().config.image_token_id, toy_tokenizer().pad_id, drop_hidden
    )
