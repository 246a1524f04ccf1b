"""The sizes that are measured: LLaVA-1.6-7B's, and one for two cores in its proportions."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from minialign.files import write_json

PICTURE = (640, 480)  # AnyRes cuts it into 2 x 2 tiles, and the whole goes before them
SENTENCES = 5
# One token each.
WORDS = "ball beach bench bicycle book bus car clock dog kettle kitchen kite lamp laptop".split()
WORDS += "orange park pencil street tree umbrella".split()


@dataclass(frozen=True)
class Size:
    """A model's shape, by transformers' names, and what is asked of it."""

    name: str
    device: str
    dtype: str
    text: dict
    vision: dict
    lora_rank: int
    question_words: int
    # y+ and y- are SENTENCES of so many, the end token included; BDHS may add as many to each.
    sentence_tokens: int
    examples: int  # of a batch of BDHS
    new_tokens: int  # of each of two samples per picture
    repeats: int
    loaded: dict  # the decoder of the checkpoint that is loaded: one that takes a while
    shard: str

    def rng(self, *parts: object) -> random.Random:
        """The draws of one text."""
        return random.Random(f"{self.name} {parts}")

    def question(self, number: int) -> str:
        """What is asked about picture `number`."""
        return " ".join(self.rng("question", number).choices(WORDS, k=self.question_words)) + "?"

    def answer(self, number: int, kind: str) -> str:
        """A response of SENTENCES * sentence_tokens tokens with its end token, each sentence ending
        in a full stop."""
        rng, lengths = self.rng(kind, number), [self.sentence_tokens - 1] * SENTENCES
        lengths[-1] -= 1  # for the end token
        return " ".join(" ".join(rng.choices(WORDS, k=length)) + "." for length in lengths)

    def facts(self) -> dict:
        """For the JSON."""
        return asdict(self) | {"picture": list(PICTURE)}

    def save(self, folder: Path) -> None:
        """Leave the size in the folder of its model, where the rows' processes read it."""
        write_json(folder / "size.json", asdict(self))

    @classmethod
    def of_folder(cls, folder: Path) -> "Size":
        """The size that was left there."""
        return cls(**json.loads((folder / "size.json").read_text()))


def picture(number: int) -> Image.Image:
    """One of many pictures of the size that is measured."""
    return Image.effect_mandelbrot(PICTURE, (-3, -2.5 - number / 10, 2, 2.5), 100).convert("RGB")


def text_config(vocab: int, hidden: int, intermediate: int, layers: int, heads: int) -> dict:
    """A decoder whose random matrices keep their input's size."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "initializer_range": hidden**-0.5,
        "pad_token_id": 3,
    }


def vision_config(hidden: int, layers: int, heads: int, side: int) -> dict:
    """A tower with `side` patches along a tile's edge."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": 14 * side,
        "patch_size": 14,
    }


# 2,340 image tokens and 2 x 100 of responses; LLaVA-1.6 on Vicuna-7B with CLIP-L.
SEVEN_B = Size(
    "7b",
    "cuda",
    "bfloat16",
    text_config(32064, 4096, 11008, 32, 32),
    vision_config(1024, 24, 16, 24),
    lora_rank=128,
    question_words=40,
    sentence_tokens=20,
    examples=4,
    new_tokens=256,
    repeats=3,
    loaded=text_config(32064, 4096, 11008, 32, 32),
    shard="5GB",
)
# A quarter of the tokens: 594 and 2 x 25. The tower has a twentieth of the parameters, as in 7b,
# and the rank is the same share of the width.
TINY = Size(
    "tiny",
    "cpu",
    "float32",
    text_config(579, 384, 1032, 4, 6),
    vision_config(96, 3, 3, 12),
    lora_rank=12,
    question_words=10,
    sentence_tokens=5,
    examples=2,
    new_tokens=64,
    repeats=5,
    loaded=text_config(32064, 1024, 2752, 4, 16),
    shard="100MB",
)
SIZES = {size.name: size for size in (TINY, SEVEN_B)}
