"""LLaVA folders under every known layout of their keys, and ways to change one."""

import json
from pathlib import Path

from safetensors.torch import save_file

SEED = 5  # grouped queries, and a rope_theta that is not the default
# Prefixes of the in-memory layout -> those of another one, written out here rather than taken from
# the code.
LAYOUTS = {
    "in memory": {},
    "in memory of transformers 4": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "hub": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "fresh transformers 5": {
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "original": {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
    },
}


def laid_out(state: dict, layout: str) -> dict:
    """The in-memory state under the keys of another layout."""
    renamed = {}
    for key, value in state.items():
        prefixes = [prefix for prefix in LAYOUTS[layout] if key.startswith(prefix)]
        assert len(prefixes) <= 1
        renamed[
            LAYOUTS[layout][prefixes[0]] + key.removeprefix(prefixes[0]) if prefixes else key
        ] = value
    assert len(renamed) == len(state)
    return renamed


def edit_json(path: Path, change) -> None:
    """Apply `change` to a JSON document in place."""
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def replace_weights(folder: Path, tensors: dict) -> None:
    """The folder's weights are these from now on."""
    save_file(
        {k: v.detach().clone().contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
    )
