"""docs/bdhs_with_transformers.py finds what sample_bdhs.py finds, text by text, and the programs of
docs/porting.md run."""

import json
import math
import random
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import toy_tokenizer
from input_files import pairs_in
from PIL import Image
from safetensors.torch import load_file, save_file

import minialign.toy.__main__
import sample_bdhs
from minialign.align.logps import branch_logps
from minialign.cli import parse_config
from minialign.data.records import Record, instruct_record, pair_fields, sharegpt_fields
from minialign.edge import CHECKPOINT
from minialign.model.masks import build_tree
from minialign.sampling.assistant import Assistant
from minialign.sampling.similarity import lexical_cosine
from minialign.toy import world

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
PORT = SimpleNamespace(**runpy.run_path(str(ROOT / "docs/bdhs_with_transformers.py")))


def never(text: str, reference: str) -> float:
    """A similarity by which everything differs."""
    return 0.0


def always(text: str, reference: str) -> float:
    """A similarity by which everything is the same."""
    return 1.0


def settings(**flags) -> sample_bdhs.Config:
    """What both read their flags from: greedy and short, unless a test says otherwise."""
    return sample_bdhs.Config(
        **{"temperature": 0.0, "max_new_tokens": 12, "rho_th": 0.7, "n_bdhs": 1} | flags
    )


class Both:
    """A model folder as transformers and as we read it."""

    def __init__(self, transformers, folder: Path):
        auto = transformers.AutoModelForImageTextToText
        self.model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder)
        self.ours = Assistant.from_folder(folder, template="short")

    @torch.no_grad()
    def features(self, picture: Image.Image) -> torch.Tensor:
        """What the decoder gets of a picture, by transformers."""
        pixels = self.processor(picture, return_tensors="pt")
        return self.model.get_image_features(**pixels).pooler_output[0]

    def by_port(self, record: Record, picture, phi, config) -> tuple[str, int, float]:
        """(text, iterations, phi) by the port, from the seeds of ours."""
        seeds = [sample_bdhs.draw_seed(config.seed, record, i + 1) for i in range(config.n_bdhs)]
        flags = SimpleNamespace(**vars(config) | {"template": PORT.TEMPLATE})
        pair = (self.features(picture), record.turns[0][1], record.chosen)
        text, iterations, found = PORT.bdhs(self.model, self.tokenizer, *pair, phi, seeds, flags)
        return text, iterations, round(found, 4)

    def by_ours(self, record: Record, picture, phi, config) -> tuple[str, int, float]:
        """The same by sample_bdhs.py."""

        def similarity(texts, references):
            return [phi(*both) for both in zip(texts, references, strict=True)]

        example = sample_bdhs.Example(record, picture, self.ours.processor.prepare(picture))
        [found] = sample_bdhs.sample(self.ours, similarity, [example], config)
        return found.rejected, found.iterations, found.similarity


@pytest.fixture(scope="module")
def toy(oracle) -> Both:
    """The shipped checkpoint."""
    return Both(oracle.transformers, CHECKPOINT)


@pytest.fixture(scope="module")
def llava_next(oracle, tmp_path_factory) -> Both:
    """A random LLaVA-1.6, which cuts pictures into tiles, with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("llava_next")
    model = oracle.make_next(3, "mistral", (579, 4))
    model.save_pretrained(folder)
    size, pinpoints = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    crop = {"height": size, "width": size}
    oracle.transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": size}, crop_size=crop, image_grid_pinpoints=pinpoints
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return Both(oracle.transformers, folder)


# White space, line breaks, words that only begin like Yes or No, a last sentence without full stop.
SPOKEN = [
    "Yes, there is a red cup at the top. No clock is on it!\n\nNobody sees the blue book.",
    "No. yes, a desk is in the middle.  The car is yellow",
]


def toy_record(number: int) -> Record:
    """A description or a question of the embedded world; the first two answered in other words."""
    [raw] = world.alignment_records(1, "validation", number)
    record = instruct_record(raw)
    return replace(record, chosen=SPOKEN[number]) if number < len(SPOKEN) else record


@pytest.mark.parametrize("number", range(8))
def test_the_port_finds_the_same_on_the_shipped_checkpoint(toy, number):
    """Greedy, of one iteration, guided, and of several, the last of them unguided."""
    record, rng = toy_record(number), random.Random(number)
    picture = world.open_picture(record.image)
    guided = settings(seed=number, rho_th=rng.choice([0.0, 0.3, 0.7, 0.99, 1.0]))
    found = toy.by_port(record, picture, never, guided)
    assert found == toy.by_ours(record, picture, never, guided) and found[0]

    again = settings(seed=number, rho_th=rng.choice([0.5, 0.7, 0.9]), n_bdhs=rng.choice([2, 3, 4]))
    for phi in (lexical_cosine, always):
        found = toy.by_port(record, picture, phi, again)
        assert found == toy.by_ours(record, picture, phi, again)
    assert found[1] == again.n_bdhs


@pytest.mark.parametrize("size", [(40, 30), (31, 97), (16, 16)])
def test_the_port_finds_the_same_on_llava_1_6(llava_next, size):
    """Tiles and their line ends: each token of the packed picture is hidden on its own."""
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture, record = Image.fromarray(pixels), toy_record(size[0] % 2)
    config = settings(n_bdhs=2, rho_th=0.6, max_new_tokens=5)
    found = llava_next.by_port(record, picture, never, config)
    assert found == llava_next.by_ours(record, picture, never, config)


def test_the_port_finds_the_same_where_sentences_stay_empty(oracle, tmp_path):
    """A model that ends its answer rather than begin a sentence, and would draw the image token."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "hasty"))
    weights, vocabulary = load_file(folder / "model.safetensors"), toy_tokenizer().fast.get_vocab()
    head = weights["language_model.lm_head.weight"]
    head[toy_tokenizer().eos_id] = 1.1 * head[vocabulary["▁The"]]
    head[toy_tokenizer().image_id] = 1.1 * head[vocabulary["▁red"]]
    save_file(weights, folder / "model.safetensors")
    hasty = Both(oracle.transformers, folder)

    empty = 0
    for number in (2, 4):
        record = toy_record(number)
        picture, config = world.open_picture(record.image), settings(seed=number)
        found = hasty.by_port(record, picture, never, config)
        assert found == hasty.by_ours(record, picture, never, config)
        empty += found[0].count(".") < record.chosen.count(".")
    assert empty


def test_the_picture_matters_to_what_is_found(toy):
    """Or else nothing above would depend on the mask: it changes with rho_th, not at 1."""
    record, other = toy_record(2), world.picture(world.make_scene("validation", 9))
    picture, texts = world.open_picture(record.image), {}
    for rho_th in (0.0, 1.0):
        config = settings(rho_th=rho_th)
        texts[rho_th] = [toy.by_port(record, each, never, config)[0] for each in (picture, other)]
    assert texts[0.0][0] != texts[0.0][1] and texts[1.0][0] == texts[1.0][1]


def test_control_tokens_in_texts_are_refused(toy):
    for question, chosen in (("What is <image>?", "A cup."), ("What?", "A cup.</s> It is red.")):
        record = Record("0", "a.png", [("user", question)], chosen)
        with pytest.raises(SystemExit, match="would become a control token"):
            toy.by_port(record, world.open_picture("validation-000000.png"), never, settings())


def test_the_program_prints_a_rejected_response(toy, tmp_path, monkeypatch, capsys):
    """From a command line; the sentence encoder, which takes long to load, is a stand-in."""

    class Encoder:
        def __init__(self, folder):
            assert folder == "ENCODER"

        def encode(self, texts):
            return torch.tensor([[float(len(text))] for text in texts])

        def similarity(self, first, second):
            return torch.tensor([[0.25]]) if first != second else torch.tensor([[1.0]])

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Encoder)
    )
    record = toy_record(2)
    picture = world.open_picture(record.image)
    picture.save(tmp_path / "picture.png")
    flags = "--temperature 0 --rho-th 0.7 --n-bdhs 2 --max-new-tokens 12 --encoder ENCODER --seed 4"
    words = [str(CHECKPOINT), str(tmp_path / "picture.png"), record.turns[0][1], record.chosen]
    monkeypatch.setattr(sys, "argv", ["bdhs_with_transformers.py", *words, *flags.split()])
    PORT.main()

    # In the type of the weights, float16.
    model = type(toy.model).from_pretrained(CHECKPOINT)
    pixels = toy.processor(picture, return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(pixels.pixel_values.half()).pooler_output[0]
    config = SimpleNamespace(**vars(settings()) | {"template": PORT.TEMPLATE})
    pair = (features, record.turns[0][1], record.chosen)
    text, iterations, _ = PORT.bdhs(model, toy.tokenizer, *pair, never, [4, 5], config)
    assert capsys.readouterr().out == f"{text} {iterations} 0.25\n"


# ---------------------------------------------------------------- docs/porting.md

PAGE = (ROOT / "docs/porting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
PROGRAMS = {"minialign.toy": minialign.toy.__main__, "sample_bdhs.py": sample_bdhs}


def run_block(text: str) -> dict:
    """Run the one block that has a text in it; its names."""
    [block] = [block for block in BLOCKS if text in block]
    names = {}
    exec(compile(block, "docs/porting.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def porters(tmp_path_factory):
    """A copy of the project's root in which the page's commands have run."""
    folder = tmp_path_factory.mktemp("porters")
    for name in ("minialign", "docs"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in "".join(COMMANDS).splitlines():
            name, *words = shlex.split(line.removeprefix("python ").removeprefix("-m "))
            program = PROGRAMS[name]
            program.main(parse_config(program.Config, "", words))
        yield folder


def test_every_block_is_run():
    """By one of the tests below, each."""
    assert len(BLOCKS) == 2


def test_the_checks_of_a_port(porters):
    assert len(run_block("Hidden tokens")["hidden"]) == 2


@pytest.mark.filterwarnings("ignore")  # what TRL and transformers say to each other
def test_trl_trains_on_the_pairs(porters, monkeypatch):
    """One step: the tokens of prompts and responses, their log-probs and the loss are ours."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", porters / "cache")
    trainer = run_block("DPOTrainer")["trainer"]
    assistant = Assistant.from_folder(CHECKPOINT)
    records, logs = pairs_in(porters / "runs/pairs.jsonl"), trainer.state.log_history[0]
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])

    means, image_id = {"chosen": 0.0, "rejected": 0.0}, assistant.tokenizer.image_id
    for number, record in enumerate(records):
        image = assistant.processor.prepare(world.open_picture(record.image))
        prompt = assistant.tokenizer.prompt(record.turns)
        place = prompt.index(image_id)
        whole = prompt[:place] + [image_id] * len(image.packing) + prompt[place + 1 :]
        answers = [assistant.tokenizer.response(text) for text in (record.chosen, record.rejected)]
        for row, answer in zip((number, number + len(records)), answers, strict=True):
            theirs = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            assert theirs.tolist() == whole + answer
            assert int(batch["completion_mask"][row].sum()) == len(answer)

        tree = build_tree([assistant.sequence(record.turns, image, answers)], image_id, 0)
        with torch.no_grad():
            logps = branch_logps(assistant.model, tree, assistant.encode([image]))[0]
        for name, logp in zip(means, logps.tolist(), strict=True):
            means[name] += logp / len(records)

    assert logs["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name, mean in means.items():
        assert logs[f"logps/{name}"] == pytest.approx(mean, abs=1e-3)


def test_the_pairs_for_llama_factory(tmp_path):
    """Read back as what they were; also where the picture stands in a later turn."""
    out = tmp_path / "pairs.jsonl"
    sample_bdhs.main(sample_bdhs.Config(limit=3, out=str(out), workers=0, sharegpt=True))
    wanted = [replace(record, bdhs={}) for record in pairs_in(out)]
    assert pairs_in(tmp_path / "pairs.jsonl.sharegpt.json") == wanted and len(wanted) == 3

    talk = [("user", "Hello."), ("assistant", "Hi."), ("user", "Q")]
    later = Record("later", "a.png", talk, "A cup.", "A dog.", image_turn=2)
    line = pair_fields(later, {"chosen": "A cup.", "rejected": "A dog."})
    path = tmp_path / "later.json"
    path.write_text(json.dumps([sharegpt_fields(line)]))
    assert pairs_in(path) == [later]


def test_llama_factory_is_told_of_the_columns():
    """`dataset_info.json` names the fields of the lines."""
    [text] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    columns = json.loads(text)["bdhs"]["columns"]
    assert set(columns) == set(columns.values()) == {"messages", "chosen", "rejected", "images"}


@torch.no_grad()
def test_the_traps_of_masks_are_there(oracle):
    """What the page says of transformers, on a random picture that is hidden whole."""
    auto = oracle.transformers.AutoModelForImageTextToText
    models = {}
    for name in ("sdpa", "eager"):
        options = {"dtype": torch.float32, "attn_implementation": name}
        models[name] = auto.from_pretrained(CHECKPOINT, **options).eval()
    image = models["sdpa"].config.image_token_id
    ids = [1, 368, 286, *[image] * 36, 15, 296, 544, 371]
    features, visible = torch.randn(36, 128), torch.zeros(36).bool()
    seen = torch.tensor(ids) != image
    embeddings, positions = (
        models["sdpa"].get_input_embeddings()(torch.tensor(ids)),
        torch.arange(len(ids)),
    )
    embeddings[~seen] = features
    wanted = PORT.next_logits(models["sdpa"], ids, features, visible)

    def wrong(logits) -> bool:
        return not torch.allclose(logits, wanted, atol=0.1)

    # Right: eager attention with the same mask, a 2D mask with positions, no hidden tokens at all.
    assert not wrong(PORT.next_logits(models["eager"], ids, features, visible))
    whole = {"inputs_embeds": embeddings[None], "position_ids": positions[None]}
    assert not wrong(models["sdpa"](**whole, attention_mask=seen[None].long()).logits[0, -1])
    left = {"inputs_embeds": embeddings[None, seen], "position_ids": positions[None, seen]}
    ones = torch.ones(1, int(seen.sum()))
    assert not wrong(models["sdpa"](**left, attention_mask=ones, use_cache=False).logits[0, -1])

    # Wrong: without a mask, of True and False, and as `generate` counts positions.
    assert wrong(models["sdpa"](**left, use_cache=False).logits[0, -1])
    allowed = (seen & torch.ones(len(ids), len(ids)).tril().bool())[None, None]
    assert wrong(models["eager"](**whole, attention_mask=allowed).logits[0, -1])
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    generated = models["sdpa"].generate(
        inputs_embeds=embeddings[None], attention_mask=seen[None].long(), **options
    )
    assert wrong(generated.logits[0][0])
