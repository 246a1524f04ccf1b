"""A PEFT adapter, made elsewhere, as the policy's start; and what the reference then is."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from adapters import answers, batch_of, transformers_model
from helpers import random_model, refused, toy_model, worst
from policies import adapted
from safetensors.torch import load_file, save_file
from script_runs import contents, read_lines, train

from minialign.cli import parse_config
from minialign.edge import CHECKPOINT
from minialign.model.hf_folder import load_model
from minialign.model.llava import Llava
from minialign.model.lora import (
    TARGETS,
    adapter_state,
    adapters_off,
    add_adapters,
    keep_reference,
)
from minialign.model.peft_folder import fill_adapter, load_adapter, save_adapter
from minialign.model.policy import empty_policy
from train_dpo import Config, check

PATTERN = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.({})"
FOREIGN = [
    {"target_modules": PATTERN.format("q_proj|v_proj"), "r": 3, "lora_alpha": 5},
    {
        "target_modules": PATTERN.format("|".join(TARGETS)),
        "r": 2,
        "lora_alpha": 7,
        "lora_dropout": 0.1,
    },
    {
        "target_modules": PATTERN.format("down_proj"),
        "modules_to_save": ["multi_modal_projector"],
        "r": 4,
    },
    {"target_modules": ["gate_proj", "up_proj"], "r": 2},  # names that the tower does not have
]


def foreign_adapter(oracle, folder, seed: int, init=False, **choices):
    """An adapter that PEFT made and wrote, with nonzero values; returns PEFT's model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        transformers_model(oracle, CHECKPOINT), peft.LoraConfig(init_lora_weights=init, **choices)
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("choices", FOREIGN, ids=range(len(FOREIGN)))
def test_adapters_that_peft_made(oracle, tmp_path, choices):
    theirs, ours = foreign_adapter(oracle, tmp_path, 0, **choices), copy.deepcopy(toy_model())
    load_adapter(ours, tmp_path)
    for a, b, base in zip(answers(ours), answers(theirs), answers(toy_model()), strict=True):
        assert worst(a, b) < 1e-4 and worst(a, base) > 0.01
    save_adapter(
        adapter_state(ours),
        choices["r"],
        choices.get("lora_alpha", 8),
        str(CHECKPOINT),
        tmp_path / "again",
    )
    again = copy.deepcopy(toy_model())
    load_adapter(again, tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(answers(again), answers(ours), strict=True))


# Adapters that reach beyond the decoder's linears, and what they change there.
BEYOND = [
    ({"target_modules": ["q_proj", "v_proj"]}, "the vision tower"),
    ({"target_modules": "all-linear"}, "the vision tower"),
    ({"target_modules": ["q_proj", "lm_head"]}, "the LM head and the vision tower"),
    ({"target_modules": ["gate_proj", "embed_tokens"]}, "embeddings"),
    ({"target_modules": ["patch_embedding", "position_embedding"]}, "the vision tower"),
    ({"target_modules": ["out_proj"], "bias": "all"}, "the vision tower"),
    ({"target_modules": ["fc1"], "bias": "lora_only"}, "the vision tower"),
    ({"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "norm"]}, "embeddings, norms"),
    (
        {"target_modules": ["up_proj"], "modules_to_save": ["v_proj"]},
        "embeddings, norms or whole matrices",
    ),
    ({"target_modules": ["linear_1", "linear_2"]}, None),
    ({"target_modules": ["linear_2"], "bias": "lora_only"}, None),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("choices", "frozen"), BEYOND, ids=str)
def test_adapters_beyond_the_decoders_linears(oracle, tmp_path, choices, frozen):
    """Read exactly where the model is only read; in training, only what is trained may change."""
    theirs = foreign_adapter(oracle, tmp_path, 0, r=2, lora_alpha=3, **choices)
    ours = copy.deepcopy(toy_model())
    load_adapter(ours, tmp_path)
    for a, b, base in zip(answers(ours), answers(theirs), answers(toy_model()), strict=True):
        assert worst(a, b) < 1e-4 and worst(a, base) > 1e-3

    policy = copy.deepcopy(toy_model())
    add_adapters(policy, 2, 3.0)
    if frozen is not None:
        message = refused(lambda: fill_adapter(policy, tmp_path), f"updates {frozen}")
        assert "merge_and_unload" in message and "another model" not in message
        return
    fill_adapter(policy, tmp_path)
    for a, b in zip(answers(policy), answers(ours), strict=True):
        assert torch.equal(a, b)
    with adapters_off(policy):
        for a, base in zip(answers(policy), answers(toy_model()), strict=True):
            assert torch.equal(a, base)


@pytest.mark.filterwarnings("ignore")
def test_the_remedy_for_what_training_leaves_as_it_is(oracle, tmp_path):
    """PEFT's merge_and_unload makes a folder that is read, of the same logits."""
    theirs = foreign_adapter(oracle, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    expected = answers(theirs)
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    for a, b in zip(answers(load_model(tmp_path / "merged")), expected, strict=True):
        assert worst(a, b) < 1e-4


def test_an_adapter_of_tied_embeddings_is_refused(tmp_path):
    config = replace(random_model(0).config.text, tie_word_embeddings=True)
    tied = Llava(replace(random_model(0).config, text=config))
    save_adapter(adapter_state(adapted(random_model(0), 2, 4.0)), 2, 4.0, "x", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": torch.zeros(tied.lm_head.weight.shape)}
    save_file(load_file(file) | head, file)
    refused(lambda: load_adapter(tied, tmp_path), "lm_head.weight", "one tensor")


# ---------------------------------------------------------------- what lies beside an adapter


def original_names(folder) -> dict:
    """Give the adapter's folder LLaVA's own names, and return its projector as LLaVA keeps it."""
    file = folder / "adapter_model.safetensors"
    linears, projector = {}, {}
    for key, tensor in load_file(file).items():
        key = key.replace("model.language_model.layers", "model.layers")
        key = key.replace("multi_modal_projector.linear_1", "mm_projector.0")
        key = key.replace("multi_modal_projector.linear_2", "mm_projector.2")
        (projector if "mm_projector" in key else linears)[key] = tensor
    save_file(linears, file)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": None}))
    return projector


def test_weights_beside_an_adapter_are_never_passed_over(tmp_path):
    """LLaVA's own LoRA keeps the projector apart: refused, and read when put where it belongs."""
    model = adapted(random_model(1), 2, 4.0)
    save_adapter(adapter_state(model), 2, 4.0, "somewhere", tmp_path)
    torch.save(original_names(tmp_path), tmp_path / "non_lora_trainables.bin")
    ours = copy.deepcopy(random_model(1))
    refused(lambda: load_adapter(ours, tmp_path), "non_lora_trainables.bin", "add its tensors")

    file, beside = tmp_path / "adapter_model.safetensors", tmp_path / "non_lora_trainables.bin"
    save_file(load_file(file) | torch.load(beside, weights_only=True), file)
    beside.unlink()
    ours = copy.deepcopy(random_model(1))
    load_adapter(ours, tmp_path)
    tree, features = batch_of(1, ours.config.vision.patches)
    assert torch.equal(ours(tree, features), model(tree, features))


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "mm_projector.bin", "model.safetensors", "x.pt"]
)
def test_other_weights_beside_an_adapter(tmp_path, name):
    save_adapter(adapter_state(adapted(random_model(0), 2, 4.0)), 2, 4.0, "somewhere", tmp_path)
    for harmless in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "README.md"):
        (tmp_path / harmless).write_bytes(b"x")
    load_adapter(copy.deepcopy(random_model(0)), tmp_path)
    (tmp_path / name).write_bytes(b"x")
    refused(lambda: load_adapter(copy.deepcopy(random_model(0)), tmp_path), tmp_path / name)


@pytest.mark.parametrize("seed", range(3))
def test_the_reference_may_be_the_adapter(seed):
    base = random_model(seed)
    model, (tree, features) = (
        adapted(base, 2, 4.0, seed),
        batch_of(seed, base.config.vision.patches),
    )
    start = model(tree, features).detach()
    keep_reference(model)
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter.add_(0.1)
    with adapters_off(model):
        assert torch.equal(model(tree, features), start)
    assert worst(model(tree, features), start) > 1e-3


@pytest.mark.parametrize("reference", ["base", "adapter"])
def test_training_from_an_adapter(model, pairs, tmp_path, oracle, reference):
    """Held against itself the policy's first loss is log 2; held against the base it is not."""
    foreign_adapter(
        oracle, tmp_path / "start", 1, target_modules=PATTERN.format("q_proj"), r=3, lora_alpha=9
    )
    flags = {"adapter": str(tmp_path / "start"), "reference": reference}
    train(model, tmp_path / "out", pairs=pairs, limit=6, lr=1e-3, **flags)
    first = read_lines(tmp_path / "out" / "metrics.jsonl")[0]
    assert (abs(first["loss"] - math.log(2)) < 1e-5) == (reference == "adapter")
    started, trained = copy.deepcopy(toy_model()), copy.deepcopy(toy_model())
    load_adapter(started, tmp_path / "start")
    load_adapter(trained, tmp_path / "out" / "adapter")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["lora_rank"], config["lora_alpha"]) == (3, 9)  # the adapter's own
    before, after = adapter_state(started), adapter_state(trained)
    moved = [worst(before[name], after[name]) for name in before if "q_proj" in name]
    assert 0 < max(moved) < 0.1  # it went on from the adapter


@pytest.mark.parametrize("head", [None, "value", "reward"])
def test_a_policy_without_memory_draws_nothing(head):
    """What adapters and head begin with is drawn once, when the weights are read."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    policy = empty_policy(CHECKPOINT, Config(lora_rank=2, lora_alpha=4.0), head)
    assert all(parameter.is_meta for parameter in policy.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "flags", [["--adapter", "x"], ["--reference", "base"], ["--reference", "adapter"]]
)
def test_the_reference_is_always_named(flags):
    numbers = (
        "beta",
        "lr",
        "lora-alpha",
        "lora-rank",
        "epochs",
        "projector-lr",
        "workers",
        "batch-size",
    )
    given = ["--pairs=x", "--warmup=0", *(f"--{name}=1" for name in numbers)]
    refused(
        lambda: check(parse_config(Config, "", [*given, *flags])),
        "--adapter and --reference go together",
    )


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapters_that_changed_the_base_are_refused(oracle, tmp_path, kind):
    foreign_adapter(oracle, tmp_path, 0, target_modules=PATTERN.format("q_proj"), r=2, init=kind)
    refused(lambda: load_adapter(copy.deepcopy(toy_model()), tmp_path), "init_lora_weights")


def test_a_wrong_adapter_costs_nothing(model, pairs, tmp_path):
    """An earlier run's files are still there, and the policy's start is not overwritten by its own
    training.
    """
    train(model, tmp_path / "out", pairs=pairs, limit=6)
    before = contents(tmp_path / "out")
    for adapter, message in (
        (tmp_path / "none", "adapter_config.json"),
        (tmp_path / "out" / "adapter", "which is read"),
    ):
        flags = {"adapter": str(adapter), "reference": "base"}
        refused(lambda f=flags: train(model, tmp_path / "out", pairs=pairs, limit=6, **f), message)
    assert contents(tmp_path / "out") == before


def test_a_run_from_a_partial_adapter_is_repeatable_and_knows_its_adapter(
    model, pairs, tmp_path, oracle
):
    """Linears that it lacks are drawn from --seed; another adapter under the same name is noticed
    on resuming.
    """
    foreign_adapter(
        oracle, tmp_path / "a", 1, target_modules=PATTERN.format("q_proj"), r=3, lora_alpha=9
    )
    flags = {"adapter": str(tmp_path / "a"), "reference": "adapter", "limit": 6, "pairs": pairs}
    for seed, name in enumerate(("x", "y")):
        torch.manual_seed(seed)
        train(model, tmp_path / name, **flags)
    weights = "adapter/adapter_model.safetensors"
    assert contents(tmp_path / "x")[weights] == contents(tmp_path / "y")[weights]
    foreign_adapter(
        oracle, tmp_path / "a", 2, target_modules=PATTERN.format("q_proj"), r=3, lora_alpha=9
    )
    (tmp_path / "x/report.html").unlink()  # a finished run has nothing to resume
    refused(
        lambda: train(model, tmp_path / "x", resume=True, **flags),
        "--resume: pairs, model, template, annotator or reward are not those",
    )
