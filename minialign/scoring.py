"""Who says how good a response is: a reward model, the embedded world's exact truth, or a function
of the user's.

All are called with records, pictures and k texts for each, and give scores (B, k): r(x, y) of Eq.
2."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minialign import toyworld
from minialign.annotator import OracleAnnotator
from minialign.checkpoint import resolve_model
from minialign.cli import require
from minialign.errors import UserError
from minialign.records import Record
from minialign.reward_model import RewardModel, load_reward_model


class OracleReward:
    """The embedded world's truth, in objects: those named that are there, less those that are not
    and wrong attributes.

    So an object is worth naming from one chance in two on, and silence is worth nothing.
    """

    def __call__(
        self, records: list[Record], pictures: list[Image.Image], texts: list[tuple[str, ...]]
    ) -> Tensor:
        """Scores (B, k)."""
        scenes = [toyworld.scene_of(record.image) for record in records]
        both = zip(scenes, texts, strict=True)
        return torch.tensor(
            [
                [float(sum(OracleAnnotator.score(scene, text))) for text in each]
                for scene, each in both
            ]
        )


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
        asked = zip(records, pictures, texts, strict=True)
        return torch.tensor(
            [
                [self.score(record, picture, text) for text in each]
                for record, picture, each in asked
            ]
        )

    def score(self, record: Record, picture: Image.Image, text: str) -> float:
        """What it says of one response; what is no number of float32's, or raises, is a
        `UserError`."""
        try:
            said = float(self.function(picture, record.asked, text))
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise UserError(
                f"{self.name}: raised {error!r}, of record {record.id}; mend it"
            ) from error
        require(
            abs(said) <= 1e30,
            f"{self.name}: {said} of record {record.id}, which is no finite number; mend it",
        )
        return said


def load_reward(name: str, config) -> OracleReward | UserReward | RewardModel:
    """`oracle`, FILE.py:FUNCTION, or the folder of a reward model; `config` has a training script's
    flags."""
    if name == "oracle":
        require(
            config.images == "toy",
            "--reward oracle: knows the embedded world alone; give a reward model's folder",
        )
        return OracleReward()
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return UserReward(load_function(Path(path), function), f"--reward {name}")
    return load_reward_model(
        resolve_model(name, "--reward"), config.device, getattr(torch, config.dtype)
    )


def load_function(path: Path, name: str) -> Callable:
    """A function of a Python file of the user's, which is run."""
    require(path.is_file(), f"--reward {path}: no such file; give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # there, as dataclasses look it up
    sys.path.insert(0, str(path.parent))  # as for a script: what stands beside it can be imported
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(f"--reward {path}: raised {error!r}; mend it") from error
    function = getattr(module, name, None)
    require(callable(function), f"--reward {path}: has no function {name!r}; give FILE.py:FUNCTION")
    return function
