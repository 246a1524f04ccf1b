"""A log keeps few examples of what was sampled, however long the run is, from its first step on."""

import pytest
from torch import nn
from torch.optim import AdamW

from minialign.training import progress
from minialign.training.flags import TrainingFlags
from minialign.training.progress import EXAMPLES, TrainingLog


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 11, 23, 40, 100])
def test_examples_are_few_and_spread(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(progress, "save_progress", lambda *given: None)
    (tmp_path / "run").mkdir()
    config = TrainingFlags(workers=0)
    object.__setattr__(config, "out", str(tmp_path / "run"))
    optimizer = AdamW([nn.Parameter(nn.Linear(1, 1).weight)])
    with TrainingLog(nn.Linear(1, 1), optimizer, config) as log:
        for step, _ in log.steps([[0]] * steps, lambda numbers, _: numbers):
            log.add({"step": step + 1}, {"image": "a.png"})
    kept = [row["step"] for row in log.rows if "example" in row]
    assert kept[0] == 1 and len(kept) <= EXAMPLES and len(kept) > min(steps, EXAMPLES) / 2
