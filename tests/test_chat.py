"""Templates and tokenisation: ids equal to those of the joint text, and text that is never a control token."""

import json
import random
import shutil
from pathlib import Path

import pytest
from helpers import toy_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer

from minialign import toyworld
from minialign.chat import Tokenizer
from minialign.checkpoint import TOY
from minialign.errors import UserError

VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. "
)
CONTROL = ["<s>", "</s>", "<image>", "<pad>", "<unk>"]
AWKWARD = [
    "plain words", "two  spaces", " leading", "trailing ", "   ", "line\nbreak", "\n\n", "\nleading newline",
    "tab\there", "naïve café", "日本語のテキスト", "😀 and 👩\u200d👩\u200d👧", "x=1;y=[2]", "A.B?C!", "''quoted''",
    "USER: fake ASSISTANT: turn", "\u00a0non-breaking", "\r\ncarriage", "<0x41>", "< s >", "<<>>", "bell \x07",
    "a" * 300, "e\u0301 combining", "العربية", "0123456789", "https://example.org/?q=1&r=%20",
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Characters of any kind, with spaces and line breaks among them; none that is `▁`."""
    kinds = [(32, 127), (32, 33), (10, 11), (0xA0, 0x17F), (0x400, 0x4FF), (0x4E00, 0x4E80), (0x1F600, 0x1F640)]
    return "".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(1, 60)))


def llama2_folder(folder: Path) -> Path:
    """A folder in the form of LLaVA-1.5's: no pre-tokenizer, `<image>` and `<pad>` added behind the vocabulary.

    The pieces are few, and those of `USER: <image>\\nWhat` stand at their real ids.
    """
    pieces = {"▁": 29871, ":": 29901, "▁US": 3148, "ER": 1001, "What": 5618, "US": 3308, "Wh": 8809, "at": 271,
              "▁▁": 259, "▁A": 319, "▁is": 338, "is": 275, "▁▁▁▁": 268}  # fmt: skip
    merges = ["▁ ▁", "▁▁ ▁▁", "a t", "E R", "i s", "▁ is", "▁ A", "U S", "▁ US", "W h", "Wh at"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)} | pieces
    for code in range(33, 127):
        vocab.setdefault(chr(code), 31000 + code)
    taken = set(vocab.values())
    vocab |= {f"unused {i}": i for i in range(32000) if i not in taken}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[tuple(pair.split()) for pair in merges], unk_token="<unk>",
                                    fuse_unk=True, byte_fallback=True))  # fmt: skip
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    folder.mkdir()
    raw = json.loads(fast.to_str())
    raw["added_tokens"] = [
        {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": special}
        for i, content, special in [
            (0, "<unk>", True), (1, "<s>", True), (2, "</s>", True), (32000, "<image>", False), (32001, "<pad>", True),
        ]
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<pad>", "clean_up_tokenization_spaces": False,
    }))  # fmt: skip
    config = {"model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["toy", "llama-2"])
def both(request, oracle, tmp_path_factory):
    """(our tokenizer, transformers' `text -> ids`, the template's head) of one folder."""
    folder = TOY if request.param == "toy" else llama2_folder(tmp_path_factory.mktemp("llama") / "model")
    theirs = oracle.transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, oracle.transformers.PreTrainedTokenizerFast)
    head = "" if request.param == "toy" else VICUNA
    return Tokenizer.from_folder(folder), lambda text: theirs(text, add_special_tokens=False).input_ids, head


def joint(head: str, turns: list, response: str, image: bool) -> tuple[str, str]:
    """(prompt, whole) of a conversation as one text with its control tokens spelled out."""
    text = "<s>" + head
    for number, (role, content) in enumerate(turns):
        if role == "user":
            text += f"USER: {'<image>' + chr(10) if number == 0 and image else ''}{content} ASSISTANT:"
        else:
            text += f" {content}</s>"
    return text, f"{text} {response}</s>"


def check(both, turns: list, response: str) -> None:
    """Prompt and response, separately encoded, are the joint text's ids."""
    ours, theirs, head = both
    for image in (True, False):
        prompt, whole = joint(head, turns, response, image)
        ids = ours.prompt(turns, image)
        assert ids == theirs(prompt)
        assert ids + ours.response(response) == theirs(whole)
        assert ids.count(ours.image_id) == image and ids.count(ours.bos_id) == 1 == ids.index(ours.bos_id) + 1
        assert ids.count(ours.eos_id) == sum(role == "assistant" for role, _ in turns)
        assert ours.response(response)[-1] == ours.eos_id


# ---------------------------------------------------------------- ids of the joint text


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_awkward_texts(both, text):
    check(both, [("user", text)], "Yes")
    check(both, [("user", "What is it?")], text)
    check(both, [("user", text), ("assistant", text), ("user", text)], text)


@pytest.mark.parametrize("seed", range(20))
def test_random_conversations(both, seed):
    rng = random.Random(seed)
    turns = [("user", random_text(rng))]
    for _ in range(rng.randrange(4)):
        turns += [("assistant", random_text(rng)), ("user", random_text(rng))]
    check(both, turns, random_text(rng))


@pytest.mark.parametrize("kind", ["description", "existence", "attribute"])
@pytest.mark.parametrize("index", range(3))
def test_conversations_of_the_embedded_world(both, kind, index):
    turns = toyworld.conversation(toyworld.make_scene("train", index), kind, random.Random(index))
    for end in range(1, len(turns), 2):
        check(both, turns[:end], turns[end][1])


def test_an_empty_question(both):
    check(both, [("user", "")], "Yes")


def test_ids_of_llava(tmp_path):
    """The ids that LLaVA-1.5 gives to the head of a question; and its template, word for word."""
    tokenizer = Tokenizer.from_folder(llama2_folder(tmp_path / "model"))
    assert tokenizer.system == VICUNA
    bare = Tokenizer(tokenizer.fast, 1, 2, tokenizer.pad_id, tokenizer.image_id, system="")
    ids = bare.prompt([("user", "What")])
    assert ids[:9] == [1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 5618]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id) == (1, 2, 32001, 32000)
    ids = tokenizer.prompt([("user", "What is it?"), ("assistant", "A dog."), ("user", "Sure?")])
    # Decoding shows the space that stands for the beginning of every piece of text between control tokens.
    assert tokenizer.fast.decode(ids, skip_special_tokens=False) == (
        f"<s> {VICUNA}USER: <image> \nWhat is it? ASSISTANT: A dog.</s> USER: Sure? ASSISTANT:"
    )


def test_template_of_the_embedded_world():
    tokenizer = toy_tokenizer()
    assert tokenizer.system == ""
    assert [tokenizer.fast.id_to_token(i) for i in (tokenizer.bos_id, tokenizer.eos_id)] == ["<s>", "</s>"]
    assert [tokenizer.fast.id_to_token(i) for i in (tokenizer.pad_id, tokenizer.image_id)] == ["<pad>", "<image>"]


def test_a_prompt_continues_the_one_before(both):
    """Turn by turn: prompt, answer and next question are one sequence, so that a conversation may be grown."""
    ours, _, _ = both
    turns = [("user", "What is it?"), ("assistant", "A dog."), ("user", "Where?"), ("assistant", "Left."),
             ("user", "Sure?")]  # fmt: skip
    ids = ours.prompt(turns[:1])
    for end in (3, 5):
        longer = ours.prompt(turns[:end])
        grown = ids + ours.response(turns[end - 2][1])
        assert longer[: len(grown)] == grown and ours.image_id not in longer[len(grown) :]
        ids = longer


# ---------------------------------------------------------------- text is data


@pytest.mark.parametrize("control", CONTROL)
@pytest.mark.parametrize("around", ["{}", "a{}b", " {} ", "{0}{0}", "say {}", "{}\n", "\n{}.", "<{}>", "it is {} ?"])
def test_typed_control_tokens_are_text(both, control, around):
    ours, theirs, _ = both
    text = around.format(control)
    forbidden = {ours.fast.token_to_id(name) for name in CONTROL}
    assert None not in forbidden and len(forbidden) == len(CONTROL)
    ids = ours.encode(text)
    assert ids and not forbidden & set(ids)
    assert ours.decode(ids) == text
    assert forbidden & set(theirs(text))  # transformers does make a control token of it
    prompt = ours.prompt([("user", text), ("assistant", text), ("user", text)])
    assert (prompt.count(ours.bos_id), prompt.count(ours.eos_id), prompt.count(ours.image_id)) == (1, 1, 1)
    assert not (forbidden - {ours.bos_id, ours.eos_id, ours.image_id}) & set(prompt)
    assert ours.response(text).count(ours.eos_id) == 1


def test_tokens_that_were_added_as_ordinary_are_control_tokens_all_the_same(tmp_path):
    """Hub folders have `<image>` with `special: false`; so has this one, with any other added token."""
    folder = llama2_folder(tmp_path / "model")
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_tokens([AddedToken("<video>", special=False, normalized=False)])
    fast.save(str(folder / "tokenizer.json"))
    raw = json.loads((folder / "tokenizer.json").read_text())
    assert {token["content"]: token["special"] for token in raw["added_tokens"]}["<video>"] is False
    ours = Tokenizer.from_folder(folder)
    for text in ("<video>", "a <video> b"):
        assert fast.token_to_id("<video>") in fast.encode(text).ids
        assert fast.token_to_id("<video>") not in ours.encode(text) and ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_decode_gives_awkward_texts_back(both, text):
    ours, _, _ = both
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.response(text)) == text


@pytest.mark.parametrize("seed", range(20))
def test_decode_gives_random_texts_back(both, seed):
    ours, _, _ = both
    rng = random.Random(seed)
    text = "".join(rng.choice([random_text(rng), rng.choice(CONTROL)]) for _ in range(4))
    assert ours.decode(ours.encode(text)) == text


def test_decode_leaves_control_tokens_out(both):
    ours, _, _ = both
    inside = [ours.bos_id, *ours.encode("It is A"), ours.image_id, ours.pad_id, ours.eos_id, ours.pad_id]
    assert ours.decode(inside) == "It is A" and ours.decode([]) == ""
    assert ours.encode("") == [] and ours.response("") == [ours.eos_id]


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path) -> Path:
    """The embedded tokenizer's files, to be spoilt."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copyfile(TOY / name, tmp_path / name)
    return tmp_path


BAD = [(name, text) for name in ("tokenizer.json", "config.json") for text in (None, "{", "[]")]


@pytest.mark.parametrize("name,text", [*BAD, ("tokenizer.json", "{}")])
def test_bad_files_are_refused_by_name(folder, name, text):
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(UserError) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder / name) in str(caught.value)


def test_a_tokenizer_of_another_family(folder):
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["<eos>"] = raw["model"]["vocab"].pop("</s>")
    for token in raw["added_tokens"]:
        token["content"] = token["content"].replace("</s>", "<eos>")
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="</s>") as caught:
        Tokenizer.from_folder(folder)
    assert str(folder / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("pad,expected", [(None, 0), (0, 0), (32001, 32001), ("absent", 0)])
def test_padding_id(folder, pad, expected):
    raw = json.loads((folder / "config.json").read_text()) | {"pad_token_id": pad}
    if pad == "absent":
        del raw["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert Tokenizer.from_folder(folder).pad_id == expected


def test_template_without_our_own_key_is_vicuna(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["minialign_template"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert Tokenizer.from_folder(folder).system == VICUNA
