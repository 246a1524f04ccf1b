"""The bench: its numbers by hand and by torch's own counter, its rows at the smallest size, other
work is noticed."""

import copy
import json
import random
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import IMAGE, random_ids, random_model, refused
from torch.utils.flop_counter import FlopCounterMode

from minialign.align.logps import branch_logps, reference_logps
from minialign.align.losses import dpo_loss
from minialign.model.llama import LlamaConfig
from minialign.model.lora import add_adapters
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.sampling.generate import Sampling, generate

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl")
from tests.bench import __main__ as bench  # noqa: E402
from tests.bench import dpo, load, models, roofline, sampling, sizes, timing  # noqa: E402
from tests.bench.row import WORK  # noqa: E402
from tests.bench.rows import Facts, ending  # noqa: E402

SMALL = sizes.Size(
    "small",
    "cpu",
    "float32",
    sizes.text_config(579, 48, 64, 2, 3),
    sizes.vision_config(24, 3, 2, 4),
    lora_rank=2,
    question_words=3,
    sentence_tokens=4,
    examples=2,
    new_tokens=6,
    repeats=1,
    loaded=sizes.text_config(579, 48, 64, 2, 3),
    shard="100KB",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest model's folder."""
    return models.make_folder(SMALL, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def steps(folder):
    """Both sides of a DPO step."""
    ours, pair = dpo.make_ours(SMALL, folder)
    return ours, dpo.Peer(SMALL, folder, pair, ours.model)


# ---------------------------------------------------------------- seconds and bytes


def test_the_sides_take_turns(monkeypatch):
    """Medians by a clock that each call moves on by so much."""
    clock, calls, taken = [0.0], [], {"ours": [5.0, 1.0, 3.0], "peer": [2.0, 9.0, 4.0]}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def work(name: str) -> None:
        clock[0] += taken[name][calls.count(name)]
        calls.append(name)

    found = timing.interleaved({name: lambda name=name: work(name) for name in taken}, 3, "cpu")
    assert found == {"ours": 3.0, "peer": 4.0} and calls == ["ours", "peer"] * 3


@pytest.mark.parametrize("seed", range(3))
def test_the_peak_is_what_is_held_at_a_time(seed):
    """Random sizes; the first and the third are never there together."""
    a, b, c = random.Random(seed).sample(range(1, 10**6), 3)

    def work() -> tuple:
        first, second = torch.zeros(a), torch.zeros(b)
        del first
        return second, torch.zeros(c)

    assert timing.peak_bytes(work, "cpu") == 4 * max(a + b, b + c)


def test_ratios_are_the_peers_over_ours():
    ours, peer = timing.Side(2.0, 100, 50), timing.Side(3.0, 400, 50)
    row = timing.compared("work", "checked", ours, peer, tokens=7)
    assert (row["time_ratio"], row["memory_ratio"]) == (1.5, 4.0)
    assert (row["with_model_ratio"], row["tokens"]) == (3.0, 7)


# ---------------------------------------------------------------- near to the GPU's limits


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reference", [True, False])
def test_flops_of_a_step(seed, reference):
    """torch counts the matrix multiplications of a real step; attention, by hand, is what is
    left."""
    rng, model = random.Random(seed), copy.deepcopy(random_model(seed))
    add_adapters(model, rng.randrange(1, 5), 2.0)
    prompt, long, short = (rng.randrange(1, 9) for _ in range(3))
    trunk = [IMAGE, *random_ids(rng, prompt)]
    branches = [Branch(random_ids(rng, long)), Branch(random_ids(rng, short))]
    tree = build_tree([Sequence(trunk, branches, 9)], IMAGE, 0)
    with FlopCounterMode(display=False) as counter:
        features = model.encode_images(torch.rand(1, 3, 12, 12))
        ref = torch.zeros(1, 2)
        if reference:
            ref = reference_logps(model, tree, features)
        logps = branch_logps(model, tree, features)
        dpo_loss(logps[:, :1], logps[:, 1:], ref[:, :1], ref[:, 1:], 0.1).mean().backward()
    products, counts = ("aten.mm", "aten.addmm"), counter.get_flop_counts()["Global"]
    counted = sum(count for op, count in counts.items() if str(op) in products)

    text, vision, first = model.config.text, model.config.vision, 9 + prompt
    pairs = first * (first + 1) // 2 + sum(n * first + n * (n + 1) // 2 for n in (long, short))
    width = text.num_attention_heads * text.head_dim
    attention = (16 if reference else 12) * width * pairs * text.num_hidden_layers
    blocks = vision.num_hidden_layers - 1
    attention += 4 * vision.hidden_size * 10 * 10 * blocks  # 9 patches and the class token
    # The backward pass computes the head's logits once more.
    again = 2 * model.lm_head.weight.numel() * (long + short)
    assert roofline.dpo_flops(model, tree, 1, reference) == counted + attention - again


def test_padding_takes_no_flops():
    model = copy.deepcopy(random_model(0))
    add_adapters(model, 2, 4.0)
    rows = [Sequence(list(range(5, 5 + n)), [Branch([6] * n), Branch([7])]) for n in (3, 9)]
    alone = [roofline.dpo_flops(model, build_tree([row], IMAGE, 0), 0) for row in rows]
    assert roofline.dpo_flops(model, build_tree(rows, IMAGE, 0), 0) == sum(alone)


def test_bytes_of_decoding():
    """Two rows of 10 and 20 trunk tokens with 2 and 1 branches, 3 steps, 2 layers of 4 heads of 8
    in two bytes."""
    config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=4, head_dim=8)
    token = 2 * 2 * 4 * 8 * 2  # keys and values
    by_step = [1000 * 2 + token * (10 + 20) + token * (2 + 1) * t for t in (1, 2, 3)]
    assert roofline.decoding_bytes(1000, config, 2, [(10, 2), (20, 1)], 3) == sum(by_step)


@pytest.mark.parametrize(("name", "share"), [("NVIDIA H100 80GB HBM3", 0.5), ("NVIDIA T4", None)])
def test_shares_of_a_known_gpu(monkeypatch, name, share):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert roofline.utilisation(round(989e12), 2.0) == share
    model = random_model(1)
    weights = model.lm_head.weight.numel()
    for key, parameter in model.language_model.layers.named_parameters():
        weights += parameter.numel() if "proj" in key else 0
    needed = roofline.decoding_bytes(weights, model.config.text, 4, [(4, 1)], 5)
    sequences = [Sequence([5] * 5, [Branch([])])]
    found = roofline.bandwidth_share(model, sequences, 5, needed / 3.35e12)
    assert found == (None if share is None else pytest.approx(1.0))


# ---------------------------------------------------------------- the rows


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory):
    """The same model in bfloat16."""
    size = replace(SMALL, dtype="bfloat16")
    return models.make_folder(size, tmp_path_factory.mktemp("half"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_row(tmp_path, folder, half_folder, dtype):
    """Each row's check holds at the smallest size, and its facts have their form."""
    size, where = replace(SMALL, dtype=dtype), folder if dtype == "float32" else half_folder
    facts, rows = Facts(tmp_path / "facts.json"), {}
    for names in bench.PROCESSES:
        WORK[names[0]](size, where, facts)
        rows |= {name: ending(facts.rows[name], "ok", 0.0, "") for name in names}
    written = json.loads((tmp_path / "facts.json").read_text())
    for name, row in rows.items():
        assert row["status"] == "ok" and row["checked"] and written[name]["checked"]
        own, other = ("online", "offline") if "overhead" in name else ("ours", "peer")
        assert all(side[key] > 0 for side in (row[own], row[other]) for key in ("seconds", "peak"))
        if name == "online-bdhs-overhead":
            assert row["overhead"] == row[own]["seconds"] / row[other]["seconds"] - 1
        else:
            assert row["time_ratio"] == row[other]["seconds"] / row[own]["seconds"]
            assert row["memory_ratio"] == row[other]["peak"] / row[own]["peak"]
    step = rows["dpo-step"]
    responses = 2 * sizes.SENTENCES * SMALL.sentence_tokens
    assert step["peer_tokens"] == 2 * step["tokens"] - responses  # the prompt twice
    printed = bench.table({"rows": rows})
    assert all(name in printed for name in rows)


def test_the_whole_bench(tmp_path, monkeypatch, capsys):
    """Rows by processes of their own, of the size that the folder holds; a row that nobody knows
    fails alone, with its reason in the table. bench.json has its form."""
    monkeypatch.setitem(sizes.SIZES, "tiny", SMALL)
    monkeypatch.setattr(bench, "PROCESSES", (("nonsense",), ("load",)))
    bench.main(bench.Config(out=str(tmp_path / "bench.json")))
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["size"]["name"] == "small"
    statuses = {name: row["status"] for name, row in found["rows"].items()}
    assert statuses == {"nonsense": "failed", "load": "ok"}
    assert "--row nonsense" in found["rows"]["nonsense"]["error"]
    assert found["rows"]["load"]["time_ratio"] > 0 and found["rows"]["load"]["bytes"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in statuses) and "--row nonsense" in printed


def test_the_peer_is_late(tmp_path, folder, monkeypatch):
    """Our own numbers are written down before there is a peer."""
    monkeypatch.setattr(dpo, "Peer", lambda *_: 1 / 0)
    monkeypatch.setattr(sampling, "load_peer", lambda *_: 1 / 0)
    facts = Facts(tmp_path / "facts.json")
    for name in ("dpo-step", "bdhs", "generate"):
        with pytest.raises(ZeroDivisionError):
            WORK[name](SMALL, folder, facts)
    written = json.loads((tmp_path / "facts.json").read_text())
    assert list(written) == ["dpo-step", "dpo-step-cached-ref", "bdhs", "generate"]
    assert all(row["ours"]["seconds"] > 0 and "status" not in row for row in written.values())


def test_texts_have_their_lengths(folder):
    tokenizer, size = models.load_ours(SMALL, folder).tokenizer, replace(SMALL, sentence_tokens=9)
    answers = [size.answer(i, "chosen") for i in range(20)]
    rejected = [size.answer(i, "rejected") for i in range(20)]
    lengths = {len(tokenizer.response(answer)) for answer in answers + rejected}
    assert lengths == {sizes.SENTENCES * 9}
    assert all(a != b for a, b in pairwise(answers))


def test_the_peer_stops_and_never_says_the_image_token(folder, monkeypatch):
    """Both have a head that would say the image token often; a token of what they say instead is
    made a stop."""
    assistant, peer = models.load_ours(SMALL, folder), models.load_peer(SMALL, folder)
    ours, (samples, pixels) = assistant.model, sampling.two_samples(SMALL, assistant)
    sequences = []
    for i, sequence in enumerate(samples):
        branches = [Branch([100 + i]), Branch([200 + i])]
        sequences.append(replace(sequence, branches=branches))
    prompts = sampling.PeerBatch(peer, sequences, pixels)
    features = ours.encode_images(torch.cat(pixels))

    def both(stops: set[int]) -> list[list[int]]:
        said = generate(ours, sequences, features, Sampling(8, 0.0), stops)
        theirs = prompts.generate(8, stops)
        sampling.require_same_tokens(said, theirs, "float32")
        return theirs

    first, *others = both(set())
    with torch.no_grad():
        for head in (ours.lm_head, peer.lm_head):
            head.weight[models.IMAGE] = 3 * head.weight[first[0]]
    assert both(set()) == [first, *others] and any(other[0] != first[0] for other in others)
    assert both({first[0]})[0] == first[:1]
    real, widths = peer.generate, []

    def noted(**inputs):
        out = real(**inputs)
        widths.append(out.shape[1])
        return out

    monkeypatch.setattr(peer, "generate", noted)
    assert both({said[0] for said in (first, *others)}) == [said[:1] for said in (first, *others)]
    assert widths == [prompts.width + 1]  # it does not go on, either


def test_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    large = bench.Config("7b", str(tmp_path / "bench.json"))
    refused(lambda: bench.main(large), "--size 7b", "GPU", "--size tiny")
    nowhere = bench.Config("tiny", str(tmp_path / "none" / "bench.json"))
    refused(lambda: bench.main(nowhere), "--out")


def test_frozen_weights_lie_in_memory_once(steps):
    """The peer's are ours, but what is trained, and the reference's projector."""
    ours, peer = steps
    mine = {p.data_ptr() for p in ours.model.parameters()}
    other = [n for n, p in peer.model.named_parameters() if p.data_ptr() not in mine]
    assert other and all("lora_" in n or "multi_modal_projector" in n for n in other)
    assert all("lora_" not in n for n, p in peer.model.named_parameters() if n not in other)


# ---------------------------------------------------------------- work that is not the same


@pytest.mark.parametrize("change", ["nothing", "adapters", "projector", "tokens"])
def test_another_step_is_noticed(steps, change):
    ours, peer = steps
    trained = dict(ours.model.named_parameters())
    name = {
        "adapters": "language_model.layers.1.mlp.up_proj.lora_B",
        "projector": "multi_modal_projector.copy.linear_2.weight",
    }.get(change)
    kept = None if name is None else trained[name].detach().clone()
    with torch.no_grad():
        if name is not None:
            trained[name].mul_(1.5)
    with pytest.raises(AssertionError) if change != "nothing" else nullcontext():
        ids = peer.batch["input_ids"].clone()
        ids[1, -2] += change == "tokens"
        dpo.require_same_tokens(ours.batch, peer.batch | {"input_ids": ids})
        dpo.require_same_work(ours.step(), peer.step(), "float32")
    with torch.no_grad():
        if name is not None:
            trained[name].copy_(kept)


@pytest.mark.parametrize("change", ["nothing", "attention_mask", "position_ids", "pixel_values"])
def test_other_tokens_are_noticed(folder, monkeypatch, change):
    """The peer with the whole picture, with positions counted from the mask, or with another
    picture."""
    real = sampling.PeerBatch.generate

    def changed(self, limit: int, stops: set[int]) -> list[list[int]]:
        if change == "attention_mask":
            self.inputs[change] = torch.ones_like(self.inputs[change])
        if change == "position_ids":
            self.inputs[change] = (self.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if change == "pixel_values":
            self.inputs[change] = -self.inputs[change]
        return real(self, 12, stops)

    monkeypatch.setattr(sampling.PeerBatch, "generate", changed)
    size = replace(SMALL, sentence_tokens=12)
    ours, peer = models.load_ours(size, folder), models.load_peer(size, folder)
    noticed = pytest.raises(AssertionError, match="other tokens")
    with noticed if change != "nothing" else nullcontext():
        sampling.compare(size, sampling.bdhs_work(size, ours), ours.model, peer)


def test_another_checkpoint_is_noticed(folder):
    ours, peer = models.load_ours(SMALL, folder).model, models.load_peer(SMALL, folder)
    load.require_same_tensors(ours, peer)
    with torch.no_grad():
        peer.model.language_model.layers[1].self_attn.q_proj.weight[3, 5] += 1
    with pytest.raises(AssertionError, match="layers.1.self_attn.q_proj"):
        load.require_same_tensors(ours, peer)
