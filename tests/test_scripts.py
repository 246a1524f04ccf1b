"""sample_bdhs.py and train_dpo.py as a user runs them, on a few records: what they leave, and stopped runs."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from helpers import random_toy, toy_model, toy_processor, toy_tokenizer, worst
from safetensors.torch import load_file

import sample_bdhs
import train_dpo
from minialign import toyworld
from minialign.bdhs import Bdhs, Sampled
from minialign.checkpoint import TOY, load_model, save_model
from minialign.clip import Clip
from minialign.data import PairCollator, read_pairs
from minialign.errors import UserError
from minialign.images import ImageProcessor
from minialign.llama import Llama
from minialign.lora import load_adapter
from minialign.masks import Branch, Sequence, build_tree, image_attention_mask

TRL_NAMES = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "grad_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model folder of random weights, float32."""
    folder = tmp_path_factory.mktemp("model") / "llava"
    save_model(random_toy(1).state_dict(), toy_model().config.raw, TOY, folder, torch.float32)
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but the report, which has the time in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "report.html"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# ---------------------------------------------------------------- sample_bdhs.py


def sample(model: str, out: Path, **changes) -> list[dict]:
    """The pairs that a run of a few tokens leaves."""
    knobs = {"limit": 7, "rho_th": 0.7, "temperature": 1.0, "max_new_tokens": 5, "batch_size": 3, "n_bdhs": 3}
    sample_bdhs.main(sample_bdhs.Config(model=model, out=str(out), **(knobs | changes)))
    return read_lines(out)


def instruct_file(path: Path, *talks: list[tuple[str, str]]) -> str:
    """A LLaVA-Instruct file on pictures of the embedded world."""
    raws = [
        {"id": i, "image": toyworld.image_name("alignment", i),
         "conversations": [{"from": role, "value": text} for role, text in talk]}
        for i, talk in enumerate(talks)
    ]  # fmt: skip
    path.write_text(json.dumps(raws))
    return str(path)


def test_pairs_file(model, tmp_path):
    pairs = sample(model, tmp_path / "deep" / "pairs.jsonl")
    records = toyworld.alignment_records(7)
    assert len(pairs) == 7
    for pair, record in zip(pairs, records, strict=True):
        assert list(pair) == ["id", "images", "prompt", "chosen", "rejected", "bdhs"]
        assert pair["id"] == record["id"] and pair["images"] == [record["image"]]
        assert record["conversations"][0]["value"] == f"<image>\n{pair['prompt']}"
        assert record["conversations"][1]["value"] == pair["chosen"]
        assert isinstance(pair["rejected"], str) and pair["rejected"].strip()
        kinds = {name: type(value) for name, value in pair["bdhs"].items()}
        assert kinds == {"iterations": int, "similarity": float, "mask_seed": int, "guided": bool, "truncated": bool,
                         "rho_th": float, "noise_steps": int}  # fmt: skip
        assert 1 <= pair["bdhs"]["iterations"] <= 3 and 0 <= pair["bdhs"]["similarity"] <= 1
        assert pair["bdhs"]["guided"] == (pair["bdhs"]["iterations"] < 3) and pair["bdhs"]["rho_th"] == 0.7
    assert len({pair["bdhs"]["mask_seed"] for pair in pairs}) == 7
    assert sorted(contents(tmp_path / "deep")) == ["pairs.jsonl", "pairs.jsonl.config.json", "pairs.jsonl.stats.json"]
    config = json.loads((tmp_path / "deep" / "pairs.jsonl.config.json").read_text())
    assert config["model"] == model and config["max_new_tokens"] == 5 and config["encoder"] is None


def test_the_stored_seed_draws_the_mask_that_was_used(model, tmp_path, monkeypatch):
    used = []

    def spy(patches, rho_th, seed):
        used.append(image_attention_mask(patches, rho_th, torch.Generator().manual_seed(seed)).tolist())
        return torch.tensor(used[-1])

    monkeypatch.setattr("minialign.bdhs.mask_of_seed", spy)
    pairs = sample(model, tmp_path / "pairs.jsonl", n_bdhs=1)
    collate = PairCollator(toy_tokenizer(), toy_processor(), "toy", 36, 512)
    shown = [collate.report_pair(record) for record in read_pairs(tmp_path / "pairs.jsonl", None)]
    assert [pair.visible for pair in shown] == used and len(pairs) == len(used) == 7
    assert all(0 < sum(mask) < 36 for mask in used)


def test_other_readers_take_the_pairs(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    pairs = sample(model, tmp_path / "pairs.jsonl")
    found = datasets.Dataset.from_json(str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert found.to_list() == pairs
    kinds = {name: str(kind) for name, kind in found.features.items() if name in ("prompt", "chosen", "rejected")}
    assert set(kinds.values()) == {"Value('string')"}


def test_a_file_keeps_to_messages_where_a_record_has_earlier_turns(model, tmp_path):
    """TRL takes texts or messages, and looks at one row to know which."""
    talks = [
        [("human", "<image>\nWhat is there?"), ("gpt", "A red cup.")],
        [("human", "Is there a cup?\n<image>"), ("gpt", "Yes."), ("human", "Which colour?"), ("gpt", "It is red.")],
    ]
    pairs = sample(model, tmp_path / "pairs.jsonl", data=instruct_file(tmp_path / "data.json", *talks))
    assert pairs[0]["prompt"] == [{"role": "user", "content": "What is there?"}]
    assert pairs[1]["prompt"] == [
        {"role": "user", "content": "Is there a cup?"}, {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Which colour?"},
    ]  # fmt: skip
    for pair, answer in zip(pairs, ("A red cup.", "It is red."), strict=True):
        assert pair["chosen"] == [{"role": "assistant", "content": answer}]
        assert [set(message) for message in pair["rejected"]] == [{"role", "content"}]
    records = read_pairs(tmp_path / "pairs.jsonl", None)
    assert records[1].turns == [("user", "Is there a cup?"), ("assistant", "Yes."), ("user", "Which colour?")]
    assert [record.chosen for record in records] == ["A red cup.", "It is red."]
    rows = train(model, tmp_path / "out", pairs=str(tmp_path / "pairs.jsonl"))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_run_continues_to_the_same_bytes(model, tmp_path, seed):
    """Killed between lines or within one, and continued in other batches."""
    rng, undisturbed, out = random.Random(seed), tmp_path / "a", tmp_path / "b"
    sample(model, undisturbed / "pairs.jsonl")
    sample(model, out / "pairs.jsonl")
    whole = (out / "pairs.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    cut = rng.randrange(len(whole)) if seed % 2 else len(b"".join(lines[: rng.randrange(len(lines))]))
    (out / "pairs.jsonl").write_bytes(whole[:cut])
    (out / "pairs.jsonl.stats.json").unlink()
    sample(model, out / "pairs.jsonl", batch_size=rng.choice([1, 2, 3, 7]))
    for name in ("pairs.jsonl", "pairs.jsonl.stats.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_run_that_is_interrupted_keeps_whole_batches(model, tmp_path, monkeypatch):
    real, batches = Bdhs.sample, []

    def interrupted(self, examples):
        batches.append(len(examples))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(self, examples)

    monkeypatch.setattr(Bdhs, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(model, tmp_path / "pairs.jsonl", batch_size=2)
    assert len(read_lines(tmp_path / "pairs.jsonl")) == 4 and not (tmp_path / "pairs.jsonl.stats.json").exists()
    monkeypatch.setattr(Bdhs, "sample", real)
    assert sample(model, tmp_path / "pairs.jsonl", batch_size=2) == sample(model, tmp_path / "other.jsonl")


def test_what_is_there_is_not_sampled_again(model, tmp_path, monkeypatch):
    first = sample(model, tmp_path / "pairs.jsonl", limit=4)
    before, real, ids = contents(tmp_path), Bdhs.sample, []
    monkeypatch.setattr(Bdhs, "sample", lambda self, batch: ids.extend(e.id for e in batch) or real(self, batch))
    assert sample(model, tmp_path / "pairs.jsonl", limit=4) == first and contents(tmp_path) == before and ids == []
    more = sample(model, tmp_path / "pairs.jsonl", limit=6)  # a longer run goes on
    assert more[:4] == first and ids == [record["id"] for record in toyworld.alignment_records(6)[4:]]


@pytest.mark.parametrize("changes", [{"rho_th": 0.5}, {"seed": 1}, {"n_bdhs": 2}, {"guided": False},
                                     {"temperature": 0.5}, {"eps_s": 0.5}, {"noise_steps": 5}], ids=str)  # fmt: skip
def test_pairs_of_other_settings_are_not_mixed(model, tmp_path, changes):
    sample(model, tmp_path / "pairs.jsonl", limit=2)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"pairs of another {next(iter(changes))} .*give another --out, or remove"):
        sample(model, tmp_path / "pairs.jsonl", limit=2, **changes)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("data", [b"my notes\nwithout an end", b'{"id": 1}\n', b"no line end", b"\xff\x00"])
def test_a_file_that_is_no_pairs_file_is_left_alone(model, tmp_path, data):
    (tmp_path / "notes.txt").write_bytes(data)
    with pytest.raises(UserError, match="notes.txt is not known to be a pairs file .*; give another --out, or remove"):
        sample(model, tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": data}


@pytest.mark.parametrize("line", ["{", "5", '{"id": "x"}'])
def test_a_pairs_file_with_a_bad_line_is_refused(model, tmp_path, line):
    sample(model, tmp_path / "pairs.jsonl", limit=2)
    with open(tmp_path / "pairs.jsonl", "a") as file:
        file.write(line + "\n")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"pairs\.jsonl"):
        sample(model, tmp_path / "pairs.jsonl")
    assert contents(tmp_path) == before


def test_resolved_curve_by_hand():
    def pair(iterations: int, similarity: float, truncated: bool = False) -> dict:
        return {"bdhs": {"iterations": iterations, "similarity": similarity, "truncated": truncated}}

    pairs = [pair(1, 0.2), pair(1, 0.96), pair(2, 0.5), pair(3, 0.9), pair(3, 0.97), pair(3, 1.0), pair(1, 0),
             pair(3, 0.2, True)]  # fmt: skip
    assert sample_bdhs.resolved_curve(pairs, 3, 0.97) == [3 / 8, 4 / 8, 5 / 8]  # too similar twice, and cut off
    assert sample_bdhs.resolved_curve(pairs[:3], 3, 0.97) == [0.6667, 1.0, 1.0]
    assert sample_bdhs.resolved_curve([], 2, 0.97) == [0.0, 0.0]


def test_stats(model, tmp_path, monkeypatch):
    """Four samples made up: different at once, at the last try, never; and an empty one, which is no pair."""

    def made_up(self, examples):
        kinds = [Sampled("Other.", 1, 0.1, 5, True, False), Sampled("Late", 3, 0.9, 5, False, True),
                 Sampled(examples[2].chosen, 3, 1.0, 5, False, False), Sampled("", 3, 0.0, 5, True, False)]  # fmt: skip
        return kinds[: len(examples)]

    monkeypatch.setattr(Bdhs, "sample", made_up)
    pairs = sample(model, tmp_path / "pairs.jsonl", limit=4, batch_size=4)
    assert [pair["rejected"] for pair in pairs] == ["Other.", "Late", pairs[2]["chosen"]]
    stats = json.loads((tmp_path / "pairs.jsonl.stats.json").read_text())
    assert stats == {"pairs": 3, "resolved": [0.3333] * 3, "identical": 1, "truncated": 1, "left_out": 1}
    assert len(read_pairs(tmp_path / "pairs.jsonl", None)) == 2  # the identical one teaches nothing


def test_iterations_follow_eps_s(model, tmp_path, monkeypatch):
    """Everything is too similar at 0, so all is tried to the end, unguided at last; at 1 the first try is taken."""
    # The fixture's model has random weights, so that it never stops by itself: let that count as whole.
    monkeypatch.setattr(Bdhs, "iterate", lambda *args, real=Bdhs.iterate: (real(*args)[0], [False] * len(args[1])))
    never = sample(model, tmp_path / "never.jsonl", eps_s=0.0)
    assert {(pair["bdhs"]["iterations"], pair["bdhs"]["guided"]) for pair in never} == {(3, False)}
    once = sample(model, tmp_path / "once.jsonl", eps_s=1.0)
    assert {(pair["bdhs"]["iterations"], pair["bdhs"]["guided"]) for pair in once} == {(1, True)}
    unguided = sample(model, tmp_path / "unguided.jsonl", eps_s=1.0, guided=False)
    assert not any(pair["bdhs"]["guided"] for pair in unguided)
    noise = sample(model, tmp_path / "noise.jsonl", eps_s=1.0, rho_th=0.0, noise_steps=500)
    assert [pair["rejected"] for pair in noise] != [pair["rejected"] for pair in once]


def test_records_with_the_same_id(model, tmp_path):
    """Each is sampled, from its own seed, and a continued run knows them apart."""
    talk = [("human", "<image>\nWhat is there?"), ("gpt", "A red cup. A blue ball. A green tree. A white dog.")]
    data = Path(instruct_file(tmp_path / "data.json", talk, talk, talk))
    data.write_text(data.read_text().replace('"id": 1', '"id": 0').replace('"id": 2', '"id": 0'))
    pairs = sample(model, tmp_path / "pairs.jsonl", data=str(data))
    assert [pair["id"] for pair in pairs] == ["0", "0#2", "0#3"] and len({pair["rejected"] for pair in pairs}) == 3
    whole = (tmp_path / "pairs.jsonl").read_bytes()
    (tmp_path / "pairs.jsonl").write_bytes(whole[: whole.index(b"\n") + 9])
    assert sample(model, tmp_path / "pairs.jsonl", data=str(data)) == pairs


# ---------------------------------------------------------------- train_dpo.py

DEFAULTS = {"lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-3, "projector_lr": 1e-4, "epochs": 1, "batch_size": 4,
            "eval_images": 0}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """14 pairs; in batches of 4 the last one has 2. The words are fixed here, whatever the embedded world says."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    colours, things = ("red", "blue", "green", "white", "black"), ("cup", "car", "tree", "ball")
    with open(path, "w") as file:
        for i in range(14):
            colour, thing = colours[i % 5], things[i % 4]
            chosen = f"A {colour} {thing} is at the top left." + " The rest is empty." * ((i + 1) % 3)
            rejected = f"There is no {thing}, but a {colours[(i + 2) % 5]} {things[(i + 1) % 4]}."
            rejected += " It is large." * (4 - 2 * ((i + 1) % 3))  # so that the base ranks some pairs right
            pair = {"id": f"pair-{i:02d}", "images": [toyworld.image_name("alignment", i)], "prompt": "What is there?"}
            file.write(json.dumps(pair | {"chosen": chosen, "rejected": rejected}) + "\n")
    return str(path)


def train(model: str, out: Path, **changes) -> list[dict]:
    """The rows of metrics.jsonl that a run leaves."""
    train_dpo.main(train_dpo.Config(model=model, out=str(out), **(DEFAULTS | changes)))
    return read_lines(out / "metrics.jsonl")


@pytest.fixture(scope="module")
def undisturbed(model, pairs, tmp_path_factory) -> Path:
    """A run of 8 steps in two epochs, looked at by many tests and changed by none."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(model, out, pairs=pairs, epochs=2, lr=3e-3)
    return out


def test_what_a_run_leaves(undisturbed, model):
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "adapter", "checkpoint", "config.json", "merged", "metrics.jsonl", "report.html", "result.json",
    ]  # fmt: skip
    assert {p.name for p in (undisturbed / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    merged = {p.name for p in (undisturbed / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= merged
    assert [p.name for p in (undisturbed / "checkpoint").iterdir()] == ["data.json", "progress.safetensors"]
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["model"] == model and config["lr"] == 3e-3 and config["beta"] == 0.1 and config["resume"] is False
    rows = read_lines(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(TRL_NAMES < row.keys() and all(math.isfinite(value) for value in row.values()) for row in rows)
    result = json.loads((undisturbed / "result.json").read_text())
    weights = [4, 4, 4, 2]  # pairs in the batches of the first epoch
    ranked = sum(n * row["logps/ref_accuracies"] for n, row in zip(weights, rows, strict=False)) / 14
    assert result == {"base_preference_accuracy": pytest.approx(ranked)} and 0 < ranked < 1
    assert ranked != pytest.approx(sum(row["logps/ref_accuracies"] for row in rows[:4]) / 4)  # not the batches' mean
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
            assert figures["value"] is None or figures["low"] <= figures["high"]  # None: nothing to measure
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert [len(counts[column]) for column in ("before", "after")] == [2, 2]
    assert counts["before"] != counts["after"]  # the second is the trained model's
    shown = capsys.readouterr().out
    assert "before" in shown and "after" in shown and all(name in shown for name in names)
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
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic", "sft"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_first_step(model, pairs, tmp_path, loss, beta):
    """Adapters that are zero leave policy and reference alike: h = 0."""
    row = train(model, tmp_path, pairs=pairs, loss=loss, beta=beta, batch_size=14)[0]
    records, tokenizer = read_pairs(Path(pairs), None), toy_tokenizer()
    tokens = sum(len(tokenizer.response(record.chosen)) for record in records)
    per_token = -row["logps/chosen"] * len(records) / tokens
    expected = {"dpo": math.log(2), "ipo": 1 / (4 * beta**2), "slic": 1.0, "sft": per_token}[loss]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/accuracies"] == 0
    assert row["logps/chosen"] < 0 and row["logps/rejected"] < 0 and row["grad_norm"] > 0


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_accumulating_changes_nothing(model, pairs, tmp_path, loss):
    """A batch in one forward pass, in two, and in parts of unlike sizes."""
    found = {}
    for parts in (1, 2, 3):
        out = tmp_path / str(parts)
        rows = train(model, out, pairs=pairs, batch_size=10, accumulate=parts, loss=loss, lr=1e-4)
        found[parts] = rows, load_file(out / "adapter" / "adapter_model.safetensors")
    rows, whole = found[1]
    assert max(tensor.abs().max().item() for name, tensor in whole.items() if "lora_B" in name) > 1e-4  # it did learn
    for parts in (2, 3):
        for row, other in zip(rows, found[parts][0], strict=True):
            assert other == pytest.approx(row, rel=1e-4, abs=1e-5)
        assert max(worst(whole[name], found[parts][1][name]) for name in whole) < 1e-5


@pytest.mark.parametrize(
    "step,expected", [(0, 1 / 3), (1, 2 / 3), (2, 1.0), (3, 1.0), (5, 0.75), (6, 0.5), (7, 0.25), (8, 1 - 5 / 6)]
)
def test_learning_rate_by_hand(step, expected):
    """9 steps, a third of them rising: cos(pi d) at d = 0, 1/6, ... for the cosine, 1 - d for the line."""
    cosine = train_dpo.learning_rate(step, 9, 1 / 3, "cosine")
    linear = train_dpo.learning_rate(step, 9, 1 / 3, "linear")
    if step < 3:
        assert cosine == linear == pytest.approx(expected)
    else:
        done = (step - 3) / 6
        assert linear == pytest.approx(1 - done) and cosine == pytest.approx((1 + math.cos(math.pi * done)) / 2)


def test_rates_of_a_run(model, pairs, tmp_path):
    rows = train(model, tmp_path, pairs=pairs, lr=2e-3)  # 4 steps, one of them rising
    assert [row["lr"] for row in rows] == pytest.approx([2e-3, 2e-3, 1.5e-3, 0.5e-3])


def test_an_epoch_sees_every_pair_once():
    records = list(range(23))
    seen = []
    for epoch in range(3):
        batches = train_dpo.batches_of_epoch(records, 5, 0, epoch)
        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
        assert sorted(sum(batches, [])) == records
        seen.append(sum(batches, []))
    assert seen[0] != seen[1] != seen[2] != seen[0] and records == list(range(23))
    assert train_dpo.batches_of_epoch(records, 5, 0, 1) == train_dpo.batches_of_epoch(records, 5, 0, 1)
    assert sum(train_dpo.batches_of_epoch(records, 5, 1, 0), []) != seen[0]


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
    pixels = ImageProcessor.from_folder(TOY)(toyworld.picture(toyworld.make_scene("test", 0)))
    tree = build_tree([sequence], tokenizer.image_id, tokenizer.pad_id)
    with torch.no_grad():
        return model.lm_head(model(tree, model.encode_images(pixels[None])))


def test_merged_and_adapter_are_the_trained_model(undisturbed, model):
    merged, adapted, base = load_model(undisturbed / "merged"), load_model(Path(model)), load_model(Path(model))
    load_adapter(adapted, undisturbed / "adapter")
    assert worst(some_logits(merged), some_logits(adapted)) < 1e-4
    assert worst(some_logits(merged), some_logits(base)) > 0.1


def test_merged_keeps_the_type_of_the_base(pairs, tmp_path):
    folder = tmp_path / "half"
    save_model(random_toy(1).state_dict(), toy_model().config.raw, TOY, folder, torch.float16)
    train(str(folder), tmp_path / "out", pairs=pairs, limit=2)
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "out" / "merged" / "model.safetensors").values()}
    assert kinds == {torch.float16}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"dtype": None}))
    train(str(folder), tmp_path / "other", pairs=pairs, limit=2)  # a config that does not say
    assert json.loads((tmp_path / "other" / "merged" / "config.json").read_text())["dtype"] == "float32"


# ---------------------------------------------------------------- stopped runs


def stop_at(monkeypatch, where: str, count: int) -> None:
    """Ctrl-C in the `count`-th step: in its forward pass, or when its metrics are written but not its checkpoint."""
    real, calls = getattr(train_dpo, where), []

    def stopping(*args):
        result = real(*args)
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(train_dpo, where, stopping)


STOPS = [("pair_loss", 1, 1), ("pair_loss", 3, 2), ("pair_loss", 6, 5), ("append_lines", 2, 3), ("append_lines", 5, 3),
         ("append_lines", 7, 50), ("append_lines", 8, 3), ("save_progress", 1, 3), ("save_progress", 3, 2)]  # fmt: skip


@pytest.mark.parametrize("where,count,save_every", STOPS)
def test_a_stopped_run_resumes_bit_for_bit(undisturbed, model, pairs, tmp_path, monkeypatch, where, count, save_every):
    options = {"pairs": pairs, "epochs": 2, "lr": 3e-3, "save_every": save_every}
    with monkeypatch.context() as patch:
        stop_at(patch, where, count)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path, **options)
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "adapter").exists()
    if count % 2:  # killed within the writing of a line
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "lo')
    train(model, tmp_path, resume=True, **options)
    expected, found = contents(undisturbed), contents(tmp_path)
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    assert different == ["config.json"]  # --out and --save-every are not the same
    assert '"resume": false' in (tmp_path / "config.json").read_text()


def test_stopped_twice(undisturbed, model, pairs, tmp_path, monkeypatch):
    options = {"pairs": pairs, "epochs": 2, "lr": 3e-3, "save_every": 2}
    for resume, count in ((False, 3), (True, 3)):
        with monkeypatch.context() as patch:
            stop_at(patch, "append_lines", count)
            with pytest.raises(KeyboardInterrupt):
                train(model, tmp_path, resume=resume, **options)
    train(model, tmp_path, resume=True, **options)
    for name in ("metrics.jsonl", "checkpoint/progress.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_finished_run_resumes_to_itself(undisturbed, model, pairs, tmp_path, monkeypatch):
    options = {"pairs": pairs, "limit": 4}
    train(model, tmp_path, **options)
    before = contents(tmp_path)
    monkeypatch.setattr(train_dpo, "pair_loss", None)  # no step is left
    train(model, tmp_path, resume=True, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("changes", [{"lr": 1e-4}, {"seed": 3}, {"batch_size": 2}, {"loss": "ipo"}, {"lora_rank": 2},
                                     {"limit": 3}, {"epochs": 2}], ids=str)  # fmt: skip
def test_other_settings_do_not_resume(model, pairs, tmp_path, changes):
    train(model, tmp_path, pairs=pairs, limit=4)
    before = contents(tmp_path)
    name = next(iter(changes))
    with pytest.raises(UserError, match=f"^--resume: {name} differ from .*config.json; keep them as they were"):
        train(model, tmp_path, resume=True, **({"pairs": pairs, "limit": 4} | changes))
    assert contents(tmp_path) == before


def test_nothing_to_resume(model, pairs, tmp_path):
    with pytest.raises(UserError, match="config.json: no such file; there is nothing to resume; leave --resume out"):
        train(model, tmp_path / "out", pairs=pairs, resume=True)
    assert contents(tmp_path) == {}


def test_an_earlier_runs_checkpoint_is_not_resumed(model, pairs, tmp_path, monkeypatch):
    """A new run in the same folder, stopped before its own first checkpoint."""
    options = {"pairs": pairs, "limit": 4, "batch_size": 2}
    train(model, tmp_path / "a", lr=1e-2, **options)
    train(model, tmp_path / "b", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, "append_lines", 1)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "a", **options)
    train(model, tmp_path / "a", resume=True, **options)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("damage,match", [
    (lambda out: (out / "metrics.jsonl").unlink(), "metrics.jsonl: 0 of the checkpoint's 1 steps; leave --resume out"),
    (lambda out: (out / "metrics.jsonl").write_text("{\n"), "metrics.jsonl: not readable as JSON Lines"),
    (lambda out: (out / "config.json").write_text("{"), "config.json: not readable as JSON"),
    (lambda out: (out / "checkpoint/progress.safetensors").write_bytes(b"short"), "not a whole safetensors file"),
])  # fmt: skip
def test_damaged_runs_do_not_resume(model, pairs, tmp_path, damage, match):
    train(model, tmp_path, pairs=pairs, limit=4)
    damage(tmp_path)
    with pytest.raises(UserError, match=match):
        train(model, tmp_path, pairs=pairs, limit=4, resume=True)


# ---------------------------------------------------------------- runs that diverge


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(model, pairs, tmp_path, monkeypatch, bad):
    """The run ends with step and remedy, and the checkpoint holds the weights before that step."""
    with monkeypatch.context() as patch:
        stop_at(patch, "append_lines", 2)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "good", pairs=pairs, save_every=1)  # one checkpoint, after step 1
    real, calls = train_dpo.pair_loss, []

    def failing(*args):
        loss, metrics = real(*args)
        calls.append(1)
        return (loss * bad, metrics | {"loss": bad}) if len(calls) == 2 else (loss, metrics)

    monkeypatch.setattr(train_dpo, "pair_loss", failing)
    with pytest.raises(UserError, match=r"^step 2: loss (nan|inf), .*/checkpoint; lower --lr 0.001 or raise --warmup"):
        train(model, tmp_path / "bad", pairs=pairs)
    good, found = (tmp_path / name / "checkpoint" / "progress.safetensors" for name in ("good", "bad"))
    assert found.read_bytes() == good.read_bytes()  # tensors, moments and the number of steps
    assert len(read_lines(tmp_path / "bad" / "metrics.jsonl")) == 1
    assert not any((tmp_path / "bad" / name).exists() for name in ("result.json", "adapter", "merged", "report.html"))


def test_a_rate_that_is_far_too_high(model, pairs, tmp_path):
    with pytest.raises(UserError, match="^step [23]: loss nan, .* lower --lr 1e"):
        train(model, tmp_path, pairs=pairs, lr=1e30)
    found = load_file(tmp_path / "checkpoint" / "progress.safetensors")
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_weights_that_are_not_finite_are_not_saved(model, pairs, tmp_path, monkeypatch):
    """The checkpoint of the step before them stays."""
    real, calls = train_dpo.pair_loss, []

    def failing(model, *args):
        calls.append(1)
        if len(calls) == 3:
            model.multi_modal_projector.copy.linear_1.bias.data[0] = math.inf
        return real(model, *args)

    monkeypatch.setattr(train_dpo, "pair_loss", failing)
    with pytest.raises(UserError, match="^step 3: loss nan"):
        train(model, tmp_path, pairs=pairs, save_every=1)
    found = load_file(tmp_path / "checkpoint" / "progress.safetensors")
    assert all(tensor.isfinite().all() for tensor in found.values()) and found["optimizer.0.0.step"] == 2


# ---------------------------------------------------------------- both scripts in one go


def test_without_pairs_they_are_sampled_first(model, tmp_path, monkeypatch):
    """`train_dpo.py` alone: the whole road; stopped while it samples, it goes on from there."""
    knobs = {"limit": 5, "batch_size": 2}
    real = sample_bdhs.Config
    few = {"max_new_tokens": 4, "rho_th": 0.7, "temperature": 1.0, "batch_size": 2}
    monkeypatch.setattr(sample_bdhs, "Config", lambda **options: real(**(options | few)))
    train(model, tmp_path / "a", **knobs)
    assert len(read_lines(tmp_path / "a" / "pairs.jsonl")) == 5 and (tmp_path / "a" / "report.html").exists()
    sampled, calls = Bdhs.sample, []

    def interrupted(self, examples):
        calls.append(examples)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sampled(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(Bdhs, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "b", **knobs)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Bdhs, "sample", lambda self, examples: calls.append(examples) or sampled(self, examples))
        with pytest.raises(UserError, match="nothing to resume; leave --resume out"):  # no training to go on with
            train(model, tmp_path / "b", resume=True, **knobs)
        train(model, tmp_path / "b", **knobs)
    assert sum(map(len, calls)) == 1  # the fifth; four were there
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    different = {name for name in a if a[name] != b[name]}
    assert a.keys() == b.keys() and different == {"config.json", "pairs.jsonl.config.json"}
    train(model, tmp_path / "b", **knobs)  # a new run of the same settings takes the pairs that are there
    assert contents(tmp_path / "b") == b and sum(map(len, calls)) == 1
    with pytest.raises(UserError, match="pairs of another seed .*give another --out, or remove"):
        train(model, tmp_path / "b", seed=1, **knobs)
    assert contents(tmp_path / "b") == b  # nothing of the run before is lost
    with open(tmp_path / "b" / "pairs.jsonl", "a") as file:
        file.write("rubbish\n")
    before = (tmp_path / "b" / "pairs.jsonl").read_bytes()
    with pytest.raises(UserError, match="another --out"):  # what it did not write it does not remove
        train(model, tmp_path / "b", **knobs)
    assert (tmp_path / "b" / "pairs.jsonl").read_bytes() == before


def test_the_models_own_folder_is_no_out(model):
    before = contents(Path(model))
    with pytest.raises(UserError, match="own folder"):
        train(model, Path(model), pairs="none.jsonl")
    assert contents(Path(model)) == before


def test_settings_of_two_pairs_files_in_one_folder_stay_apart(model, tmp_path):
    sample(model, tmp_path / "s0.0", limit=2, seed=0)
    sample(model, tmp_path / "s0.1", limit=2, seed=1)
    with pytest.raises(UserError, match="another seed"):
        sample(model, tmp_path / "s0.0", limit=3, seed=1)


def test_resuming_on_other_pairs_is_refused(model, tmp_path):
    rows = [json.loads(line) for line in open_pairs(tmp_path, model)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(model, tmp_path / "run", pairs=str(file))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(UserError, match="pairs are not those"):
        train(model, tmp_path / "run", pairs=str(file), resume=True)


def open_pairs(folder: Path, model: str) -> list[str]:
    """The lines of a small pairs file."""
    sample_bdhs.main(sample_bdhs.Config(out=str(folder / "pairs.jsonl"), limit=6))
    return (folder / "pairs.jsonl").read_text().splitlines()
