"""Random damage to folders of models, adapters and encoders: each is read and works, or is one
line.

A few hundred cases here; MINIALIGN_FUZZ=2000 makes so many of each kind.
"""

import copy
import json
import math
import os
import random
import resource
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from encoder_folders import make_encoder, make_folder
from helpers import random_model
from policies import adapted

from minialign.errors import UserError
from minialign.model.hf_folder import load_model
from minialign.model.lora import adapter_state
from minialign.model.masks import Sequence, build_tree
from minialign.model.peft_folder import load_adapter, save_adapter
from minialign.sampling.sentence_encoder import SentenceEncoder

# Where tokenizers panics, Rust would print a trace, and read the symbols of all of torch for it.
os.environ["RUST_BACKTRACE"] = "0"
CASES = int(os.environ.get("MINIALIGN_FUZZ", 25))
DEEP = json.loads("[" * 300 + "]" * 300)
VALUES = [
    *(None, True, False, 0, 1, 2, 3, 7, -1, -2, 64, 2**31, 2**64, 10**400, 0.5, -0.5, 1e30, 1e-40),
    *(math.nan, math.inf, -math.inf, "", "x", "1", "../x", "/", "\0", "\ud800", "y" * 5000),
    *([], [1], [[1, 2]], ["x"], [None], {}, {"a": 1}, {"a": ["x"]}, DEEP),
]


def places_in(value: object) -> list[tuple]:
    """Every (container, key) below a JSON value."""
    found, todo = [], [value]
    while todo:
        each = todo.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each))
        for key in keys:
            found.append((each, key))
            todo += [each[key]] if isinstance(each[key], dict | list) else []
    return found


def damaged(text: str, rng: random.Random) -> str:
    """A JSON text with one to three values changed, moved or taken away, or with other characters
    in it."""
    if rng.random() < 0.05:
        cut = rng.randrange(len(text))
        return text[:cut] + rng.choice(["", "}", "\x00", '"', "9" * 5000]) + text[cut + 1 :]
    raw = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = places_in(raw)
        if not places:
            break
        container, key = rng.choice(places)
        other, other_key = rng.choice(places)
        what = rng.random()
        if what < 0.1:
            del container[key]
        elif what < 0.2:
            container[key] = copy.deepcopy(other[other_key])
        elif what < 0.25 and isinstance(container, dict):
            container[f"{key}{rng.choice('_x2')}"] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(raw)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a damaged header, or other bytes in it."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = damaged(data[8 : 8 + size].decode(), rng).encode("utf-8", "replace")
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 4, 40])):
        changed[rng.randrange(rng.choice([8, 8 + size, len(data)]))] = rng.randrange(256)
    return bytes(changed[: rng.choice([len(data)] * 3 + [rng.randrange(len(data))])])


def in_shards(folder: Path) -> None:
    """An index, without model.safetensors beside it."""
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    keys = ("lm_head.weight", "model.norm.weight", "image_newline")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, "shard.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def use_model(folder: Path) -> torch.Tensor:
    """Logits of the folder's model."""
    model = load_model(folder)
    image, patches = model.config.image_token_id, model.config.vision.patches
    ids = [id for id in range(6) if id != image and id < model.config.text.vocab_size]
    size, tiles = model.config.vision.image_size, 1
    tree = build_tree([Sequence([*ids, image, *ids], [], tiles * patches)], image, 0)
    return model.lm_head(model(tree, model.encode_images(torch.ones(tiles, 3, size, size))))


def use_adapter(folder: Path) -> torch.Tensor:
    """Logits of a model with the folder's adapter."""
    model = copy.deepcopy(random_model(0))
    load_adapter(model, folder)
    patches = model.config.vision.patches
    tree = build_tree([Sequence([5, 3, 6], [], patches)], 3, 0)
    return model.lm_head(model(tree, torch.ones(1, patches, 16)))


def use_encoder(folder: Path) -> torch.Tensor:
    """Embeddings."""
    return SentenceEncoder.from_folder(folder).embed(["w1 w2 x", "", "W3 [SEP] w4 " * 40])


def peak_memory() -> int:
    """The most that this process has taken so far, in bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(folder: Path, names: list[str], use, seed: str) -> None:
    """Damage one of the folder's files after the other, and use the folder each time."""
    whole = {name: (folder / name).read_bytes() for name in names}
    assert use(folder).isfinite().all()
    outcomes: Counter = Counter()
    before = peak_memory()
    for case in range(CASES):
        rng = random.Random(f"{seed} {case}")
        name = rng.choice(names)
        if name.endswith(".json"):
            spoilt = damaged(whole[name].decode(), rng).encode("utf-8", "replace")
        else:
            spoilt = damaged_bytes(whole[name], rng)
        (folder / name).write_bytes(spoilt)
        start = time.monotonic()
        try:
            with torch.no_grad():
                result = use(folder)
            outcomes["read"] += 1
            # Numbers of any size may come of damaged bytes.
            assert name.endswith(".safetensors") or not result.isnan().any(), (case, name)
        except UserError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) < 3000, (case, name)
        except Exception as error:
            raise AssertionError(f"case {case} of {seed}: {name}: {spoilt[:300]}") from error
        assert time.monotonic() - start < 10, (case, name)
        (folder / name).write_bytes(whole[name])
    print(seed, dict(outcomes))
    assert outcomes["refused"] > outcomes["read"] / 20
    assert peak_memory() - before < 2**30


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_models(llava_folder, name):
    check(llava_folder, [name], use_model, f"model {name}")


def test_indexes(llava_folder):
    in_shards(llava_folder)
    names = ["model.safetensors.index.json", "shard.safetensors"]
    check(llava_folder, names, use_model, "index")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(tmp_path, name):
    save_adapter(adapter_state(adapted(random_model(0), 2, 4.0)), 2, 4.0, "x", tmp_path)
    check(tmp_path, [name], use_adapter, f"adapter {name}")


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_encoders(tmp_path, kind):
    folder = make_folder(tmp_path, make_encoder(kind, 7), kind)
    names = ["config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"]
    names += ["sentence_bert_config.json", "tokenizer.json", "config.json", "tokenizer.json"]
    check(folder, names, use_encoder, f"encoder {kind}")
