"""Templates and tokenisation: the one place that turns conversations into token ids.

Control tokens come from the template alone. Text is data: a user who types `</s>` or `<image>` gets the
ordinary pieces of those characters.

`python -m minialign.chat` answers a question about a picture, or scores an answer that is given to it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer

from minialign import toyworld
from minialign.checkpoint import load_model, resolve_model
from minialign.cli import parse_config, require, require_device, require_seed, require_temperature, run_main
from minialign.errors import UserError
from minialign.files import read_json
from minialign.generate import Sampling, generate, stable_seed
from minialign.images import ImageProcessor, open_image, read_picture
from minialign.lora import load_adapter
from minialign.losses import token_logps
from minialign.masks import Branch, Sequence, build_tree, mask_of_seed

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
        for token in raw.get("added_tokens") or []:
            if not isinstance(token, dict):
                raise UserError(f"{path}: added_tokens must be a list of objects; download the folder again")
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
        if not isinstance(template, str) or template not in SYSTEMS:
            known = ", ".join(SYSTEMS)
            raise UserError(f"{folder / 'config.json'}: minialign_template {template!r} is none of {known}; name one")
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


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.chat`."""

    image: str | None = None  # picture; or the name of one in the embedded world, such as test-000000.png
    prompt: str = "Describe the picture."  # the question
    response: str | None = None  # score this answer instead of sampling one
    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    adapter: str | None = None  # adapter folder that train_dpo.py wrote
    rho_th: float = 0.0  # Eq. 6: hide each image token with this probability
    temperature: float = 0.0  # 0 is greedy
    max_new_tokens: int = 256  # limit of the answer
    seed: int = 0  # mask and sampling follow from it
    device: str = "cpu"  # torch device
    json: bool = False  # print one JSON object


def picture_for(config: Config):
    """The picture of --image: a file, or a scene of the embedded world."""
    require(config.image is not None, "--image is missing; give a picture, or test-000000.png of the embedded world")
    path = Path(config.image)
    if toyworld.NAME.fullmatch(config.image) and not path.exists():
        return open_image("toy", config.image)
    return read_picture(path, "give a picture, or test-000000.png of the embedded world")


def main() -> None:
    """Answer, or score an answer."""
    config = parse_config(Config, __doc__)
    require(0 <= config.rho_th <= 1, f"--rho-th {config.rho_th}: a probability between 0 and 1")
    require_temperature(config.temperature)
    require_seed(config.seed)
    require_device(config.device)
    require(config.max_new_tokens >= 1, f"--max-new-tokens {config.max_new_tokens}: at least 1")
    for name in ("prompt", "response"):
        text = getattr(config, name) or ""
        require(text == text.encode("utf-8", "ignore").decode(), f"--{name}: not UTF-8; type it anew")
    require(config.response is None or config.response.strip() != "", "--response is empty; give the answer to score")
    folder = resolve_model(config.model)
    processor, picture = ImageProcessor.from_folder(folder), picture_for(config)
    model, tokenizer = load_model(folder, config.device), Tokenizer.from_folder(folder)
    if config.adapter:
        load_adapter(model, Path(config.adapter))
    patches, packing = processor.layout(picture)
    mask = mask_of_seed(len(packing), config.rho_th, config.seed)
    prompt_ids = tokenizer.prompt([("user", config.prompt)])
    features = model.encode_images(processor(picture))
    if config.response is None:
        sequence = Sequence(prompt_ids, [Branch([])], patches, mask, packing)
        sampling, seeds = Sampling(config.max_new_tokens, config.temperature), [[stable_seed(config.seed)]]
        done = generate(model, [sequence], features, sampling, {tokenizer.eos_id}, seeds, tokenizer.pad_id)[0][0]
        text, response_ids, logps = tokenizer.decode(done.ids), done.ids, done.logps
    else:
        text, response_ids = config.response, tokenizer.response(config.response)
        sequence = Sequence(prompt_ids, [Branch(response_ids)], patches, mask, packing)
        tree = build_tree([sequence], tokenizer.image_id, tokenizer.pad_id).to(model.device)
        with torch.no_grad():
            logps = token_logps(model, tree, features)[2].tolist()
    if config.json:
        print(json.dumps({
            "text": text, "prompt_ids": prompt_ids, "response_ids": response_ids, "image_tokens": len(packing),
            "logps": logps, "sum_logps": sum(logps),
        }))  # fmt: skip
    else:
        print(text if config.response is None else f"{sum(logps):.4f} nats over {len(logps)} tokens")


if __name__ == "__main__":
    run_main(main)
