"""Ask a LLaVA about a picture, or score an answer that is given to it.

python -m minialign.chat --image test-000000.png --prompt "Is there a cup?"
python -m minialign.chat --model DIR --image FILE --response "A cup." --json
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from minialign import edge
from minialign.align.logps import token_logps
from minialign.cli import require, require_device, require_seed, require_temperature, run_main
from minialign.data.images import read_picture
from minialign.model.masks import build_tree, mask_of_seed
from minialign.sampling.assistant import Assistant
from minialign.sampling.generate import Sampling, generate
from minialign.seeds import stable_seed
from minialign.toy import world


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.chat`."""

    # picture; or the name of one in the embedded world, such as test-000000.png
    image: str | None = None
    prompt: str = "Describe the picture."  # the question
    response: str | None = None  # score this answer instead of sampling one
    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    adapter: str | None = None  # adapter folder that train_dpo.py wrote
    # form of conversation: vicuna_v1, llava_v1, mistral, chatml, short, a file; else the model's
    template: str | None = None
    rho_th: float = 0.0  # Eq. 6: hide each image token with this probability
    temperature: float = 0.0  # 0 is greedy
    max_new_tokens: int = 256  # limit of the answer
    seed: int = 0  # mask and sampling follow from it
    device: str = "cpu"  # torch device
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    json: bool = False  # print one JSON object


def open_picture(name: str | None) -> Image.Image:
    """The picture of --image: a file, or a scene of the embedded world."""
    remedy = "give a picture, or test-000000.png of the embedded world"
    require(name is not None, f"--image is missing; {remedy}")
    if world.NAME.fullmatch(name) and not Path(name).exists():
        return world.open_picture(name)
    return read_picture(Path(name), remedy)


def main(config: Config) -> None:
    """Answer, or score an answer."""
    require(0 <= config.rho_th <= 1, f"--rho-th {config.rho_th}: a probability between 0 and 1")
    require_temperature(config.temperature)
    require_seed(config.seed)
    require_device(config.device)
    require(config.max_new_tokens >= 1, f"--max-new-tokens {config.max_new_tokens}: at least 1")
    given = config.response is None or config.response.strip() != ""
    require(given, "--response is empty; give the answer to score")

    picture = open_picture(config.image)
    folder, dtype = edge.model_folder(config.model), getattr(torch, config.dtype)
    assistant = Assistant.from_folder(folder, config.device, dtype, config.template, config.adapter)
    model, tokenizer = assistant.model, assistant.tokenizer
    image, turns = assistant.processor.prepare(picture), [("user", config.prompt)]
    features = assistant.encode([image])
    visible = mask_of_seed(len(image.packing), config.rho_th, config.seed)  # Eq. 6

    if config.response is None:
        sequence = assistant.sequence(turns, image, [[]], visible)
        sampling = Sampling(config.max_new_tokens, config.temperature)
        seeds, stops = [[stable_seed(config.seed)]], {tokenizer.eos_id}
        rows = generate(model, [sequence], features, sampling, stops, seeds, tokenizer.pad_id)
        completion = rows[0][0]
        text, response_ids = tokenizer.decode(completion.ids), completion.ids
        logps = completion.logps
    else:
        text, response_ids = config.response, tokenizer.response(config.response)
        assistant.require_positions(turns, image, len(response_ids))
        sequence = assistant.sequence(turns, image, [response_ids], visible)
        tree = build_tree([sequence], tokenizer.image_id, tokenizer.pad_id).to(model.device)
        with torch.no_grad():
            logps = token_logps(model, tree, features)[2].tolist()

    if config.json:
        result = {
            "text": text,
            "prompt_ids": sequence.trunk,
            "response_ids": response_ids,
            "image_tokens": len(image.packing),
            "logps": logps,
            "sum_logps": sum(logps),
        }
        print(json.dumps(result))
    elif config.response is None:
        print(text)
    else:
        print(f"{sum(logps):.4f} nats over {len(logps)} tokens")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
