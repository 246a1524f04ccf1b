"""What tests of adapters ask of models: trees for random ones, logits on the toy world."""

import random

import torch
from helpers import (
    IMAGE,
    plain_logits,
    random_ids,
    toy_model,
    toy_processor,
    toy_tokenizer,
)

from minialign.model.llava import Llava
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.toy import world


def batch_of(seed: int, patches: int) -> tuple:
    """A tree of two rows with two branches each, and features, for the random models."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [
        Sequence(
            [1, IMAGE, *random_ids(rng, 3 + i)],
            [Branch(random_ids(rng, 4)), Branch(random_ids(rng, 2))],
            patches,
        )
        for i in range(2)
    ]
    return build_tree(rows, IMAGE, pad_id=0), torch.randn(2, patches, 16, generator=generator)


def answers(model) -> list[torch.Tensor]:
    """All logits of two toy conversations: by the plain way for our model, by its own for
    transformers'.
    """
    tokenizer, logits = toy_tokenizer(), []
    for i, raw in enumerate(world.alignment_records(2, "validation")):
        question, answer = (
            turn["value"].removeprefix("<image>\n") for turn in raw["conversations"]
        )
        ids = tokenizer.prompt([("user", question)]) + tokenizer.response(answer)
        pixels = toy_processor()(world.picture(world.make_scene("validation", i)))
        with torch.no_grad():
            if isinstance(model, Llava):
                logits.append(plain_logits(model, ids, model.encode_images(pixels)[0]))
                continue
            patches = toy_model().config.vision.patches
            expanded = [
                t
                for token in ids
                for t in [token] * (patches if token == tokenizer.image_id else 1)
            ]
            logits.append(model(input_ids=torch.tensor([expanded]), pixel_values=pixels).logits[0])
    return logits


def transformers_model(oracle, folder):
    return oracle.transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
