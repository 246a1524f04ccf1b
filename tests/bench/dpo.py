"""dpo-step and dpo-step-cached-ref: one step of train_dpo.py beside one of TRL's DPOTrainer with PEFT.

A step is the tower, policy and reference forward, backward, clipping and AdamW, from a batch that each side's own
collator has made. Both have the same adapters on the same linears and train the projector in full; the adapters are
not at zero, else every loss would be log 2. TRL runs as its users have it at its fastest: SDPA, no gradient
checkpointing (we have none either), and in bf16 where the size says so. TRL refuses to precompute reference
log-probs of pictures, so the second row has its whole step, too.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import train_dpo
from minialign.chat import Tokenizer
from minialign.collate import PairBatch, PairCollator
from minialign.images import ImageProcessor
from minialign.llava import Llava
from minialign.lora import adapter_state, add_adapters, save_adapter
from minialign.losses import both_logps, branch_logps, preference_loss
from minialign.optimizer import make_optimizer, update
from minialign.records import Record
from tests.bench import roofline
from tests.bench.models import load_ours, load_peer, peer_processor
from tests.bench.sizes import Size, picture
from tests.bench.timing import Side, compared, interleaved, model_bytes, peak_bytes

CONFIG = train_dpo.Config(beta=0.1, lr=1e-9, projector_lr=1e-9, clip=1.0)  # every repeat is the first step again
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of losses and gradient norms, relative


def record(size: Size, folder: Path, number: int) -> Record:
    """A pair of this size, its picture beside the model."""
    name = f"{number}.png"
    picture(number).save(folder / name)
    turns = [("user", size.question(number))]
    return Record(str(number), name, turns, size.answer(number, "chosen"), size.answer(number, "rejected"))


def collator(tokenizer: Tokenizer, processor: ImageProcessor, folder: Path, keep: bool = False) -> PairCollator:
    """The training scripts' collator, for pictures beside the model; `keep` them for the model to sample from."""
    return PairCollator(tokenizer, processor, str(folder), CONFIG.max_response_tokens, keep_pictures=keep)


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
    """Our side of a step."""

    model: Llava
    batch: PairBatch

    def __post_init__(self):
        self.optimizer = make_optimizer(self.model, CONFIG.lr, CONFIG.projector_lr)

    def step(self) -> tuple[float, float]:
        """One whole step; its loss and gradient norm."""
        return self.learn(train_dpo.pair_loss(self.model, self.batch, CONFIG, 1.0)[0])

    def cached_step(self, ref_logps: Tensor) -> tuple[float, float]:
        """The same where the reference's log-probs (B, 2) are known."""
        features = self.model.encode_images(self.batch.pixels)
        logps = branch_logps(self.model, self.batch.tree.to(self.model.device), features)
        weights = torch.ones(1, device=self.model.device)
        return self.learn(preference_loss(logps, ref_logps, CONFIG.loss, CONFIG.beta, weights))

    def learn(self, loss: Tensor) -> tuple[float, float]:
        loss.backward()
        return loss.item(), update(self.optimizer, 1.0, CONFIG.clip, loss.item(), "bench")

    @torch.no_grad()
    def ref_logps(self) -> Tensor:
        """What a cache would hold."""
        features = self.model.encode_images(self.batch.pixels)
        return both_logps(self.model, self.batch.tree.to(self.model.device), features)[1]


class Peer:
    """TRL's side of a step, on the adapter folder that ours has written."""

    def __init__(self, size: Size, folder: Path, adapter: Path, pair: Record):
        import datasets
        import peft
        import trl

        row = {
            "images": [picture(int(pair.id))], "prompt": f"<s>USER: <image>\n{pair.turns[0][1]} ASSISTANT:",
            "chosen": f"{pair.chosen}</s>", "rejected": f"{pair.rejected}</s>",
        }  # fmt: skip
        config = trl.DPOConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=1, gradient_checkpointing=False,
            bf16=size.dtype == "bfloat16", use_cpu=size.device == "cpu", max_length=None, report_to="none",
            learning_rate=CONFIG.lr, max_grad_norm=CONFIG.clip, beta=CONFIG.beta,
        )  # fmt: skip
        lora = peft.LoraConfig.from_pretrained(adapter)
        lora.inference_mode = False
        self.trainer = trl.DPOTrainer(
            load_peer(size, folder), args=config, train_dataset=datasets.Dataset.from_list([row]),
            processing_class=peer_processor(size, folder), peft_config=lora,
        )  # fmt: skip
        self.model = self.trainer.model
        unknown = peft.set_peft_model_state_dict(self.model, load_file(adapter / "adapter_model.safetensors"))
        assert not unknown.unexpected_keys
        self.optimizer = self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1  # which `train` sets before the first step
        self.batch = next(iter(self.trainer.get_train_dataloader()))

    def step(self) -> tuple[float, float]:
        """What `Trainer.train` does of one step; its loss and gradient norm."""
        loss = self.trainer.training_step(self.model, self.batch).item()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, CONFIG.clip).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm


def make_sides(size: Size, folder: Path) -> tuple[Ours, Peer]:
    """Both sides before their first step, on the same pair and the same adapters."""
    model, tokenizer, processor = load_ours(size, folder)
    with_adapters(model, size.lora_rank)
    adapter, pair = folder / "adapter", record(size, folder, 0)
    save_adapter(adapter_state(model), size.lora_rank, 2.0 * size.lora_rank, str(folder), adapter)
    ours, peer = Ours(model, collator(tokenizer, processor, folder)([pair])), Peer(size, folder, adapter, pair)
    require_same_tokens(ours.batch, peer.batch)
    return ours, peer


def require_same_tokens(ours: PairBatch, peer: dict) -> None:
    """TRL's two rows are our trunk with each of our branches behind it."""
    tree = ours.tree
    for branch in (1, 2):
        ids = tree.ids[0][(tree.branch[0] == 0) | (tree.branch[0] == branch)]
        row = peer["input_ids"][branch - 1].cpu()
        assert torch.equal(row[peer["attention_mask"][branch - 1].bool().cpu()], ids), "other tokens"


def require_same_work(ours: tuple[float, float], peer: tuple[float, float], dtype: str) -> str:
    """The first steps' losses and gradient norms agree; in words."""
    for a, b in zip(ours, peer, strict=True):
        assert abs(a - b) <= TOLERANCE[dtype] * abs(b), f"loss and gradient norm {ours}, the peer's {peer}"
    return f"loss {ours[0]:.5f} and gradient norm {ours[1]:.4f}, the peer's {peer[0]:.5f} and {peer[1]:.4f}"


def rows(size: Size, folder: Path) -> dict[str, dict]:
    """Both rows."""
    ours, peer = make_sides(size, folder)
    ref_logps = ours.ref_logps()  # before the first step: the projector's original and the base do not change
    first, cached, theirs = ours.step(), ours.cached_step(ref_logps), peer.step()
    checked = require_same_work(first, theirs, size.dtype)
    require_same_work(cached, peer.step(), size.dtype)
    steps = {"ours": ours.step, "cached": lambda: ours.cached_step(ref_logps), "peer": peer.step}
    seconds = interleaved(steps, size.repeats, size.device)
    peaks = {name: peak_bytes(step, size.device) for name, step in steps.items()}
    models = {"ours": model_bytes(ours.model), "cached": model_bytes(ours.model), "peer": model_bytes(peer.model)}
    side = {name: Side(seconds[name], peaks[name], models[name]) for name in steps}
    return {
        "dpo-step": compared("a DPO step with LoRA: TRL's DPOTrainer", checked, side["ours"], side["peer"],
                             **facts(size, ours, peer, seconds["ours"], True)),
        "dpo-step-cached-ref": compared("the same, the reference's log-probs given: TRL's whole step", checked,
                                        side["cached"], side["peer"],
                                        **facts(size, ours, peer, seconds["cached"], False)),
    }  # fmt: skip


def facts(size: Size, ours: Ours, peer: Peer, seconds: float, reference: bool) -> dict:
    """The tokens of both sides, our FLOPs, and on a GPU their share of what it can do."""
    tree = ours.batch.tree
    flops = roofline.dpo_flops(ours.model, tree, len(ours.batch.pixels), reference)
    found = {"tokens": tree.ids.numel(), "peer_tokens": peer.batch["input_ids"].numel(), "flops": flops}
    return found | ({"utilisation": roofline.utilisation(flops, seconds)} if size.device == "cuda" else {})
