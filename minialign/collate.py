"""Collation: pairs into token trees and pixels, one optimizer step at a time."""

import math
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from minialign import toyworld
from minialign.chat import Tokenizer
from minialign.data import Records, sift
from minialign.errors import UserError
from minialign.generate import stable_seed
from minialign.images import ImageProcessor, noise_of_seed, open_image
from minialign.masks import Branch, Sequence, TokenTree, build_tree, mask_of_seed
from minialign.records import Record, require_different
from minialign.reference import pair_key
from minialign.report import ReportPair


@dataclass(frozen=True)
class PairBatch:
    """Pairs as token trees, one each, with their pixels (tiles, 3, H, W), and the noisy ones if
    they are wanted.

    An idle batch has a sequence and no record.
    """

    records: list[Record]
    sequences: list[Sequence]  # branches: chosen, then every rejected response
    tree: TokenTree | None  # of these; None where the model has branches to add first
    pixels: Tensor
    noisy: Tensor | None
    pictures: list[Image.Image | None]
    keys: list[str]  # what names the pairs in the reference's cache; none where there is no cache

    def __len__(self) -> int:
        return len(self.records)

    @property
    def chosen_tokens(self) -> int:
        """Tokens of all chosen responses."""
        return sum(
            len(sequence.branches[0].ids)
            for _, sequence in zip(self.records, self.sequences, strict=False)
        )


@dataclass(frozen=True)
class PairCollator:
    """Records to a `PairBatch`. A response is cut at its end if `truncate`, else refused; an image
    never is."""

    tokenizer: Tokenizer
    processor: ImageProcessor
    images: str
    max_response_tokens: int
    positions: int = 4096  # that the decoder has
    truncate: bool = False
    rejected: tuple[str, ...] = ("rejected",)  # fields of a record that hold its rejected responses
    noise_steps: int = 0  # of the noisy pictures; 0: none are wanted
    keep_pictures: bool = False  # beside their pixels, for the model to sample from
    keyed: bool = False  # each pair with its key in the reference's cache
    # that the pixels go to; a GPU fetches them from pinned memory while it computes
    device: str = "cpu"

    def responses(self, record: Record, room: int | None = None) -> list[list[int]]:
        """Chosen and rejected ids, at most --max-response-tokens each, and `room`."""
        limit = self.max_response_tokens if room is None else min(self.max_response_tokens, room)
        ids = [
            self.tokenizer.response(getattr(record, name)) for name in ("chosen", *self.rejected)
        ]
        longest = max(map(len, ids))
        if limit < 1:
            said = f"image and prompt take {self.positions - room} of the decoder's {self.positions} positions"
            raise UserError(f"{said}, which leaves none for a response; use another model")
        if longest > limit and not self.truncate:
            said = f"a response of {longest} tokens is longer than"
            if limit == self.max_response_tokens:
                raise UserError(
                    f"{said} --max-response-tokens {limit}; raise it, or pass --truncate"
                )
            left = f"{limit} positions that image and prompt leave of {self.positions}"
            raise UserError(f"{said} the {left}; pass --truncate")
        return [each[:limit] for each in ids]

    def require_different(self, record: Record) -> None:
        """Leave a record out whose responses do not differ: there is nothing to prefer."""
        for name in self.rejected:
            require_different(record, name)

    def check(self, record: Record) -> None:
        """Refuse a record whose picture cannot be read or whose responses do not fit, leave out one
        of no use."""
        self.require_different(record)
        if self.images == "toy":
            toyworld.scene_of(record.image)  # drawing it would take longer
            taken = len(self.tokenizer.prompt(record.turns)) - 1 + self.processor.patches
            self.responses(record, self.positions - taken)
        else:
            self.sequence(record, open_image(self.images, record.image))

    def sequence(self, record: Record, picture: Image.Image) -> Sequence:
        """A pair is ONE sequence: image and prompt once, then a branch per response."""
        patches, packing = self.processor.layout(picture)
        prompt = self.tokenizer.prompt(record.turns)
        room = self.positions - (len(prompt) - 1 + len(packing))
        branches = [Branch(ids) for ids in self.responses(record, room)]
        return Sequence(prompt, branches, patches, packing=packing)

    def loaded(self, record: Record) -> "Loaded":
        """A record with its sequence and pixels."""
        self.require_different(record)
        picture, noisy = open_image(self.images, record.image), None
        if self.noise_steps:
            noisy = self.processor(
                noise_of_seed(picture, self.noise_steps, stable_seed(record.id) % 2**31)
            )
        kept = picture if self.keep_pictures else None
        return Loaded(record, self.sequence(record, picture), self.processor(picture), noisy, kept)

    def __call__(self, records: list[Record]) -> PairBatch:
        """Records to one batch."""
        return self.batch([self.loaded(record) for record in records])

    def batch(self, pairs: list["Loaded"]) -> PairBatch:
        """What was loaded of some pairs, as one batch."""
        sequences = [pair.sequence for pair in pairs]
        whole = not (self.noise_steps or self.keep_pictures)
        tree = self.tree(sequences) if whole else None
        noisy = self.pinned([pair.noisy for pair in pairs]) if self.noise_steps else None
        pixels = self.pinned([pair.pixels for pair in pairs])
        records, pictures = [pair.record for pair in pairs], [pair.picture for pair in pairs]
        keys = [pair_key(pair.sequence, pair.pixels) for pair in pairs] if self.keyed else []
        return PairBatch(records, sequences, tree, pixels, noisy, pictures, keys)

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
        answers = [Branch([self.tokenizer.eos_id])] * branches
        sequence = Sequence([self.tokenizer.image_id], answers, self.processor.patches)
        pixels = torch.zeros(1, 3, self.processor.size, self.processor.size)
        pair = Loaded(None, sequence, pixels, pixels if self.noise_steps else None)
        return replace(self.batch([pair]), records=[])

    def report_pair(self, record: Record) -> ReportPair:
        """What the report shows of a pair: the whole picture as the tower saw it, its visible
        patches, the texts."""
        mask, picture = None, open_image(self.images, record.image)
        if record.bdhs.get("rho_th") and record.bdhs.get("mask_seed") is not None:
            tokens = len(self.processor.layout(picture)[1])
            mask = mask_of_seed(tokens, record.bdhs["rho_th"], record.bdhs["mask_seed"]).tolist()
            mask = mask[: self.processor.patches]  # AnyRes: the whole picture's tile comes first
        question = record.turns[-1][1]
        if record.bdhs.get("noise_steps") and record.bdhs.get("mask_seed") is not None:
            picture = noise_of_seed(picture, record.bdhs["noise_steps"], record.bdhs["mask_seed"])
        picture = self.processor.crop(picture)
        facts = (record.bdhs.get(name) for name in ("iterations", "similarity", "guided"))
        return ReportPair(
            record.id, picture, mask, question, record.chosen, record.rejected, *facts
        )


@dataclass(frozen=True)
class Loaded:
    """One pair: its record, its sequence and the pixels (tiles, 3, H, W) of its picture, and of the
    noisy one."""

    record: Record
    sequence: Sequence
    pixels: Tensor
    noisy: Tensor | None
    picture: Image.Image | None = None


@dataclass(frozen=True)
class StepLoader:
    """The pairs of one optimizer step as `accumulate` batches, one forward pass each.

    Pairs are bucketed by length within the step: those of like length pass together, so that little
    is padding, and the gradient is the same. Buckets across steps would make each step's pairs
    alike, and the gradient another."""

    records: Records
    collate: PairCollator
    accumulate: int
    skip_bad: bool

    def __call__(self, numbers: list[int]) -> tuple[list[PairBatch], list[str]]:
        """The batches, and what is wrong with the pairs that were left out."""
        numbered = ((self.records.file.place(number), number) for number in numbers)
        pairs, left_out = sift(
            numbered, lambda n: self.collate.loaded(self.records.parse(n)), self.skip_bad
        )
        if self.accumulate > 1:
            pairs.sort(key=lambda pair: pair.sequence.length)
        size = math.ceil(len(pairs) / self.accumulate) or 1
        batches = [self.collate.batch(pairs[i : i + size]) for i in range(0, len(pairs), size)]
        return batches, [f"{place}: {error}" for place, error in left_out]
