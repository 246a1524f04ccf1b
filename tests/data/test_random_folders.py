"""A model folder's small files damaged at random: read, and then of use, or one UserError that
names the file."""

import json
import random
import shutil
import sys

import pytest
from PIL import Image
from test_random_damage import RUBBISH, damage_text

from minialign.data import templates
from minialign.data.images import ImageProcessor, read_picture
from minialign.data.tokenizer import Tokenizer
from minialign.edge import CHECKPOINT
from minialign.errors import UserError

# What stands beside the generator's own rubbish.
ODD = [*RUBBISH, 10**400, 1e30, 1e-320, -0.0, "1/255", [1], {"type": "Sequence"}, "</s>", "<unk>"]
FORM = {"system": "A.", "user": "USER: {} ASSISTANT:", "answer": " {}", "end": "</s>"}


def damage(raw, rng: random.Random):
    """The value with one thing in it deleted, repeated, renamed or replaced, at any depth."""
    if isinstance(raw, dict | list) and raw and rng.random() < 0.85:
        name = rng.choice(list(raw)) if isinstance(raw, dict) else rng.randrange(len(raw))
        changed = raw.copy()
        way = rng.randrange(8)
        if way == 0:
            del changed[name]
        elif way == 1 and isinstance(raw, dict):
            changed[f"{name}s"] = changed.pop(name)
        elif way == 1:
            changed.append(raw[name])
        else:
            changed[name] = damage(raw[name], rng)
        return changed
    return rng.choice([*ODD, [raw], {"value": raw}, str(raw)])


def originals(folder) -> dict:
    """The small files of a folder that has them all, as transformers 5 writes them."""
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    processor = {"image_processor": raw, "patch_size": 16, "processor_class": "LlavaProcessor"}
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    tokens = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    rule = {"type": "TemplateProcessing", "single": single, "pair": pair}
    tokenizer["post_processor"] = rule | {"special_tokens": tokens}
    names = json.loads((folder / "tokenizer_config.json").read_text())
    return {
        "preprocessor_config.json": raw,
        "processor_config.json": processor,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": names | {"chat_template": "USER: ASSISTANT:"},
        "form.json": FORM,
    }


def use(folder) -> None:
    """All that reads the files, and what follows."""
    templates.asked_form.cache_clear()
    for form in (None, str(folder / "form.json")):
        ours = Tokenizer.from_folder(folder, form)
        for text in ("A cup.", "a </s> b <image><s>", "猫\n\x00"):
            ids = ours.prompt([("user", text)]) + ours.response(text)
            assert ids.count(ours.image_id) == 1 and ids[-1] == ours.eos_id
            assert all(0 <= i < 579 for i in ids)
            ours.decode(ids)
        assert ours.eos_id in ours.sentence_ends
    pixels = ImageProcessor.from_folder(folder)(Image.linear_gradient("L"))
    assert bool(pixels.isfinite().all())


def check(folder, seed: int) -> str:
    """Damage one file, and use them all: which, and whether they were refused."""
    rng = random.Random(seed)
    files = originals(CHECKPOINT)
    if rng.random() < 0.5:  # as transformers 4 writes it
        files["processor_config.json"].pop("image_processor")
    for name, raw in files.items():
        (folder / name).write_text(json.dumps(raw))
    edited = json.loads((CHECKPOINT / "config.json").read_text())
    if rng.random() < 0.5:
        del edited["minialign_template"]
    (folder / "config.json").write_text(json.dumps(edited))

    name = rng.choice(list(files))
    text = json.dumps(damage(files[name], rng))
    if rng.random() < 0.2:
        text = damage_text(text, rng)
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        use(folder)
    except UserError as error:
        message = str(error)
        assert "\n" not in message and ";" in message
        assert ".json" in message or "--template" in message
        return f"{name} refused"
    return f"{name} read"


def test_damaged_folders(tmp_path):
    """Every file is met, read and refused."""
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    seen = {check(tmp_path, seed) for seed in range(200)}
    names = originals(CHECKPOINT)
    assert seen == {f"{name} {what}" for name in names for what in ("read", "refused")}


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_of_pictures(tmp_path):
    """Of every kind that is decoded, and of some that are not."""
    seen = {check_picture(tmp_path / "x.png", seed) for seed in range(60)}
    assert seen == {"RGB", "refused"}


def check_picture(path, seed: int) -> str:
    """Damage a picture's bytes: the mode in which it is read, or that it was refused."""
    rng = random.Random(seed)
    form = rng.choice(["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "EPS", "ICO"])
    Image.effect_noise((24, 20), 50).convert("RGB").save(path, form)
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(8)):
        data[rng.randrange(min(len(data), rng.choice([40, 200, 10**6])))] = rng.randrange(256)
    path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
    try:
        picture = read_picture(path, "give a picture")
        ImageProcessor(28, pad=True)(picture)
    except UserError as error:
        assert "\n" not in str(error) and ";" in str(error)
        return "refused"
    return picture.mode


if __name__ == "__main__":  # a longer search: FOLDER FIRST COUNT
    import collections
    import traceback
    from pathlib import Path

    place, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    shutil.copytree(CHECKPOINT, place, dirs_exist_ok=True)
    found = collections.Counter()
    for number in range(first, first + count):
        for call, where in ((check, place), (check_picture, place / "x.png")):
            try:
                found[call(where, number)] += 1
            except BaseException as error:
                found[f"{call.__name__} {type(error).__name__}"] += 1
                print(number, call.__name__, traceback.format_exc().splitlines()[-3:])
    print(found)
