"""Bad input ends in one line that names the thing and the remedy, and leaves nothing half-written in --out."""

import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from helpers import random_toy, toy_model, toy_processor, toy_tokenizer
from PIL import Image

import sample_bdhs
import train_dpo
from minialign import chat, evaluate, study, toyworld
from minialign.checkpoint import TOY, save_model
from minialign.cli import parse_config
from minialign.data import PairCollator, Record, instruct_record, number_repeats, read_instruct, read_pairs
from minialign.errors import UserError
from minialign.images import open_image


def instruct(number: int = 0, **changes) -> dict:
    """A good LLaVA-Instruct record with a picture of the embedded world; None deletes a field."""
    raw = toyworld.alignment_records(1, first=number)[0] | changes
    return {name: value for name, value in raw.items() if value is not None}


def pair(number: int = 0, **changes) -> dict:
    """A good line of a pairs file; None deletes a field."""
    bdhs = {"iterations": 1, "similarity": 0.5, "mask_seed": number, "guided": True, "rho_th": 0.7}
    raw = {
        "id": f"pair-{number}", "images": [toyworld.image_name("alignment", number)], "prompt": "What is there?",
        "chosen": "A red cup.", "rejected": "A blue cup, perhaps.", "bdhs": bdhs,
    } | changes  # fmt: skip
    return {name: value for name, value in raw.items() if value is not None}


def talk(*turns: tuple) -> list[dict]:
    return [{"from": role, "value": text} for role, text in turns]


def lines(*raws: dict | str) -> bytes:
    texts = (raw if isinstance(raw, str) else json.dumps(raw) for raw in raws)
    return "".join(text + "\n" for text in texts).encode("utf-8", "surrogatepass")


def array(*raws: object) -> bytes:
    return json.dumps(raws).encode("utf-8")


DEEP, LONG_NUMBER = "[" * 100_000, "1" * 5000
# What is no data at all, for both readers: bytes, and what the message says of them.
NO_DATA = [
    (b"", "no usable|not readable as JSON"),
    (b"\n", "line 1: not JSON|not readable as JSON"),
    (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", "not readable"),
    ("[{}]".encode("utf-16"), "not readable"),
    (b"\x00" * 50, "not JSON|not readable as JSON"),
    (DEEP.encode(), "not JSON|not readable as JSON"),
    (LONG_NUMBER.encode(), "not JSON|not readable as JSON"),
    (b"5", "expected a JSON"),
    (b'"text"', "expected a JSON"),
    (b"null", "expected a JSON"),
]
BAD_INSTRUCT = [
    (array(), "no usable record"),
    (lines(instruct(0), instruct(1)), "give --data a LLaVA-Instruct JSON array"),  # JSON Lines
    (array(instruct())[:-30], "not readable as JSON"),
    (json.dumps(instruct()).encode(), "expected a JSON array"),
    (array(instruct(0), 5), "record 2: expected a JSON object"),
    (array(instruct(0), instruct(1, id=None)), "record 2: field 'id' is missing"),
    (array(instruct(id="")), "record 1: field 'id' is empty"),
    (array(instruct(id=True)), "field 'id' is not a text"),
    (array(instruct(id=[1])), "field 'id' is not a text"),
    (array(instruct(image=None)), "field 'image' is missing"),
    (array(instruct(image=7)), "field 'image' is not a text"),
    (array(instruct(conversations=None)), "field 'conversations'"),
    (array(instruct(conversations="text")), "field 'conversations'"),
    (array(instruct(conversations=talk(("human", "Q")))), "a question and its answer"),
    (array(instruct(conversations=["Q", "A"])), "field 'value' is missing"),
    (array(instruct(conversations=talk(("human", "Q"), ("gpt", "")))), "field 'value' is empty"),
    (array(instruct(conversations=talk(("human", "Q"), ("gpt", " \n\t")))), "field 'value' is empty"),
    (array(instruct(conversations=talk(("human", "<image>\n"), ("gpt", "A")))), "field 'value' is empty"),
    (array(instruct(conversations=talk(("human", "Q"), ("gpt", 7)))), "field 'value' is not a text"),
    (array(instruct(conversations=talk(("gpt", "A"), ("human", "Q")))), "turn 1 is from 'gpt'"),
    (array(instruct(conversations=talk(("human", "Q"), ("human", "Q")))), "turn 2 is from 'human'"),
    (array(instruct(conversations=talk(("human", "Q"), ("robot", "A")))), "turn 2 is from 'robot'"),
    (array(instruct(conversations=talk(("human", "Q"), ("gpt", "A"), ("human", "Q")))), "end with an answer"),
    (array(instruct(conversations=talk(("human", "Q"), ("gpt", "\ud800")))), "half a surrogate pair"),
]
MESSAGE = {"role": "user", "content": "Q"}
BAD_PAIRS = [
    (lines(pair(0), pair(1)) + b'{"id": "2", "ima', "line 3: not JSON"),
    (lines(pair(0), "", pair(1)), "line 2: not JSON"),
    (lines(pair(0), "{'id': 1}"), "line 2: not JSON"),
    (lines(pair(0), '{"id": "a\tb"}'), "line 2: not JSON"),  # a control character
    (lines(pair(0), [pair(1)]), "line 2: expected a JSON object"),
    (lines(pair(0), pair(1, id=None)), "line 2: field 'id' is missing"),
    (lines(pair(id=5)), "line 1: field 'id' is not a text"),
    (lines(pair(images=None)), "field 'images'"),
    (lines(pair(images=[])), "field 'images'"),
    (lines(pair(images="a.png")), "field 'images'"),
    (lines(pair(images=["a.png", "b.png"])), "field 'images'"),
    (lines(pair(images=[{}])), "field 'images' is not a text"),
    (lines(pair(prompt=None)), "field 'prompt' is missing"),
    (lines(pair(prompt=" ")), "field 'prompt' is empty"),
    (lines(pair(prompt=[])), "field 'prompt' must end with the user's"),
    (lines(pair(prompt=[MESSAGE, {"role": "assistant", "content": "A"}])), "field 'prompt' must end with the user's"),
    (lines(pair(prompt=[MESSAGE, MESSAGE, MESSAGE])), "turn 2 is from 'user'"),
    (lines(pair(prompt=[{"role": "user"}])), "field 'content' is missing"),
    (lines(pair(chosen=None)), "field 'chosen' is missing"),
    (lines(pair(chosen="")), "field 'chosen' is empty"),
    (lines(pair(rejected="  \n ")), "field 'rejected' is empty"),
    (lines(pair(rejected=["A"])), "field 'role' is missing"),
    (lines(pair(rejected=[MESSAGE])), "is from 'user'"),
    (lines(pair(rejected=[])), "field 'rejected'"),
    (lines(pair(chosen="\udfff")), "half a surrogate pair"),
    (lines(pair(bdhs=[1])), "field 'bdhs'"),
    (lines(pair(bdhs={"mask_seed": "7"})), "field 'bdhs.mask_seed'"),
    (lines(pair(bdhs={"mask_seed": 2**70})), "field 'bdhs.mask_seed'"),
    (lines(pair(bdhs={"rho_th": math.nan})), "field 'bdhs.rho_th'"),
    (lines(pair(bdhs={"guided": "yes"})), "field 'bdhs.guided'"),
    (lines(pair(bdhs={"guided": 1})), "field 'bdhs.guided'"),
    (lines(pair(bdhs={"rho_th": 0.5, "mask_seed": True})), "field 'bdhs.mask_seed'"),
    (lines(pair(chosen="The same.", rejected="The same.")), "no usable pair"),
    (lines(pair(chosen="A cup. " * 300)), "record pair-0: a response of .* longer than --max-response-tokens 512"),
    (lines(pair(images=["elsewhere.png"])), "record pair-0: image 'elsewhere.png' is not in the embedded world"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model folder of random weights."""
    folder = tmp_path_factory.mktemp("model")
    save_model(random_toy().state_dict(), toy_model().config.raw, TOY, folder / "llava", torch.float32)
    return str(folder / "llava")


def sample(model: str, out: Path, *argv: str) -> None:
    flags = ["--model", model, "--out", str(out / "pairs.jsonl"), "--rho-th", "0.7", "--max-new-tokens", "4", *argv]
    sample_bdhs.main(parse_config(sample_bdhs.Config, "", [*flags, "--temperature", "0"]))


def train(model: str, out: Path, *argv: str) -> None:
    flags = ["--model", model, "--out", str(out), "--eval-images", "0", "--epochs", "1", "--lora-rank", "2"]
    train_dpo.main(parse_config(train_dpo.Config, "", [*flags, *argv]))


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


REMEDIES = (";", "expected a JSON array", "at least", "between", "above", "below", "or more", "number of 64 bits")


def refused(run, match: str, *named: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message and all(str(name) in message for name in named)
    assert any(mark in message for mark in REMEDIES), f"no remedy: {message}"


@pytest.mark.parametrize("data,match", NO_DATA + BAD_INSTRUCT, ids=range(len(NO_DATA + BAD_INSTRUCT)))
def test_bad_records(model, tmp_path, data, match):
    path, out = tmp_path / "data.json", tmp_path / "out"
    path.write_bytes(data)
    refused(lambda: sample(model, out, "--data", str(path)), match, path)
    assert left_in(out) == []


@pytest.mark.parametrize("data,match", NO_DATA + BAD_PAIRS, ids=range(len(NO_DATA + BAD_PAIRS)))
def test_bad_pairs(model, tmp_path, data, match):
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    path.write_bytes(data)
    refused(lambda: train(model, out, "--pairs", str(path)), match, "" if "record pair-0" in match else path)
    assert left_in(out) == []


def test_files_that_are_not_there(model, tmp_path):
    out, none = tmp_path / "out", str(tmp_path / "none.json")
    refused(lambda: sample(model, out, "--data", none), "no such file", none)
    refused(lambda: train(model, out, "--pairs", none), "no such file; make one with sample_bdhs.py", none)
    refused(lambda: sample(model, out, "--data", str(tmp_path)), "not readable", tmp_path)  # a folder
    refused(lambda: train(model, out, "--pairs", str(tmp_path)), "not readable", tmp_path)
    refused(lambda: sample(none, out), "--model .* no such folder", none)
    refused(lambda: train(none, out, "--pairs", none), "--model .* no such folder", none)
    refused(lambda: sample(model, out, "--encoder", none), "no such folder", none)
    refused(lambda: train(model, out, "--images", str(tmp_path)), "--pairs is missing; make one")
    assert left_in(out) == []


def test_an_out_that_cannot_be(model, tmp_path):
    (tmp_path / "pairs.jsonl").mkdir()
    refused(lambda: sample(model, tmp_path), "--out .* is a folder; name the pairs file")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "good.jsonl").write_bytes(lines(pair()))
    good = str(tmp_path / "good.jsonl")
    refused(lambda: train(model, tmp_path / "file", "--pairs", good), "--out .* is a file; name a folder")
    refused(lambda: sample(model, tmp_path / "file", "--limit", "1"), "cannot be written")
    refused(lambda: train(model, tmp_path / "file" / "x", "--pairs", good), "cannot be written")
    assert left_in(tmp_path) == ["file", "good.jsonl", "pairs.jsonl"]
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("read,write,make", [(read_instruct, array, instruct), (read_pairs, lines, pair)])
def test_what_is_not_bad(tmp_path, read, write, make):
    """A byte order mark, Windows line ends, no line end at all, and whatever text may hold."""
    odd = "  <image> </s> \u2028 \x85 Zürich 東京 \x00 \u200b "
    records = [make(0), make(1), make(2, id=odd)]
    path = tmp_path / "data"
    path.write_bytes(write(*records))
    good = read(str(path), None)
    assert len(good) == 3 and good[2].id == odd
    for data in (b"\xef\xbb\xbf" + write(*records), write(*records).replace(b"\n", b"\r\n"), write(*records).rstrip()):
        path.write_bytes(data)
        assert read(str(path), None) == good
    assert read(str(path), 2) == good[:2]


def test_repeated_ids_are_numbered(tmp_path):
    """LLaVA-Instruct's ids are the pictures': records share them, and each has its own seed and place."""
    path = tmp_path / "data.json"
    path.write_bytes(array(*(instruct(i, id=name) for i, name in enumerate([7, "7", "7#2", "8", "7"]))))
    assert [record.id for record in read_instruct(str(path), None)] == ["7", "7#2", "7#2#2", "8", "7#3"]
    many = number_repeats([Record("x", "", [], "")] * 20_000)  # no quadratic search
    assert len({record.id for record in many}) == 20_000


FLAGS = [
    (sample, "--rho-th", "1.5"), (sample, "--rho-th", "-0.1"), (sample, "--rho-th", "nan"), (sample, "--n-bdhs", "0"),
    (sample, "--batch-size", "0"), (sample, "--noise-steps", "-1"), (sample, "--noise-steps", "1001"),
    (sample, "--top-p", "0"), (sample, "--top-p", "1.1"), (sample, "--max-new-tokens", "0"), (sample, "--limit", "0"),
    (sample, "--limit", "-3"), (sample, "--eps-s", "1.5"), (sample, "--eps-s", "nan"), (sample, "--device", "gpu"),
    (train, "--lr", "-1e-4"), (train, "--lr", "0"), (train, "--lr", "nan"), (train, "--lr", "inf"),
    (train, "--projector-lr", "-1"), (train, "--projector-lr", "inf"), (train, "--beta", "0"), (train, "--beta", "inf"),
    (train, "--lora-rank", "0"), (train, "--lora-alpha", "0"), (train, "--epochs", "0"), (train, "--batch-size", "0"),
    (train, "--accumulate", "0"), (train, "--warmup", "1"), (train, "--warmup", "-0.1"), (train, "--clip", "0"),
    (train, "--save-every", "0"), (train, "--eval-images", "-1"), (train, "--limit", "0"), (train, "--device", "gpu"),
    (train, "--seed", str(2**64)), (train, "--max-response-tokens", "0"),
]  # fmt: skip


@pytest.mark.parametrize("script,flag,value", FLAGS, ids=lambda x: getattr(x, "__name__", x))
def test_wrong_values_of_flags(tmp_path, script, flag, value, model):
    (tmp_path / "pairs.jsonl").write_bytes(lines(pair()))
    argv = ["--pairs", str(tmp_path / "pairs.jsonl")] if script is train else []
    refused(lambda: script(model, tmp_path / "out", *argv, f"{flag}={value}"), f"{flag} {value[:1]}")
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize("program,argv", [
    (chat, []), (chat, ["--image", "none.png"]), (chat, ["--image", "."]), (chat, ["--image", "x" * 5000]),
    (chat, ["--image", "test-000000.png", "--response", " "]), (chat, ["--rho-th", "2"]), (chat, ["--temperature=-1"]),
    (chat, ["--max-new-tokens", "0"]), (chat, ["--model", "none"]), (chat, ["--device", "gpu"]),
    (chat, ["--image", "test-000000.png", "--adapter", "none"]), (evaluate, ["--images", "0"]),
    (evaluate, ["--batch-size", "0"]), (evaluate, ["--model", "none"]), (study, ["--rows", "none"]),
    (study, ["--seeds", "0"]), (toyworld, []), (toyworld, ["--export", "none", "--limit", "0"]),
], ids=str)  # fmt: skip
def test_the_other_programs(program, argv, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["program", *argv])
    refused(program.main, "--|none|image|x{99}")
    assert left_in(tmp_path) == []


# ---------------------------------------------------------------- pictures


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


BAD_PICTURES = [
    ("none.png", "no such file; is --images .* the right folder"), ("truncated.png", "not a readable picture"),
    ("header.png", "not a readable picture"), ("broken.png", "not a readable picture"),
    ("text.png", "not a readable picture"), ("empty.png", "not a readable picture"),
    ("deep", "not a readable picture"), (".", "not a readable picture"),
    ("../outside.png", "leaves the folder --images"), ("deep/../../outside.png", "leaves the folder --images"),
    ("/etc/hostname", "leaves the folder --images"), ("link.png", "leaves the folder --images"),
    ("up/outside.png", "leaves the folder --images"), ("loop.png", "no path of a file"), ("a\0b.png", "no path"),
    ("x" * 5000 + ".png", "not a readable picture"),
]  # fmt: skip


@pytest.mark.parametrize("name,match", BAD_PICTURES, ids=[name[:20] for name, _ in BAD_PICTURES])
def test_bad_pictures(model, tmp_path, pictures, name, match):
    refused(lambda: open_image(str(pictures), name), match)
    out, images = tmp_path / "out", ["--images", str(pictures)]
    (tmp_path / "pairs.jsonl").write_bytes(lines(pair(0, images=["good.png"]), pair(1, images=[name])))
    run = ["--pairs", str(tmp_path / "pairs.jsonl"), *images]
    refused(lambda: train(model, out, *run), f"record pair-1: .*{match}.* mend it, or pass --skip-bad-records")
    assert left_in(out) == []
    (tmp_path / "data.json").write_bytes(array(instruct(0, image="good.png"), instruct(1, image=name)))
    run = ["--data", str(tmp_path / "data.json"), *images, "--batch-size", "1"]
    refused(lambda: sample(model, out, *run), match)
    assert left_in(out) == ["pairs.jsonl", "pairs.jsonl.config.json"]  # the first batch, whole
    assert (out / "pairs.jsonl").read_text().endswith("}\n") and len(read_pairs(out / "pairs.jsonl", None)) == 1


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures(tmp_path, form):
    """Whatever a file holds: an RGB picture or a `UserError`."""
    rng, seen = random.Random(form), set()
    Image.effect_noise((24, 20), 50).convert("P" if form in ("PNG", "GIF") else "RGB").save(tmp_path / "x", form)
    data = (tmp_path / "x").read_bytes()
    for _ in range(40):
        bad = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            bad[rng.randrange(len(bad) if rng.random() < 0.5 else 100)] = rng.randrange(256)
        (tmp_path / "x").write_bytes(bad[: rng.randrange(len(bad))] if rng.random() < 0.3 else bad)
        try:
            seen.add(open_image(str(tmp_path), "x").mode)
        except UserError:
            seen.add("refused")
    assert "refused" in seen <= {"RGB", "refused"}


def test_good_pictures(pictures):
    for name in ("good.png", "deep/good.png", "deep/../good.png", "inside.png", str(pictures / "good.png")):
        assert open_image(str(pictures), name).size == (40, 30)


def test_chat_takes_any_path(pictures, monkeypatch):
    """The user named that one file: there is no folder to stay in."""
    monkeypatch.chdir(pictures / "deep")
    for name in ("../good.png", "../link.png", "../up/outside.png", str(pictures / "good.png"), "good.png"):
        assert chat.picture_for(chat.Config(image=name)).mode == "RGB"
    Image.new("RGB", (7, 9)).save("test-000000.png")  # a file goes before the embedded world
    assert chat.picture_for(chat.Config(image="test-000000.png")).size == (7, 9)
    assert chat.picture_for(chat.Config(image="test-000001.png")).size == (96, 96)


# ---------------------------------------------------------------- --skip-bad-records


def test_bad_records_are_skipped_and_counted(model, tmp_path, pictures, capsys):
    good = [instruct(i, image="good.png") for i in range(3)]
    bad = [instruct(9, image="text.png"), instruct(8, image=None), 5, instruct(7, image="../outside.png")]
    (tmp_path / "good.json").write_bytes(array(*good))
    (tmp_path / "mixed.json").write_bytes(array(bad[0], good[0], bad[1], bad[2], good[1], good[2], bad[3]))
    flags = ["--images", str(pictures), "--batch-size", "2"]
    sample(model, tmp_path / "a", "--data", str(tmp_path / "good.json"), *flags)
    sample(model, tmp_path / "b", "--data", str(tmp_path / "mixed.json"), *flags, "--skip-bad-records")
    assert (tmp_path / "a" / "pairs.jsonl").read_bytes() == (tmp_path / "b" / "pairs.jsonl").read_bytes()
    assert json.loads((tmp_path / "b" / "pairs.jsonl.stats.json").read_text())["left_out"] == 2
    shown = capsys.readouterr()
    assert "2 bad records skipped, the first:" in shown.out + shown.err
    (tmp_path / "all.json").write_bytes(array(*bad[1:3]))
    run = ["--data", str(tmp_path / "all.json"), "--skip-bad-records"]
    refused(lambda: sample(model, tmp_path / "c", *run), "no usable record")
    assert left_in(tmp_path / "c") == []


def test_bad_pairs_are_skipped_and_counted(model, tmp_path, pictures, capsys):
    good = [pair(i, images=["good.png"]) for i in range(3)]
    long = pair(5, images=["good.png"], chosen="A cup. " * 300)
    bad = [pair(4, images=["text.png"]), "{", long, pair(6, prompt=None)]
    (tmp_path / "good.jsonl").write_bytes(lines(*good))
    (tmp_path / "mixed.jsonl").write_bytes(lines(bad[0], good[0], bad[1], bad[2], good[1], bad[3], good[2]))
    for name in ("good", "mixed"):
        run = ["--pairs", str(tmp_path / f"{name}.jsonl"), "--images", str(pictures), "--skip-bad-records"]
        train(model, tmp_path / name, *run)
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "good" / adapter).read_bytes() == (tmp_path / "mixed" / adapter).read_bytes()
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("2 bad records skipped, the first:") == 2  # unreadable; unusable
    (tmp_path / "all.jsonl").write_bytes(lines(bad[0], bad[2]))
    run = ["--pairs", str(tmp_path / "all.jsonl"), "--images", str(pictures), "--skip-bad-records"]
    refused(lambda: train(model, tmp_path / "all", *run), "no usable pair")
    assert left_in(tmp_path / "all") == []


# ---------------------------------------------------------------- random damage

RUBBISH = [None, True, 0, -1, 2**80, 1.5, math.nan, math.inf, "", " ", "\ud800", "\x00\x1b", "x" * 3000, [], {}, [[]],
           [None], {"role": "user"}, [{"role": "user", "content": ""}], "../../etc/passwd", "</s><image>"]  # fmt: skip


def damage(raw, rng: random.Random):
    """The value with one thing in it deleted, replaced, nested, repeated or renamed."""
    if isinstance(raw, dict) and raw and rng.random() < 0.9:
        name = rng.choice(list(raw))
        way = rng.randrange(6)
        if way == 0:
            return {k: v for k, v in raw.items() if k != name}
        if way == 1:
            return raw | {name: {name: raw[name]}}
        if way == 2:
            return {(k + "s" if k == name else k): v for k, v in raw.items()}
        return raw | {name: damage(raw[name], rng)}
    if isinstance(raw, list) and raw and rng.random() < 0.7:
        at = rng.randrange(len(raw))
        head, tail = raw[:at], raw[at + 1 :]
        return rng.choice([head + tail, raw + [raw[at]], [*head, damage(raw[at], rng), *tail]])
    return rng.choice([*RUBBISH, [raw], {"value": raw}, str(raw)])


def damage_text(line: str, rng: random.Random) -> str:
    """The line cut short, or with a character deleted, repeated or put in; never a line end."""
    at = rng.randrange(len(line))
    put = rng.choice(["", "\x00", "\x07", "\t", '"', "\\", "}", "[", ",", "\u2028", "\ufeff", "\\ud800", "é", line[at]])
    return rng.choice([line[:at], line[:at] + put + line[at:], line[:at] + put + line[at + 1 :], line[at:]])


COLLATE = PairCollator(toy_tokenizer(), toy_processor(), "toy", 36, 64)
LONG = pair(1, prompt=[MESSAGE, {"role": "assistant", "content": "A"}, MESSAGE])


@pytest.mark.parametrize("seed", range(60))
def test_damaged_pairs(tmp_path, seed):
    """A damaged line is a UserError that names it, or a record that all that follows can use."""
    rng, path, neighbours = random.Random(seed), tmp_path / "pairs.jsonl", [pair(0), pair(2)]
    raw = rng.choice([pair(1), LONG])
    middle = damage_text(json.dumps(raw), rng) if seed % 3 == 0 else json.dumps(damage(raw, rng))
    path.write_bytes(lines(neighbours[0], middle, neighbours[1]))
    try:
        records = read_pairs(path, None)
    except UserError as error:
        assert f"{path}, line 2: " in str(error) and "--skip-bad-records" in str(error)
        records = read_pairs(path, None, skip_bad=True)
        assert len(records) == 2
    by_id = {record.id: record for record in records}
    assert [by_id.pop(f"pair-{i}") for i in (0, 2)] == [records[0], records[-1]]
    path.write_bytes(lines(*neighbours))
    assert [records[0], records[-1]] == read_pairs(path, None)
    for record in by_id.values():
        try:
            usable = COLLATE.usable([record], skip_bad=False)
        except UserError:
            continue
        assert COLLATE(usable).tree.ids.shape[0] == 1
        train_dpo.write_report(tmp_path / "r.html", "", {}, [COLLATE.report_pair(record)], [], {})


@pytest.mark.parametrize("seed", range(60))
def test_damaged_records(tmp_path, seed):
    rng, path, neighbours = random.Random(seed), tmp_path / "data.json", [instruct(0), instruct(2)]
    middle = damage(instruct(1), rng)
    path.write_bytes(array(neighbours[0], middle, neighbours[1]))
    try:
        records = read_instruct(str(path), None)
    except UserError as error:
        assert f"{path}, record 2: " in str(error) and "--skip-bad-records" in str(error)
        records = read_instruct(str(path), None, skip_bad=True)
        assert len(records) == 2
    for record in records[1:-1]:
        toy_tokenizer().prompt(record.turns)
        assert record.id.strip() and record.chosen.strip() and all(text.strip() for _, text in record.turns)
        json.dumps(record.id + record.image).encode("utf-8")
    path.write_bytes(array(*neighbours))
    assert [records[0], records[-1]] == read_instruct(str(path), None)


@pytest.mark.parametrize("value", [-1.0, 1e-320, float("inf"), float("nan")])
def test_a_temperature_that_cannot_divide_is_refused(tmp_path, value):
    with pytest.raises(UserError, match="--temperature"):
        sample_bdhs.main(sample_bdhs.Config(out=str(tmp_path / "pairs.jsonl"), limit=1, temperature=value))
    assert list(tmp_path.iterdir()) == []


def test_only_the_placeholder_is_taken_out_of_a_question():
    talk = [{"from": "human", "value": "<image>\nWhat does <image> mean?"}, {"from": "gpt", "value": "A picture."}]
    record = instruct_record({"id": "1", "image": "a.png", "conversations": talk})
    assert record.turns == [("user", "What does <image> mean?")]
