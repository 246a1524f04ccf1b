"""train_online.py: its limits are offline DPO to the bit, its samples are the policy's, it learns
what is preferred."""

import copy
import html
import json

import pytest
import torch
from helpers import random_model, random_toy, refused, worst
from online_runs import TIMES, Scripted, online, weights_of
from script_runs import contents, instruct_file, stop_at, train

import train_online
from minialign import edge
from minialign.align.logps import token_logps
from minialign.errors import UserError
from minialign.model.llava import Llava
from minialign.model.lora import adapter_state, add_adapters
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.model.peft_folder import save_adapter
from minialign.sampling.generate import Sampling, generate


@pytest.mark.parametrize("method", ["online-dpo", "online-bdhs"])
def test_what_the_policy_said_is_kept_and_shown(model, tmp_path, method):
    """A few answers of the whole run, with what came of each, in the log and in the report."""
    rows = online(model, tmp_path, method=method, limit=8, batch_size=1, epochs=3)
    kept = [row for row in rows if "example" in row]
    assert len(rows) == 24 and [row["step"] for row in kept] == [1, 5, 9, 13, 17, 21]
    page = html.unescape((tmp_path / "report.html").read_text())
    for row in kept:
        example = row["example"]
        assert f"step {row['step']}, {example['image']}" in page and example["prompt"] in page
        assert len(example["answers"]) == 2
        for note, _ in example["answers"]:
            assert note in page
    answers = [answer for row in kept for answer in row["example"]["answers"]]
    notes = {note.split(" in iteration")[0] for note, _ in answers}
    if method == "online-dpo":
        assert notes <= {"preferred", "not preferred", "tie"} and notes
    else:
        assert notes == {"stored as chosen", "sampled as rejected"}


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("loss", "beta", "accumulate"), [("dpo", 0.1, 1), ("ipo", 0.9, 3), ("slic", 0.1, 3)]
)
def test_what_is_not_sampled_is_offline_dpo(model, pairs, tmp_path, loss, beta, accumulate):
    """p = 1 (Eq. 4) and gamma = 1 (Eq. 5), to the last bit of adapters and metrics."""
    flags = {"loss": loss, "beta": beta, "accumulate": accumulate, "epochs": 2, "seed": 3}
    offline = train(model, tmp_path / "offline", pairs=pairs, **flags)
    for name, method in (("p", {"method": "mixed-dpo", "p": 1.0}), ("gamma", {"gamma": 1.0})):
        rows = online(model, tmp_path / name, data=pairs, **flags, **method)
        assert weights_of(tmp_path / name) == weights_of(tmp_path / "offline")
        assert rows == offline


def test_never_the_stored_pair_is_online_dpo(model, pairs, tmp_path, monkeypatch):
    """p = 0, to the last bit; and p between is neither."""
    scripted = Scripted(len)
    monkeypatch.setattr(edge, "annotator_of", lambda *_: scripted)
    rows = {}
    for name, flags in {
        "online": {"method": "online-dpo"},
        "p0": {"method": "mixed-dpo", "p": 0.0},
        "p5": {"method": "mixed-dpo", "p": 0.5},
    }.items():
        rows[name] = online(model, tmp_path / name, data=pairs, epochs=2, **flags)
    weights = {name: weights_of(tmp_path / name) for name in rows}
    assert weights["online"] == weights["p0"] != weights["p5"]
    assert rows["online"] == rows["p0"]
    judged = [row.get("sampled/length") is not None for row in rows["p5"]]
    assert any(judged) and rows["p5"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_draw_of_eq_4(model, pairs, tmp_path, monkeypatch):
    """Stored pairs are taken with probability p, anew in every step."""
    asked = []
    real = train_online.two_samples
    monkeypatch.setattr(edge, "annotator_of", lambda *_: Scripted(len))

    def noting(assistant, pairs, *rest):
        asked.append([pair.record.id for pair in pairs])
        return real(assistant, pairs, *rest)

    monkeypatch.setattr(train_online, "two_samples", noting)
    online(model, tmp_path, data=pairs, method="mixed-dpo", p=0.25, epochs=12, max_new_tokens=1)
    sampled, total = sum(map(len, asked)), 14 * 12
    assert len(asked) == 4 * 12 and abs(sampled / total - 0.75) < 0.12  # 3.5 standard deviations
    # No record is always, or never, the stored one.
    often = [sum(f"pair-{number:02d}" in ids for ids in asked) for number in range(14)]
    assert max(often) < 13 and 0 < min(often) < max(often)


# ---------------------------------------------------------------- the samples


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_sampled_log_probs_are_those_of_training(seed):
    """Right-padded rows of unlike lengths, two branches each: what sampling says of a token,
    training says too."""
    model = random_model(seed)
    image, patches = model.config.image_token_id, model.config.vision.patches
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, patches, model.config.vision.hidden_size, generator=generator)
    prompts = [[5] * (2 + 3 * i) + [image] + [9 + i, 7] for i in range(3)]
    forked = [Sequence(prompt, [Branch([]), Branch([])], patches) for prompt in prompts]
    seeds = [[seed * 10 + i, seed * 10 + 5 + i] for i in range(3)]
    done = generate(model, forked, features, Sampling(9), set(range(11, 18)), seeds)
    rows = [
        Sequence(p, [Branch(c.ids) for c in row], patches)
        for p, row in zip(prompts, done, strict=True)
    ]
    row, branch, logps = token_logps(model, build_tree(rows, image, 0), features)
    sampled = torch.tensor([logp for completions in done for c in completions for logp in c.logps])
    assert worst(logps, sampled) < 1e-4
    assert len({len(c.ids) for completions in done for c in completions}) > 1
    for i, completions in enumerate(done):  # and alone, unpadded, one branch at a time
        for c in completions:
            tree = build_tree([Sequence(prompts[i], [Branch(c.ids)], patches)], image, 0)
            alone = token_logps(model, tree, features[i : i + 1])[2]
            assert worst(alone, torch.tensor(c.logps)) < 1e-4


def test_the_first_step_learns_from_the_policys_own_words(model, tmp_path, monkeypatch):
    """In a step before anything was learned kl is 0, and entropy is that of what was sampled."""
    seen, real = [], train_online.branch_logps
    monkeypatch.setattr(edge, "annotator_of", lambda *_: Scripted(len))
    noting = lambda *args: seen.append(real(*args)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(train_online, "branch_logps", noting)
    rows = online(model, tmp_path, method="online-dpo", limit=4, max_new_tokens=5)
    ref_logps, logps = seen[:2]
    assert torch.equal(logps, ref_logps) and rows[0]["objective/kl"] == 0
    assert rows[0]["objective/entropy"] == pytest.approx(-logps.mean().item(), rel=1e-5)
    assert rows[0]["pairs"] == len(logps) and rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("method", ["online-dpo", "online-bdhs"])
def test_an_image_is_encoded_once_per_step(model, tmp_path, monkeypatch, method):
    """For sampling, an annotator that is the policy's own base, policy and reference, and all
    iterations of BDHS."""
    tiles, real = [], Llava.encode_images
    monkeypatch.setattr(
        Llava, "encode_images", lambda self, pixels: tiles.append(len(pixels)) or real(self, pixels)
    )
    online(model, tmp_path, method=method, annotator="self", limit=8, epochs=2, n_bdhs=4, eps_s=0.0)
    assert tiles == [4, 4] * 2  # 8 pictures of one tile each, in batches of 4, two epochs


def test_noise_needs_its_own_view(model, tmp_path, monkeypatch):
    tiles, real = [], Llava.encode_images
    monkeypatch.setattr(
        Llava, "encode_images", lambda self, pixels: tiles.append(len(pixels)) or real(self, pixels)
    )
    online(model, tmp_path, limit=4, n_bdhs=1, noise_steps=100, rho_th=0.0)
    assert tiles == [4, 4]  # the picture, and the noisy one


def test_responses_that_hit_the_limit_are_counted(model, tmp_path, monkeypatch):
    """The model of random weights never stops by itself."""
    monkeypatch.setattr(edge, "annotator_of", lambda *_: Scripted(len))
    rows = online(model, tmp_path, method="online-dpo", limit=4, max_new_tokens=3)
    assert rows[0]["sampled/truncated"] == 1 and rows[0]["sampled/length"] == 3


@pytest.mark.parametrize("method", ["online-dpo", "online-bdhs"])
def test_every_step_draws_anew(model, tmp_path, monkeypatch, method):
    """The same record gets other responses in the next epoch, though nothing was learned; one seed
    gives the same."""
    said = []
    scripted = Scripted(lambda text: said.append(text) or 0)
    monkeypatch.setattr(edge, "annotator_of", lambda *_: scripted)
    real = train_online.own_rejected

    def noting(*args):
        found = real(*args)
        said.extend(tuple(sequence.branches[-1].ids) for sequence in found)
        return found

    monkeypatch.setattr(train_online, "own_rejected", noting)
    flags = {"method": method, "limit": 1, "lr": 1e-20, "projector_lr": 0.0, "max_new_tokens": 8}
    online(model, tmp_path / "a", epochs=2, **flags)
    assert len(said) == (4 if method == "online-dpo" else 2) and len(set(said)) == len(said)
    online(model, tmp_path / "b", epochs=2, **flags)
    assert said[len(said) // 2 :] == said[: len(said) // 2]


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("sign", [1, -1])
def test_it_learns_what_the_annotator_prefers(tmp_path, monkeypatch, sign):
    """To begin a description in the north with one annotator, in the south with the other, within a
    few steps."""
    scripted = Scripted(lambda text: sign * ("north" in " ".join(text.split()[:7])))
    monkeypatch.setattr(edge, "annotator_of", lambda *_: scripted)
    talks = [[("human", "<image>\nDescribe the picture."), ("gpt", "A cup.")]] * 24
    data = instruct_file(tmp_path / "data.json", *talks)
    flags = {
        "method": "online-dpo",
        "data": data,
        "epochs": 6,
        "batch_size": 12,
        "lr": 5e-3,
        "max_new_tokens": 20,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "beta": 0.1,
    }
    online("toy", tmp_path / "out", **flags)
    north = [
        sum("north" in " ".join(text.split()[:7]) for text in c.responses) / 2
        for c in scripted.seen
    ]
    first, last = sum(north[:24]) / 24, sum(north[-48:]) / 48
    assert len(north) == 6 * 24 and 0.3 < first < 0.7 and sign * (last - first) > 0.2


def test_ties_teach_nothing(model, tmp_path, monkeypatch):
    """A step of ties alone leaves the weights, and is logged."""
    monkeypatch.setattr(edge, "annotator_of", lambda *_: Scripted(lambda text: 0))
    rows = online(model, tmp_path, method="online-dpo", limit=8)
    assert [row["pairs"] for row in rows] == [0, 0]
    assert {row["annotator/ties"] for row in rows} == {1.0}
    assert "loss" not in rows[0]
    fresh = copy.deepcopy(random_toy(1))
    torch.manual_seed(0)
    add_adapters(fresh, 4, 8.0)
    save_adapter(adapter_state(fresh), 4, 8.0, model, tmp_path / "fresh")
    assert weights_of(tmp_path) == (tmp_path / "fresh" / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "flags", [{"method": "online-dpo"}, {"method": "mixed-dpo"}, {"gamma": 0.5}, {}], ids=str
)
def test_a_stopped_run_resumes_bit_for_bit(model, pairs, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(edge, "annotator_of", lambda *_: Scripted(len))
    flags = flags | {"data": pairs, "epochs": 2, "save_every": 2}
    rows = online(model, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        stop_at(patch, "clip_gradients", 6, train_online)
        with pytest.raises(KeyboardInterrupt):
            online(model, tmp_path / "out", **flags)
    assert online(model, tmp_path / "out", resume=True, **flags) == rows
    whole, out = (contents(tmp_path / name) for name in ("whole", "out"))
    for name in (
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
        "checkpoint/progress.safetensors",
    ):
        assert whole[name] == out[name]
    assert set(TIMES) < json.loads(out["metrics.jsonl"].splitlines()[0]).keys()


def test_another_annotator_is_noticed(model, pairs, tmp_path, monkeypatch):
    """Its folder's name is the old one, its weights are not: the run does not go on by them."""
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "model.safetensors").write_bytes(b"one")
    monkeypatch.setattr(edge, "annotator_of", lambda *_: Scripted(len))
    flags = {"data": pairs, "method": "online-dpo", "annotator": str(judge)}
    with monkeypatch.context() as patch:
        stop_at(patch, "clip_gradients", 2, train_online)
        with pytest.raises(KeyboardInterrupt):
            online(model, tmp_path / "out", save_every=1, **flags)
    (judge / "model.safetensors").write_bytes(b"two")
    with pytest.raises(UserError, match="annotator or reward are not those"):
        online(model, tmp_path / "out", resume=True, save_every=1, **flags)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags,said",
    [
        ({"p": 1.5}, "--p 1.5: a probability"),
        ({"gamma": -0.1}, "--gamma -0.1: between 0 and 1"),
        ({"rho_th": 2.0}, "--rho-th 2.0"),
        ({"temperature": -1.0}, "--temperature"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"images": "nowhere"}, "--images nowhere: no such folder"),
        ({"annotator": "nobody", "method": "online-dpo"}, "nobody"),
        ({"data": "none.json"}, "--data none.json: no such file"),
        ({"method": "mixed-dpo", "data": "INSTRUCT"}, "no usable"),
    ],
)
def test_wrong_flags(model, tmp_path, flags, said):
    if flags.get("data") == "INSTRUCT":
        talks = [[("human", "Q"), ("gpt", "A.")]] * 3
        flags = flags | {"data": instruct_file(tmp_path / "data.json", *talks)}
    refused(lambda: online(model, tmp_path / "out", limit=4, **flags), said)
    assert not (tmp_path / "out" / "adapter").exists()
