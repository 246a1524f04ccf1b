"""One folder of random weights, read by both sides: transformers writes it, with its processor."""

import shutil
from pathlib import Path

import torch
import transformers

from minialign.chat import Tokenizer
from minialign.checkpoint import TOY, load_model
from minialign.images import ImageProcessor
from minialign.llava import Llava
from tests.bench.sizes import Size

transformers.utils.logging.disable_progress_bar()
IMAGE = 4  # ids of the embedded world's tokenizer
TEMPLATE = "short"


def make_folder(size: Size, folder: Path) -> Path:
    """A LLaVA-1.6 of this size in shards, its processor, and the tokenizer of the embedded world."""
    tile = size.vision["image_size"]
    pinpoints = [[tile * down, tile * across] for down, across in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    config = transformers.LlavaNextConfig(
        text_config=transformers.LlamaConfig(**size.text).to_dict(), image_token_index=IMAGE,
        vision_config=transformers.CLIPVisionConfig(**size.vision).to_dict(), image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False, dtype=size.dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(size.device):
        model = transformers.LlavaNextForConditionalGeneration._from_config(config, dtype=getattr(torch, size.dtype))
    with torch.no_grad():  # of the size that the layers add, so that what is said depends on what was asked
        model.get_input_embeddings().weight.mul_(size.text["hidden_size"] ** 0.5)
    model.save_pretrained(folder, max_shard_size=size.shard)
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, image_grid_pinpoints=pinpoints
    )
    pictures.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOY / name, folder / name)
    return folder


def load_ours(size: Size, folder: Path) -> tuple[Llava, Tokenizer, ImageProcessor]:
    """The model as minialign has it."""
    model = load_model(folder, size.device, getattr(torch, size.dtype))
    return model, Tokenizer.from_folder(folder, TEMPLATE), ImageProcessor.from_folder(folder)


def load_peer(size: Size, folder: Path):
    """The model as transformers has it, with SDPA."""
    return transformers.LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, size.dtype), device_map=size.device, attn_implementation="sdpa"
    ).eval()


def peer_processor(size: Size, folder: Path):
    """The processor that transformers' and TRL's users have beside that model."""
    return transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil.from_pretrained(folder),
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        patch_size=size.vision["patch_size"], vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
