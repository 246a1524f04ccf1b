"""A reward model: its head, Eq. 1 through train_dpo.py, the folder that it leaves, and as an
annotator (Table 7)."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import refused, toy_processor, toy_tokenizer, worst
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_runs import contents, read_lines, train

import train_dpo
from minialign.align import annotators
from minialign.align.annotators import Comparison, RewardAnnotator
from minialign.cli import parse_config
from minialign.data.records import Record
from minialign.model import lora, scalar_head
from minialign.model.hf_folder import load_model
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.rlhf.scorers import HEAD_FILE, load_reward_model
from minialign.toy import world

TEXTS = ("The north cup is red.", "Yes, there is a boat.", "A lamp.", "")


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_a_reward_is_the_head_on_the_last_token(oracle, tmp_path, seed):
    """transformers' hidden state behind each response, in a sequence of its own; ours are branches
    of one trunk."""
    theirs = oracle.make(seed)
    theirs.save_pretrained(tmp_path)
    model, rng = load_model(tmp_path), random.Random(seed)
    patches, image, vocab = (
        model.config.vision.patches,
        model.config.image_token_id,
        model.config.text.vocab_size,
    )
    generator = torch.Generator().manual_seed(seed)
    scalar_head.set_head(model, torch.randn(1, model.config.text.hidden_size, generator=generator))
    size = theirs.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)

    def words(count: int) -> list[int]:
        return [
            token for token in (rng.randrange(vocab) for _ in range(count)) if token != image
        ] or [0]

    prompt, responses = (
        [*words(2), image, *words(4)],
        [words(1 + rng.randrange(7)) for _ in range(3)],
    )
    tree = build_tree([Sequence(prompt, [Branch(each) for each in responses], patches)], image, 0)
    rewards = scalar_head.branch_rewards(model, tree, model.encode_images(pixels))[0]
    place = prompt.index(image)
    for reward, response in zip(rewards, responses, strict=True):
        ids = torch.tensor([prompt[:place] + [image] * patches + prompt[place + 1 :] + response])
        hidden = theirs.model(
            input_ids=ids, pixel_values=pixels
        ).last_hidden_state  # behind the final norm
        assert reward.item() == pytest.approx(
            (model.scalar_head.weight[0] @ hidden[0, -1]).item(), abs=1e-4
        )


@pytest.fixture(scope="module")
def trained(model, pairs, tmp_path_factory) -> Path:
    """A reward model of a few steps."""
    out = tmp_path_factory.mktemp("reward")
    train(model, out, pairs=pairs, loss="reward", epochs=6, lr=3e-3)
    return out


def test_it_learns_to_rank(trained):
    """From rewards that a random head gives to all of its pairs; the logged names are DPO's."""
    rows = read_lines(trained / "metrics.jsonl")
    assert rows[0]["loss"] > 0.3 and rows[0]["rewards/accuracies"] < 1
    assert rows[-2]["rewards/accuracies"] == 1 and rows[-1]["loss"] < 0.1
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} < rows[
        0
    ].keys() and "logps/chosen" not in rows[0]
    result = json.loads((trained / "result.json").read_text())
    # No evaluation: nobody asks it for answers.
    assert result.keys() == {"reward_mean", "reward_std", "accuracy_of_last_steps"}


def scores_by_hand(trained: Path, pairs: str) -> torch.Tensor:
    """Rewards (14, 2) of a pairs file by the adapters and the head in the checkpoint, one response
    at a time."""
    tokenizer, processor = toy_tokenizer(), toy_processor()
    model = load_model(trained / "merged")
    state = load_file(trained / "checkpoint/progress.safetensors")
    scalar_head.set_head(model, state[f"model.{scalar_head.HEAD}"])
    found = []
    for line in read_lines(Path(pairs)):
        features = model.encode_images(processor(world.picture(world.scene_of(line["images"][0]))))
        prompt = tokenizer.prompt([("user", line["prompt"])])
        for name in ("chosen", "rejected"):
            branch = Branch(tokenizer.response(line[name]))
            tree = build_tree(
                [Sequence(prompt, [branch], features.shape[1])], tokenizer.image_id, 0
            )
            with torch.no_grad():
                found.append(scalar_head.branch_rewards(model, tree, features).item())
    return torch.tensor(found).view(-1, 2)


def test_the_folder_holds_head_mean_and_deviation(trained, pairs):
    rewards = scores_by_hand(trained, pairs)
    loaded = load_reward_model(trained / "merged", "cpu", torch.float32)
    assert loaded.whitening.mean == pytest.approx(rewards.mean().item(), abs=1e-4)
    assert loaded.whitening.std == pytest.approx(rewards.std(correction=0).item(), abs=1e-4)
    lines = read_lines(Path(pairs))
    records = [
        Record(x["id"], x["images"][0], [("user", x["prompt"])], x["chosen"], x["rejected"])
        for x in lines
    ]
    pictures = [world.picture(world.scene_of(record.image)) for record in records]
    scores = loaded(records, pictures, [(record.chosen, record.rejected) for record in records])
    assert worst(scores, (rewards - rewards.mean()) / rewards.std(correction=0)) < 1e-3
    both = annotators.RewardAnnotator(loaded).choose(
        [Comparison(r, (r.rejected, r.chosen), p) for r, p in zip(records, pictures, strict=True)]
    )
    assert [verdict.better for verdict in both] == (rewards[:, 0] > rewards[:, 1]).long().tolist()
    [same] = RewardAnnotator(loaded).choose(
        [Comparison(records[0], ("A cup.", "A cup."), pictures[0])]
    )
    assert same.better is None and same.reason == "tie" and RewardAnnotator(loaded).choose([]) == []


def test_the_folder_is_a_model_like_any_other(trained, oracle, tmp_path):
    """transformers and PEFT read it, and the head does not disturb."""
    theirs = oracle.transformers.LlavaForConditionalGeneration.from_pretrained(trained / "merged")
    assert (
        worst(
            theirs.lm_head.weight.detach(), load_model(trained / "merged").lm_head.weight.detach()
        )
        == 0
    )
    keys = safe_open(trained / "adapter/adapter_model.safetensors", "pt").keys()
    assert not any("head" in key for key in keys) and sorted(
        p.name for p in (trained / "merged").iterdir()
    ) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        HEAD_FILE,
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_stopped_reward_run_resumes_bit_for_bit(trained, model, pairs, tmp_path, monkeypatch):
    calls, real = [], train_dpo.pair_loss

    def stopping(*args):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args)

    flags = {"pairs": pairs, "loss": "reward", "epochs": 6, "lr": 3e-3, "save_every": 3}
    monkeypatch.setattr(train_dpo, "pair_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, **flags)
    monkeypatch.undo()
    train(model, tmp_path, resume=True, **flags)
    expected, found = contents(trained), contents(tmp_path)
    assert [name for name in expected if found[name] != expected[name]] == ["config.json"]


@pytest.mark.parametrize("accumulate", [2, 3])
def test_parts_of_a_batch_train_the_same(trained, model, pairs, tmp_path, accumulate):
    train(model, tmp_path, pairs=pairs, loss="reward", epochs=6, lr=3e-3, accumulate=accumulate)
    for row, also in zip(
        read_lines(trained / "metrics.jsonl"), read_lines(tmp_path / "metrics.jsonl"), strict=True
    ):
        assert also["loss"] == pytest.approx(row["loss"], abs=2e-3)


def spoil(folder: Path, weight=None, whitening: object = None) -> None:
    """The head with another weight or other facts."""
    [tensor] = load_file(folder / HEAD_FILE).values()
    with safe_open(folder / HEAD_FILE, "pt") as file:
        metadata = file.metadata()
    if whitening is not None:
        metadata = {"whitening": whitening} if whitening else {}
    save_file({"weight": tensor} if weight is None else weight, folder / HEAD_FILE, metadata)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"weight": {"weight": torch.zeros(1, 5)}}, "no head of this model"),
        ({"weight": {"weight": torch.full((1, 128), torch.nan)}}, "no head of this model"),
        ({"weight": {"other": torch.zeros(1, 128)}}, "no head of this model"),
        ({"whitening": '{"mean": 0.0, "std": 0.0}'}, "a standard deviation"),
        ({"whitening": '{"mean": NaN, "std": 1.0}'}, "a standard deviation"),
        ({"whitening": '{"mean": "zero", "std": 1.0}'}, "a standard deviation"),
        ({"whitening": "[1, 2]"}, "a standard deviation"),
        ({"whitening": "{"}, "a standard deviation"),
        ({"whitening": ""}, "a standard deviation"),
    ],
)
def test_a_spoilt_head_is_refused_in_one_line(trained, tmp_path, change, said):
    folder = Path(shutil.copytree(trained / "merged", tmp_path / "merged"))
    spoil(folder, **change)
    refused(
        lambda: load_reward_model(folder, "cpu", torch.float32), HEAD_FILE, said, "train it again"
    )


def test_a_folder_without_a_head_is_refused(model):
    refused(
        lambda: load_reward_model(Path(model), "cpu", torch.float32),
        model,
        HEAD_FILE,
        "--loss reward",
    )


def test_a_damaged_head_is_refused(trained, tmp_path):
    folder = Path(shutil.copytree(trained / "merged", tmp_path / "merged"))
    (folder / HEAD_FILE).write_bytes((folder / HEAD_FILE).read_bytes()[:40])
    refused(
        lambda: load_reward_model(folder, "cpu", torch.float32),
        HEAD_FILE,
        "not a whole safetensors file",
    )


def test_a_model_that_ranks_nothing_is_refused(model, pairs, tmp_path, monkeypatch):
    """From a head of zeros, at a rate of next to nothing: all rewards are the same, and nobody
    could whiten them."""
    monkeypatch.setattr(lora, "new_head", lambda model, kind: scalar_head.new_head(model, "value"))
    flags = {"pairs": pairs, "loss": "reward", "lr": 1e-30, "projector_lr": 0.0}
    refused(
        lambda: train(model, tmp_path, **flags),
        "gives all responses the same reward; train it longer",
    )
    assert not (tmp_path / "merged").exists()


def test_there_is_no_reference_to_cache(model, pairs, tmp_path):
    flags = {"pairs": pairs, "loss": "reward", "ref_cache": str(tmp_path / "cache")}
    refused(
        lambda: train(model, tmp_path / "out", **flags),
        "--ref-cache with --loss reward: there is no reference",
    )


def test_accuracy_across_data_sets(trained, pairs, tmp_path, monkeypatch, capsys):
    """Table 7: a column per file; the model's accuracy is the share of pairs whose chosen response
    it pays more."""
    rewards = scores_by_hand(trained, pairs)
    turned = tmp_path / "turned.jsonl"
    lines = read_lines(Path(pairs))
    turned.write_text(
        "".join(
            json.dumps(x | {"chosen": x["rejected"], "rejected": x["chosen"]}) + "\n" for x in lines
        )
    )
    out = tmp_path / "table.json"
    argv = [
        "annotator",
        "--annotator",
        str(trained / "merged"),
        "--pairs",
        f"{pairs},{turned}",
        "--out",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", argv)
    annotators.main(parse_config(annotators.Config, ""))
    found = json.loads(out.read_text())
    right = (rewards[:, 0] > rewards[:, 1]).float().mean().item()
    assert found[pairs]["accuracy"]["value"] == pytest.approx(right, abs=1e-5)
    assert found[str(turned)]["accuracy"]["value"] == pytest.approx(1 - right, abs=1e-5)
    shown = capsys.readouterr().out
    assert found[pairs]["pairs"] == 14 and "pairs.jsonl" in shown and "turned.jsonl" in shown
