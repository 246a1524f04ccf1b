"""How the toy checkpoint is made: LLaVA's recipe in small.

(1) The tower learns to see on DEcorrelated pictures, by dense per-patch labels as a stand-in for
CLIP's training, and is frozen. (2) The decoder learns the biased world from text alone: the prior.
(3) Projector and decoder are joined on biased supervised data, a tenth of it text only, as LLaVA's
mixture has. The result sees well and yet says what is typical: a language model whose prior
overrides its eyes, which is what BDHS is about.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from minialign.data.images import ImageProcessor
from minialign.data.tokenizer import Tokenizer, Turn
from minialign.evaluation.metrics import print_table, with_intervals
from minialign.files import write_json
from minialign.model.clip import Clip, ClipConfig
from minialign.model.config import read_config
from minialign.model.hf_folder import save_model
from minialign.model.llava import Llava
from minialign.model.masks import Branch, Sequence, build_tree
from minialign.sampling.assistant import Assistant
from minialign.toy import world
from minialign.toy.benchmark import ToyBenchmark
from minialign.toy.drawing import COLOURS, COLUMNS, OBJECTS, ROWS, SETTINGS, SIZE

PATCH = 16
CLASSES = [len(OBJECTS), len(COLOURS), len(SETTINGS), ROWS * COLUMNS]  # of a patch's labels
CONTROL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
TOWER_STEPS, TEXT_STEPS, JOINT_STEPS = 2000, 200, 1800
TOWER_BATCH, BATCH, TEXT_ONLY, PEAK_LR = 64, 16, 2, 2e-3


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "image_token": "<image>",
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
}
PREPROCESSOR_CONFIG = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


def config_json(vocab_size: int) -> dict:
    """config.json of the toy model, by transformers' names."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "minialign_template": "short",
        "image_token_index": CONTROL.index("<image>"),
        "pad_token_id": CONTROL.index("<pad>"),
        "image_seq_length": (SIZE // PATCH) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": CONTROL.index("<pad>"),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "projection_dim": 128,
            "hidden_act": "quick_gelu",
        },
    }


def build_tokenizer() -> FastTokenizer:
    """A Llama-2 style tokenizer (BPE, byte fallback, `▁` for spaces) in which the world's words are
    whole.
    """
    rng = random.Random(0)
    corpus = []
    for index in range(3000):
        scene = world.make_scene("train", index)
        for kind in world.KINDS:
            texts = [text for _, text in world.conversation(scene, kind, rng)]
            corpus.append("\n ASSISTANT: USER: ".join(texts))

    # Pieces and merges are learned of words, as the world has them.
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = pre_tokenizers.Split("▁", "merged_with_next")
    trained = FastTokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation("isolated")])
    alphabet = [chr(c) for c in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=alphabet, limit_alphabet=200, show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)

    # They are only to be had through the JSON form.
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    names = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece for piece in pieces if piece != "\n"]
    bpe = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[tuple(merge) for merge in model["merges"] if "\n" not in "".join(merge)],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = FastTokenizer(bpe)
    tokenizer.normalizer = normalizer
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(CONTROL)
    return tokenizer


def write_companions(folder: Path) -> Tokenizer:
    """Everything of the model folder but the weights; returns the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    fast = build_tokenizer()
    fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config_json(fast.get_vocab_size()))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    default = ImageProcessor()
    means = {"image_mean": default.mean, "image_std": default.std, "do_convert_rgb": True}
    write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG | means)
    return Tokenizer.from_folder(folder)


def optimise(parameters: list[Parameter], steps: int, loss_of: Callable, title: str) -> None:
    """`steps` updates of one-cycle AdamW on `loss_of(step)`."""
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=steps, pct_start=0.1
    )
    bar = tqdm(range(steps), desc=title, mininterval=5)
    for step in bar:
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def initialise(module: torch.nn.Module, std: float) -> torch.nn.Module:
    """Draw every matrix anew from N(0, std)."""
    for parameter in module.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=std)
    return module


# ---------------------------------------------------------------- stage 1: the tower


def pretrain_tower(config: ClipConfig, processor: ImageProcessor) -> Clip:
    """Name object, colour, setting and place of every patch, on decorrelated pictures.

    The place is named so that the features keep it, as CLIP's do: the decoder must find "the
    northwest".
    """
    tower = initialise(Clip(config), 0.02)
    heads = torch.nn.Linear(config.hidden_size, sum(CLASSES))

    def loss_of(step: int) -> Tensor:
        pixels, labels = tower_batch(processor, step)
        scores = heads(tower(pixels)).flatten(0, 1).split(CLASSES, dim=-1)  # 4 of (N * patches, C)
        return sum(F.cross_entropy(each, labels[:, i]) for i, each in enumerate(scores))

    optimise([*tower.parameters(), *heads.parameters()], TOWER_STEPS, loss_of, "1/3 tower")

    pixels, labels = tower_batch(processor, TOWER_STEPS)
    with torch.no_grad():
        scores = heads(tower(pixels)).flatten(0, 1).split(CLASSES, dim=-1)
    for i, what in enumerate(("object", "colour", "setting", "place")):
        right = (scores[i].argmax(-1) == labels[:, i]).float().mean()
        print(f"tower, accuracy per patch: {what} {right:.3f}")
    return tower


def tower_batch(processor: ImageProcessor, step: int) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, size, size) and labels (N * patches, 4) of one step's pictures."""
    # Far behind the alignment split's own scenes: the world without its bias.
    first = 5 * 10**8 + step * TOWER_BATCH
    scenes = [world.make_scene("alignment", first + i) for i in range(TOWER_BATCH)]
    pixels = torch.cat([processor(world.picture(scene)) for scene in scenes])
    return pixels, torch.cat([patch_labels(scene) for scene in scenes])


def patch_labels(scene: world.Scene) -> Tensor:
    """(patches, 4) class numbers: object, colour, setting and place of every patch, row by row."""
    side = SIZE // PATCH
    grid = torch.zeros(side, side, len(CLASSES), dtype=torch.long)
    grid[..., 2] = list(SETTINGS).index(scene.setting)
    for number, (row, column) in enumerate(world.CELLS):
        rows = slice(row * side // ROWS, (row + 1) * side // ROWS)
        columns = slice(column * side // COLUMNS, (column + 1) * side // COLUMNS)
        name, colour = scene.cells[row, column]
        grid[rows, columns, 0] = OBJECTS.index(name)
        grid[rows, columns, 1] = list(COLOURS).index(colour)
        grid[rows, columns, 3] = number
    return grid.flatten(0, 1)


# ---------------------------------------------------------------- stages 2 and 3: the decoder


@dataclass(frozen=True)
class Row:
    """A picture's conversations, branches of one trunk."""

    ids: list[list[int]]  # one list per conversation
    learned: list[list[bool]]  # which of them are: answers and their end token, never questions
    image: bool  # whether the picture is shown


def row_of(tokenizer: Tokenizer, index: int, image: bool) -> Row:
    """What is said of training scene number `index`: one conversation of each kind."""
    all_ids, all_learned = [], []
    for turns in talks(index):
        ids: list[int] = []
        learned: list[bool] = []
        for number in range(0, len(turns), 2):
            prompt = tokenizer.prompt(turns[: number + 1], image)
            learned += [False] * (len(prompt) - len(ids))
            answer = tokenizer.response(turns[number + 1][1])
            learned += [True] * len(answer)
            ids = prompt + answer
        all_ids.append(ids)
        all_learned.append(learned)
    return Row(all_ids, all_learned, image)


def talks(index: int) -> list[list[Turn]]:
    """One conversation of each kind, told from hearsay."""
    scene = world.hearsay(world.make_scene("train", index))
    # Not the scene's own numbers: a question must not tell of its setting.
    rng = random.Random(f"talk {index}")
    return [world.conversation(scene, kind, rng) for kind in world.KINDS]


def language_loss(
    model: Llava, tokenizer: Tokenizer, rows: list[Row], features: Tensor | None
) -> Tensor:
    """Next-token loss on the learned tokens. features (N, patches, D): of the rows with images."""
    sequences, learned = [], []
    for row in rows:
        # Up to the image, or <s>.
        shared = row.ids[0].index(tokenizer.image_id) + 1 if row.image else 1
        branches = [Branch(ids[shared:]) for ids in row.ids]
        patches = model.config.vision.patches if row.image else 0
        sequences.append(Sequence(row.ids[0][:shared], branches, patches))
        learned += [flag for flags in row.learned for flag in flags[shared:]]
    tree = build_tree(sequences, tokenizer.image_id, tokenizer.pad_id)

    row, column = (tree.branch > 0).nonzero(as_tuple=True)
    keep = torch.tensor(learned)
    row, column = row[keep], column[keep]
    hidden = model(tree, features)
    logits = model.lm_head(hidden[row, tree.parent[row, column]])
    return F.cross_entropy(logits, tree.ids[row, column])


def pretrain_language(model: Llava, tokenizer: Tokenizer, processor: ImageProcessor) -> None:
    """The prior from text alone, then projector and decoder on biased pictures and their texts."""

    def text_loss(step: int) -> Tensor:
        rows = [row_of(tokenizer, step * BATCH + i, False) for i in range(BATCH)]
        return language_loss(model, tokenizer, rows, None)

    def joint_loss(step: int) -> Tensor:
        indices = [(TEXT_STEPS + step) * BATCH + i for i in range(BATCH)]
        unseen, seen = indices[:TEXT_ONLY], indices[TEXT_ONLY:]
        pixels = torch.cat([processor(world.picture(world.make_scene("train", i))) for i in seen])
        rows = [row_of(tokenizer, i, True) for i in seen]
        rows += [row_of(tokenizer, i, False) for i in unseen]
        return language_loss(model, tokenizer, rows, model.encode_images(pixels))

    language = [*model.language_model.parameters(), *model.lm_head.parameters()]
    optimise(language, TEXT_STEPS, text_loss, "2/3 text")
    joined = [*model.multi_modal_projector.parameters(), *language]
    optimise(joined, JOINT_STEPS, joint_loss, "3/3 joint")


def pretrain(folder: Path) -> None:
    """Make the toy checkpoint in `folder` from seed 0, and print what it does on the validation
    split.
    """
    started = time.time()
    tokenizer = write_companions(folder)
    config, processor = read_config(folder), ImageProcessor.from_folder(folder)
    torch.manual_seed(0)
    tower = pretrain_tower(config.vision, processor)
    torch.manual_seed(0)
    model = initialise(Llava(config), 0.05)
    model.vision_tower = tower
    pretrain_language(model, tokenizer, processor)
    save_model(model.state_dict(), config.raw, folder, folder, torch.float16)
    print(f"wrote {folder} after {(time.time() - started) / 60:.1f} minutes")

    assistant = Assistant(model.eval(), tokenizer, processor)
    counts = ToyBenchmark("validation", 500).run(assistant).counts
    print_table({"validation": with_intervals([counts])})
