"""Adapters against PEFT on transformers' model; the reference is the untouched base; errors of a
bad folder.
"""

import copy
import json
import math

import pytest
import torch
from adapters import answers, batch_of, transformers_model
from helpers import (
    random_model,
    toy_model,
    worst,
)
from policies import adapted
from safetensors.torch import load_file, save_file

from minialign.align.logps import branch_logps
from minialign.edge import CHECKPOINT
from minialign.errors import UserError
from minialign.model.hf_folder import load_model, save_changed, save_model
from minialign.model.lora import (
    LoraLinear,
    adapter_state,
    adapters_off,
    add_adapters,
    trainable_groups,
)
from minialign.model.peft_folder import load_adapter, merged, save_adapter

SHAPES = [(1, 1.0), (4, 8.0), (16, 4.0)]  # rank, alpha


# ---------------------------------------------------------------- against PEFT and transformers


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("rank", "alpha"), SHAPES)
def test_peft_reads_the_adapter(oracle, rank, alpha, tmp_path):
    model = adapted(toy_model(), rank, alpha, seed=rank)
    save_adapter(adapter_state(model), rank, alpha, str(CHECKPOINT), tmp_path / "adapter")
    kind = pytest.importorskip("peft").PeftModel
    peft = kind.from_pretrained(transformers_model(oracle, CHECKPOINT), tmp_path / "adapter").eval()
    for ours, theirs, base in zip(answers(model), answers(peft), answers(toy_model()), strict=True):
        assert worst(ours, theirs) < 1e-4
        assert worst(ours, base) > 0.01  # the adapter does something
    # Each part counts: without the projector's copy, or without the updates, the logits are others.
    for kind in ("projector", "linear"):
        part = copy.deepcopy(model)
        if kind == "projector":
            part.multi_modal_projector.enabled = False
        for module in part.modules():
            if kind == "linear" and isinstance(module, LoraLinear):
                module.enabled = False
        assert worst(answers(part)[0], answers(peft)[0]) > 1e-3
    with peft.disable_adapter(), adapters_off(model):
        for ours, theirs in zip(answers(model), answers(peft), strict=True):
            assert worst(ours, theirs) < 1e-4


@pytest.mark.parametrize(("rank", "alpha"), SHAPES[1:])
def test_merged_checkpoint_is_a_plain_model(oracle, rank, alpha, tmp_path):
    model = adapted(toy_model(), rank, alpha, seed=rank)
    save_model(
        toy_model().state_dict(), model.config.raw, CHECKPOINT, tmp_path / "base", torch.float32
    )
    save_changed(
        tmp_path / "base",
        merged(adapter_state(model), alpha / rank),
        model.config.raw,
        tmp_path / "merged",
    )
    theirs, ours = (
        answers(transformers_model(oracle, tmp_path / "merged")),
        answers(load_model(tmp_path / "merged")),
    )
    for a, b, c, base in zip(answers(model), ours, theirs, answers(toy_model()), strict=True):
        assert worst(a, b) < 1e-4 and worst(a, c) < 1e-4
        assert worst(a, base) > 0.01


# ---------------------------------------------------------------- the reference and the gradients


@pytest.mark.parametrize("seed", range(4))
def test_adapters_off_is_the_untouched_base(seed):
    base = random_model(seed)
    tree, features = batch_of(seed, base.config.vision.patches)
    expected = base(tree, features)
    model = copy.deepcopy(base)
    add_adapters(model, 1 + seed, 2.0)
    # B is zero and the copy is equal at the start.
    assert torch.equal(model(tree, features), expected)
    model = adapted(base, 1 + seed, 2.0, seed)
    on = model(tree, features)
    with adapters_off(model):
        off = model(tree, features)
        assert not torch.is_grad_enabled()
    assert torch.equal(off, expected)
    assert worst(on, expected) > 1e-3
    with pytest.raises(RuntimeError), adapters_off(model):
        raise RuntimeError
    assert torch.equal(model(tree, features), on)  # on again, also behind an error


@pytest.mark.parametrize("seed", range(4))
def test_only_adapters_and_projector_copy_are_trained(seed):
    base = random_model(seed)
    model = adapted(base, 2, 4.0, seed)
    tree, features = batch_of(seed, base.config.vision.patches)
    branch_logps(model, tree, features).sum().backward()
    with_gradient = {
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    linears = 7 * base.config.text.num_hidden_layers
    assert with_gradient == set(adapter_state(model)) and len(with_gradient) == 2 * linears + 4
    assert all(p.grad is None for n, p in model.named_parameters() if n not in with_gradient)
    groups = trainable_groups(model, 1e-3, 1e-4)
    assert [group["lr"] for group in groups] == [1e-3, 1e-4]
    assert [len(group["params"]) for group in groups] == [2 * linears, 4]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    projector = {id(p) for p in model.multi_modal_projector.copy.parameters()}
    assert {id(p) for p in groups[1]["params"]} == projector
    # A step moves what is trained, and the reference not at all.
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.optim.AdamW(groups, weight_decay=0.0).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in with_gradient), name
    with adapters_off(model):
        assert torch.equal(model(tree, features), base(tree, features))


def test_a_half_precision_base_keeps_its_type():
    base = copy.deepcopy(random_model(0)).bfloat16()
    base.multi_modal_projector.float()  # as `load_model` has it, since it is trained
    tree, features = batch_of(0, base.config.vision.patches)
    features = features.bfloat16()
    model = adapted(base, 2, 4.0)
    # What is trained is float32.
    assert {p.dtype for p in adapter_state(model).values()} == {torch.float32}
    on = model(tree, features)
    with adapters_off(model):
        assert torch.equal(model(tree, features), base(tree, features))
    assert on.dtype == torch.bfloat16 and worst(on, base(tree, features)) > 0.01


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("seed", range(3))
def test_round_trip_is_exact(seed, tmp_path):
    base, rank = random_model(seed), 1 + 2 * seed
    model = adapted(base, rank, 3.0, seed)
    save_adapter(adapter_state(model), rank, 3.0, "somewhere", tmp_path / "adapter")
    other = copy.deepcopy(base)
    load_adapter(other, tmp_path / "adapter")
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items()
    )
    tree, features = batch_of(seed, base.config.vision.patches)
    assert torch.equal(other(tree, features), model(tree, features))


def mend(path, **changes) -> None:
    """Change some fields of a JSON file; None drops one."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def break_shape(folder) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(k for k in sorted(tensors) if "lora_A" in k)
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, path)


def drop_tensor(folder) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(k for k in sorted(tensors) if "multi_modal_projector" in k)]
    save_file(tensors, path)


def spoil(folder) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(k for k in sorted(tensors) if "lora_A" in k)
    tensors[name][1, 2] = math.nan
    save_file(tensors, path)


def truncate(folder) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json: no such file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not readable as JSON"),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            r"adapter_model\.safetensors: no such file",
        ),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "never from pickle",
        ),
        (
            lambda f: mend(f / "adapter_config.json", peft_type="IA3"),
            "peft_type is 'IA3'; only 'LORA'",
        ),
        (lambda f: mend(f / "adapter_config.json", peft_type=None), "peft_type is missing"),
        (lambda f: mend(f / "adapter_config.json", r=None), "r is missing"),
        (lambda f: mend(f / "adapter_config.json", lora_alpha=None), "lora_alpha is missing"),
        (lambda f: mend(f / "adapter_config.json", use_rslora=True), "use_rslora is set"),
        (lambda f: mend(f / "adapter_config.json", lora_bias=True), "lora_bias is set"),
        (lambda f: mend(f / "adapter_config.json", of_tomorrow=3), "of_tomorrow is set"),
        (lambda f: mend(f / "adapter_config.json", modules_to_save=5), "modules_to_save is 5"),
        (lambda f: mend(f / "adapter_config.json", r=True), "r is True"),
        (lambda f: mend(f / "adapter_config.json", lora_alpha=10**400), "lora_alpha is 1000"),
        (lambda f: mend(f / "adapter_config.json", lora_alpha=math.nan), "lora_alpha is nan"),
        (spoil, r"lora_A.weight holds NaN"),
        (
            lambda f: mend(f / "adapter_config.json", alpha_pattern={"q_proj": 1}),
            "alpha_pattern is set",
        ),
        (lambda f: mend(f / "adapter_config.json", r=3), r"lora_A has shape"),
        (break_shape, r"lora_A has shape"),
        (drop_tensor, r"missing tensors: .*multi_modal_projector"),
        (truncate, "not a whole safetensors file"),
    ],
)
def test_bad_folders_are_refused(damage, message, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(adapter_state(adapted(random_model(0), 2, 4.0)), 2, 4.0, "somewhere", folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_adapter(copy.deepcopy(random_model(0)), folder)
