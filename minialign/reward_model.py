"""A reward model (Eq. 1): a LLaVA folder with a head beside its weights, trained by `train_dpo.py
--loss reward`.

The folder is one like any other, and `reward_head.safetensors` in it holds the head and the mean
and standard deviation of its rewards on pairs that it learned from: scores are whitened by them, so
that beta of Eq. 2 counts in standard deviations (Sec. 5.5)."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minialign import parallel
from minialign.chat import Tokenizer, announce
from minialign.checkpoint import load_model, opened, read_tensors
from minialign.collate import StepLoader
from minialign.errors import UserError
from minialign.heads import branch_rewards, set_head
from minialign.images import ImageProcessor
from minialign.llava import Llava
from minialign.masks import Branch, Sequence, build_tree
from minialign.records import Record
from minialign.rewards import Whitening, score_whitening

HEAD_FILE = "reward_head.safetensors"
# pairs whose rewards are measured; so many tell the mean to 2 % of the standard deviation
MEASURED = 1000


@dataclass(frozen=True)
class RewardModel:
    """r(x, y), whitened. It reads the responses as texts, with a tokenizer and a template of its
    own."""

    model: Llava
    tokenizer: Tokenizer
    processor: ImageProcessor
    whitening: Whitening

    @torch.no_grad()
    def __call__(
        self, records: list[Record], pictures: list[Image.Image], texts: list[tuple[str, ...]]
    ) -> Tensor:
        """Scores (B, k) of the k responses to each record's prompt: k branches of one trunk."""
        features = self.model.encode_images(
            torch.cat([self.processor(picture) for picture in pictures])
        )
        asked = zip(records, pictures, texts, strict=True)
        sequences = [self.sequence(record, picture, each) for record, picture, each in asked]
        tree = build_tree(sequences, self.tokenizer.image_id, self.tokenizer.pad_id).to(
            self.model.device
        )
        return self.whitening(branch_rewards(self.model, tree, features)).cpu()

    def sequence(self, record: Record, picture: Image.Image, texts: tuple[str, ...]) -> Sequence:
        """A prompt and its responses; one that leaves the decoder's positions is cut at its end."""
        patches, packing = self.processor.layout(picture)
        prompt = self.tokenizer.prompt(record.turns)
        room = self.model.config.text.max_position_embeddings - (len(prompt) - 1 + len(packing))
        if room < 1:
            raise UserError(
                f"{record.place}: image and prompt fill the reward model's positions; use another one"
            )
        branches = [Branch(self.tokenizer.response(text)[:room]) for text in texts]
        return Sequence(prompt, branches, patches, packing=packing)


@torch.no_grad()
def measure_rewards(model: Llava, load: StepLoader, batch_size: int) -> Whitening:
    """Mean and standard deviation of a newly trained model's rewards, of both responses of up to
    `MEASURED` pairs."""
    load, numbers = replace(load, accumulate=1), load.records.numbers[:MEASURED]
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    mine, found = parallel.even(parallel.shard_batch(batches), []), []
    for batch in tqdm(mine, desc="rewards", leave=False, disable=parallel.rank() > 0):
        for part in load(batch)[0] or [load.collate.idle(2)]:  # all go through shards together
            tree = load.collate.tree(part.sequences).to(model.device)
            rewards = branch_rewards(model, tree, model.encode_images(part.pixels))
            found += rewards[: len(part)].flatten().tolist()
    return score_whitening(torch.tensor(sum(parallel.gather(found), [])))


def save_head(weight: Tensor, whitening: Whitening, folder: Path) -> None:
    """Write the head into a folder that is being made."""
    facts = {"mean": whitening.mean, "std": whitening.std}
    save_file({"weight": weight.contiguous()}, folder / HEAD_FILE, {"whitening": json.dumps(facts)})


def load_reward_model(folder: Path, device: str, dtype: torch.dtype) -> RewardModel:
    """A folder that `train_dpo.py --loss reward` has left as `merged`, with the template that it
    was trained in."""
    path = folder / HEAD_FILE
    if not path.is_file():
        said = f"no reward model, as {HEAD_FILE} is missing; give the `merged` that train_dpo.py --loss reward leaves"
        raise UserError(f"{folder}: {said}")
    model = load_model(folder, device, dtype)
    weight, whitening = dict(read_tensors(path)).get("weight"), read_whitening(path)
    fits = (
        weight is not None
        and weight.shape == (1, model.config.text.hidden_size)
        and weight.dtype == torch.float32
    )
    fits = fits and weight.isfinite().all()
    if not (fits and whitening):
        raise UserError(
            f"{path}: no head of this model with a mean and a standard deviation; train it again"
        )
    set_head(model, weight.to(model.device))
    tokenizer, processor = Tokenizer.from_folder(folder), ImageProcessor.from_folder(folder)
    announce(folder, model, tokenizer)
    return RewardModel(model, tokenizer, processor, whitening)


def read_whitening(path: Path) -> Whitening | None:
    """What `save_head` noted beside the head; None where that is no mean and standard deviation."""
    with opened(path) as file:
        noted = (file.metadata() or {}).get("whitening", "")
    try:
        facts = json.loads(noted)
        mean, std = float(facts["mean"]), float(facts["std"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return Whitening(mean, std) if math.isfinite(mean) and 0 < std < math.inf else None
