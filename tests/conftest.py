"""Fixtures that more than one test file needs: transformers, model folders, pairs, pictures, a
finished run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from encoder_folders import KINDS, make_encoder, make_folder
from helpers import random_toy, toy_model
from llava_folders import SEED
from oracle import Oracle
from PIL import Image
from script_runs import train

from minialign.edge import CHECKPOINT
from minialign.model.hf_folder import save_model
from minialign.toy import world

os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: on a busy machine a second thread costs minutes, and in the processes that
# tests start, too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that two workers end together: those that start processes."""
    rooms = ("training", "gpu", "bench")
    items.sort(key=lambda item: item.path.parent.name not in rooms)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """transformers, where it is installed."""
    return Oracle(pytest.importorskip("transformers"))


@pytest.fixture
def carriers(monkeypatch) -> list[tuple[str, int]]:
    """What every call of a decoder's attention kernel was given: ("prefix" or "rest", queries)."""
    sdpa, calls = torch.nn.functional.scaled_dot_product_attention, []

    def noted(q, k, v, **options):
        if options.get("is_causal"):
            calls.append(("prefix", q.shape[2]))
        elif options:  # the tower has no mask
            calls.append(("rest", q.shape[2]))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    return calls


@pytest.fixture
def compilations(monkeypatch) -> list:
    """The graphs that are compiled from now on; they run as plain code, which is quick to make."""
    graphs, real = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, dynamic, options: real(f, dynamic=dynamic, fullgraph=True, backend=backend),
    )
    yield graphs
    torch._dynamo.reset()


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A model folder of random weights, float32; not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "llava"
    state, config = random_toy(1).state_dict(), toy_model().config.raw
    save_model(state, config, CHECKPOINT, folder, torch.float32)
    return str(folder)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> str:
    """14 pairs; in batches of 4 the last one has 2. The words are fixed here, whatever the embedded
    world says."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    colours, things = ("red", "blue", "green", "white", "black"), ("cup", "car", "tree", "ball")
    with open(path, "w") as file:
        for i in range(14):
            colour, thing = colours[i % 5], things[i % 4]
            chosen = f"A {colour} {thing} is at the top left." + " The rest is empty." * (
                (i + 1) % 3
            )
            rejected = f"There is no {thing}, but a {colours[(i + 2) % 5]} {things[(i + 1) % 4]}."
            rejected += " It is large." * (
                4 - 2 * ((i + 1) % 3)
            )  # so that the base ranks some pairs right
            pair = {
                "id": f"pair-{i:02d}",
                "images": [world.image_name("alignment", i)],
                "prompt": "What is there?",
            }
            file.write(json.dumps(pair | {"chosen": chosen, "rejected": rejected}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def undisturbed(model, pairs, tmp_path_factory) -> Path:
    """A run of 8 steps in two epochs, looked at by many tests and changed by none."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(model, out, pairs=pairs, epochs=2, lr=3e-3)
    return out


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of one good and many bad pictures, and a good one outside of it."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    Image.linear_gradient("L").resize((40, 30)).save(folder / "good.png")
    Image.linear_gradient("L").save(tmp_path / "outside.png")
    data = (folder / "good.png").read_bytes()
    (folder / "deep" / "good.png").write_bytes(data)
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "header.png").write_bytes(data[:8])
    (folder / "broken.png").write_bytes(data[:60] + bytes(20) + data[80:])
    (folder / "text.png").write_text("this is no picture")
    (folder / "empty.png").write_bytes(b"")
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    os.symlink(tmp_path, folder / "up")
    os.symlink(folder / "good.png", folder / "inside.png")
    os.symlink("loop.png", folder / "loop.png")
    return folder


# ---------------------------------------------------------------- model folders


@pytest.fixture(scope="session")
def llava(oracle):
    """A tiny random model of transformers."""
    return oracle.make(SEED)


@pytest.fixture(scope="session")
def written_llava(llava, tmp_path_factory) -> Path:
    """The folder that transformers writes of it, and files of a tokenizer beside; not to be
    changed."""
    folder = tmp_path_factory.mktemp("models") / "written"
    llava.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return folder


@pytest.fixture
def llava_folder(written_llava, tmp_path) -> Path:
    """A copy of that folder, to be spoilt."""
    return Path(shutil.copytree(written_llava, tmp_path / "model"))


@pytest.fixture(scope="session")
def llava_state(llava) -> dict:
    """The state as transformers 5 has it in memory: `model.language_model.layers...`,
    `lm_head.weight`."""
    return {
        key: value for key, value in llava.state_dict().items() if not key.endswith("position_ids")
    }


@pytest.fixture(params=KINDS)
def encoder_folder(request, tmp_path) -> tuple[Path, str]:
    """A valid folder to break, and its kind."""
    return make_folder(
        tmp_path / "encoder", make_encoder(request.param, 7), request.param
    ), request.param
