"""Bias-Driven Hallucination Sampling: Algorithm 1 of the paper.

The policy completes the chosen response y+ while most of the image is hidden from it (Eq. 6) or
drowned in noise (Eq. 9). What it then says is what its language prior says: a plausible
hallucination, and a rejected response that nobody had to write.

Differs from the paper: the yes/no pattern ends with its word, so that `Nobody`, `No-one` and
`Yesterday` stay whole. Silent in the paper, chosen here: a cut falls on a word boundary and may
keep nothing, but never takes a swapped word away; a response that is empty or runs into the length
limit is sampled again like one that is too similar; hidden tokens leave gaps in the RoPE positions
rather than shifting the text; every draw is seeded per example."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from PIL import Image

from minialign.chat import Tokenizer, Turn
from minialign.errors import UserError
from minialign.generate import Completion, Sampling, generate, stable_seed
from minialign.images import ImageProcessor, noise_of_seed
from minialign.llava import Llava
from minialign.masks import Branch, Sequence, mask_of_seed

YES_NO = re.compile(r"(Yes|yes|No|no)\b(?!-)")  # Alg. 1 l. 12
SWAP = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


@dataclass(frozen=True)
class BdhsConfig:
    """The paper's knobs. BDHS_attn: rho_th > 0, noise_steps = 0. BDHS_noise: noise_steps > 0,
    rho_th = 0."""

    rho_th: float = 0.99
    n_bdhs: int = 5
    eps_s: float = 0.97
    noise_steps: int = 0
    guided: bool = True
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Example:
    """One record to sample for: its prompt's turns, its image and its chosen response y+."""

    id: str
    image: Image.Image
    turns: list[Turn]
    chosen: str


@dataclass(frozen=True)
class Sampled:
    """A rejected response y- and how it came about; `truncated`: the length limit ended a
    completion."""

    rejected: str
    iterations: int
    similarity: float
    mask_seed: int
    guided: bool
    truncated: bool


@dataclass(frozen=True)
class Cut:
    """One sentence of y+ cut in two: the text before the sentence, what is kept of it, and where it
    forks."""

    separator: str
    kept: str
    kept_ids: list[int]
    shared: int  # leading tokens of kept_ids that the trunk already holds


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character spans of the sentences: each ends behind `.`, `!` or `?` that a space or the end
    follows."""
    return [
        match.span()
        for match in re.finditer(r"\S.*?(?:[.!?]+(?=\s|$)|$)", text.rstrip(), re.DOTALL)
    ]


def cut_sentence(
    text: str, span: tuple[int, int], ids: list[int], tokenizer: Tokenizer, rng: random.Random
) -> Cut:
    """Alg. 1 l. 11-14 for one sentence of y+ (`ids` are y+'s): perhaps swap Yes and No, then cut at
    a random word."""
    start, end = span
    sentence = text[start:end]
    match = YES_NO.match(sentence)
    said = SWAP[match[1]] if match and rng.random() >= 0.5 else ""
    if said:
        sentence = said + sentence[match.end() :]
    places = [word.start() for word in re.finditer(r"\S+", sentence)]
    if said:
        places = places[1:] or [len(said)]
    kept = sentence[: rng.choice(places)].rstrip()
    # The swapped word belongs to its own sentence: the text before it is always the true one (Eq.
    # 7).
    before = text[:start] if kept else text[:start].rstrip()
    kept_ids = tokenizer.answer(before + kept)
    shared = 0
    while shared < min(len(kept_ids), len(ids)) and kept_ids[shared] == ids[shared]:
        shared += 1
    separator = text[len(text[:start].rstrip()) : start]
    return Cut(separator, kept, kept_ids, shared)


def join(cuts: list[Cut], completions: list[Completion], tokenizer: Tokenizer) -> str:
    """Alg. 1 l. 15-16: every kept part with its completion, in order."""
    parts = []
    for cut, completion in zip(cuts, completions, strict=True):
        new = completion.ids
        tail = tokenizer.decode(cut.kept_ids + new)[len(tokenizer.decode(cut.kept_ids)) :]
        sentence = cut.kept + (tail if cut.kept else tail.lstrip())
        if sentence:
            parts.append(cut.separator + sentence)
    return "".join(parts).strip()


def full_stop_ids(tokenizer: Tokenizer) -> set[int]:
    """Tokens that end a sentence: every piece that ends in a full stop, and the end token."""
    vocabulary = tokenizer.fast.get_vocab(with_added_tokens=False)
    return {i for piece, i in vocabulary.items() if piece.endswith(".")} | {tokenizer.eos_id}


@dataclass(frozen=True)
class Bdhs:
    """What every iteration needs: the policy, its tokenizer and preprocessing, the similarity and
    the knobs."""

    model: Llava
    tokenizer: Tokenizer
    processor: ImageProcessor
    similarity: Callable[[list[str], list[str]], list[float]]
    config: BdhsConfig

    @cached_property
    def sentence_stops(self) -> set[int]:
        """`full_stop_ids`, looked up once: the vocabulary is long and every batch asks."""
        return full_stop_ids(self.tokenizer)

    def require_room(self, example: Example) -> None:
        """Refuse an example of which image, prompt and y+ leave no position for a completion."""
        prompt, answer = self.tokenizer.prompt(example.turns), self.tokenizer.answer(example.chosen)
        taken = len(prompt) - 1 + len(self.processor.layout(example.image)[1]) + len(answer)
        positions = self.model.config.text.max_position_embeddings
        if taken >= positions:
            said = f"image, prompt and response take {taken} positions, the decoder has {positions}"
            raise UserError(f"{said}; drop the record")

    def sample(
        self,
        examples: list[Example],
        features: list[torch.Tensor] | None = None,
        step: int | None = None,
    ) -> list[Sampled]:
        """Algorithm 1 for a batch; only responses that are still too similar to y+ are sampled
        again.

        features (tiles, patches, D) each, where the tower has seen the pictures already; noise
        needs its own. In training `step` makes other draws of the same record."""
        if features is None and not self.config.noise_steps:
            pixels = [self.processor(example.image) for example in examples]
            features = self.model.encode_images(torch.cat(pixels)).split(
                [len(tiles) for tiles in pixels]
            )
        results: list[Sampled | None] = [None] * len(examples)
        pending = list(range(len(examples)))
        for iteration in range(1, self.config.n_bdhs + 1):
            last = iteration == self.config.n_bdhs
            guided = self.config.guided and not (self.config.n_bdhs > 1 and last)  # l. 5-7
            batch = [examples[i] for i in pending]
            seen = None if self.config.noise_steps else torch.cat([features[i] for i in pending])
            texts, truncated = self.iterate(batch, iteration, guided, seen, step)
            phis = self.similarity(texts, [example.chosen for example in batch])
            again = []
            for i, text, cut_off, phi in zip(pending, texts, truncated, phis, strict=True):
                seed = self.mask_seed(examples[i], iteration, step)
                results[i] = Sampled(text, iteration, round(phi, 4), seed, guided, cut_off)
                if phi >= self.config.eps_s or cut_off or not text:
                    again.append(i)
            pending = again
            if not pending:
                break
        return results

    def mask_seed(self, example: Example, iteration: int, step: int | None = None) -> int:
        """The seed of this iteration's mask, stored with the pair so that the mask can be drawn
        again."""
        return (
            stable_seed(self.config.seed, example.id, iteration, *([] if step is None else [step]))
            % 2**31
        )

    def mask(self, seed: int, image_tokens: int) -> torch.Tensor:
        """Eq. 6 for one picture."""
        return mask_of_seed(image_tokens, self.config.rho_th, seed)

    def iterate(
        self,
        examples: list[Example],
        iteration: int,
        guided: bool,
        features: torch.Tensor | None,
        step: int | None,
    ) -> tuple[list[str], list[bool]]:
        """One iteration of Alg. 1 for a batch: one prefill, then all sentences of all examples at
        once.

        Returns the responses, and which of them the length limit cut off.
        """
        config, tokenizer = self.config, self.tokenizer
        sequences, cuts, pixels, seeds = [], [], [], []
        for example in examples:
            seed = self.mask_seed(example, iteration, step)
            if features is None:
                pixels.append(
                    self.processor(noise_of_seed(example.image, config.noise_steps, seed))
                )
            prompt = tokenizer.prompt(example.turns)
            if guided:
                ids, rng = tokenizer.answer(example.chosen), random.Random(seed)
                spans = split_sentences(example.chosen)
                parts = [cut_sentence(example.chosen, span, ids, tokenizer, rng) for span in spans]
            else:
                ids, parts = [], [Cut("", "", [], 0)]
            branches = [
                Branch(cut.kept_ids[cut.shared :], len(prompt) + cut.shared) for cut in parts
            ]
            patches, packing = self.processor.layout(example.image)
            visible = self.mask(seed, len(packing))
            ids = ids[
                : max(cut.shared for cut in parts)
            ]  # no branch sees what is behind the last fork
            sequences.append(Sequence(prompt + ids, branches, patches, visible, packing))
            seeds.append([stable_seed(seed, k) for k in range(len(parts))])
            cuts.append(parts)
        if features is None:
            features = self.model.encode_images(torch.cat(pixels))
        stops = self.sentence_stops if guided else {tokenizer.eos_id}
        completions = generate(
            self.model, sequences, features, config.sampling, stops, seeds, pad_id=tokenizer.pad_id
        )
        texts = [join(c, done, tokenizer) for c, done in zip(cuts, completions, strict=True)]
        return texts, [not all(completion.stopped for completion in done) for done in completions]
