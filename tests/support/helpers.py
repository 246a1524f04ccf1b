"""What several test files share: the toy checkpoint, random tiny models, refusals, the plain way to
do things.

The plain way knows nothing of token trees: one full sequence per response, an explicit causal mask,
the logits of every position, a whole forward pass for every new token.
"""

import random
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from minialign.data.images import ImageProcessor
from minialign.data.tokenizer import Tokenizer
from minialign.edge import CHECKPOINT
from minialign.errors import UserError
from minialign.model.clip import ClipConfig
from minialign.model.hf_folder import load_model
from minialign.model.llama import LlamaConfig
from minialign.model.llava import Llava, LlavaConfig
from minialign.model.masks import Branch, Sequence
from minialign.sampling.assistant import Assistant
from minialign.sampling.bdhs import Cut, cut_sentence, split_sentences
from minialign.toy import world

IMAGE = 3  # the image token of the random models
# Grouped-query attention, a head size of its own, widths that differ from one another:
# hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim.
SHAPES = [(24, 40, 4, 2, 8), (32, 20, 3, 1, 10), (20, 64, 2, 2, 6)]


@cache
def toy_model() -> Llava:
    """The embedded checkpoint; shared, so leave its weights alone."""
    return load_model(CHECKPOINT)


@cache
def toy_tokenizer() -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.from_folder(CHECKPOINT)


@cache
def toy_processor() -> ImageProcessor:
    """Its preprocessing."""
    return ImageProcessor.from_folder(CHECKPOINT)


def toy_assistant(model: Llava | None = None) -> Assistant:
    """The embedded checkpoint, or another model in its place, with what belongs to it."""
    return Assistant(model or toy_model(), toy_tokenizer(), toy_processor())


@cache
def toy_features(indices: tuple[int, ...], split: str = "validation") -> Tensor:
    """The toy tower's features of some pictures, (N, patches, D)."""
    pixels = [toy_processor()(world.picture(world.make_scene(split, i))) for i in indices]
    return toy_model().encode_images(torch.cat(pixels))


def randomize(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Weights that matter: matrices that keep their input's size (times `scale`), norms around 1,
    biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # a norm's weights are 1, a bias is not
                parameter.copy_(noise * 0.1 + (parameter == 1))
            else:
                parameter.copy_(noise * scale / parameter[0].numel() ** 0.5)


@cache
def random_model(seed: int, vocab: int = 50) -> Llava:
    """A tiny random model of a size that follows from the seed; shared, so leave its weights
    alone."""
    hidden, intermediate, heads, kv_heads, head_dim = SHAPES[seed % len(SHAPES)]
    text = LlamaConfig(vocab, hidden, intermediate, 2, heads, kv_heads, head_dim=head_dim)
    vision = ClipConfig(16, 24, 3, 2, image_size=12, patch_size=4)  # 9 patches
    model = Llava(LlavaConfig(text, vision, image_token_id=IMAGE)).eval()
    randomize(model, seed, 1.5)
    return model


@cache
def random_toy(seed: int = 0) -> Llava:
    """Random weights in the toy model's shape, so that its tokenizer fits; shared, so leave them
    alone."""
    model = Llava(toy_model().config).eval()
    randomize(model, seed)
    return model


def random_ids(rng: random.Random, count: int, vocab: int = 50) -> list[int]:
    """Text ids: no control token and no image token of the random models."""
    return [rng.randrange(IMAGE + 1, vocab) for _ in range(count)]


def random_batch(seed: int, patches: int) -> list[Sequence]:
    """Rows of unlike lengths, with and without a picture, with one to four branches that fork
    anywhere."""
    rng = random.Random(seed)
    batch = []
    for row in range(3 + seed % 2):
        image = patches > 0 and (row == 0 or rng.random() < 0.6)
        before = random_ids(rng, 1 + rng.randrange(3))
        trunk = before + [IMAGE] * image + random_ids(rng, 2 + rng.randrange(6))
        forks = [None, *(rng.randrange(1, len(trunk) + 1) for _ in range(rng.randrange(4)))]
        branches = [Branch(random_ids(rng, 1 + rng.randrange(7)), fork) for fork in forks]
        batch.append(Sequence(trunk, branches, patches if image else 0))
    return batch


def random_case(seed: int, vocab: int = 50) -> tuple[Llava, list[Sequence], Tensor]:
    """A random model, a batch for it, and what a tower might have seen of the batch's pictures."""
    model = random_model(seed, vocab)
    patches, width = model.config.vision.patches, model.config.vision.hidden_size
    batch = random_batch(seed, patches)
    pictures = sum(row.image_tokens > 0 for row in batch)
    generator = torch.Generator().manual_seed(seed)
    return model, batch, torch.randn(pictures, patches, width, generator=generator)


def plain_logits(
    model: Llava, ids: list[int], features: Tensor | None, visible: list[bool] | None = None
) -> Tensor:
    """(T, V) logits of one sequence; the image token, once in `ids`, stands for all of `features`
    (patches, D)."""
    table = model.language_model.embed_tokens.weight
    rows, seen = [], []
    for token in ids:
        if token == model.config.image_token_id:
            rows.append(model.multi_modal_projector(features))
            seen += [True] * len(features) if visible is None else visible
        else:
            rows.append(table[token][None])
            seen.append(True)
    mask = torch.ones(len(seen), len(seen)).tril().bool() & torch.tensor(seen)
    positions = torch.arange(len(seen))
    hidden = model.language_model(torch.cat(rows)[None], positions[None], mask[None, None])
    return model.lm_head(hidden)[0]


def plain_logp(
    model: Llava, prompt: list[int], response: list[int], features: Tensor | None
) -> Tensor:
    """The response's summed log-probability, from its own full sequence."""
    logits = plain_logits(model, prompt + response, features).log_softmax(-1)
    shift = len(logits) - len(response) - 1
    return sum((logits[shift + i, token] for i, token in enumerate(response)), torch.zeros(()))


@torch.no_grad()
def plain_greedy(
    model: Llava,
    ids: list[int],
    features: Tensor | None,
    stops: set[int],
    limit: int,
    visible: list[bool] | None = None,
) -> tuple[list[int], list[float]]:
    """Greedy ids and their log-probs, one whole forward pass per token; the image token is never
    chosen."""
    new: list[int] = []
    logps: list[float] = []
    while len(new) < limit and not (new and new[-1] in stops):
        last = plain_logits(model, ids + new, features, visible)[-1].log_softmax(-1)
        allowed = last.clone()
        allowed[model.config.image_token_id] = -torch.inf
        new.append(int(allowed.argmax()))
        logps.append(last[new[-1]].item())
    return new, logps


def worst(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return (a - b).abs().max().item() if a.numel() else 0.0


def cuts(text: str, rng: random.Random) -> list[tuple[str, Cut]]:
    """Every sentence of `text` with its cut."""
    encode = toy_tokenizer().answer
    ids = encode(text)
    spans = split_sentences(text)
    return [(text[a:b], cut_sentence(text, (a, b), ids, encode, rng)) for a, b in spans]


def refused(call, *parts) -> str:
    """`call()` must raise a UserError of one line with these parts in it."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert str(part) in message, f"{part!r} is not in {message!r}"
    assert "\n" not in message
    return message
