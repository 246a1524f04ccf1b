"""A LLaVA with what belongs to it: its tokenizer, under a template, and its image preprocessing."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minialign.data.images import ImageProcessor, PreparedImage
from minialign.data.tokenizer import Tokenizer, Turn
from minialign.errors import UserError
from minialign.model.hf_folder import load_model
from minialign.model.llava import Llava
from minialign.model.lora import adapter_state
from minialign.model.masks import Branch, Sequence
from minialign.model.peft_folder import load_adapter
from minialign.sampling.generate import Sampling, generate


@cache
def say_once(line: str) -> None:
    """Print a line that this process has not printed yet."""
    print(line)


@dataclass(frozen=True)
class Assistant:
    """Model, tokenizer and image preprocessing of one folder."""

    model: Llava
    tokenizer: Tokenizer
    processor: ImageProcessor

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        template: str | None = None,
        adapter: str | None = None,
        shard: bool = False,
    ) -> "Assistant":
        """Read a LLaVA folder, perhaps with a PEFT adapter on top, or in shards."""
        tokenizer = Tokenizer.from_folder(folder, template)
        processor = ImageProcessor.from_folder(folder)
        model = load_model(folder, device, dtype, shard)
        if adapter is not None:
            load_adapter(model, Path(adapter))
        return cls(model, tokenizer, processor)

    def announce(self, folder: Path) -> None:
        """Say which model is used, and how; once, however often it is loaded."""
        trained = adapter_state(self.model).keys()
        base = [p for name, p in self.model.named_parameters() if name not in trained]
        size = sum(p.numel() for p in base) / 1e6
        weight = self.model.lm_head.weight
        kind = f"{self.model.config.raw.get('model_type')}, {size:,.0f} M parameters"
        where = f"{weight.dtype} on {weight.device}"
        say_once(f"{folder}: {kind}, {where}, template {self.tokenizer.name}")

    @property
    def positions(self) -> int:
        """How many positions the decoder has."""
        return self.model.config.text.max_position_embeddings

    def positions_left(self, turns: list[Turn], image: PreparedImage, image_turn: int = 0) -> int:
        """Of these, how many a prompt and its picture leave for a response."""
        prompt = self.tokenizer.prompt(turns, image_turn=image_turn)
        taken = len(prompt) - 1 + len(image.packing)  # the prompt has one token for the picture
        return self.positions - taken

    def require_positions(
        self, turns: list[Turn], image: PreparedImage, response: int, image_turn: int = 0
    ) -> None:
        """Refuse a prompt that leaves fewer positions than its response has tokens."""
        left = self.positions_left(turns, image, image_turn)
        if left < response:
            taken = self.positions - left + response
            message = f"image, prompt and response take {taken} positions"
            remedy = "shorten the texts, or use another model"
            raise UserError(f"{message}, the decoder has {self.positions}; {remedy}")

    def sequence(
        self,
        turns: list[Turn],
        image: PreparedImage,
        responses: list[list[int]],
        image_visible: Tensor | None = None,
        image_turn: int = 0,
    ) -> Sequence:
        """A prompt, and a branch for each response's ids behind it."""
        prompt = self.tokenizer.prompt(turns, image_turn=image_turn)
        branches = [Branch(ids) for ids in responses]
        return Sequence(prompt, branches, image.features, image_visible, image.packing)

    def together(self, image: PreparedImage, prompts: list[list[int]]) -> Sequence:
        """The ids of several prompts about one picture, which begin alike: the trunk ends with the
        picture, and the rest of each is a branch."""
        shared = prompts[0].index(self.tokenizer.image_id) + 1
        branches = [Branch(prompt[shared:]) for prompt in prompts]
        return Sequence(prompts[0][:shared], branches, image.features, packing=image.packing)

    def encode(self, images: list[PreparedImage]) -> Tensor:
        """What the tower sees of some pictures: (tiles, patches, D)."""
        return self.model.encode_images(torch.cat([image.pixels for image in images]))

    def no_features(self) -> Tensor:
        """Features (1, patches, D) of a picture that nobody looks at: of an idle batch."""
        width = self.model.config.vision.hidden_size
        return torch.zeros(1, self.processor.patches, width, device=self.model.device)

    def answers(
        self,
        features: Tensor,
        images: list[PreparedImage],
        questions: list[list[str]],
        max_new_tokens: int,
    ) -> list[list[str]]:
        """Greedy answers to several questions about each picture, which is computed once: it is the
        trunk, and each question a branch.

        features (tiles, patches, D): of all the pictures, as `encode` gives them.
        """
        sequences = []
        for image, asked in zip(images, questions, strict=True):
            prompts = [self.tokenizer.prompt([("user", question)]) for question in asked]
            sequences.append(self.together(image, prompts))

        greedy, stops = Sampling(max_new_tokens, temperature=0.0), {self.tokenizer.eos_id}
        pad = self.tokenizer.pad_id
        rows = generate(self.model, sequences, features, greedy, stops, pad_id=pad)
        return [[self.tokenizer.decode(completion.ids) for completion in row] for row in rows]
