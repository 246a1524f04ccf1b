"""Eq. 5 with an external and an own rejected response: by hand, in train_dpo.py, and where
sample_bdhs.py keeps it.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from data_sets import CHOSEN, QUESTION, REJECTED, photographs, write
from helpers import worst
from input_files import pairs_in
from script_runs import read_lines, sample, train

import train_dpo
from minialign.align.losses import dpo_loss, ipo_loss, preference_metrics, slic_loss
from minialign.errors import UserError

SEEDS = range(5)
LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "slic": slic_loss}
ADAPTER = "adapter/adapter_model.safetensors"


# ---------------------------------------------------------------- by hand


def value_and_slope(loss: str, h: float, beta: float) -> tuple[float, float]:
    """A loss of Eq. 3 or Sec. 5.7 at h, and its derivative by h."""
    if loss == "dpo":
        return math.log1p(math.exp(-beta * h)), -beta / (1 + math.exp(beta * h))
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
    return max(0.0, 1 - beta * h), -beta * (beta * h < 1)


def random_logps(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3) by policy and reference: y+, the external y-, the own one."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        logps = -30 * torch.rand(1 + 3 * seed, 3, generator=generator, dtype=torch.float64)
        found.append(logps.requires_grad_())
    return found[0], found[1]


def average(loss: str, policy, ref, beta: float, weights: list[float]) -> torch.Tensor:
    """Eq. 5 as the scripts write it: the weighted sum over y-, the mean over pairs."""
    four = policy[:, :1], policy[:, 1:], ref[:, :1], ref[:, 1:]
    losses = LOSSES[loss](*four, beta)
    return (losses * torch.tensor(weights, dtype=policy.dtype)).sum(1).mean()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
def test_two_rejected_responses_by_hand(loss, seed):
    """gamma L(y+, y-) + (1 - gamma) L(y+, y~-), its mean, and its gradient by every
    log-probability."""
    policy, ref = random_logps(seed)
    rng = random.Random(seed)
    gamma, beta, count = rng.random(), 0.05 + 0.5 * rng.random(), len(policy)
    found = average(loss, policy, ref, beta, [gamma, 1 - gamma])
    found.backward()
    expected, gradient = 0.0, torch.zeros(count, 3, dtype=torch.float64)
    for row, (p, r) in enumerate(zip(policy.tolist(), ref.tolist(), strict=True)):
        for k, weight in ((1, gamma), (2, 1 - gamma)):
            value, slope = value_and_slope(loss, (p[0] - r[0]) - (p[k] - r[k]), beta)
            expected += weight * value / count
            gradient[row, 0] += weight * slope / count
            gradient[row, k] -= weight * slope / count
    assert found.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(policy.grad, gradient, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ref.grad, -gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
def test_at_the_ends_one_rejected_response_counts(loss):
    """A weight of 1 and one of 0 are Eq. 3 with that response alone."""
    policy, ref = random_logps(3)
    for weights, k in (([1.0, 0.0], 1), ([0.0, 1.0], 2)):
        both = average(loss, policy, ref, 0.1, weights)
        alone = average(loss, policy[:, [0, k]], ref[:, [0, k]], 0.1, [1.0])
        other = average(loss, policy[:, [0, 3 - k]], ref[:, [0, 3 - k]], 0.1, [1.0])
        assert both.item() == pytest.approx(alone.item(), rel=1e-9) != other.item()


def test_metrics_by_hand():
    """beta = 0.5, weights 1/4 and 3/4; rejected rewards are the weighted means, ties are not
    accurate."""
    policy = torch.tensor([[-4.0, -8.0, -12.0], [-6.0, -2.0, -2.0], [-1.0, -1.0, -1.0]])
    ref = torch.tensor([[-6.0, -4.0, -8.0], [-2.0, -6.0, -2.0], [-1.0, -1.0, -1.0]])
    # chosen - ref: 2, -4, 0. Rejected: -11, -2, -1; of the reference: -7, -3, -1; their difference:
    # -4, 1, 0.
    four = policy[:, :1], policy[:, 1:], ref[:, :1], ref[:, 1:]
    found = preference_metrics(*four, 0.5, torch.tensor([0.25, 0.75]))
    assert found == pytest.approx(
        {
            "rewards/chosen": 0.5 * (2 - 4 + 0) / 3,
            "rewards/rejected": 0.5 * (-4 + 1 + 0) / 3,
            "rewards/margins": 0.5 * (6 - 5 + 0) / 3,
            "rewards/accuracies": 1 / 3,
            "logps/chosen": -11 / 3,
            "logps/rejected": -14 / 3,
            "logps/ref_accuracies": 2 / 3,  # -6 > -7, -2 > -3, -1 = -1
        }
    )


# ---------------------------------------------------------------- train_dpo.py


@pytest.fixture(scope="module")
def files(pairs, tmp_path_factory) -> dict[str, str]:
    """The pairs with an external y-, those with it in the place of their own, and some that have
    none."""
    folder = tmp_path_factory.mktemp("files")
    raws = read_lines(Path(pairs))
    found: dict[str, list[dict]] = {"both": [], "swapped": [], "some": []}
    for i, raw in enumerate(raws):
        text = f"{raws[(i + 3) % len(raws)]['rejected']} It is {i} years old."
        found["both"].append(raw | {"external": text})
        found["swapped"].append(raw | {"rejected": text})
        found["some"].append(raw if i in (2, 5, 11) else raw | {"external": text})
    found["fewer"] = [raw for raw in found["some"] if "external" in raw]
    for name, lines in found.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: str(folder / name) for name in found}


@pytest.fixture(scope="module")
def run(model, files, tmp_path_factory):
    """A run on one of the files; its adapter's bytes and its log."""

    def go(file: str, **options) -> tuple[bytes, list[dict]]:
        out = tmp_path_factory.mktemp("run")
        rows = train(model, out, pairs=files[file], **options)
        return (out / ADAPTER).read_bytes(), rows

    return go


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_gamma_at_its_ends(run, loss):
    """gamma = 1: as on the file of external responses; 0: as on the own ones; byte for byte, and
    0.5 is neither."""
    ones, zeros, half = (
        run("both", rejected="both", gamma=gamma, loss=loss) for gamma in (1.0, 0.0, 0.5)
    )
    assert ones == run("swapped", loss=loss)
    assert zeros == run("both", loss=loss)
    assert len({ones[0], zeros[0], half[0]}) == 3


def test_without_the_flag_the_external_response_is_not_seen(run, pairs, model, tmp_path):
    """`stored` is the file's own rejected response, whatever else its lines hold."""
    train(model, tmp_path, pairs=pairs)
    assert run("both")[0] == (tmp_path / ADAPTER).read_bytes()


def gradients(monkeypatch, run, file: str, **options) -> torch.Tensor:
    """All gradients of the first step, on all pairs at once."""
    found, real = [], train_dpo.clip_gradients

    def spy(trained, limit):
        found.append(torch.cat([parameter.grad.flatten() for parameter in trained]))
        return real(trained, limit)

    with monkeypatch.context() as patch:
        patch.setattr(train_dpo, "clip_gradients", spy)
        run(file, batch_size=14, **options)
    return found[0]


@pytest.mark.parametrize(("loss", "gamma"), [("dpo", 0.2), ("ipo", 0.5), ("slic", 0.2)])
def test_the_gradient_is_the_weighted_mean(run, undisturbed, monkeypatch, loss, gamma):
    """From trained adapters on, where policy and reference differ: that of two runs with one y-
    each."""
    options = {"adapter": str(undisturbed / "adapter"), "reference": "base"}
    options |= {"loss": loss, "beta": 0.01}
    external, own = (gradients(monkeypatch, run, file, **options) for file in ("swapped", "both"))
    both = gradients(monkeypatch, run, "both", rejected="both", gamma=gamma, **options)
    largest = external.abs().max().item()
    assert worst(both, gamma * external + (1 - gamma) * own) < 1e-5 * largest
    assert largest > 1e-3 and worst(external, own) > 0.1 * largest


def test_pairs_without_an_external_response_are_left_out(run, capsys):
    """And counted; what is left trains as if they had not been there. With gamma = 0 nobody needs
    it."""
    adapter, rows = run("some", rejected="both", batch_size=20)
    assert "3 records left out: no external response" in capsys.readouterr().out
    assert [row["pairs"] for row in rows] == [11]
    assert run("fewer", rejected="both", batch_size=20) == (adapter, rows)
    _, rows = run("some", rejected="both", gamma=0.0, batch_size=20)
    assert "left out" not in capsys.readouterr().out and [row["pairs"] for row in rows] == [14]


def test_no_external_response_at_all(model, pairs, tmp_path):
    """Nothing to train on is an error; so is an external response that is no text."""
    with pytest.raises(UserError, match="no usable record"):
        train(model, tmp_path / "out", pairs=pairs, rejected="both")
    raw = json.loads(Path(pairs).read_text().splitlines()[0]) | {"external": 7}
    (tmp_path / "bad.jsonl").write_text(json.dumps(raw) + "\n")
    with pytest.raises(UserError, match="line 1: field 'external' is not a text"):
        train(model, tmp_path / "out", pairs=str(tmp_path / "bad.jsonl"), rejected="both")
    assert not (tmp_path / "out").exists()


def test_the_external_response_that_is_y_plus_is_left_out(model, pairs, tmp_path, capsys):
    """There is nothing to prefer; whatever the own one says."""
    raws = [json.loads(line) for line in Path(pairs).read_text().splitlines()[:4]]
    raws = [raw | {"external": raw["chosen"] if i == 1 else "A cat."} for i, raw in enumerate(raws)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    rows = train(model, tmp_path / "out", pairs=str(tmp_path / "pairs.jsonl"), rejected="both")
    assert [row["pairs"] for row in rows] == [3]
    assert "1 records left out: chosen and external are the same text" in capsys.readouterr().out


# ---------------------------------------------------------------- sample_bdhs.py


@pytest.fixture(scope="module")
def sampled(model, tmp_path_factory) -> tuple[Path, Path]:
    """A pairs file that was sampled from a file in POVID's form, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("povid")
    pictures = photographs(folder / "pictures")
    data = write(folder, "povid")
    sample(model, folder / "pairs.jsonl", data=data, images=str(pictures), limit=None)
    return folder / "pairs.jsonl", pictures


def test_the_records_own_rejected_response_is_kept(sampled):
    """As `external`, beside the one that was sampled; in the file's form, and read so."""
    lines, records = read_lines(sampled[0]), pairs_in(sampled[0])
    assert len(lines) == len(records) == 2
    for line, record in zip(lines, records, strict=True):
        assert list(line) == ["id", "images", "prompt", "chosen", "rejected", "external", "bdhs"]
        assert line["external"] == [{"role": "assistant", "content": REJECTED}]
        assert (record.external, record.chosen) == (REJECTED, CHOSEN)
        assert record.turns[-1] == ("user", QUESTION)
        assert record.rejected not in ("", REJECTED)


def test_a_record_without_a_rejected_response_has_none(model, tmp_path):
    """LLaVA-Instruct has none at all; of VLFeedback the ones whose ratings tie have none."""
    pictures = photographs(tmp_path / "pictures")
    for form, kept in {"instruct": [False] * 2, "vlfeedback": [True, True, False]}.items():
        out = tmp_path / f"{form}.jsonl"
        lines = sample(model, out, data=write(tmp_path, form), images=str(pictures), limit=None)
        assert ["external" in line for line in lines] == kept
        texts = [line["external"][0]["content"] for line in lines if "external" in line]
        assert texts == [REJECTED] * sum(kept)


def test_sampled_pairs_train_with_both(sampled, model, tmp_path):
    """The paper's Avg-DPO offline: the sampled file as it is."""
    file, pictures = sampled
    rows = train(model, tmp_path, pairs=str(file), images=str(pictures), rejected="both")
    assert [row["pairs"] for row in rows] == [2]
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_other_readers_take_the_file(sampled, tmp_path):
    """`datasets` reads and writes it without loss, and TRL sees its preference pairs."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl.data_utils")
    found = datasets.Dataset.from_json(str(sampled[0]), cache_dir=str(tmp_path / "cache"))
    assert found.to_list() == read_lines(sampled[0])
    found.to_json(tmp_path / "again.jsonl")
    assert pairs_in(tmp_path / "again.jsonl") == pairs_in(sampled[0])
    for row in found:
        assert trl.is_conversational(row)
        assert trl.extract_prompt(row)["rejected"][0]["content"] == row["rejected"][0]["content"]
