"""dpo-step and dpo-step-cached-ref: one step of train_dpo.py beside one of TRL's DPOTrainer with
PEFT; dpo-step-liger: the same beside TRL with Liger's kernels.

A step is the tower, policy and reference forward, backward, clipping and AdamW, from a batch that
each side's own collator has made. Both have the same adapters on the same linears and train the
projector in full; the adapters are not at zero, else every loss would be log 2. TRL runs as its
users have it at its fastest: SDPA, no gradient checkpointing (we have none either), and in bf16
where the size says so. TRL refuses to precompute reference log-probs of pictures, so the second row
has its whole step, too. What neither side trains lies in memory once, for both: a GPU of 80 GB has
no room for two. Of `use_liger_kernel` TRL's `train` makes a call that does nothing for a
LLaVA-1.6, for which Liger has no kernels; the third row gives its language model those of a Llama.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minialign.align.logps import branch_logps, reference_logps
from minialign.align.losses import dpo_loss
from minialign.data.collate import PairBatch, PairCollator
from minialign.data.images import PictureFolder
from minialign.data.records import Record
from minialign.model.hf_folder import NAMES, rename
from minialign.model.llava import Llava
from minialign.model.lora import adapter_state, add_adapters
from minialign.model.masks import TokenTree
from minialign.model.peft_folder import save_adapter
from minialign.sampling.assistant import Assistant
from minialign.training.optimizer import clip_gradients, make_optimizer, trained_parameters
from tests.bench import roofline
from tests.bench.models import load_ours, load_peer, peer_processor
from tests.bench.rows import Facts
from tests.bench.sizes import Size, picture
from tests.bench.timing import alone, compared, measured

BETA, CLIP = 0.1, 1.0
LR = 1e-9  # so low that every repeat is the first step again
MAX_RESPONSE_TOKENS = 1024
# Of losses and gradient norms, relative. In bfloat16 the log-prob of a response of 100 tokens is
# right to some tenths, on either side.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}


def record(size: Size, folder: Path, number: int) -> Record:
    """A pair of this size, its picture beside the model."""
    name = f"{number}.png"
    picture(number).save(folder / name)
    turns = [("user", size.question(number))]
    chosen, rejected = size.answer(number, "chosen"), size.answer(number, "rejected")
    return Record(str(number), name, turns, chosen, rejected)


def batch_of(
    assistant: Assistant, folder: Path, records: list[Record], limit: int = MAX_RESPONSE_TOKENS
) -> PairBatch:
    """Some records as the training scripts collate them, responses cut to `limit` tokens; their
    pictures are beside the model."""
    pictures = PictureFolder(str(folder))
    collate = PairCollator(assistant.tokenizer, assistant.processor, pictures, limit, truncate=True)
    return collate.batch([collate.load(each) for each in records])


def with_adapters(model: Llava, rank: int) -> Llava:
    """The model with adapters that do something."""
    add_adapters(model, rank, 2.0 * rank)
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1 / rank, generator=generator)
    return model


@dataclass
class Ours:
    """Our side of a step: train_dpo.py's, without its metrics."""

    model: Llava
    batch: PairBatch

    def __post_init__(self):
        self.optimizer = make_optimizer(self.model, LR, LR)

    def step(self, ref_logps: Tensor | None = None) -> tuple[float, float]:
        """One whole step; its loss and gradient norm. ref_logps (B, 2): the reference's log-probs,
        where a cache has them."""
        features = self.model.encode_images(self.batch.pixels)
        return self.learn(self.batch.tree, features, ref_logps)

    def learn(
        self, tree: TokenTree, features: Tensor, ref_logps: Tensor | None = None
    ) -> tuple[float, float]:
        """What comes behind the tower."""
        tree = tree.to(self.model.device)
        if ref_logps is None:
            ref_logps = reference_logps(self.model, tree, features)
        logps = branch_logps(self.model, tree, features)
        chosen, rejected = logps[:, :1], logps[:, 1:]
        loss = dpo_loss(chosen, rejected, ref_logps[:, :1], ref_logps[:, 1:], BETA).mean()
        loss.backward()

        grad_norm = clip_gradients(trained_parameters(self.optimizer), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), grad_norm

    def ref_logps(self) -> Tensor:
        """What a cache would hold."""
        features = self.model.encode_images(self.batch.pixels)
        return reference_logps(self.model, self.batch.tree.to(self.model.device), features)

    def flops(self, reference: bool = True) -> int:
        """Of a step, by mathematics."""
        return roofline.dpo_flops(self.model, self.batch.tree, len(self.batch.pixels), reference)


class Peer:
    """TRL's side of a step, on the adapter folder that ours has written."""

    def __init__(self, size: Size, folder: Path, pair: Record, ours: Llava, liger: bool = False):
        import datasets
        import peft
        import trl

        row = {
            "images": [picture(int(pair.id))],
            "prompt": f"<s>USER: <image>\n{pair.turns[0][1]} ASSISTANT:",
            "chosen": f"{pair.chosen}</s>",
            "rejected": f"{pair.rejected}</s>",
        }
        config = trl.DPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            bf16=size.dtype == "bfloat16",
            use_cpu=size.device == "cpu",
            max_length=None,
            report_to="none",
            learning_rate=LR,
            max_grad_norm=CLIP,
            beta=BETA,
            use_liger_kernel=liger,
        )
        adapter = folder / "adapter"
        lora = peft.LoraConfig.from_pretrained(adapter)
        lora.inference_mode = False
        model = load_peer(size, folder)
        share_weights(ours, model)
        self.trainer = trl.DPOTrainer(
            model,
            args=config,
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=peer_processor(size, folder),
            peft_config=lora,
        )
        self.model = self.trainer.model
        state = load_file(adapter / "adapter_model.safetensors")
        assert not peft.set_peft_model_state_dict(self.model, state).unexpected_keys
        if liger:
            with_liger_kernels(self.model, config)
        self.optimizer = self.trainer.create_optimizer()
        # What `train` sets before the first step.
        self.trainer.current_gradient_accumulation_steps = 1
        self.batch = next(iter(self.trainer.get_train_dataloader()))

    def step(self) -> tuple[float, float]:
        """What `Trainer.train` does of one step; its loss and gradient norm."""
        loss = self.trainer.training_step(self.model, self.batch).item()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm


def share_weights(ours: Llava, peer: nn.Module) -> None:
    """Let the peer have its frozen weights where ours are; the projector is trained, by each its
    own."""
    frozen = {
        name.replace(".base.weight", ".weight"): parameter
        for name, parameter in ours.named_parameters()
        if not parameter.requires_grad and "multi_modal_projector" not in name
    }
    for name, parameter in peer.named_parameters():
        own = frozen.get(rename(name, NAMES))
        if own is not None:
            assert torch.equal(own, parameter), f"{name} differs"
            parameter.data = own.data


def with_liger_kernels(model, config) -> None:
    """What `train` does for `use_liger_kernel`, and of Liger's kernels for a Llama all that leave
    the logits as they are."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, config.liger_kernel_config)
    decoder = model.get_base_model().model.language_model
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=decoder)


def make_ours(size: Size, folder: Path) -> tuple[Ours, Record]:
    """Our side before its first step, its adapters written for the peer, and the pair."""
    assistant, rank = load_ours(size, folder), size.lora_rank
    model = with_adapters(assistant.model, rank)
    save_adapter(adapter_state(model), rank, 2.0 * rank, str(folder), folder / "adapter")
    pair = record(size, folder, 0)
    return Ours(model, batch_of(assistant, folder, [pair])), pair


def require_same_tokens(ours: PairBatch, peer: dict) -> None:
    """TRL's two rows are our trunk with each of our branches behind it."""
    tree = ours.tree
    for branch in (1, 2):
        ids = tree.ids[0][(tree.branch[0] == 0) | (tree.branch[0] == branch)]
        row = peer["input_ids"][branch - 1].cpu()
        shown = peer["attention_mask"][branch - 1].bool().cpu()
        assert torch.equal(row[shown], ids), "other tokens"


def require_same_work(ours: tuple[float, float], peer: tuple[float, float], dtype: str) -> str:
    """The first steps' losses and gradient norms agree; in words."""
    message = f"loss and gradient norm {ours}, the peer's {peer}"
    for a, b in zip(ours, peer, strict=True):
        assert abs(a - b) <= TOLERANCE[dtype] * abs(b), message
    theirs = f"the peer's {peer[0]:.5f} and {peer[1]:.4f}"
    return f"loss {ours[0]:.5f} and gradient norm {ours[1]:.4f}, {theirs}"


def measure(size: Size, folder: Path, facts: Facts) -> None:
    """The rows dpo-step and dpo-step-cached-ref."""
    ours, pair = make_ours(size, folder)
    ref_logps = ours.ref_logps()  # before the first step; the base does not change
    first, cached = ours.step(), ours.step(ref_logps)
    steps: dict[str, Callable] = {
        "dpo-step": ours.step,
        "dpo-step-cached-ref": lambda: ours.step(ref_logps),
    }
    for row, step in steps.items():
        facts.add(row, ours=alone(step, ours.model, size.device))

    peer = Peer(size, folder, pair, ours.model)
    require_same_tokens(ours.batch, peer.batch)
    checked = require_same_work(first, peer.step(), size.dtype)
    require_same_work(cached, peer.step(), size.dtype)

    models = dict.fromkeys(steps, ours.model) | {"peer": peer.model}
    side = measured(steps | {"peer": peer.step}, models, size.repeats, size.device)
    works = {
        "dpo-step": "a DPO step with LoRA: TRL's DPOTrainer",
        "dpo-step-cached-ref": "the same, the reference's log-probs given: TRL's whole step",
    }
    for row, work in works.items():
        more = shares(size, ours, peer, side[row].seconds, reference=row == "dpo-step")
        facts.finish(row, **compared(work, checked, side[row], side["peer"], **more))


def measure_liger(size: Size, folder: Path, facts: Facts) -> None:
    """The row dpo-step-liger."""
    if size.device != "cuda" or find_spec("liger_kernel") is None:
        facts.skip("dpo-step-liger", "wants a CUDA GPU and the package liger_kernel")
        return
    ours, pair = make_ours(size, folder)
    first = ours.step()
    facts.add("dpo-step-liger", ours=alone(ours.step, ours.model, size.device))

    peer = Peer(size, folder, pair, ours.model, liger=True)
    checked = require_same_work(first, peer.step(), size.dtype)
    steps = {"ours": ours.step, "peer": peer.step}
    models = {"ours": ours.model, "peer": peer.model}
    side = measured(steps, models, size.repeats, size.device)
    work = "a DPO step with LoRA: TRL's DPOTrainer with Liger's kernels"
    facts.finish("dpo-step-liger", **compared(work, checked, side["ours"], side["peer"]))


def shares(size: Size, ours: Ours, peer: Peer, seconds: float, reference: bool) -> dict:
    """The tokens of both sides, our FLOPs, and on a GPU their share of what it can do."""
    flops = ours.flops(reference)
    found = {
        "tokens": ours.batch.tree.ids.numel(),
        "peer_tokens": peer.batch["input_ids"].numel(),
        "flops": flops,
    }
    if size.device == "cuda":
        found["utilisation"] = roofline.utilisation(flops, seconds)
    return found
