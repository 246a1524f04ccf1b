"""A reward model: its head, Eq. 1 through minialign.rlhf.reward_model, the folder that it leaves,
and as an annotator (Table 7).
"""

import json
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import refused, toy_processor, toy_tokenizer, worst
from online_runs import rlhf
from safetensors import safe_open
from safetensors.torch import load_file
from script_runs import contents, read_lines, stop_at, train_reward

from minialign import annotate
from minialign.align.annotators import Comparison, RewardAnnotator
from minialign.cli import parse_config
from minialign.data.collate import PairCollator, StepLoader
from minialign.data.record_files import open_pairs
from minialign.data.records import Record
from minialign.model import policy, scalar_head
from minialign.model.hf_folder import load_model
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.rlhf import reward_model
from minialign.rlhf.scorers import HEAD_FILE, load_reward_model
from minialign.rlhf.whitening import WhitenedReward
from minialign.toy import world

FLAGS = {"epochs": 6, "lr": 3e-3}


def random_words(rng: random.Random, count: int, vocab: int, image: int) -> list[int]:
    """Some ids, at least one, and no image token."""
    words = [rng.randrange(vocab) for _ in range(count)]
    return [word for word in words if word != image] or [0]


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_a_reward_is_the_head_on_the_last_token(oracle, tmp_path, seed):
    """transformers' hidden state behind each response, in a sequence of its own; ours are branches
    of one trunk.
    """
    theirs = oracle.make(seed)
    theirs.save_pretrained(tmp_path)
    model, rng = load_model(tmp_path), random.Random(seed)
    patches, image = model.config.vision.patches, model.config.image_token_id
    generator = torch.Generator().manual_seed(seed)
    scalar_head.set_head(model, torch.randn(1, model.config.text.hidden_size, generator=generator))
    size = theirs.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)

    limits = model.config.text.vocab_size, image
    before, after = random_words(rng, 2, *limits), random_words(rng, 4, *limits)
    responses = [random_words(rng, 1 + rng.randrange(7), *limits) for _ in range(3)]
    branches = [Branch(response) for response in responses]
    tree = build_tree([Sequence([*before, image, *after], branches, patches)], image, 0)
    rewards = scalar_head.branch_rewards(model, tree, model.encode_images(pixels))[0]
    for reward, response in zip(rewards, responses, strict=True):
        ids = torch.tensor([before + [image] * patches + after + response])
        # Behind the final norm.
        hidden = theirs.model(input_ids=ids, pixel_values=pixels).last_hidden_state[0, -1]
        assert reward.item() == pytest.approx(
            (model.scalar_head.weight[0] @ hidden).item(), abs=1e-4
        )


@pytest.fixture(scope="module")
def trained(model, pairs, tmp_path_factory) -> Path:
    """A reward model of a few steps."""
    out = tmp_path_factory.mktemp("reward")
    train_reward(model, out, pairs=pairs, **FLAGS)
    return out


def test_it_learns_to_rank(trained):
    """From rewards that a random head gives to all of its pairs; the logged names are DPO's."""
    rows = read_lines(trained / "metrics.jsonl")
    assert rows[0]["loss"] > 0.3 and rows[0]["rewards/accuracies"] < 1
    assert rows[-2]["rewards/accuracies"] == 1 and rows[-1]["loss"] < 0.1
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} < rows[0].keys()
    result = json.loads((trained / "result.json").read_text())
    # No evaluation: nobody asks it for answers.
    assert result.keys() == {"accuracy_of_last_steps"}


def scores_by_hand(trained: Path, pairs: str) -> torch.Tensor:
    """Rewards (14, 2) of a pairs file by the adapters and the head in the checkpoint, one response
    at a time.
    """
    tokenizer, processor = toy_tokenizer(), toy_processor()
    model, found = load_model(trained / "merged"), []
    state = load_file(trained / "checkpoint/progress.safetensors")
    scalar_head.set_head(model, state[f"model.{scalar_head.HEAD}"])
    for line in read_lines(Path(pairs)):
        features = model.encode_images(processor(world.open_picture(line["images"][0])))
        prompt = tokenizer.prompt([("user", line["prompt"])])
        for name in ("chosen", "rejected"):
            branch = Branch(tokenizer.response(line[name]))
            sequence = Sequence(prompt, [branch], features.shape[1])
            tree = build_tree([sequence], tokenizer.image_id, 0)
            with torch.no_grad():
                found.append(scalar_head.branch_rewards(model, tree, features).item())
    return torch.tensor(found).view(-1, 2)


def test_the_folder_holds_the_head(trained, pairs):
    """Its scores are those by hand; whitened on these pairs, as RLOO and PPO do it, they have mean
    0 and standard deviation 1.
    """
    rewards = scores_by_hand(trained, pairs)
    loaded = load_reward_model(trained / "merged", "cpu", torch.float32)
    records, turned = [], []
    for x in read_lines(Path(pairs)):
        turns = [("user", x["prompt"])]
        records.append(Record(x["id"], x["images"][0], turns, x["chosen"], x["rejected"]))
    pictures = [world.open_picture(record.image) for record in records]
    responses = [(record.chosen, record.rejected) for record in records]
    assert worst(loaded(records, pictures, responses), rewards) < 1e-4

    collate = PairCollator(toy_tokenizer(), toy_processor(), world.open_picture, 200)
    loader = StepLoader(open_pairs(pairs, None), collate, 2, skip_bad=False)
    whitened = WhitenedReward.on(loaded, loader, batch_size=3)
    scores = whitened(records, pictures, responses)
    assert worst(scores, (rewards - rewards.mean()) / rewards.std(correction=0)) < 1e-3

    annotator = RewardAnnotator(loaded)
    for record, picture in zip(records, pictures, strict=True):
        turned.append(Comparison(record, (record.rejected, record.chosen), picture))
    better = [verdict.better for verdict in annotator.choose(turned)]
    assert better == (rewards[:, 0] > rewards[:, 1]).long().tolist()
    [same] = annotator.choose([Comparison(records[0], ("A cup.", "A cup."), pictures[0])])
    assert same.better is None and same.reason == "tie" and annotator.choose([]) == []


def test_the_folder_is_a_model_like_any_other(trained, oracle, tmp_path):
    """transformers and PEFT read it, and the head does not disturb."""
    theirs = oracle.transformers.LlavaForConditionalGeneration.from_pretrained(trained / "merged")
    ours = load_model(trained / "merged")
    assert worst(theirs.lm_head.weight.detach(), ours.lm_head.weight.detach()) == 0
    keys = safe_open(trained / "adapter/adapter_model.safetensors", "pt").keys()
    assert not any("head" in key for key in keys)
    assert sorted(path.name for path in (trained / "merged").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        HEAD_FILE,
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_stopped_reward_run_resumes_bit_for_bit(trained, model, pairs, tmp_path, monkeypatch):
    flags = FLAGS | {"pairs": pairs, "save_every": 3}
    with monkeypatch.context() as patch:
        stop_at(patch, "reward_metrics", 9, reward_model)
        with pytest.raises(KeyboardInterrupt):
            train_reward(model, tmp_path, **flags)
    train_reward(model, tmp_path, resume=True, **flags)
    expected, found = contents(trained), contents(tmp_path)
    assert [name for name in expected if found[name] != expected[name]] == ["config.json"]


@pytest.mark.parametrize("accumulate", [2, 3])
def test_parts_of_a_batch_train_the_same(trained, model, pairs, tmp_path, accumulate):
    rows = read_lines(trained / "metrics.jsonl")
    parts = train_reward(model, tmp_path, pairs=pairs, accumulate=accumulate, **FLAGS)
    for row, also in zip(rows, parts, strict=True):
        assert also["loss"] == pytest.approx(row["loss"], abs=2e-3)


def test_without_pairs_it_learns_from_rule_corrupted_ones(model, tmp_path):
    rows = train_reward(model, tmp_path, limit=6, epochs=1)
    lines = read_lines(tmp_path / "pairs.jsonl")
    assert [row["pairs"] for row in rows] == [4, 2] and len(lines) == 6
    assert all(line["chosen"] != line["rejected"] for line in lines)


def test_pictures_of_ones_own_need_pairs(model, tmp_path):
    message, images = "--pairs is missing; make one with sample_bdhs.py", tmp_path / "images"
    images.mkdir()
    refused(lambda: train_reward(model, tmp_path / "out", images=str(images)), message)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_head_is_refused(model):
    folder, remedy = Path(model), "give the `merged` that minialign.rlhf.reward_model leaves"
    refused(lambda: load_reward_model(folder, "cpu", torch.float32), model, HEAD_FILE, remedy)


def test_a_head_that_was_cut_off_is_refused(model, tmp_path):
    """As by a copy that was interrupted."""
    for path in Path(model).iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / HEAD_FILE).write_bytes(bytes(40))
    message = "not a whole safetensors file"
    refused(lambda: load_reward_model(tmp_path, "cpu", torch.float32), HEAD_FILE, message)


@pytest.mark.filterwarnings("ignore:std")
def test_whitening_takes_records_from_everywhere(monkeypatch):
    """Of many records some at random: not the first, nor every second of a file whose kinds take
    turns.
    """
    asked: list[int] = []

    def loader(self, numbers, step=0):
        asked.extend(numbers)
        return []

    monkeypatch.setattr(StepLoader, "__call__", loader)
    loader = StepLoader(Namespace(numbers=range(2000)), None, 1, skip_bad=False)
    refused(lambda: WhitenedReward.on(None, loader, 16), "give more records")  # none was scored
    assert len(asked) == len(set(asked)) == 1000
    assert 400 < sum(number % 2 for number in asked) < 600
    assert 400 < sum(number < 1000 for number in asked) < 600


def test_a_model_that_ranks_nothing_is_refused(model, pairs, tmp_path, monkeypatch):
    """From a head of zeros, at a rate of next to nothing: all rewards are the same, and nobody
    can whiten them; before anything is sampled.
    """
    real = scalar_head.new_head
    monkeypatch.setattr(policy, "new_head", lambda model, kind: real(model, "value"))
    flags = {"pairs": pairs, "lr": 1e-30, "projector_lr": 0.0}
    train_reward(model, tmp_path / "reward", **flags)
    flags = {"data": pairs, "reward": str(tmp_path / "reward/merged")}
    message = "gives all responses of the data the same reward; train it longer, or give more"
    for method in ("rloo", "ppo"):
        refused(lambda m=method: rlhf(m, model, tmp_path / m, **flags), message)
        assert not (tmp_path / method / "metrics.jsonl").exists()


def test_accuracy_across_data_sets(trained, pairs, tmp_path, capsys):
    """Table 7: a column per file; the model's accuracy is the share of pairs whose chosen response
    it pays more.
    """
    rewards = scores_by_hand(trained, pairs)
    turned = tmp_path / "turned.jsonl"
    lines = read_lines(Path(pairs))
    swapped = [x | {"chosen": x["rejected"], "rejected": x["chosen"]} for x in lines]
    turned.write_text("".join(json.dumps(x) + "\n" for x in swapped))
    out = tmp_path / "table.json"
    flags = ["--annotator", trained / "merged", "--pairs", f"{pairs},{turned}", "--out", out]
    annotate.main(parse_config(annotate.Config, "", [str(flag) for flag in flags]))
    found = json.loads(out.read_text())
    right = (rewards[:, 0] > rewards[:, 1]).float().mean().item()
    assert found[pairs]["accuracy"]["value"] == pytest.approx(right, abs=1e-5)
    assert found[str(turned)]["accuracy"]["value"] == pytest.approx(1 - right, abs=1e-5)
    shown = capsys.readouterr().out
    assert found[pairs]["pairs"] == 14 and "pairs.jsonl" in shown and "turned.jsonl" in shown
