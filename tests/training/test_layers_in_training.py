"""--recompute and --compile change time and memory, and no number; where the model samples they do
nothing."""

import random
from collections import Counter

import pytest
import torch
from helpers import IMAGE, random_case, random_ids, random_model, worst
from input_files import gives_remedy
from input_files import train as train_by_flags
from online_runs import online, weights_of
from policies import adapted, wrap_layers
from script_runs import train
from torch.utils.checkpoint import checkpoint

import train_dpo
import train_online
from minialign.align.logps import branch_logps, reference_logps
from minialign.align.losses import ipo_loss
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.sampling.generate import Sampling, generate

SEEDS = range(6)
PLAIN, RECOMPUTE, COMPILED = (False, False), (True, False), (False, True)


def pairs_of(seed: int, rows: int, length: int):
    """(a tree of pairs of which the longest has `length` tokens, features), for the random
    models."""
    rng, patches, batch = random.Random(seed), 9, []
    for row in range(rows):
        room = length - patches - (rng.randrange(5) if row else 0)
        first, second = sorted(rng.sample(range(3, room), 2))
        trunk = random_ids(rng, 2) + [IMAGE] + random_ids(rng, first - 2)
        branches = [Branch(random_ids(rng, second - first)), Branch(random_ids(rng, room - second))]
        batch.append(Sequence(trunk, branches, patches))
    tree = build_tree(batch, IMAGE, 0)
    assert tree.ids.shape == (rows, length)
    return tree, torch.randn(rows, patches, 16, generator=torch.Generator().manual_seed(seed))


def step(model, tree, features, means: tuple[bool, bool]) -> list[torch.Tensor]:
    """The log-probs of policy and reference, the loss, and all gradients of one training step."""
    wrap_layers(model, *means)
    ref_logps = reference_logps(model, tree, features)
    logps = branch_logps(model, tree, features)
    four = logps[:, :1], logps[:, 1:], ref_logps[:, :1], ref_logps[:, 1:]
    loss = ipo_loss(*four, 0.1).mean()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logps.detach(), ref_logps, loss.detach(), *torch.autograd.grad(loss, trained)]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Equal to 1e-4."""
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0 and worst(a, b) <= 1e-4 * max(1.0, b.abs().max().item())


# ---------------------------------------------------------------- Recompute


@pytest.mark.parametrize("seed", SEEDS)
def test_recomputing_changes_no_bit(seed):
    model = adapted(random_model(seed), 4, 8.0, seed)
    tree, features = pairs_of(seed, 1 + seed % 3, 20 + seed)
    again = step(model, tree, features, RECOMPUTE)
    for a, b in zip(again, step(model, tree, features, PLAIN), strict=True):
        assert torch.equal(a, b) and b.abs().max() > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_layer_keeps_its_input_alone(seed):
    """The bias of the mask is one for all layers; the rest is kept without any layers, too."""
    model = adapted(random_model(seed), 4, 8.0, seed)
    tree, features = pairs_of(seed, 2, 30)

    def kept(means: tuple[bool, bool], layers) -> int:
        numbers: list[int] = []
        model.language_model.layers = layers
        wrap_layers(model, *means)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: numbers.append(t.numel()) or t, lambda t: t
        ):
            model(tree, features)
        return sum(numbers)

    layers, none = model.language_model.layers, torch.nn.ModuleList()
    text = model.config.text
    group = text.num_attention_heads // text.num_key_value_heads
    bias = tree.mask.numel() * group
    inputs = len(layers) * (tree.ids.numel() * text.hidden_size + bias)
    assert kept(RECOMPUTE, layers) == kept(PLAIN, none) + inputs < kept(PLAIN, layers) / 4


def test_who_runs_again():
    """The policy's layers, once; neither the reference's nor the tower's, which keeps nothing."""
    model = adapted(random_model(0), 4, 8.0)
    tree, _ = pairs_of(0, 2, 30)
    runs = Counter()
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_pre_hook(lambda _, __, name=name: runs.update([name]))
    features = model.encode_images(torch.randn(2, 3, 12, 12, requires_grad=True))
    assert not features.requires_grad
    step(model, tree, features, RECOMPUTE)
    # Of the tower's three layers the last is never run.
    tower = {f"vision_tower.encoder.layers.{i}.mlp": 1 for i in range(2)}
    assert runs == tower | {f"language_model.layers.{i}.mlp": 1 + 2 for i in range(2)}


# ---------------------------------------------------------------- Compile


@pytest.mark.parametrize("recompute", [False, True])
def test_a_dozen_lengths_are_compiled_once(recompute, compilations):
    """Policy and reference, one row and more: all layers, lengths and numbers of rows share the
    code."""
    rng, model = random.Random(int(recompute)), adapted(random_model(1), 4, 8.0)
    counts = []
    for i, length in enumerate(rng.sample(range(17, 90), 12)):
        tree, features = pairs_of(i, [1, 2, 5, rng.randrange(1, 7)][i % 4], length)
        means = step(model, tree, features, (recompute, True)), step(model, tree, features, PLAIN)
        assert_close(*means)
        counts.append(len(compilations))
    # With gradients and without: one row, several; a rest of one column.
    assert counts[0] == 2 and counts[-1] <= 6


def test_compiled_by_the_real_compiler():
    """Rows and lengths other than those of the first time, too; it takes minutes, so the policy
    alone."""
    model = adapted(random_model(2), 4, 8.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for seed, (rows, length) in enumerate([(3, 40), (2, 33)]):
        tree, features = pairs_of(seed, rows, length)
        found = []
        for means in (COMPILED, PLAIN):
            wrap_layers(model, *means)
            logps = branch_logps(model, tree, features)
            found.append([logps.detach(), *torch.autograd.grad((logps * logps).sum(), trained)])
        assert_close(*found)


# ---------------------------------------------------------------- Where they have no part


def test_sampling_computes_nothing_again_and_compiles_nothing(compilations):
    model, batch, features = random_case(2)
    model = adapted(model, 4, 8.0)
    given = batch, features, Sampling(5, temperature=0.0), set()
    expected = generate(model, *given)
    runs = Counter()
    for layer in model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.update(["mlp"]))
    wrap_layers(model, True, True)
    assert generate(model, *given) == expected
    assert runs["mlp"] == len(model.language_model.layers) * 5 and not compilations


# ---------------------------------------------------------------- The flags


@pytest.fixture
def means(monkeypatch) -> Counter:
    """How often a layer was checkpointed, and how many were compiled: as plain code here."""
    counts = Counter()

    def noted_checkpoint(*args, **kwargs):
        counts.update(["recompute"] if torch.is_grad_enabled() else [])
        return checkpoint(*args, **kwargs)

    def noted_compile(function, dynamic, options):
        assert dynamic and function.__name__ == "forward"
        counts.update(["compile"])
        return function

    for module in (train_dpo, train_online):
        monkeypatch.setattr(module, "checkpoint", noted_checkpoint)
    monkeypatch.setattr(torch, "compile", noted_compile)
    return counts


@pytest.mark.parametrize(
    "script,facts", [(train, {"epochs": 1}), (online, {"limit": 6, "method": "online-bdhs"})]
)
def test_both_scripts_have_the_flags(script, facts, model, pairs, tmp_path, means):
    facts |= {"pairs": pairs} if script is train else {"data": pairs}
    rows, used = [], []
    for i, (again, compile) in enumerate([PLAIN, RECOMPUTE, COMPILED]):
        rows.append(script(model, tmp_path / str(i), **facts, recompute=again, compile=compile))
        used.append(dict(means))
        means.clear()
    assert rows[0] == rows[1] == rows[2]
    assert len({weights_of(tmp_path / str(i)) for i in range(3)}) == 1
    layers = 3
    assert used == [{}, {"recompute": layers * len(rows[0])}, {"compile": layers}]


def test_compiling_needs_a_compiler(model, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    gives_remedy(
        lambda: train_by_flags(model, tmp_path, "--pairs", pairs, "--compile"),
        "no no-such-compiler; install",
    )
