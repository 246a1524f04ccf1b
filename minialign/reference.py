"""The reference's log-probs, computed once and kept in a folder (--ref-cache): later epochs and
runs look them up.

The reference is frozen, so that what it says of a pair never changes. A value is kept under two
hashes: of the reference and of all that it sees of the pair. They cover whatever a value follows
from, so that one that is found is right, and nothing need be compared or cleared away. Left out is
what moves the last bits only: the other pairs of the batch that it was computed in, which say how
wide the padding is, the device, and torch's version.

Every process appends to a file of its own and reads those of all. A killed one may leave half a
line at the end of its file, which nobody reads and which nothing is ever written behind."""

import hashlib
import json
import math
import secrets
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from minialign.errors import UserError
from minialign.files import append_lines
from minialign.llava import Llava
from minialign.lora import reference_state
from minialign.losses import reference_logps
from minialign.masks import Sequence, TokenTree
from minialign.parallel import gather

SOURCES = sorted(Path(__file__).parent.glob("*.py"))


def put(digest, tensor: Tensor) -> None:
    """Type, shape and bytes of a tensor into a hash."""
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    copied = tensor.detach().to(
        "cpu", copy=True
    )  # what numpy has seen cannot be let go, as shards are
    digest.update(copied.contiguous().flatten().view(torch.uint8).numpy())


def reference_key(model: Llava) -> str:
    """Names the reference: every byte of its tensors as they are in memory, the model's choices,
    and this code.

    `checkpoint.fingerprint` would not do, as it reads the ends of the files only.
    """
    digest = hashlib.sha256(repr(replace(model.config, raw={})).encode())
    for path in SOURCES:  # all of it, as a list of what counts would one day lack a file
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    for name, tensor in reference_state(model).items():
        digest.update(f"{name} ".encode())
        put(digest, tensor)
    return digest.hexdigest()


def pair_key(sequence: Sequence, pixels: Tensor) -> str:
    """Names what the model sees of a pair: ids of trunk and branches, forks, the picture's packing,
    and its pixels.

    Template and truncation count by the ids that they lead to, the picture's preprocessing by the
    pixels."""
    digest = hashlib.sha256(json.dumps(asdict(sequence), default=Tensor.tolist).encode())
    put(digest, pixels)
    return digest.hexdigest()


def line_of(reference: str, pair: str, logps: list[float]) -> dict:
    """What is kept of a pair: its log-probs, chosen first, and a checksum of the line."""
    check = zlib.crc32(f"{reference} {pair} {logps}".encode())
    return {"reference": reference, "pair": pair, "logps": logps, "check": check}


class ReferenceCache:
    """The log-probs that `folder` has of a model's reference, and those that are added to it."""

    def __init__(self, folder: Path, model: Llava):
        folder.mkdir(parents=True, exist_ok=True)  # now, and not when the first value is found
        self.folder, self.reference = folder, reference_key(model)
        self.file = folder / f"reference-{secrets.token_hex(8)}.jsonl"  # of this process alone
        self.known: dict[str, list[float]] = {}
        self.read_to: dict[Path, int] = {}  # bytes of each file
        self.read()
        print(f"{folder}: has the reference's log-probs of {len(self.known)} pairs")

    def logps(
        self, model: Llava, keys: list[str], tree: TokenTree, tower_features: Tensor | None
    ) -> Tensor:
        """What `reference_logps` gives for the pairs of these keys, (B, S); computed only where one
        is not known."""
        if not self.known.keys() >= set(keys):
            self.read()
        if all(
            gather(self.known.keys() >= set(keys))
        ):  # several processes pass through shards together, or none does
            return torch.tensor([self.known[key] for key in keys], device=model.device)
        logps = reference_logps(model, tree, tower_features)
        self.add(dict(zip(keys, logps.tolist(), strict=True)))
        return logps

    def add(self, found: dict[str, list[float]]) -> None:
        """Keep what is new, in memory and on the disk; a value that is no number is none."""
        new = {
            key: row
            for key, row in found.items()
            if key not in self.known and all(map(math.isfinite, row))
        }
        append_lines(self.file, [line_of(self.reference, key, row) for key, row in new.items()])
        self.known |= new

    def read(self) -> None:
        """Take in what any process has appended since the last time; a line that is being written
        waits."""
        for path in sorted(self.folder.glob("reference-*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self.read_to.get(path, 0))
                lines = file.read().split(b"\n")[:-1]
            for line in lines:
                self.take(path, line)
            self.read_to[path] = self.read_to.get(path, 0) + sum(len(line) + 1 for line in lines)

    def take(self, path: Path, line: bytes) -> None:
        """Remember a line of this reference; one that `line_of` did not make is a `UserError`."""
        try:
            found = json.loads(line)
            whole = found == line_of(found["reference"], found["pair"], found["logps"])
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise UserError(
                f"{path}: a line is damaged; delete the file, and what it held is computed anew"
            )
        if found["reference"] == self.reference:
            self.known[found["pair"]] = found["logps"]
