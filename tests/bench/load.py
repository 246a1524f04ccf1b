"""load: a checkpoint in shards into memory, minialign's `load_model` beside transformers'
`from_pretrained`.

Both map the files, and a tensor that is used as it is stored may never be read before it is needed:
so each loaded tensor is summed up once. The files are in the page cache from the second repeat on,
for both.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minialign.model.hf_folder import NAMES, load_model, rename
from minialign.model.llava import Llava
from tests.bench.models import load_peer, make_folder
from tests.bench.rows import Facts
from tests.bench.sizes import Size
from tests.bench.timing import compared, measured


def touched(model: nn.Module) -> nn.Module:
    """The model, after every parameter has been read."""
    for parameter in model.parameters():
        parameter.sum().item()
    return model


def require_same_tensors(ours: Llava, peer: nn.Module) -> str:
    """Both hold the same tensors, in words; our projector, which is trained, is float32."""
    theirs = {rename(key, NAMES): tensor for key, tensor in peer.state_dict().items()}
    state = ours.state_dict()
    assert state.keys() == theirs.keys(), sorted(state.keys() ^ theirs.keys())
    for name, tensor in state.items():
        assert torch.equal(tensor.to(theirs[name].dtype), theirs[name]), f"{name} differs"
    return f"{len(state)} tensors are the same"


def measure(size: Size, folder: Path, facts: Facts) -> None:
    """The row; `folder` holds the size's model, which is loaded itself if it is large enough."""
    dtype = getattr(torch, size.dtype)
    if size.loaded != size.text:
        size = replace(size, text=size.loaded)
        folder = make_folder(size, folder / "loaded")

    works = {
        "ours": lambda: touched(load_model(folder, size.device, dtype)),
        "peer": lambda: touched(load_peer(size, folder)),
    }
    checked = require_same_tensors(works["ours"](), works["peer"]())
    side = measured(works, dict.fromkeys(works), size.repeats, size.device)
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    kind = f"{sum(files) / 1e6:,.0f} MB of {size.dtype} in {len(files)} shards"
    work = f"{kind}: transformers' from_pretrained"
    row = compared(work, checked, side["ours"], side["peer"], bytes=sum(files))
    facts.finish("load", **row)
