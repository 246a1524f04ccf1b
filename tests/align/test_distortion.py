"""POVID's image distortion (Sec. 3.3): y~- against the plain computation, and train_dpo.py
--rejected distorted.
"""

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    IMAGE,
    plain_logits,
    plain_logp,
    random_ids,
    random_model,
    random_toy,
    toy_model,
    toy_processor,
    toy_tokenizer,
    worst,
)
from input_files import pairs_in
from PIL import Image
from policies import adapted
from script_runs import read_lines, stop_at, train

from minialign.align.distortion import chosen_tree, distorted_logps
from minialign.align.logps import branch_logps
from minialign.data.collate import PairBatch, PairCollator
from minialign.data.records import Record, instruct_record
from minialign.errors import UserError
from minialign.model.clip import Clip
from minialign.model.llama import Llama
from minialign.model.lora import adapters_off
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.seeds import stable_seed
from minialign.toy import world

SEEDS = range(6)
ADAPTER = "adapter/adapter_model.safetensors"


# ---------------------------------------------------------------- the plain computation


@torch.no_grad()
def plain_distorted(model, trunk: list[int], chosen: list[int], noisy, image_id: int) -> list[int]:
    """Sec. 3.3: each token is the likeliest one given the noisy picture, the prompt and the true
    tokens before it."""
    predicted = []
    for t in range(len(chosen)):
        last = plain_logits(model, trunk + chosen[:t], noisy)[-1].clone()
        last[image_id] = -torch.inf
        predicted.append(int(last.argmax()))
    return predicted


def random_rows(seed: int, patches: int) -> list[Sequence]:
    """Rows of unlike lengths with one to three stored branches, some of them without a picture."""
    rng, rows = random.Random(seed), []
    for row in range(3 + seed % 3):
        image = row == 0 or rng.random() < 0.7
        before, after = random_ids(rng, 1 + rng.randrange(3)), random_ids(rng, 2 + rng.randrange(6))
        branches = []
        for _ in range(1 + rng.randrange(3)):
            branches.append(Branch(random_ids(rng, 1 + rng.randrange(9))))
        trunk = before + [IMAGE] * image + after
        rows.append(Sequence(trunk, branches, patches if image else 0))
    return rows


def random_features(rows: list[Sequence], patches: int, seed: int) -> torch.Tensor:
    """Of the pictures that some rows have."""
    pictures = sum(row.image_tokens > 0 for row in rows)
    return 2 * torch.randn(pictures, patches, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_scored(model, trunk: list[int], chosen: list[int], own: list[int], clean) -> float:
    """What y~- is scored by: each token's log-prob given the clean picture and the true tokens
    before it."""
    logits = plain_logits(model, trunk + chosen, clean)[-len(chosen) - 1 : -1]
    return logits.log_softmax(-1)[range(len(own)), own].sum().item()


def plain_column(model, rows: list[Sequence], clean, noisy, image_id: int) -> torch.Tensor:
    """(B,): y~-'s log-prob of every row, by the plain way."""
    pictures, column = iter(zip(clean, noisy, strict=True)), []
    for row in rows:
        seen, drowned = next(pictures) if row.image_tokens else (None, None)
        chosen = row.branches[0].ids
        own = plain_distorted(model, row.trunk, chosen, drowned, image_id)
        column.append(plain_scored(model, row.trunk, chosen, own, seen))
    return torch.tensor(column)


def found_columns(model, rows: list[Sequence], clean, noisy, image_id: int) -> torch.Tensor:
    """(B, S + 1), as train_dpo.py asks for them."""
    tree, chosen = build_tree(rows, image_id, 0), chosen_tree(rows, image_id)
    return distorted_logps(model, tree, clean, chosen, noisy)


@pytest.mark.parametrize("seed", SEEDS)
def test_distortion_equals_the_plain_computation(seed):
    """One more column, and the others are what they are without it."""
    model = random_model(seed)
    patches = model.config.vision.patches
    rows = random_rows(seed, patches)
    clean, noisy, other = (random_features(rows, patches, seed + n) for n in (0, 100, 200))
    with torch.no_grad():
        found = found_columns(model, rows, clean, noisy, IMAGE)
        stored = branch_logps(model, build_tree(rows, IMAGE, 0), clean)
    assert torch.equal(found[:, :-1], stored)
    assert worst(found[:, -1], plain_column(model, rows, clean, noisy, IMAGE)) < 1e-3
    assert worst(found[:, -1], plain_column(model, rows, clean, other, IMAGE)) > 0.1  # it matters
    assert worst(found[:, -1], plain_column(model, rows, noisy, noisy, IMAGE)) > 0.1  # so does it


@pytest.mark.parametrize("seed", SEEDS)
def test_policy_and_reference_predict_each_their_own(seed):
    """The adapters take part, switched on; switched off the base predicts and scores."""
    base = random_model(seed)
    model, patches = adapted(base, 4, 8.0, seed, 0.3), base.config.vision.patches
    rows = random_rows(seed, patches)
    clean, noisy = random_features(rows, patches, seed), random_features(rows, patches, seed + 100)
    expected = plain_column(model, rows, clean, noisy, IMAGE)
    expected_of_base = plain_column(base, rows, clean, noisy, IMAGE)
    with torch.no_grad():
        assert worst(found_columns(model, rows, clean, noisy, IMAGE)[:, -1], expected) < 1e-3
        with adapters_off(model):
            found = found_columns(model, rows, clean, noisy, IMAGE)[:, -1]
    assert worst(found, expected_of_base) < 1e-3 < worst(expected, expected_of_base)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_image_token_is_never_predicted(seed):
    """By a model whose likeliest token it often is; then the second likeliest is taken."""
    model = copy.deepcopy(random_model(seed))
    patches = model.config.vision.patches
    with torch.no_grad():
        model.lm_head.weight[IMAGE] *= 30
    rows = random_rows(seed, patches)
    clean, noisy = random_features(rows, patches, seed), random_features(rows, patches, seed + 100)
    with torch.no_grad():
        found = found_columns(model, rows, clean, noisy, IMAGE)[:, -1]
    assert worst(found, plain_column(model, rows, clean, noisy, IMAGE)) < 1e-2
    unbound = plain_column(model, rows, clean, noisy, image_id=0)  # 0 is forbidden instead
    assert worst(found, unbound) > 0.1


def test_the_prediction_keeps_no_graph(monkeypatch):
    """It runs without gradients, also of a model in training; the score has them."""
    model = adapted(random_model(0), 4, 8.0)
    rows = random_rows(0, model.config.vision.patches)
    clean, noisy = (random_features(rows, model.config.vision.patches, n) for n in (0, 1))
    hidden, real = [], Llama.forward

    def noted(*args, **options):
        hidden.append(real(*args, **options))
        return hidden[-1]

    monkeypatch.setattr(Llama, "forward", noted)
    found = found_columns(model.train(), rows, clean, noisy.requires_grad_(), IMAGE)
    assert [state.requires_grad for state in hidden] == [False, True]
    found[:, -1].sum().backward()
    assert noisy.grad is None
    assert any(parameter.grad is not None for parameter in model.parameters())


# ---------------------------------------------------------------- Eq. 9


def plain_noise(record: Record, steps: int, step: int = 0) -> Image.Image:
    """Eq. 8-9 by a loop, on [0, 1], clamped; eps is drawn anew at every step."""
    abar = 1.0
    for k in range(1, steps + 1):
        abar *= 1 - (1 / (1 + math.exp(6 - 12 * k / 1000)) * (0.5e-2 - 1e-5) + 1e-5)
    pixels = np.asarray(world.picture(world.scene_of(record.image))) / 255
    stream = torch.Generator().manual_seed(stable_seed(0, step, record.id) % 2**31 + 1)
    eps = torch.randn(pixels.shape, generator=stream, dtype=torch.float64).numpy()
    noisy = np.clip(math.sqrt(abar) * pixels + math.sqrt(1 - abar) * eps, 0, 1)
    return Image.fromarray(np.round(noisy * 255).astype(np.uint8))


def world_records(count: int, first: int) -> list[Record]:
    """True answers, the next picture's as rejected ones."""
    raws = world.alignment_records(count + 1, "validation", first)
    answers = [instruct_record(raw) for raw in raws]
    records = []
    for this, after in zip(answers, answers[1:], strict=False):
        records.append(Record(this.id, this.image, this.turns, this.chosen, after.chosen))
    return records


def batch_of(records: list[Record], noise_steps: int = 0) -> PairBatch:
    """The records collated, with their noisy pictures."""
    collate = PairCollator(
        toy_tokenizer(), toy_processor(), world.open_picture, 200, noise_steps=noise_steps
    )
    return collate.batch([collate.load(record) for record in records])


@pytest.mark.parametrize("steps", [1, 137, 500, 1000])
def test_the_noise_is_that_of_eq_9(steps):
    """Beside the clean pixels, which are what they are without noise; at 500 sqrt(abar) is
    0.863."""
    records = world_records(3, 10)
    batch, clean = batch_of(records, steps), batch_of(records)
    assert clean.noisy is None and torch.equal(batch.pixels, clean.pixels)
    expected = torch.cat([toy_processor()(plain_noise(record, steps)) for record in records])
    assert worst(batch.noisy, expected) < 0.02  # a byte that was rounded the other way
    assert (batch.noisy != expected).float().mean() < 1e-3
    assert worst(batch.noisy, batch.pixels) > 0.02


def test_noise_is_fresh_at_every_visit():
    """And follows from the run's seed, the step and the record."""
    [record] = world_records(1, 4)
    collates = [
        PairCollator(
            toy_tokenizer(), toy_processor(), world.open_picture, 200, noise_steps=500, seed=seed
        )
        for seed in (0, 1)
    ]
    first, second = (collates[0].load(record, step).noisy for step in (3, 4))
    assert not torch.equal(first, second)
    assert torch.equal(collates[0].load(record, 3).noisy, first)
    assert not torch.equal(collates[1].load(record, 3).noisy, first)
    expected = toy_processor()(plain_noise(record, 500, step=3))
    assert worst(first, expected) < 0.02


@pytest.mark.parametrize("first", [0, 7])
def test_pairs_of_the_embedded_world(first):
    """The toy model on noisy pictures: the plain computation, and that it is misled."""
    model, image_id, records = toy_model(), toy_tokenizer().image_id, world_records(3, first)
    batch = batch_of(records, 500)
    noisy = []
    for record in records:
        noisy.append(model.encode_images(toy_processor()(plain_noise(record, 500))))
    clean = model.encode_images(batch.pixels)
    rows = batch.sequences
    expected = plain_column(model, rows, clean, torch.cat(noisy), image_id)
    with torch.no_grad():
        found = found_columns(model, rows, clean, model.encode_images(batch.noisy), image_id)
    assert found.shape == (3, 3) and worst(found[:, -1], expected) < 1e-2
    misled = plain_column(model, rows, clean, clean, image_id)
    assert worst(misled, expected) > 0.1


# ---------------------------------------------------------------- train_dpo.py


@pytest.mark.parametrize(("gamma", "steps"), [(0.0, 500), (0.25, 500), (0.5, 60)])
def test_the_first_step_by_hand(model, pairs, tmp_path, gamma, steps):
    """Both rejected responses are scored on the clean picture, y~- behind the true tokens, and
    weighted; fresh adapters leave h at 0."""
    path, base, tokenizer = tmp_path / "pairs.jsonl", random_toy(1), toy_tokenizer()
    path.write_text("".join(Path(pairs).read_text().splitlines(keepends=True)[:5]))
    options = {"rejected": "distorted", "gamma": gamma, "noise_steps": steps, "batch_size": 5}
    row = train(model, tmp_path / "out", pairs=str(path), **options)[0]
    expected = 0.0
    for record in pairs_in(path):
        prompt, stored = tokenizer.prompt(record.turns), tokenizer.response(record.rejected)
        chosen = tokenizer.response(record.chosen)
        clean = base.encode_images(toy_processor()(world.open_picture(record.image)))[0]
        noisy = base.encode_images(toy_processor()(plain_noise(record, steps)))[0]
        own = plain_distorted(base, prompt, chosen, noisy, tokenizer.image_id)
        scored = plain_scored(base, prompt, chosen, own, clean)
        with torch.no_grad():
            logp = plain_logp(base, prompt, stored, clean).item()
        expected += (gamma * logp + (1 - gamma) * scored) / 5
    assert row["logps/rejected"] == pytest.approx(expected, rel=1e-4)
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-5) and row["grad_norm"] > 0


def test_gamma_1_is_the_stored_response_alone(model, pairs, tmp_path):
    """Byte for byte, as if --rejected were not given; another gamma or noise is another adapter."""
    runs = {
        "stored": {},
        "one": {"rejected": "distorted", "gamma": 1.0},
        "half": {"rejected": "distorted"},
        "less noise": {"rejected": "distorted", "noise_steps": 50},
    }
    found = {}
    for name, options in runs.items():
        train(model, tmp_path / name, pairs=pairs, limit=8, **options)
        found[name] = (tmp_path / name / ADAPTER).read_bytes()
    assert found["one"] == found["stored"]
    assert len(set(found.values())) == 3
    rows = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("stored", "one", "half")]
    assert rows[0] == rows[1] != rows[2]


def test_gamma_1_spares_the_noise(model, pairs, tmp_path, monkeypatch):
    """The tower sees each picture once, and else twice; y~- is one more pass of the decoder for
    each of policy and reference."""
    pictures, passes, real_tower, real_decoder = [], [], Clip.forward, Llama.forward

    def tower(self, pixels, *args, **options):
        pictures.append(len(pixels))
        return real_tower(self, pixels, *args, **options)

    def decoder(*args, **options):
        passes.append(1)
        return real_decoder(*args, **options)

    monkeypatch.setattr(Clip, "forward", tower)
    monkeypatch.setattr(Llama, "forward", decoder)
    for gamma, seen, count in ((1.0, [4], 2), (0.5, [4, 4], 4), (0.0, [4, 4], 4)):
        pictures.clear()
        passes.clear()
        train(model, tmp_path / str(gamma), pairs=pairs, limit=4, rejected="distorted", gamma=gamma)
        assert pictures == seen and len(passes) == count


@pytest.mark.parametrize(("where", "count"), [("preference_metrics", 2), ("append_lines", 3)])
def test_a_stopped_run_resumes_bit_for_bit(model, pairs, tmp_path, monkeypatch, where, count):
    """y~- is made anew from the policy and the noise of that step."""
    options = {"pairs": pairs, "rejected": "distorted", "lr": 3e-3, "save_every": 2}
    train(model, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, where, count)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "stopped", **options)
    train(model, tmp_path / "stopped", resume=True, **options)
    for name in (ADAPTER, "metrics.jsonl", "checkpoint/progress.safetensors", "result.json"):
        whole, stopped = (tmp_path / run / name for run in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes(), name
    assert json.loads((tmp_path / "stopped" / "config.json").read_text())["rejected"] == "distorted"


@pytest.mark.parametrize(
    "changes", [{"noise_steps": 0}, {"noise_steps": 1001}, {"gamma": -0.1}, {"gamma": 1.1}], ids=str
)
def test_bad_values_are_refused(model, pairs, tmp_path, changes):
    """Before anything is read."""
    name, value = next(iter(changes.items()))
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: between"):
        train(model, tmp_path / "out", pairs="none.jsonl", **changes)
    assert not (tmp_path / "out").exists()
