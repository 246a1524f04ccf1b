"""One folder of random weights, read by both sides: transformers writes it, with its processor.

transformers is imported where it is needed: rows of our own side alone do not wait for it.
"""

import shutil
from pathlib import Path

import torch

from minialign.edge import CHECKPOINT
from minialign.sampling.assistant import Assistant
from tests.bench.rows import Facts
from tests.bench.sizes import Size

IMAGE = 4  # ids of the embedded world's tokenizer
TEMPLATE = "short"


def quiet_transformers():
    """The library, without its progress bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def make_folder(size: Size, folder: Path) -> Path:
    """A LLaVA-1.6 of this size in shards, its processor, and the tokenizer of the embedded
    world."""
    transformers = quiet_transformers()
    tile = size.vision["image_size"]
    shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    pinpoints = [[tile * down, tile * across] for down, across in shapes]
    config = transformers.LlavaNextConfig(
        text_config=transformers.LlamaConfig(**size.text).to_dict(),
        vision_config=transformers.CLIPVisionConfig(**size.vision).to_dict(),
        image_token_index=IMAGE,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
        dtype=size.dtype,
    )
    kind, dtype = transformers.LlavaNextForConditionalGeneration, getattr(torch, size.dtype)
    torch.manual_seed(0)
    with torch.device(size.device):
        model = kind._from_config(config, dtype=dtype)
    # Of the size that the layers add, so that what is said depends on what was asked.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(size.text["hidden_size"] ** 0.5)
    model.save_pretrained(folder, max_shard_size=size.shard)

    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=pinpoints,
    )
    pictures.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return folder


def measure(size: Size, folder: Path, facts: Facts) -> None:
    """The row `model`: there is one to measure."""
    make_folder(size, folder)
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    facts.finish("model", bytes=sum(files), shards=len(files))


def load_ours(size: Size, folder: Path) -> Assistant:
    """The model as minialign has it, with what belongs to it."""
    return Assistant.from_folder(folder, size.device, getattr(torch, size.dtype), TEMPLATE)


def load_peer(size: Size, folder: Path):
    """The model as transformers has it, with SDPA."""
    kind = quiet_transformers().LlavaNextForConditionalGeneration
    dtype = getattr(torch, size.dtype)
    model = kind.from_pretrained(
        folder, dtype=dtype, device_map=size.device, attn_implementation="sdpa"
    )
    return model.eval()


def peer_processor(size: Size, folder: Path):
    """The processor that transformers' and TRL's users have beside that model."""
    transformers = quiet_transformers()
    return transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil.from_pretrained(folder),
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        patch_size=size.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
