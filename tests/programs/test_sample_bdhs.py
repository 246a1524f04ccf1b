"""sample_bdhs.py as a user runs it: what its pairs hold, how others read them, and what it
counts."""

import json
import math

import pytest
import torch
from helpers import toy_processor, toy_tokenizer
from input_files import pairs_in
from script_runs import contents, instruct_file, sample, train

import sample_bdhs
from minialign.data.collate import PairCollator
from minialign.model.masks import image_attention_mask
from minialign.sampling.bdhs import Bdhs
from minialign.sampling.pairs_file import Sampled
from minialign.toy import world


def test_pairs_file(model, tmp_path):
    pairs = sample(model, tmp_path / "deep" / "pairs.jsonl")
    records = world.alignment_records(7)
    assert len(pairs) == 7
    for pair, record in zip(pairs, records, strict=True):
        assert list(pair) == ["id", "images", "prompt", "chosen", "rejected", "bdhs"]
        assert pair["id"] == record["id"] and pair["images"] == [record["image"]]
        assert record["conversations"][0]["value"] == f"<image>\n{pair['prompt']}"
        assert record["conversations"][1]["value"] == pair["chosen"]
        assert isinstance(pair["rejected"], str) and pair["rejected"].strip()
        kinds = {name: type(value) for name, value in pair["bdhs"].items()}
        assert kinds == {
            "iterations": int,
            "similarity": float,
            "mask_seed": int,
            "guided": bool,
            "truncated": bool,
            "rho_th": float,
            "noise_steps": int,
        }
        assert 1 <= pair["bdhs"]["iterations"] <= 3 and 0 <= pair["bdhs"]["similarity"] <= 1
        assert (
            pair["bdhs"]["guided"] == (pair["bdhs"]["iterations"] < 3)
            and pair["bdhs"]["rho_th"] == 0.7
        )
    assert len({pair["bdhs"]["mask_seed"] for pair in pairs}) == 7
    assert sorted(contents(tmp_path / "deep")) == [
        "pairs.jsonl",
        "pairs.jsonl.config.json",
        "pairs.jsonl.stats.json",
    ]
    config = json.loads((tmp_path / "deep" / "pairs.jsonl.config.json").read_text())
    assert config["model"] == model and config["max_new_tokens"] == 5 and config["encoder"] is None


def test_the_stored_seed_draws_the_mask_that_was_used(model, tmp_path, monkeypatch):
    used = []

    def spy(patches, rho_th, seed):
        used.append(
            image_attention_mask(patches, rho_th, torch.Generator().manual_seed(seed)).tolist()
        )
        return torch.tensor(used[-1])

    monkeypatch.setattr("minialign.bdhs.mask_of_seed", spy)
    pairs = sample(model, tmp_path / "pairs.jsonl", n_bdhs=1)
    collate = PairCollator(toy_tokenizer(), toy_processor(), "toy", 512)
    shown = [collate.report_pair(record) for record in pairs_in(tmp_path / "pairs.jsonl")]
    assert [pair.visible for pair in shown] == used and len(pairs) == len(used) == 7
    assert all(0 < sum(mask) < 36 for mask in used)


def test_other_readers_take_the_pairs(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    pairs = sample(model, tmp_path / "pairs.jsonl")
    found = datasets.Dataset.from_json(
        str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache")
    )
    assert found.to_list() == pairs
    kinds = {
        name: str(kind)
        for name, kind in found.features.items()
        if name in ("prompt", "chosen", "rejected")
    }
    assert set(kinds.values()) == {"Value('string')"}


def test_a_file_keeps_to_messages_where_a_record_has_earlier_turns(model, tmp_path):
    """TRL takes texts or messages, and looks at one row to know which."""
    talks = [
        [("human", "<image>\nWhat is there?"), ("gpt", "A red cup.")],
        [
            ("human", "Is there a cup?\n<image>"),
            ("gpt", "Yes."),
            ("human", "Which colour?"),
            ("gpt", "It is red."),
        ],
    ]
    pairs = sample(
        model, tmp_path / "pairs.jsonl", data=instruct_file(tmp_path / "data.json", *talks)
    )
    assert pairs[0]["prompt"] == [{"role": "user", "content": "What is there?"}]
    assert pairs[1]["prompt"] == [
        {"role": "user", "content": "Is there a cup?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Which colour?"},
    ]
    for pair, answer in zip(pairs, ("A red cup.", "It is red."), strict=True):
        assert pair["chosen"] == [{"role": "assistant", "content": answer}]
        assert [set(message) for message in pair["rejected"]] == [{"role", "content"}]
    records = pairs_in(tmp_path / "pairs.jsonl")
    assert records[1].turns == [
        ("user", "Is there a cup?"),
        ("assistant", "Yes."),
        ("user", "Which colour?"),
    ]
    assert [record.chosen for record in records] == ["A red cup.", "It is red."]
    rows = train(model, tmp_path / "out", pairs=str(tmp_path / "pairs.jsonl"))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_resolved_curve_by_hand():
    def pair(iterations: int, similarity: float, truncated: bool = False) -> dict:
        return {
            "bdhs": {"iterations": iterations, "similarity": similarity, "truncated": truncated}
        }

    pairs = [
        pair(1, 0.2),
        pair(1, 0.96),
        pair(2, 0.5),
        pair(3, 0.9),
        pair(3, 0.97),
        pair(3, 1.0),
        pair(1, 0),
        pair(3, 0.2, True),
    ]
    assert sample_bdhs.resolved_curve(pairs, 3, 0.97) == [
        3 / 8,
        4 / 8,
        5 / 8,
    ]  # too similar twice, and cut off
    assert sample_bdhs.resolved_curve(pairs[:3], 3, 0.97) == [0.6667, 1.0, 1.0]
    assert sample_bdhs.resolved_curve([], 2, 0.97) == [0.0, 0.0]


def test_stats(model, tmp_path, monkeypatch):
    """Four samples made up: different at once, at the last try, never; and an empty one, which is
    no pair."""

    def made_up(self, examples):
        kinds = [
            Sampled("Other.", 1, 0.1, 5, True, False),
            Sampled("Late", 3, 0.9, 5, False, True),
            Sampled(examples[2].chosen, 3, 1.0, 5, False, False),
            Sampled("", 3, 0.0, 5, True, False),
        ]
        return kinds[: len(examples)]

    monkeypatch.setattr(Bdhs, "sample", made_up)
    pairs = sample(model, tmp_path / "pairs.jsonl", limit=4, batch_size=4)
    assert [pair["rejected"] for pair in pairs] == ["Other.", "Late", pairs[2]["chosen"]]
    stats = json.loads((tmp_path / "pairs.jsonl.stats.json").read_text())
    assert stats == {
        "pairs": 3,
        "resolved": [0.3333] * 3,
        "identical": 1,
        "truncated": 1,
        "left_out": 1,
    }
    assert len(pairs_in(tmp_path / "pairs.jsonl")) == 2  # the identical one teaches nothing


def test_iterations_follow_eps_s(model, tmp_path, monkeypatch):
    """Everything is too similar at 0, so all is tried to the end, unguided at last; at 1 the first
    try is taken."""
    # The fixture's model has random weights, so that it never stops by itself: let that count as
    # whole.
    monkeypatch.setattr(
        Bdhs, "iterate", lambda *args, real=Bdhs.iterate: (real(*args)[0], [False] * len(args[1]))
    )
    never = sample(model, tmp_path / "never.jsonl", eps_s=0.0)
    assert {(pair["bdhs"]["iterations"], pair["bdhs"]["guided"]) for pair in never} == {(3, False)}
    once = sample(model, tmp_path / "once.jsonl", eps_s=1.0)
    assert {(pair["bdhs"]["iterations"], pair["bdhs"]["guided"]) for pair in once} == {(1, True)}
    unguided = sample(model, tmp_path / "unguided.jsonl", eps_s=1.0, guided=False)
    assert not any(pair["bdhs"]["guided"] for pair in unguided)
    noise = sample(model, tmp_path / "noise.jsonl", eps_s=1.0, rho_th=0.0, noise_steps=500)
    assert [pair["rejected"] for pair in noise] != [pair["rejected"] for pair in once]
