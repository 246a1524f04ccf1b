"""What a training leaves besides its figures: the form of conversation, in `merged`."""

import json

import pytest
from helpers import toy_model

from minialign.data.templates import TEMPLATES
from minialign.training import outputs
from minialign.training.flags import TrainingFlags

FORM = {"system": "", "user": "Q: {} A:", "answer": " {}", "end": "</s>"}


@pytest.mark.parametrize("asked", [None, "vicuna_v1", "form.json"])
def test_merged_keeps_the_form_that_was_asked_in(tmp_path, monkeypatch, asked):
    """By its name, or as a whole: the file may be gone by the time somebody chats with it."""
    written = []
    monkeypatch.setattr(outputs, "save_adapter", lambda *given: None)
    monkeypatch.setattr(outputs, "save_changed", lambda *given: written.append(given))
    (tmp_path / "form.json").write_text(json.dumps(FORM))
    path = str(tmp_path / "form.json") if asked == "form.json" else asked
    config = TrainingFlags(template=path, lora_rank=2, lora_alpha=4)
    outputs.save_weights(toy_model(), tmp_path, config, tmp_path / "out")
    [(_, _, raw, folder, _)] = written
    expected = {None: "short", "form.json": FORM}.get(asked, asked)
    assert raw == toy_model().config.raw | {"minialign_template": expected}
    assert (
        folder == tmp_path / "out" / "merged" and toy_model().config.raw[outputs.KEY] in TEMPLATES
    )
