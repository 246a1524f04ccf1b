"""Tokenisation: text is never a control token, and comes back as it was; folders that are
refused.
"""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import refused, toy_tokenizer
from llama_tokenizer import AWKWARD, VICUNA, llama2_folder, random_text
from llava_folders import edit_json
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from minialign.data.tokenizer import Tokenizer
from minialign.edge import CHECKPOINT
from minialign.errors import UserError

CONTROL = ["<s>", "</s>", "<image>", "<pad>", "<unk>"]


@pytest.fixture(scope="module", params=["toy", "llama-2"])
def both(request, oracle, tmp_path_factory):
    """(our tokenizer, transformers' `text -> ids`) of one folder."""
    folder = (
        CHECKPOINT
        if request.param == "toy"
        else llama2_folder(tmp_path_factory.mktemp("llama") / "model", chatml=False)
    )
    theirs = oracle.transformers.AutoTokenizer.from_pretrained(folder)
    return Tokenizer.from_folder(
        folder
    ), lambda text: theirs(text, add_special_tokens=False).input_ids


def test_ids_of_llava(tmp_path):
    """The ids that LLaVA-1.5 gives to the head of a question; and its template, word for word."""
    tokenizer = Tokenizer.from_folder(llama2_folder(tmp_path / "model", chatml=False))
    assert tokenizer.template.system == VICUNA
    bare = Tokenizer.from_folder(tmp_path / "model", "short")
    ids = bare.prompt([("user", "What")])
    assert ids[:9] == [1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 5618]
    assert (tokenizer.bos[0], tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id) == (
        1,
        2,
        32001,
        32000,
    )
    ids = tokenizer.prompt([("user", "What is it?"), ("assistant", "A dog."), ("user", "Sure?")])
    # Decoding shows the space that stands for the beginning of every piece of text between control
    # tokens.
    assert tokenizer.fast.decode(ids, skip_special_tokens=False) == (
        f"<s> {VICUNA}USER: <image> \nWhat is it? ASSISTANT: A dog.</s> USER: Sure? ASSISTANT:"
    )


def test_template_of_the_embedded_world():
    tokenizer = toy_tokenizer()
    assert tokenizer.template.system == ""
    assert [tokenizer.fast.id_to_token(i) for i in (tokenizer.bos[0], tokenizer.eos_id)] == [
        "<s>",
        "</s>",
    ]
    assert [tokenizer.fast.id_to_token(i) for i in (tokenizer.pad_id, tokenizer.image_id)] == [
        "<pad>",
        "<image>",
    ]


# ---------------------------------------------------------------- text is data


@pytest.mark.parametrize("control", CONTROL)
@pytest.mark.parametrize(
    "around", ["{}", "a{}b", " {} ", "{0}{0}", "say {}", "{}\n", "\n{}.", "<{}>", "it is {} ?"]
)
def test_typed_control_tokens_are_text(both, control, around):
    ours, theirs = both
    text = around.format(control)
    forbidden = {ours.fast.token_to_id(name) for name in CONTROL}
    assert None not in forbidden and len(forbidden) == len(CONTROL)
    ids = ours.encode(text)
    assert ids and not forbidden & set(ids)
    assert ours.decode(ids) == text
    assert forbidden & set(theirs(text))  # transformers does make a control token of it
    prompt = ours.prompt([("user", text), ("assistant", text), ("user", text)])
    assert (prompt.count(ours.bos[0]), prompt.count(ours.eos_id), prompt.count(ours.image_id)) == (
        1,
        1,
        1,
    )
    assert not (forbidden - {ours.bos[0], ours.eos_id, ours.image_id}) & set(prompt)
    assert ours.response(text).count(ours.eos_id) == 1


def test_tokens_that_were_added_as_ordinary_are_control_tokens_all_the_same(tmp_path):
    """Hub folders have `<image>` with `special: false`; so has this one, with any other added
    token.
    """
    folder = llama2_folder(tmp_path / "model", chatml=False)
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_tokens([AddedToken("<video>", special=False, normalized=False)])
    fast.save(str(folder / "tokenizer.json"))
    raw = json.loads((folder / "tokenizer.json").read_text())
    assert {token["content"]: token["special"] for token in raw["added_tokens"]}["<video>"] is False
    ours = Tokenizer.from_folder(folder)
    for text in ("<video>", "a <video> b"):
        assert fast.token_to_id("<video>") in fast.encode(text).ids
        assert (
            fast.token_to_id("<video>") not in ours.encode(text)
            and ours.decode(ours.encode(text)) == text
        )


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_decode_gives_awkward_texts_back(both, text):
    ours, _ = both
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.response(text)) == text


@pytest.mark.parametrize("seed", range(20))
def test_decode_gives_random_texts_back(both, seed):
    ours, _ = both
    rng = random.Random(seed)
    text = "".join(rng.choice([random_text(rng), rng.choice(CONTROL)]) for _ in range(4))
    assert ours.decode(ours.encode(text)) == text


def test_decode_leaves_control_tokens_out(both):
    ours, _ = both
    inside = [
        ours.bos[0],
        *ours.encode("It is A"),
        ours.image_id,
        ours.pad_id,
        ours.eos_id,
        ours.pad_id,
    ]
    assert ours.decode(inside) == "It is A" and ours.decode([]) == ""
    assert ours.encode("") == [] and ours.response("") == [ours.eos_id]


def as_unigram(raw: dict) -> None:
    """The same pieces, of which the most likely are taken."""
    vocab = sorted(raw["model"]["vocab"].items(), key=lambda item: item[1])
    scores = [[piece, -1.0 - 5 * (len(piece) < 2)] for piece, _ in vocab]
    raw["model"] = {"type": "Unigram", "unk_id": 0, "vocab": scores, "byte_fallback": True}


def as_words(raw: dict) -> None:
    """The same pieces, each a word between spaces."""
    raw["model"] = {"type": "WordLevel", "vocab": raw["model"]["vocab"], "unk_token": "<unk>"}
    raw |= {"pre_tokenizer": {"type": "WhitespaceSplit"}, "normalizer": None}


def as_whole_words(raw: dict) -> None:
    """A word that is a piece is not merged, as in Llama-3's."""
    raw["model"]["ignore_merges"] = True
    raw |= {"pre_tokenizer": {"type": "WhitespaceSplit"}, "normalizer": None}


def with_merges(raw: dict) -> None:
    """`</s>` is merged of its characters."""
    model = raw["model"]
    model["merges"] = [["<", "/"], ["</", "s"], ["</s", ">"], *model["merges"]]
    for piece in ("</", "</s"):
        model["vocab"].setdefault(piece, 570)


def with_compatible_characters(raw: dict) -> None:
    """Full-width brackets become plain ones."""
    rules = [{"type": "NFKC"}, *raw["normalizer"]["normalizers"]]
    raw["normalizer"] = {"type": "Sequence", "normalizers": rules}


def with_other_brackets(raw: dict) -> None:
    """What no spelling shows: `{/s}` is made the control token, and `</s>` is not."""
    with_merges(raw)
    rules = [("<", "["), (">", "]"), ("{", "<"), ("}", ">")]
    first = [{"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in rules]
    raw["normalizer"]["normalizers"] = first + raw["normalizer"]["normalizers"]


CHANGES = [as_unigram, as_words, as_whole_words, with_merges, with_compatible_characters]
TYPED = ["a </s> b", "</s>", "</s></s>", "a<image>b", "<s>", "\uff1c/s\uff1e", "say <pad> now"]


@pytest.mark.parametrize("change", CHANGES)
def test_text_is_data_to_every_kind_of_tokenizer(folder, change):
    """Ordinary pieces, or the folder is refused."""
    edit_json(folder / "tokenizer.json", change)
    try:
        ours = Tokenizer.from_folder(folder)
    except UserError as error:
        assert change is not with_compatible_characters
        assert "becomes the control token" in str(error) and "tokenizer.json" in str(error)
        return
    bare = ours.prompt([("user", "a")])
    for text in TYPED:
        ids = ours.prompt([("user", text)])
        for i in (ours.eos_id, ours.image_id, *ours.bos, ours.pad_id):
            assert ids.count(i) == bare.count(i)
        assert ours.response(text).count(ours.eos_id) == 1


def test_a_text_that_becomes_a_control_token_is_refused(folder):
    """Where loading could not see it, as it looks at the tokens' own spellings."""
    edit_json(folder / "tokenizer.json", with_other_brackets)
    ours = Tokenizer.from_folder(folder)
    assert ours.eos_id not in ours.encode("a </s> b")
    for call in (ours.encode, ours.response, lambda text: ours.prompt([("user", text)])):
        refused(lambda call=call: call("a{/s} b"), "control token '</s>'", "change the text")


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("\u2581cup", "config.json: image_token_index is 442, the ordinary piece"),
        ("</s>", "config.json: image_token_index is 2, which is '</s>', too"),
        ("<s>", "config.json: image_token_index is 1, which is '<s>', too"),
        ("<unk>", "config.json: image_token_index is 0, which is '<unk>', too"),
        ("<0x41>", "config.json: image_token_index is 70, the ordinary piece"),
    ],
)
def test_an_image_token_that_is_another_piece(folder, piece, message):
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    edit_json(folder / "config.json", lambda raw: raw.update(image_token_index=vocabulary[piece]))
    refused(lambda: Tokenizer.from_folder(folder), message, "mend it")


def test_ids_with_gaps(folder):
    """The marks of control tokens would get the ids of pieces."""

    def drop(raw):
        del raw["model"]["vocab"]["\u2581cup"]
        raw["model"]["merges"] = [m for m in raw["model"]["merges"] if "".join(m) != "\u2581cup"]

    edit_json(folder / "tokenizer.json", drop)
    refused(lambda: Tokenizer.from_folder(folder), "tokenizer.json", "have gaps")


def test_a_tokenizer_that_panics(folder, monkeypatch):
    """What the library's Rust code raises then is no Exception."""
    ours = Tokenizer.from_folder(folder)

    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, text, add_special_tokens):
            raise PanicException("index out of bounds")

    refused(lambda: replace(ours, fast=Panicking()).encode("a"), "tokenizer.json", "out of bounds")


# ---------------------------------------------------------------- what a post-processor adds


def processor(*single: str, ids: dict | None = None) -> dict:
    """A post-processor that puts tokens around the text, which is `A`."""
    ids = {"<s>": 1, "</s>": 2, "<pad>": 3, "<image>": 4} if ids is None else ids
    pieces = []
    for name in single:
        kind = "Sequence" if name == "A" else "SpecialToken"
        pieces.append({kind: {"id": name, "type_id": 0}})
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    rule = {"type": "TemplateProcessing", "single": pieces, "pair": pair}
    return rule | {"special_tokens": tokens}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}


@pytest.mark.parametrize(
    "rule",
    [
        None,
        processor("<s>", "A"),
        processor("<s>", "A", "</s>"),
        processor("A", "</s>"),
        BYTES,
        ROBERTA | {"trim_offsets": True, "add_prefix_space": True},
        {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]},
        {"type": "Sequence", "processors": [BYTES, processor("<s>", "A", "</s>")]},
    ],
)
def test_an_end_token_of_the_post_processor_is_left_out(folder, rule):
    edit_json(folder / "tokenizer.json", lambda raw: raw.update(post_processor=rule))
    turns, ours = [("user", "What is there?"), ("assistant", "A cup.")] * 2, toy_tokenizer()
    found = Tokenizer.from_folder(folder)
    assert found.prompt(turns[:3]) == ours.prompt(turns[:3])
    assert found.response("A cup.") == ours.response("A cup.")


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (processor("<pad>", "A"), "'<pad>'"),
        (processor("<s>", "A", "<image>"), "'<image>'"),
        (processor("<s>", "<s>", "A"), "'<s>'"),
        (processor("</s>", "A"), "'</s>'"),
        (processor("A", "<s>"), "'<s>'"),
        (processor("<s>", "A", ids={"<s>": 9}), "'<s>'"),
        (processor("<s>", "A", ids={}), "damaged"),
        (processor("<s>"), "damaged"),
        ({"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<pad>", 3]}, "'<pad>'"),
        ({"type": "Other"}, "unknown kind"),
        ("x", "damaged"),
    ],
)
def test_anything_else_of_the_post_processor_is_refused(folder, rule, name):
    edit_json(folder / "tokenizer.json", lambda raw: raw.update(post_processor=rule))
    refused(lambda: Tokenizer.from_folder(folder), "tokenizer.json: its post_processor", name)


def test_a_beginning_token_has_the_name_that_tokenizer_config_gives_it(folder):
    edit_json(
        folder / "tokenizer.json", lambda raw: raw.update(post_processor=processor("<pad>", "A"))
    )
    for token in ("<pad>", {"content": "<pad>", "special": True}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
        assert Tokenizer.from_folder(folder).bos == [3]


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path) -> Path:
    """The embedded tokenizer's files, to be spoilt."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copyfile(CHECKPOINT / name, tmp_path / name)
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


@pytest.mark.parametrize("pad,expected", [(None, 0), (0, 0), (578, 578), ("absent", 0)])
def test_padding_id(folder, pad, expected):
    raw = json.loads((folder / "config.json").read_text()) | {"pad_token_id": pad}
    if pad == "absent":
        del raw["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert Tokenizer.from_folder(folder).pad_id == expected


def test_template_without_our_own_key_is_vicuna_v1(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["minialign_template"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert Tokenizer.from_folder(folder).template.system == VICUNA


@pytest.mark.parametrize("name", ["pad_token_id", "image_token_index"])
@pytest.mark.parametrize("value", [-1, 579, 10**9, "x", True, 1.5])
def test_ids_that_the_model_does_not_have(folder, name, value):
    raw = json.loads((folder / "config.json").read_text()) | {name: value}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        UserError, match=f"config.json: {name} is {value!r}, no id below vocab_size"
    ):
        Tokenizer.from_folder(folder)


def test_a_tokenizer_of_a_larger_model(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["vocab_size"] = 570
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="has ids up to 578, config.json a vocab_size of 570"):
        Tokenizer.from_folder(folder)


def test_stored_truncation_and_padding_are_ignored(folder):
    """As transformers ignores them: a prompt is never cut."""
    turns, whole = [("user", "What is there? " * 5)], toy_tokenizer()
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.enable_truncation(8)
    fast.enable_padding(length=16)
    fast.save(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_folder(folder)
    assert ours.prompt(turns) == whole.prompt(turns) and ours.answer("A cup.") == whole.answer(
        "A cup."
    )


def test_ids_behind_the_vocabulary_decode_to_nothing():
    """A model may have more rows than the tokenizer has pieces; marks stand there, and must not be
    seen.
    """
    tokenizer = toy_tokenizer()
    assert tokenizer.decode([*tokenizer.answer("A cup."), *range(579, 600)]) == "A cup."
