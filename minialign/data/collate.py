"""Collation: pairs into token trees and pixels, one optimizer step at a time."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from PIL import Image
from torch import Tensor

from minialign.data.images import ImageProcessor, PreparedImage
from minialign.data.record_files import Records, sift
from minialign.data.records import Record, require_different
from minialign.data.tokenizer import Tokenizer
from minialign.errors import UserError
from minialign.model.masks import Branch, Sequence, TokenTree, build_tree
from minialign.sampling.noise import noise_of_seed
from minialign.seeds import stable_seed


@dataclass(frozen=True)
class Pair:
    """One pair as it was loaded. An idle pair, which counts for nothing, has no record.

    sequence  image and prompt, and a branch per response: chosen, then the rejected ones
    image     the picture as the model takes it
    noisy     (tiles, 3, H, W) pixels of the noisy picture, where one is wanted
    """

    record: Record | None
    sequence: Sequence
    picture: Image.Image | None
    image: PreparedImage
    noisy: Tensor | None = None


@dataclass(frozen=True)
class PairBatch:
    """Pairs that pass through the model together.

    tree    their sequences as token trees: branch 1 is chosen, the others are rejected responses
    pixels  (tiles, 3, H, W) of all their pictures
    noisy   (tiles, 3, H, W) of the noisy ones, where they are wanted
    keys    what names the pairs in the reference's cache; none where there is no cache
    """

    pairs: list[Pair]
    tree: TokenTree
    pixels: Tensor
    noisy: Tensor | None
    keys: list[str]

    def __len__(self) -> int:
        """How many pairs count."""
        return sum(pair.record is not None for pair in self.pairs)

    @property
    def sequences(self) -> list[Sequence]:
        """The pairs' sequences."""
        return [pair.sequence for pair in self.pairs]

    @property
    def chosen_tokens(self) -> int:
        """Tokens of all chosen responses."""
        return sum(len(pair.sequence.branches[0].ids) for pair in self.pairs if pair.record)


@dataclass(frozen=True)
class PairCollator:
    """Records to a `PairBatch`.

    A response that is too long is cut if `truncate`, else refused; an image is never cut.
    """

    tokenizer: Tokenizer
    processor: ImageProcessor
    pictures: Callable[[str], Image.Image]  # by their names in the data
    max_response_tokens: int
    positions: int = 4096  # that the decoder has
    truncate: bool = False
    rejected: tuple[str, ...] = ("rejected",)  # a record's fields that hold rejected responses
    noise_steps: int = 0  # of the noisy pictures; 0: none are wanted
    seed: int = 0  # the noise follows from it, the step and the record's id
    keyed: bool = False  # each pair with its key in the reference's cache
    device: str = "cpu"  # a GPU fetches pixels from pinned memory while it computes

    def load(self, record: Record, step: int = 0) -> Pair:
        """A record with its sequence and pixels, and the noise of this step; a `UserError` where it
        is of no use.
        """
        self.require_different(record)
        picture = self.pictures(record.image)
        features, packing = self.processor.layout(picture)
        sequence = self.sequence(record, features, packing)

        image = PreparedImage(self.processor(picture), features, packing)
        noisy = None
        if self.noise_steps:
            seed = stable_seed(self.seed, step, record.id) % 2**31
            noisy = self.processor(noise_of_seed(picture, self.noise_steps, seed))
        return Pair(record, sequence, picture, image, noisy)

    def check(self, record: Record) -> None:
        """Refuse what `load` would refuse, without the pixels, which take longest."""
        self.require_different(record)
        features, packing = self.processor.layout(self.pictures(record.image))
        self.sequence(record, features, packing)

    def require_different(self, record: Record) -> None:
        """Leave a record out whose responses do not differ: there is nothing to prefer."""
        for name in self.rejected:
            require_different(record, name)

    def sequence(self, record: Record, features: int, packing: Tensor) -> Sequence:
        """A pair is ONE sequence: image and prompt once, then a branch per response. features and
        packing: the picture's layout."""
        prompt = self.tokenizer.prompt(record.turns, image_turn=record.image_turn)
        texts = [record.chosen, *(getattr(record, name) for name in self.rejected)]
        responses = [self.tokenizer.response(text) for text in texts]

        taken = len(prompt) - 1 + len(packing)  # the packing fills the image token's place
        limit = self.response_limit(max(map(len, responses)), taken)
        branches = [Branch(ids[:limit]) for ids in responses]
        return Sequence(prompt, branches, features, packing=packing)

    def response_limit(self, longest: int, taken: int) -> int:
        """How long a response may be, in tokens, behind `taken` positions.

        Refuses a record whose `longest` response is longer, unless it is to be cut.
        """
        left = self.positions - taken
        if left < 1:
            message = f"image and prompt take {taken} of the decoder's {self.positions} positions"
            raise UserError(f"{message}, which leaves none for a response; use another model")
        limit = min(self.max_response_tokens, left)
        if longest <= limit or self.truncate:
            return limit
        message = f"a response of {longest} tokens is longer than"
        if limit == self.max_response_tokens:
            message += f" --max-response-tokens {limit}; raise it, or"
        else:
            message += f" the {left} positions that image and prompt leave of {self.positions};"
        raise UserError(f"{message} pass --truncate")

    def batch(self, pairs: list[Pair]) -> PairBatch:
        """Some pairs that were loaded, as one batch."""
        tree = self.tree([pair.sequence for pair in pairs])
        pixels = self.pinned([pair.image.pixels for pair in pairs])
        noisy = None
        if self.noise_steps:
            noisy = self.pinned([pair.noisy for pair in pairs])
        keys = []
        if self.keyed:
            keys = [pair_key(pair.sequence, pair.image.pixels) for pair in pairs]
        return PairBatch(pairs, tree, pixels, noisy, keys)

    def tree(self, sequences: list[Sequence]) -> TokenTree:
        """Sequences as one batch of token trees."""
        return build_tree(sequences, self.tokenizer.image_id, self.tokenizer.pad_id)

    def pinned(self, pixels: list[Tensor]) -> Tensor:
        """The pixels of some pairs as one tensor, in pinned memory if a GPU waits for them."""
        together = torch.cat(pixels)
        return together.pin_memory() if torch.device(self.device).type == "cuda" else together

    def idle(self, branches: int) -> PairBatch:
        """A batch that counts for nothing, of one row with so many responses.

        A process that has no pair left goes with the others by it.
        """
        responses = [Branch([self.tokenizer.eos_id])] * branches
        patches = self.processor.patches
        sequence = Sequence([self.tokenizer.image_id], responses, patches)
        pixels = torch.zeros(1, 3, self.processor.size, self.processor.size)
        image = PreparedImage(pixels, patches, torch.arange(patches))
        noisy = pixels if self.noise_steps else None
        return self.batch([Pair(None, sequence, None, image, noisy)])


def pair_key(sequence: Sequence, pixels: Tensor) -> str:
    """Names what the model sees of a pair: ids of trunk and branches, forks, the picture's packing,
    and its pixels.

    Template and truncation count by the ids that they lead to, the picture's preprocessing by the
    pixels.
    """
    digest = hashlib.sha256(json.dumps(asdict(sequence), default=Tensor.tolist).encode())
    add_tensor(digest, pixels)
    return digest.hexdigest()


def add_tensor(digest, tensor: Tensor) -> None:
    """Type, shape and bytes of a tensor into a hash."""
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    # A copy: memory that numpy has seen cannot be let go, as that of shards is.
    copied = tensor.detach().to("cpu", copy=True)
    digest.update(copied.contiguous().flatten().view(torch.uint8).numpy())


@dataclass(frozen=True)
class StepLoader:
    """The pairs of one optimizer step as `accumulate` batches, one forward pass each.

    Pairs are bucketed by length within the step: those of like length pass together, so that little
    is padding, and the gradient is the same. Buckets across steps would make each step's pairs
    alike, and the gradient another.
    """

    records: Records
    collate: PairCollator
    accumulate: int
    skip_bad: bool
    # what was wrong with records that turned out, on the way, to be of no use
    left_out: list[str] = field(default_factory=list)

    def __call__(self, numbers: list[int], step: int = 0) -> list[PairBatch]:
        """The batches of some records of a step, by their numbers in the file."""

        def load(number: int) -> Pair:
            return self.collate.load(self.records.parse(number), step)

        places = ((self.records.file.place(number), number) for number in numbers)
        pairs, refused = sift(places, load, self.skip_bad)
        self.left_out.extend(f"{place}: {error}" for place, error in refused)
        # Silent in the paper: batches are not drawn by length.
        if self.accumulate > 1:
            pairs.sort(key=lambda pair: pair.sequence.length)
        size = math.ceil(len(pairs) / self.accumulate) or 1
        return [self.collate.batch(pairs[i : i + size]) for i in range(0, len(pairs), size)]

    def idle(self, branches: int | None = None) -> PairBatch:
        """A batch that counts for nothing, of as many responses as the pairs have."""
        return self.collate.idle(branches or 1 + len(self.collate.rejected))
