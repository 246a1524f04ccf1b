"""How the toy checkpoint is made: its files but the weights come out as they are shipped."""

import json

import pytest
import torch
from helpers import toy_tokenizer

from minialign.edge import CHECKPOINT
from minialign.toy import pretrain
from minialign.toy.drawing import COLOURS, COLUMNS, OBJECTS, SETTINGS
from minialign.toy.pretrain import patch_labels, row_of, talks, write_companions
from minialign.toy.world import POSITIONS, make_scene


def test_all_but_the_weights_is_as_shipped(tmp_path):
    write_companions(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes(), name
    shipped = json.loads((CHECKPOINT / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) | {"dtype": "float16"} == shipped


@pytest.mark.parametrize("index", range(5))
def test_labels_of_patches(index):
    """6 x 6 patches: a cell of the grid is three rows high and two columns wide."""
    scene = make_scene("alignment", index)
    labels = patch_labels(scene).view(6, 6, 4)
    for number, (row, column) in enumerate(POSITIONS):
        name, colour = scene.cells[row, column]
        cell = labels[3 * row : 3 * row + 3, 2 * column : 2 * column + 2]
        setting = list(SETTINGS).index(scene.setting)
        wanted = [OBJECTS.index(name), list(COLOURS).index(colour), setting, number]
        assert cell.shape == (3, 2, 4) and (cell == torch.tensor(wanted)).all()
    assert number == 2 * COLUMNS - 1


@pytest.mark.parametrize("image", [True, False])
def test_answers_are_learned_and_questions_are_not(image):
    """What is learned of a row decodes to its answers, each with its end; the rest has none of
    them.
    """
    tokenizer = toy_tokenizer()
    row = row_of(tokenizer, 3, image)
    for ids, learned, turns in zip(row.ids, row.learned, talks(3), strict=True):
        assert len(ids) == len(learned) and ids.count(tokenizer.image_id) == image
        answers = [text for role, text in turns if role == "assistant"]
        kept = [token for token, flag in zip(ids, learned, strict=True) if flag]
        assert kept == [token for text in answers for token in tokenizer.response(text)]


def test_a_short_run_leaves_a_checkpoint(tmp_path, monkeypatch, capsys):
    """A few steps of each stage, and an evaluation of two images."""
    for name in ("TOWER_STEPS", "TEXT_STEPS", "JOINT_STEPS"):
        monkeypatch.setattr(pretrain, name, 2)
    monkeypatch.setattr(pretrain, "TOWER_BATCH", 2)
    monkeypatch.setattr(pretrain, "BATCH", 3)
    benchmark = pretrain.ToyBenchmark
    monkeypatch.setattr(pretrain, "ToyBenchmark", lambda split, images: benchmark(split, 2))
    pretrain.pretrain(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(path.name for path in CHECKPOINT.iterdir())
    assert "POPE adversarial, accuracy ↑" in capsys.readouterr().out
