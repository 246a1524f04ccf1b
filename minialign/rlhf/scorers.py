"""Who says how good a response is: a reward model, or a function of the user's.

All are called with records, pictures and k texts for each, and give scores (B, k): r(x, y) of
Eq. 2.

A reward model's folder is one like any other; `reward_head.safetensors` in it holds its head. RLOO
and PPO whiten its scores (whitening.py).
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from minialign.cli import require
from minialign.data.records import Record
from minialign.errors import UserError
from minialign.model.hf_folder import check_tensors, read_tensors
from minialign.model.masks import build_tree
from minialign.model.scalar_head import branch_rewards, set_head
from minialign.sampling.assistant import Assistant

HEAD_FILE = "reward_head.safetensors"


@dataclass(frozen=True)
class RewardModel:
    """r(x, y). It reads the responses as texts, with a tokenizer and a template of its own."""

    assistant: Assistant

    @torch.no_grad()
    def __call__(
        self, records: list[Record], pictures: list[Image.Image], texts: list[tuple[str, ...]]
    ) -> Tensor:
        """Scores (B, k) of the k responses to each record's prompt: k branches of one trunk."""
        model, tokenizer = self.assistant.model, self.assistant.tokenizer
        images = [self.assistant.processor.prepare(picture) for picture in pictures]
        sequences = []
        for record, image, responses in zip(records, images, texts, strict=True):
            room = self.assistant.positions_left(record.turns, image, record.image_turn)
            if room < 1:
                full = "image and prompt fill the reward model's positions"
                raise UserError(f"{record.place}: {full}; use another one")
            # Silent in the paper: a response that was cut off is scored as if it ended there. One
            # that leaves the decoder's positions is cut at its end.
            ids = [tokenizer.response(text)[:room] for text in responses]
            turns, image_turn = record.turns, record.image_turn
            sequences.append(self.assistant.sequence(turns, image, ids, image_turn=image_turn))

        features = self.assistant.encode(images)
        tree = build_tree(sequences, tokenizer.image_id, tokenizer.pad_id).to(model.device)
        return branch_rewards(model, tree, features).cpu()


def save_head(weight: Tensor, folder: Path) -> None:
    """Write a reward model's head into a folder that is being made."""
    save_file({"weight": weight.contiguous()}, folder / HEAD_FILE)


def load_reward_model(
    folder: Path, device: str, dtype: torch.dtype, shard: bool = False
) -> RewardModel:
    """A folder that `minialign.rlhf.reward_model` has left as `merged`, with the template that it
    was trained in. In shards its head is whole in every process.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        remedy = "give the `merged` that minialign.rlhf.reward_model leaves"
        raise UserError(f"{folder}: no reward model, as {HEAD_FILE} is missing; {remedy}")
    assistant = Assistant.from_folder(folder, device, dtype, shard=shard)
    assistant.announce(folder)
    weight = read_head(path, assistant.model.config.text.hidden_size)
    set_head(assistant.model, weight.to(assistant.model.device))
    return RewardModel(assistant)


def read_head(path: Path, size: int) -> Tensor:
    """What `save_head` has written, for hidden states (..., size)."""
    tensors = dict(read_tensors(path))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(path, {"weight": torch.Size((1, size))}, shapes)
    return tensors["weight"].float()


@dataclass(frozen=True)
class UserReward:
    """A Python function (image, prompt, response) -> number; `name` says where it stands.

    Of several turns the prompt is all that was said before the response, a line each.
    """

    function: Callable[[Image.Image, str, str], float]
    name: str

    def __call__(
        self, records: list[Record], pictures: list[Image.Image], texts: list[tuple[str, ...]]
    ) -> Tensor:
        """Scores (B, k)."""
        scores = []
        for record, picture, responses in zip(records, pictures, texts, strict=True):
            scores.append([self.score(record, picture, text) for text in responses])
        return torch.tensor(scores)

    def score(self, record: Record, picture: Image.Image, text: str) -> float:
        """What it says of one response; what is no number of float32's, or raises, is a
        `UserError`.
        """
        try:
            score = float(self.function(picture, record.asked, text))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's own code may raise anything
            message = f"{self.name}: raised {error!r}, of record {record.id}; mend it"
            raise UserError(message) from error
        message = f"{self.name}: {score} of record {record.id}, which is no finite number; mend it"
        require(abs(score) <= 1e30, message)
        return score


def load_function(path: Path, name: str) -> Callable:
    """A function of a Python file of the user's, which is run."""
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses look it up there
    sys.path.insert(0, str(path.parent))  # as for a script: what stands beside it can be imported
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own code may raise anything
        raise UserError(f"--reward {path}: raised {error!r}; mend it") from error
    function = getattr(module, name, None)
    require(callable(function), f"--reward {path}: has no function {name!r}; give FILE.py:FUNCTION")
    return function
