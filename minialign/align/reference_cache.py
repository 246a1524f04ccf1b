"""The reference's log-probs, computed once and kept in a folder (--ref-cache): later epochs and
runs look them up.

The reference is frozen, so that what it says of a pair never changes. A value is kept under two
hashes: of the reference and of all that it sees of the pair. They cover whatever a value follows
from, so that one that is found is right, and nothing need be compared or cleared away. Left out is
what moves the last bits only: the other pairs of the batch that it was computed in, which say how
wide the padding is, the device, and torch's version.

Every process appends to a file of its own and reads those of all. A killed one may leave half a
line at the end of its file, which nobody reads and which nothing is ever written behind.
"""

import hashlib
import json
import secrets
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minialign.align.logps import reference_logps
from minialign.claims import claim_folder
from minialign.data.collate import add_tensor
from minialign.errors import UserError
from minialign.files import append_lines
from minialign.model.llava import Llava
from minialign.model.lora import reference_state
from minialign.model.masks import TokenTree
from minialign.training.parallel import gather

# The code that a log-prob follows from: whole rooms, as a list of files would one day lack one.
ROOMS = ("model", "align")


def reference_key(model: Llava) -> str:
    """Names the reference: every byte of its tensors as they are in memory, the model's choices,
    and the code.

    `hf_folder.fingerprint` would not do, as it reads the ends of the files only.
    """
    digest = hashlib.sha256(repr(replace(model.config, raw={})).encode())
    for room in ROOMS:
        for path in sorted((Path(__file__).parent.parent / room).glob("*.py")):
            source = path.read_bytes()
            digest.update(f"{path.name} {len(source)} ".encode() + source)
    for name, tensor in reference_state(model).items():
        digest.update(f"{name} ".encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()


class ReferenceCache:
    """The log-probs that `folder` has of a model's reference, and those that are added to it."""

    def __init__(self, folder: Path, model: Llava):
        claim_folder(folder, "reference cache", alone=False)
        self.folder = folder
        self.reference = reference_key(model)
        self.file = folder / f"reference-{secrets.token_hex(8)}.jsonl"  # of this process alone
        self.known: dict[str, list[float]] = {}  # by the pairs' keys
        self.read_to: Counter[Path] = Counter()  # bytes of each file
        self.read()
        print(f"{folder}: has the reference's log-probs of {len(self.known)} pairs")

    def logps(
        self, model: Llava, keys: list[str], tree: TokenTree, tower_features: Tensor | None
    ) -> Tensor:
        """What `reference_logps` gives for the pairs of these keys, (B, S); computed only where one
        is not known.
        """
        if not self.known.keys() >= set(keys):
            self.read()
        # Several processes pass through shards together, or none does.
        if all(gather(self.known.keys() >= set(keys))):
            return torch.tensor([self.known[key] for key in keys], device=model.device)
        logps = reference_logps(model, tree, tower_features)
        self.add(dict(zip(keys, logps.tolist(), strict=True)))
        return logps

    def add(self, found: dict[str, list[float]]) -> None:
        """Keep what is new, in memory and on the disk."""
        new = {pair: logps for pair, logps in found.items() if pair not in self.known}
        lines = []
        for pair, logps in new.items():
            lines.append({"reference": self.reference, "pair": pair, "logps": logps})
        append_lines(self.file, lines)
        self.known |= new

    def read(self) -> None:
        """Take in what any process has appended since the last time; a line that is being written
        waits.
        """
        for path in sorted(self.folder.glob("reference-*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self.read_to[path])
                lines = file.read().split(b"\n")[:-1]
            self.read_to[path] += sum(len(line) + 1 for line in lines)
            try:
                found = [json.loads(line) for line in lines]
            except ValueError:
                remedy = "delete the file, and what it held is computed anew"
                raise UserError(f"{path}: a line is damaged; {remedy}") from None
            mine = [line for line in found if line["reference"] == self.reference]
            self.known |= {line["pair"]: line["logps"] for line in mine}
