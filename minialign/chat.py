"""Templates and tokenisation: the one place that turns conversations into token ids.

Control tokens come from the template alone. Text is data: a user who types `</s>` or `<image>` gets the
ordinary pieces of those characters.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from minialign.errors import UserError
from minialign.files import read_json

Turn = tuple[str, str]  # ("user" | "assistant", text)

# What stands before the first turn. `short` is the embedded world's; `vicuna` LLaVA-1.5's.
SYSTEMS = {
    "short": "",
    "vicuna": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. "
    ),
}


@dataclass(frozen=True)
class Tokenizer:
    """tokenizer.json, with the control tokens' ids by name."""

    fast: FastTokenizer
    bos_id: int
    eos_id: int
    pad_id: int
    image_id: int
    system: str

    @staticmethod
    def from_folder(folder: Path) -> "Tokenizer":
        """Read tokenizer.json and the ids in config.json."""
        path = folder / "tokenizer.json"
        raw = read_json(path, "a model folder needs tokenizer.json")
        for token in raw.get("added_tokens", []):
            token["special"] = True  # else typed text could become a control token
        try:
            fast = FastTokenizer.from_str(json.dumps(raw))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: not a tokenizer ({error}); download the folder again") from None
        fast.encode_special_tokens = True  # text is data
        config = read_json(folder / "config.json", "a model folder needs config.json")
        image_id = config.get("image_token_index", config.get("image_token_id", 32000))
        ids = {name: fast.token_to_id(name) for name in ("<s>", "</s>")}
        if None in ids.values():
            raise UserError(f"{path}: no <s> or </s>; only Llama-2 style tokenizers are supported")
        pad_id = config.get("pad_token_id", 0)
        template = config.get("minialign_template", "vicuna")
        return Tokenizer(fast, ids["<s>"], ids["</s>"], 0 if pad_id is None else pad_id, image_id, SYSTEMS[template])

    def encode(self, text: str) -> list[int]:
        """Text to ids; never a control token."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Ids to text, control tokens left out."""
        return self.fast.decode([i for i in ids if i != self.image_id], skip_special_tokens=True)

    def prompt(self, turns: list[Turn], image: bool = True) -> list[int]:
        """The ids of a conversation that ends with a user turn, up to and including `ASSISTANT:`.

        The image token stands once, at the head of the first user turn. Equal to the ids of the joint text:
        the template never ends in a space, and a response is encoded without its leading one.
        """
        ids = [self.bos_id]
        head = self.system
        for number, (role, text) in enumerate(turns):
            if role == "assistant":
                ids += self.response(text)
                head = ""
            elif number == 0 and image:
                ids += [*self.encode(head + "USER: "), self.image_id, *self.encode(f"\n{text} ASSISTANT:")]
            else:
                ids += self.encode(f"{head}USER: {text} ASSISTANT:")
        return ids

    def response(self, text: str) -> list[int]:
        """The ids of an answer: its text, then the end token."""
        return [*self.encode(text), self.eos_id]
