"""train_dpo.py as a user runs it: what a run leaves, its figures, its steps, and that it learns."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import random_toy, toy_model, toy_tokenizer, worst
from input_files import pairs_in
from safetensors.torch import load_file
from script_runs import contents, read_lines, train

from minialign.data.images import ImageProcessor
from minialign.edge import CHECKPOINT
from minialign.errors import UserError
from minialign.evaluation.metrics import in_words
from minialign.model.clip import Clip
from minialign.model.hf_folder import load_model, save_model
from minialign.model.llama import Llama
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.model.peft_folder import load_adapter
from minialign.toy import world
from minialign.training.optimizer import batches_of_epoch, batches_of_run, lr_factor

TRL_NAMES = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
}


def test_what_a_run_leaves(undisturbed, model):
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        ".minialign",
        "adapter",
        "checkpoint",
        "config.json",
        "merged",
        "metrics.jsonl",
        "report.html",
        "result.json",
    ]
    assert {p.name for p in (undisturbed / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    merged = {p.name for p in (undisturbed / "merged").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
    } <= merged
    assert [p.name for p in (undisturbed / "checkpoint").iterdir()] == [
        "data.json",
        "progress.safetensors",
    ]
    config = json.loads((undisturbed / "config.json").read_text())
    assert (
        config["model"] == model
        and config["lr"] == 3e-3
        and config["beta"] == 0.1
        and config["resume"] is False
    )
    rows = read_lines(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(
        TRL_NAMES < row.keys() and all(math.isfinite(value) for value in row.values())
        for row in rows
    )
    result = json.loads((undisturbed / "result.json").read_text())
    weights = [4, 4, 4, 2]  # pairs in the batches of the first epoch
    ranked = (
        sum(n * row["logps/ref_accuracies"] for n, row in zip(weights, rows, strict=False)) / 14
    )
    assert result == {"base_preference_accuracy": pytest.approx(ranked)} and 0 < ranked < 1
    assert ranked != pytest.approx(
        sum(row["logps/ref_accuracies"] for row in rows[:4]) / 4
    )  # not the batches' mean
    report = (undisturbed / "report.html").read_text()
    assert report.count("<article") == 8 and "pair-00" in report and "rewards/margins" in report


def test_evaluation_before_and_after(model, pairs, tmp_path, capsys):
    train(model, tmp_path, pairs=pairs, limit=4, eval_images=2, lr=0.02)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() == {"before", "after", "base_preference_accuracy"}
    names = ["chair_i", "chair_s", "recall", "pope_random", "pope_popular", "pope_adversarial"]
    for column in ("before", "after"):
        assert set(names) <= result[column].keys()
        for figures in result[column].values():
            assert figures.keys() == {"value", "low", "high"}
            assert (
                figures["value"] is None or figures["low"] <= figures["high"]
            )  # None: nothing to measure
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert [len(counts[column]) for column in ("before", "after")] == [2, 2]
    assert counts["before"] != counts["after"]  # the second is the trained model's
    shown = capsys.readouterr().out
    assert "before" in shown and "after" in shown and all(in_words(name) in shown for name in names)
    assert "ask it: python -m minialign.chat --model" in shown and "(false: " in shown
    assert "before" in (tmp_path / "report.html").read_text()


def test_training_prefers_the_chosen_responses(undisturbed):
    rows = read_lines(undisturbed / "metrics.jsonl")
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)

    def mean(name: str, epoch: list[dict]) -> float:
        return sum(row[name] for row in epoch) / len(epoch)

    first, second = rows[:4], rows[4:]
    assert mean("rewards/margins", second) > mean("rewards/margins", first) + 0.1 > 0.1
    assert mean("loss", second) < mean("loss", first) - 0.05 < math.log(2) - 0.05
    assert mean("rewards/accuracies", second) > 0.8
    for row in rows:
        assert row["rewards/margins"] == pytest.approx(
            row["rewards/chosen"] - row["rewards/rejected"], abs=1e-4
        )


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic", "sft"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_first_step(model, pairs, tmp_path, loss, beta):
    """Adapters that are zero leave policy and reference alike: h = 0."""
    row = train(model, tmp_path, pairs=pairs, loss=loss, beta=beta, batch_size=14)[0]
    records, tokenizer = pairs_in(Path(pairs)), toy_tokenizer()
    tokens = sum(len(tokenizer.response(record.chosen)) for record in records)
    per_token = -row["logps/chosen"] * len(records) / tokens
    expected = {"dpo": math.log(2), "ipo": 1 / (4 * beta**2), "slic": 1.0, "sft": per_token}[loss]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["logps/chosen"] < 0 and row["grad_norm"] > 0
    if loss == "sft":  # it has no reference: no figure that needs one is shown
        assert not any("rewards" in name or "ref" in name for name in row)
        page = (tmp_path / "report.html").read_text()
        assert "Rewards of the pairs" not in page and "Reward accuracy" not in page
        assert json.loads((tmp_path / "result.json").read_text()) == {}
    else:
        assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/accuracies"] == 0
        assert row["logps/rejected"] < 0


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_accumulating_changes_nothing(model, pairs, tmp_path, loss):
    """A batch in one forward pass, in two, and in parts of unlike sizes."""
    found = {}
    for parts in (1, 2, 3):
        out = tmp_path / str(parts)
        rows = train(model, out, pairs=pairs, batch_size=10, accumulate=parts, loss=loss, lr=1e-4)
        found[parts] = rows, load_file(out / "adapter" / "adapter_model.safetensors")
    rows, whole = found[1]
    assert (
        max(tensor.abs().max().item() for name, tensor in whole.items() if "lora_B" in name) > 1e-4
    )  # it did learn
    for parts in (2, 3):
        for row, other in zip(rows, found[parts][0], strict=True):
            assert other == pytest.approx(row, rel=1e-4, abs=1e-5)
        assert max(worst(whole[name], found[parts][1][name]) for name in whole) < 1e-5


@pytest.mark.parametrize(
    "step,expected",
    [(0, 1 / 3), (1, 2 / 3), (2, 1.0), (3, 1.0), (5, 0.75), (6, 0.5), (7, 0.25), (8, 1 - 5 / 6)],
)
def test_learning_rate_by_hand(step, expected):
    """9 steps, a third of them rising: cos(pi d) at d = 0, 1/6, ... for the cosine, 1 - d for the
    line."""
    cosine = lr_factor(step, 9, 1 / 3, "cosine")
    linear = lr_factor(step, 9, 1 / 3, "linear")
    if step < 3:
        assert cosine == linear == pytest.approx(expected)
    else:
        done = (step - 3) / 6
        assert linear == pytest.approx(1 - done) and cosine == pytest.approx(
            (1 + math.cos(math.pi * done)) / 2
        )


def test_rates_of_a_run(model, pairs, tmp_path):
    rows = train(model, tmp_path, pairs=pairs, lr=2e-3)  # 4 steps, one of them rising
    assert [row["lr"] for row in rows] == pytest.approx([2e-3, 2e-3, 1.5e-3, 0.5e-3])


def test_an_epoch_sees_every_pair_once():
    records = list(range(23))
    seen = []
    for epoch in range(3):
        batches = batches_of_epoch(records, 5, 0, epoch)
        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
        assert sorted(sum(batches, [])) == records
        seen.append(sum(batches, []))
    assert seen[0] != seen[1] != seen[2] != seen[0] and records == list(range(23))
    assert batches_of_epoch(records, 5, 0, 1) == batches_of_epoch(records, 5, 0, 1)
    assert sum(batches_of_epoch(records, 5, 1, 0), []) != seen[0]
    run = batches_of_run(records, 5, 0, 3)
    wanted = [batch for epoch in range(3) for batch in batches_of_epoch(records, 5, 0, epoch)]
    assert list(run) == wanted and len(run) == 15
    assert [list(run[i:]) for i in range(16)] == [wanted[i:] for i in range(16)]
    assert [run[i] for i in (14, 0, 7, -1)] == [wanted[i] for i in (14, 0, 7, -1)]
    for steps in (
        1,
        5,
        6,
        10,
        15,
    ):  # fewer than an epoch, just one, more; --epochs says nothing then
        for epochs in (1, 9):
            assert list(batches_of_run(records, 5, 0, epochs, steps)) == wanted[:steps]


@pytest.mark.parametrize("steps", [2, 6])
def test_steps_in_the_place_of_epochs(model, pairs, tmp_path, steps):
    """14 pairs in batches of four: an epoch is four steps. The rate falls to zero over the steps
    that there are."""
    rows = train(model, tmp_path, pairs=pairs, epochs=7, steps=steps)
    assert [row["pairs"] for row in rows] == [4, 4, 4, 2, 4, 4][:steps]
    assert rows[-1]["lr"] == pytest.approx(1e-3 * lr_factor(steps - 1, steps, 0.1, "cosine"))


def test_the_tower_sees_each_image_once_per_step(model, pairs, tmp_path, monkeypatch):
    """For policy and reference together, which each run the decoder once."""
    images, rows, real_tower, real_decoder = [], [], Clip.forward, Llama.forward

    def tower(self, pixels, *args):
        assert not torch.is_grad_enabled()
        images.append(len(pixels))
        return real_tower(self, pixels, *args)

    def decoder(self, embeddings, *args, **options):
        rows.append((len(embeddings), torch.is_grad_enabled()))
        return real_decoder(self, embeddings, *args, **options)

    monkeypatch.setattr(Clip, "forward", tower)
    monkeypatch.setattr(Llama, "forward", decoder)
    train(model, tmp_path, pairs=pairs)
    assert images == [4, 4, 4, 2]
    assert rows == [(n, grad) for n in (4, 4, 4, 2) for grad in (False, True)]


def some_logits(model) -> torch.Tensor:
    """Logits over a picture, a question and an answer."""
    tokenizer = toy_tokenizer()
    answer = Branch(tokenizer.response("A red cup is at the top left."))
    sequence = Sequence(tokenizer.prompt([("user", "What is there?")]), [answer], 36)
    pixels = ImageProcessor.from_folder(CHECKPOINT)(world.picture(world.make_scene("test", 0)))
    tree = build_tree([sequence], tokenizer.image_id, tokenizer.pad_id)
    with torch.no_grad():
        return model.lm_head(model(tree, model.encode_images(pixels)))


def test_merged_and_adapter_are_the_trained_model(undisturbed, model):
    merged, adapted, base = (
        load_model(undisturbed / "merged"),
        load_model(Path(model)),
        load_model(Path(model)),
    )
    load_adapter(adapted, undisturbed / "adapter")
    assert worst(some_logits(merged), some_logits(adapted)) < 1e-4
    assert worst(some_logits(merged), some_logits(base)) > 0.1


def test_merged_keeps_the_type_of_the_base(pairs, tmp_path):
    folder = tmp_path / "half"
    save_model(
        random_toy(1).state_dict(), toy_model().config.raw, CHECKPOINT, folder, torch.float16
    )
    train(str(folder), tmp_path / "out", pairs=pairs, limit=2)
    kinds = {
        tensor.dtype
        for tensor in load_file(tmp_path / "out" / "merged" / "model.safetensors").values()
    }
    assert kinds == {torch.float16}
    assert (
        json.loads((tmp_path / "out" / "merged" / "config.json").read_text())["dtype"] == "float16"
    )


@pytest.mark.parametrize("levels", [0, 1])
def test_an_out_that_holds_the_model_is_refused(model, levels):
    """As in a second round on what the first one left in `merged`: the base would be
    overwritten."""
    before, out = contents(Path(model)), [Path(model), Path(model).parent][levels]
    with pytest.raises(UserError, match="which is read; name a place outside of it"):
        train(model, out, pairs="none.jsonl")
    assert contents(Path(model)) == before


def test_a_projector_at_a_rate_of_zero_has_no_part_in_clipping(model, pairs, tmp_path):
    """It stays what it was, and the gradient's norm is that of the adapters alone."""
    norms = {}
    for rate in (0.0, 1e-30):
        out = tmp_path / str(rate)
        norms[rate] = train(model, out, pairs=pairs, projector_lr=rate, batch_size=14)[0]
    assert norms[0.0]["loss"] == norms[1e-30]["loss"]
    assert 0 < norms[0.0]["grad_norm"] < 0.9 * norms[1e-30]["grad_norm"]
    saved = [load_file(tmp_path / str(rate) / "merged/model.safetensors") for rate in norms]
    projector = [name for name in saved[0] if "projector" in name]
    assert projector and all(torch.equal(saved[0][name], saved[1][name]) for name in projector)
    progress = load_file(tmp_path / "0.0/checkpoint/progress.safetensors")
    assert not any(name.startswith("optimizer.1.") for name in progress)


@pytest.mark.parametrize("ipo", ["sums", "means"])
def test_ipo_on_sums_and_on_means(model, pairs, tmp_path, ipo):
    """The second step's loss, by hand from what is logged of its one pair."""
    beta = 0.9
    rows = train(
        model, tmp_path, pairs=pairs, loss="ipo", ipo=ipo, beta=beta, batch_size=1, lr=0.02
    )
    tokenizer, row = toy_tokenizer(), rows[1]
    records = pairs_in(Path(pairs))
    order = batches_of_epoch([*range(len(records))], 1, 0, 0)
    record = records[order[1][0]]
    h = 0
    for sign, name, text in ((1, "chosen", record.chosen), (-1, "rejected", record.rejected)):
        tokens = len(tokenizer.response(text)) if ipo == "means" else 1
        h += sign * row[f"rewards/{name}"] / beta / tokens
    assert abs(h) > 1e-4 and row["loss"] == pytest.approx((h - 1 / (2 * beta)) ** 2, rel=1e-4)
