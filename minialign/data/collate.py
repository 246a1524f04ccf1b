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
    """One pair as it was loaded: its record, its sequence, its picture as the tower takes it, and
    the noisy picture's pixels, where they are wanted.

    An idle pair, which counts for nothing, has no record. Of its own accord nobody keeps `picture`.
    """

    record: Record | None
    sequence: Sequence  # branches: chosen, then every rejected response
    image: PreparedImage
    noisy: Tensor | None = None
    picture: Image.Image | None = None


@dataclass(frozen=True)
class PairBatch:
    """Pairs that pass through the model together.

    tree    their sequences as token trees: branch 1 is chosen, the others are rejected responses
    pixels  (tiles, 3, H, W), of all their pictures; noisy: the same of the noisy ones
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
    """Records to a `PairBatch`. A response is cut at its end if `truncate`, else refused; an image
    never is."""

    tokenizer: Tokenizer
    processor: ImageProcessor
    pictures: Callable[[str], Image.Image]  # by their names in the data
    max_response_tokens: int
    positions: int = 4096  # that the decoder has
    truncate: bool = False
    # fields of a record that hold its rejected responses
    rejected: tuple[str, ...] = ("rejected",)
    noise_steps: int = 0  # of the noisy pictures; 0: none are wanted
    keep_pictures: bool = False  # beside their pixels, for the model to sample from
    keyed: bool = False  # each pair with its key in the reference's cache
    # that the pixels go to; a GPU fetches them from pinned memory while it computes
    device: str = "cpu"

    def responses(self, record: Record, room: int) -> list[list[int]]:
        """Chosen and rejected ids, at most --max-response-tokens each, and `room`."""
        texts = [record.chosen, *(getattr(record, name) for name in self.rejected)]
        ids = [self.tokenizer.response(text) for text in texts]

        limit = min(self.max_response_tokens, room)
        longest = max(map(len, ids))
        if limit < 1:
            taken = f"{self.positions - room} of the decoder's {self.positions} positions"
            raise UserError(
                f"image and prompt take {taken}, which leaves none for a response; use another model"
            )
        if longest > limit and not self.truncate:
            message = f"a response of {longest} tokens is longer than"
            if limit == self.max_response_tokens:
                raise UserError(
                    f"{message} --max-response-tokens {limit}; raise it, or pass --truncate"
                )
            left = f"{limit} positions that image and prompt leave of {self.positions}"
            raise UserError(f"{message} the {left}; pass --truncate")
        return [each[:limit] for each in ids]

    def require_different(self, record: Record) -> None:
        """Leave a record out whose responses do not differ: there is nothing to prefer."""
        for name in self.rejected:
            require_different(record, name)

    def check(self, record: Record) -> None:
        """Refuse a record whose picture cannot be read or whose responses do not fit, leave out one
        of no use."""
        self.require_different(record)
        patches, packing = self.processor.layout(self.pictures(record.image))
        self.sequence(record, patches, packing)

    def sequence(self, record: Record, patches: int, packing: Tensor) -> Sequence:
        """A pair is ONE sequence: image and prompt once, then a branch per response."""
        prompt = self.tokenizer.prompt(record.turns)
        room = self.positions - (len(prompt) - 1 + len(packing))
        branches = [Branch(ids) for ids in self.responses(record, room)]
        return Sequence(prompt, branches, patches, packing=packing)

    def load(self, record: Record) -> Pair:
        """A record with its sequence and pixels."""
        self.require_different(record)
        picture, noisy = self.pictures(record.image), None
        image = self.processor.prepare(picture)
        sequence = self.sequence(record, len(image.pixels) * self.processor.patches, image.packing)
        if self.noise_steps:
            seed = stable_seed(record.id) % 2**31
            noisy = self.processor(noise_of_seed(picture, self.noise_steps, seed))
        return Pair(record, sequence, image, noisy, picture if self.keep_pictures else None)

    def batch(self, pairs: list[Pair]) -> PairBatch:
        """Some pairs that were loaded, as one batch."""
        tree = self.tree([pair.sequence for pair in pairs])
        pixels = self.pinned([pair.image.pixels for pair in pairs])
        noisy = self.pinned([pair.noisy for pair in pairs]) if self.noise_steps else None
        keys = [pair_key(pair.sequence, pair.image.pixels) for pair in pairs] if self.keyed else []
        return PairBatch(pairs, tree, pixels, noisy, keys)

    def tree(self, sequences: list[Sequence]) -> TokenTree:
        """Sequences as one batch of token trees."""
        return build_tree(sequences, self.tokenizer.image_id, self.tokenizer.pad_id)

    def pinned(self, pixels: list[Tensor]) -> Tensor:
        """The pixels of some pairs as one tensor, in pinned memory if a GPU waits for them."""
        together = torch.cat(pixels)
        return together.pin_memory() if torch.device(self.device).type == "cuda" else together

    def idle(self, branches: int) -> PairBatch:
        """A batch of no pair: one row that counts for nothing, for a process that must go with the
        others."""
        responses = [Branch([self.tokenizer.eos_id])] * branches
        sequence = Sequence([self.tokenizer.image_id], responses, self.processor.patches)
        pixels = torch.zeros(1, 3, self.processor.size, self.processor.size)
        image = PreparedImage(pixels, torch.arange(self.processor.patches))
        return self.batch([Pair(None, sequence, image, pixels if self.noise_steps else None)])


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
    copied = tensor.detach().to(
        "cpu", copy=True
    )  # what numpy has seen cannot be let go, as shards are
    digest.update(copied.contiguous().flatten().view(torch.uint8).numpy())


@dataclass(frozen=True)
class StepLoader:
    """The pairs of one optimizer step as `accumulate` batches, one forward pass each; those that
    are refused go to `left_out`, with what is wrong.

    Pairs are bucketed by length within the step: those of like length pass together, so that little
    is padding, and the gradient is the same. Buckets across steps would make each step's pairs
    alike, and the gradient another.
    """

    records: Records
    collate: PairCollator
    accumulate: int
    skip_bad: bool
    left_out: list[str] = field(default_factory=list)

    def __call__(self, numbers: list[int]) -> list[PairBatch]:
        """The batches of some records, by their numbers in the file."""
        places = ((self.records.file.place(number), number) for number in numbers)
        pairs, refused = sift(
            places, lambda n: self.collate.load(self.records.parse(n)), self.skip_bad
        )
        self.left_out.extend(f"{place}: {error}" for place, error in refused)
        if self.accumulate > 1:
            pairs.sort(key=lambda pair: pair.sequence.length)
        size = math.ceil(len(pairs) / self.accumulate) or 1
        return [self.collate.batch(pairs[i : i + size]) for i in range(0, len(pairs), size)]

    def idle(self, branches: int | None = None) -> PairBatch:
        """A batch that counts for nothing, of as many responses as the pairs have."""
        return self.collate.idle(1 + len(self.collate.rejected) if branches is None else branches)
