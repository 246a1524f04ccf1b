"""Weights are streamed: the memory that loading takes stays below the model's size plus one shard,
and of several processes that share a model below each one's share plus one tensor.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchruns import run

from minialign.model.config import read_config
from minialign.model.hf_folder import HUB_NAMES, load_model, rename
from minialign.model.llava import Llava

CONFIG = {
    "model_type": "llava",
    "image_token_index": 8000,
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 8064,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
    },
}
# Loads the toy model first, so that what the libraries themselves take is there, then measures
# (Linux).
MEASURE = """
import sys, torch
from pathlib import Path
from minialign.model.hf_folder import load_model
from minialign.edge import CHECKPOINT
def memory(name):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
load_model(CHECKPOINT, dtype=torch.bfloat16)
before = memory("VmRSS")
model = load_model(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2]))
print(memory("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""
# The same of one of several processes, each of which prints what it took. Pages of the files that
# are mapped belong to nobody: what a process has for itself is RssAnon, whose peak is watched for
# here. What was freed before is given back first: used again, it would not count.
MEASURE_SHARDS = """
import ctypes, sys, threading, time, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from torch.distributed.fsdp import fully_shard
from minialign.model.hf_folder import empty_model, load_model, load_weights
from minialign.edge import CHECKPOINT
from minialign.training import parallel
def memory(name):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
def watch():
    while not done:
        seen.append(memory("RssAnon"))
        time.sleep(0.001)
parallel.start("cpu")
torch.set_num_threads(1)
load_model(CHECKPOINT, dtype=torch.bfloat16)
ctypes.CDLL(None).malloc_trim(0)
done, before, seen = False, memory("RssAnon"), []
watcher = threading.Thread(target=watch)
watcher.start()
model = empty_model(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
for unit in (*model.language_model.layers, model.vision_tower, model):
    fully_shard(unit, mesh=parallel.mesh("cpu"))
load_weights(model, Path(sys.argv[1]), "cpu")
done = True
watcher.join()
mine = sum(p.to_local().nbytes for p in model.parameters())
largest = max(p.numel() * p.element_size() for p in model.parameters())
checksum = 0.0
for p in model.parameters():
    checksum += p.full_tensor().double().abs().sum().item()
found = parallel.gather((max(seen) - before, mine, largest))
print(checksum, *(number for each in found for number in each))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Iterator[Path]:
    """A random checkpoint of 140 MB in float16, in shards of some 30 MB."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        shapes = {
            rename(name, HUB_NAMES): p.shape
            for name, p in Llava(read_config(folder)).state_dict().items()
        }
    shards: list[dict] = [{}]
    for key, shape in shapes.items():
        if sum(t.numel() * 2 for t in shards[-1].values()) > 2.5e7:
            shards.append({})
        # Any finite number from 0 up.
        bits = torch.randint(0, 0x7C00, shape, dtype=torch.int16)
        shards[-1][key] = bits.view(torch.float16)
    names = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file)
        names |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_memory_of_loading(checkpoint, tmp_path, dtype):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = run(1, str(script), f"{checkpoint} {dtype}")
    peak, model = map(int, done.stdout.split())
    sizes = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    shown = {"model": model, "largest shard": max(sizes), "peak": peak}
    print(dtype, {name: f"{size / 1e6:.0f} MB" for name, size in shown.items()})
    assert sum(sizes) > 1.3e8 and model >= sum(sizes) * 0.99
    assert peak < model + max(sizes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_loading_shards(checkpoint, tmp_path, dtype):
    """Two processes: each reads a tensor, keeps its rows and lets the rest go."""
    script = tmp_path / "measure.py"
    script.write_text(MEASURE_SHARDS.format(root=str(Path(__file__).resolve().parents[2])))
    checksum, *numbers = map(float, run(2, str(script), f"{checkpoint} {dtype}").stdout.split())
    for peak, mine, largest in zip(*[iter(numbers)] * 3, strict=True):
        shown = {"share": mine, "largest tensor": largest, "peak": peak}
        print(dtype, {name: f"{size / 1e6:.0f} MB" for name, size in shown.items()})
        # Of what was freed before a little may still be used again, and does not count then.
        assert 0.85 * mine < peak < mine + largest
    whole = load_model(checkpoint, dtype=getattr(torch, dtype))
    expected = sum(p.double().abs().sum().item() for p in whole.parameters())
    assert checksum == pytest.approx(expected, rel=1e-6)
