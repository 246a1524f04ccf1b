"""Templates: prompt and response, separately encoded, are the ids of the joint text as transformers
encodes it.
"""

import json
import random
from dataclasses import asdict

import pytest
from helpers import refused
from llama_tokenizer import (
    AWKWARD,
    FORMS,
    VICUNA,
    joint,
    llama2_folder,
    random_text,
    with_metaspace,
)
from llava_folders import edit_json
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from minialign.data.templates import TEMPLATES, asked_form, template_of
from minialign.data.tokenizer import Tokenizer
from minialign.edge import CHECKPOINT
from minialign.model.config import read_config
from minialign.toy import world


@pytest.fixture(scope="module", params=["toy", *FORMS, "chatml-metaspace", "vicuna_v1-metaspace"])
def both(request, oracle, tmp_path_factory):
    """(our tokenizer, transformers' `text -> ids`, the template's form) of one folder."""
    name, _, metaspace = request.param.partition("-")
    folder = (
        CHECKPOINT if name == "toy" else llama2_folder(tmp_path_factory.mktemp("llama") / "model")
    )
    if metaspace:
        with_metaspace(folder)
    theirs = oracle.transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, oracle.transformers.PreTrainedTokenizerFast)
    form = FORMS["short" if name == "toy" else name]
    ours = Tokenizer.from_folder(folder, None if name == "toy" else name)
    return ours, lambda text: theirs(text, add_special_tokens=False).input_ids, form


def check(both, turns: list, response: str) -> None:
    """Prompt and response, separately encoded, are the joint text's ids."""
    ours, theirs, form = both
    for image in (True, False):
        prompt, whole = joint(form, turns, response, "<image>" if image else "")
        ids = ours.prompt(turns, image)
        assert ids[0] == 1 and ids[1:] == theirs(prompt)
        assert ids[1:] + ours.response(response) == theirs(whole)
        assert ids.count(ours.image_id) == image and ids.count(1) == 1
        assert (
            ours.response(response).count(ours.eos_id) == 1
            and ours.response(response)[-1] == ours.eos_id
        )


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
    turns = world.conversation(world.make_scene("train", index), kind, random.Random(index))
    for end in range(1, len(turns), 2):
        check(both, turns[:end], turns[end][1])


def test_an_empty_question(both):
    check(both, [("user", "")], "Yes")


def test_a_prompt_continues_the_one_before(both):
    """Turn by turn: prompt, answer and next question are one sequence, so that a conversation may
    be grown.
    """
    ours, _, _ = both
    turns = [
        ("user", "What is it?"),
        ("assistant", "A dog."),
        ("user", "Where?"),
        ("assistant", "Left."),
        ("user", "Sure?"),
    ]
    ids = ours.prompt(turns[:1])
    for end in (3, 5):
        longer = ours.prompt(turns[:end])
        grown = ids + ours.response(turns[end - 2][1])
        assert longer[: len(grown)] == grown and ours.image_id not in longer[len(grown) :]
        ids = longer


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({}, "vicuna_v1"),
        ({"minialign_template": "llava_v1"}, "llava_v1"),
        ({"minialign_template": "short"}, "short"),
        ({"text_config": {"vocab_size": 32064, "model_type": "mistral"}}, "mistral"),
        ({"text_config": {"vocab_size": 32064, "model_type": "llama"}}, "vicuna_v1"),
    ],
)
def test_template_follows_from_the_config(tmp_path, changes, expected):
    folder = llama2_folder(tmp_path / "model", chatml=False)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    turns = [("user", "What is it?")]
    assert Tokenizer.from_folder(folder).prompt(turns) == Tokenizer.from_folder(
        folder, expected
    ).prompt(turns)
    others = [
        Tokenizer.from_folder(folder, name).prompt(turns)
        for name in FORMS
        if name not in (expected, "chatml")
    ]
    assert Tokenizer.from_folder(folder).prompt(turns) not in others


def test_a_vocabulary_with_chatml_tokens_means_chatml(tmp_path):
    folder, turns = llama2_folder(tmp_path / "model"), [("user", "What is it?")]
    assert Tokenizer.from_folder(folder).prompt(turns) == Tokenizer.from_folder(
        folder, "chatml"
    ).prompt(turns)
    assert Tokenizer.from_folder(folder).eos_id == 32003


def test_templates_that_cannot_be(tmp_path):
    folder = llama2_folder(tmp_path / "model", chatml=False)
    refused(
        lambda: Tokenizer.from_folder(folder, "chatml"),
        "tokenizer.json",
        "<|im_end|>",
        "--template FILE",
    )
    refused(lambda: Tokenizer.from_folder(folder, "vicunya"), "--template 'vicunya'", *FORMS)


def test_an_answer_that_merges_with_what_precedes_it(tmp_path):
    """chatml ends in a line break; where two of them are one piece, an answer's own first one is
    kept.
    """
    folder = llama2_folder(tmp_path / "model")
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    for index, piece in enumerate(("\n", "\n\n")):
        vocab = {name: i for name, i in vocab.items() if i != 31990 + index} | {
            piece: 31990 + index
        }
    raw["model"] |= {"vocab": vocab, "merges": [*raw["model"]["merges"], ["\n", "\n"]]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with_metaspace(folder)
    ours = Tokenizer.from_folder(folder, "chatml")
    for text in ("\nA", "\n", "\n\n\nA"):
        assert ours.decode(ours.answer(text)) == text


# ---------------------------------------------------------------- the folder's chat template

USER_AND_ASSISTANT = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{% endfor %}ASSISTANT:"
)
INST = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
HEADERS = "<|start_header_id|>user<|end_header_id|>{{ messages[0].content }}<|eot_id|>"


def form_for(folder) -> str:
    """The name of the form that a folder is asked in."""
    return template_of(folder, read_config(folder), False, None)[0]


@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [
        (USER_AND_ASSISTANT, "vicuna_v1"),
        ("A chat between a curious human and ... " + USER_AND_ASSISTANT, "llava_v1"),
        (INST, "mistral"),
        ("A chat between a curious human and ... " + INST, "mistral"),
        ("<|im_start|>{{ messages[0].role }}", "chatml"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_chat_template_decides(tmp_path, chat_template, expected, family):
    """In whichever file it stands, whatever the family; not against config.json's own."""
    folder = llama2_folder(tmp_path / "model", chatml=False)
    edit_json(folder / "config.json", lambda raw: raw["text_config"].update(model_type=family))
    usual = "mistral" if family == "mistral" else "vicuna_v1"
    assert form_for(folder) == usual
    stored = {"name": "default", "template": chat_template}
    for name, text in (
        ("chat_template.jinja", chat_template),
        ("chat_template.json", json.dumps({"chat_template": chat_template})),
        ("processor_config.json", json.dumps({"chat_template": chat_template})),
        ("tokenizer_config.json", json.dumps({"chat_template": [stored]})),
    ):
        before = (folder / name).read_text() if (folder / name).exists() else "{}"
        (folder / name).write_text(text)
        assert form_for(folder) == expected
        (folder / name).unlink() if name.endswith("jinja") else (folder / name).write_text(before)
        assert form_for(folder) == usual
    (folder / "chat_template.jinja").write_text(chat_template)
    edit_json(folder / "config.json", lambda raw: raw.update(minialign_template="short"))
    assert form_for(folder) == "short"


@pytest.mark.parametrize("chat_template", [HEADERS, INST + USER_AND_ASSISTANT, ""])
def test_a_chat_template_of_another_form_is_refused(tmp_path, chat_template):
    folder = llama2_folder(tmp_path / "model", chatml=False)
    (folder / "chat_template.jinja").write_text(chat_template)
    path = folder / "chat_template.jinja"
    refused(lambda: Tokenizer.from_folder(folder), path, "--template FILE", "vicuna_v1")
    assert Tokenizer.from_folder(folder, "vicuna_v1").name == "vicuna_v1"
    path.write_bytes(b"\xff\xfe")
    refused(lambda: Tokenizer.from_folder(folder), path, "not readable")


# ---------------------------------------------------------------- forms of files

LLAMA_3 = {
    "system": "",
    "user": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "answer": "{}",
    "end": "<|eot_id|>",
}
BAKLLAVA = {"system": "", "user": "USER: {}\nASSISTANT:", "answer": " {}", "end": "</s>"}


def llama3_folder(folder):
    """Byte-level pieces and control tokens as Llama-3's, with no </s> among them; transformers'
    reading of it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, "\u010a\u010a", "it"])}
    fast = FastTokenizer(models.BPE(vocab, [("\u010a", "\u010a"), ("i", "t")], ignore_merges=True))
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    names = ["begin_of_text", "start_header_id", "end_header_id", "eot_id", "reserved_0"]
    fast.add_special_tokens([*(f"<|{name}|>" for name in names), "<image>"])
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llava", "image_token_index": fast.token_to_id("<image>")}
    config |= {"text_config": {"vocab_size": fast.get_vocab_size()}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llama3(tmp_path, oracle):
    """(our tokenizer under the form of a file, transformers' `text -> ids`)."""
    folder = llama3_folder(tmp_path / "model")
    (tmp_path / "form.json").write_text(json.dumps(LLAMA_3))
    path = str(folder / "tokenizer.json")
    theirs = oracle.transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    ours = Tokenizer.from_folder(folder, str(tmp_path / "form.json"))
    return ours, lambda text: theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("seed", range(10))
def test_a_form_of_a_file(llama3, seed):
    """Its control tokens are control tokens, and the ids those of the joint text."""
    ours, theirs = llama3
    rng = random.Random(seed)
    turns = [(role, random_text(rng)) for role in ("user", "assistant", "user")]
    form = (LLAMA_3["system"], LLAMA_3["user"], LLAMA_3["answer"] + LLAMA_3["end"])
    prompt, whole = joint(form, turns, "It is.", "<image>")
    assert ours.prompt(turns) == theirs(prompt)
    assert ours.prompt(turns) + ours.response("It is.") == theirs(whole)
    assert ours.decode(ours.response("It is.")) == "It is."
    assert ours.eos_id == theirs("<|eot_id|>")[0]
    assert ours.encode("<|eot_id|>") != theirs("<|eot_id|>")  # text is data


def test_without_an_end_token_the_remedy_is_a_form(tmp_path):
    folder = llama3_folder(tmp_path / "model")
    for name in (None, "vicuna_v1", "short", "mistral"):
        call = lambda name=name: Tokenizer.from_folder(folder, name)  # noqa: E731
        refused(call, "tokenizer.json: no </s>", "--template FILE", name or "vicuna_v1")


def test_a_form_of_config_json(tmp_path):
    """What a training leaves in `merged` for a form without a name."""
    folder = llama3_folder(tmp_path / "model")
    (tmp_path / "form.json").write_text(json.dumps(LLAMA_3))
    named = Tokenizer.from_folder(folder, str(tmp_path / "form.json"))
    stored = asked_form(str(tmp_path / "form.json"))
    edit_json(folder / "config.json", lambda raw: raw.update(minialign_template=stored))
    own, turns = Tokenizer.from_folder(folder), [("user", "What?"), ("assistant", "It.")] * 2
    assert own.prompt(turns[:3]) == named.prompt(turns[:3])
    assert own.response("It is.") == named.response("It is.")


def test_names_are_forms_too(tmp_path):
    """Every form that has a name, written into a file, gives the same ids."""
    folder = llama2_folder(tmp_path / "model")
    turns = [("user", "What is it?"), ("assistant", "A {} dog."), ("user", "{}{0}?")]
    for name, template in TEMPLATES.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(asdict(template)))
        of_file, named = (Tokenizer.from_folder(folder, form) for form in (str(path), name))
        assert of_file.prompt(turns) == named.prompt(turns)
        assert of_file.response("A {}.") == named.response("A {}.")


BAD_FORMS = [
    ({"end": None}, "end is missing"),
    ({"user": 3}, "user is 3"),
    ({"user": "USER: ASSISTANT:"}, "user is"),
    ({"user": "{} {}"}, "user is"),
    ({"user": "USER: {} ASSISTANT: "}, "user is"),
    ({"answer": "yes"}, "answer is"),
    ({"system": "{}"}, "system is"),
    ({"end": "{}"}, "end is"),
    ({"assistant": "x"}, "assistant is"),
    ({"end": ""}, "ends an answer with ''"),
    ({"end": "###"}, "ends an answer with '###'"),
    ({"end": "</s></s>"}, "ends an answer with '</s></s>'"),
    ({"end": "<|eot_id|>"}, "no <|eot_id|>"),
    ({"system": "<|begin|>"}, "no <|begin|>"),
    ({"user": "<image>\n{} ASSISTANT:"}, "image_token_index"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FORMS, ids=str)
def test_forms_that_cannot_be(tmp_path, changes, message):
    folder = llama2_folder(tmp_path / "model")
    path = tmp_path / "form.json"
    path.write_text(json.dumps(BAKLLAVA | changes))
    refused(lambda: Tokenizer.from_folder(folder, str(path)), message, ";")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ud800"])
def test_files_that_hold_no_form(tmp_path, text):
    folder = llama2_folder(tmp_path / "model")
    (tmp_path / "form.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    path = str(tmp_path / "form.json")
    refused(lambda: Tokenizer.from_folder(folder, path), path, "--template FILE")


def test_old_names_are_told_the_new_ones(tmp_path):
    folder = llama2_folder(tmp_path / "model")
    refused(lambda: Tokenizer.from_folder(folder, "vicuna"), "'vicuna' is called llava_v1 now")
    edit_json(folder / "config.json", lambda raw: raw.update(minialign_template="vicuna"))
    refused(lambda: Tokenizer.from_folder(folder), "minialign_template is 'vicuna'", "vicuna_v1")


def test_the_words_of_llavas_forms():
    """vicuna_v1 says user and llava_v1 human, as in LLaVA's own table of conversations."""
    assert TEMPLATES["vicuna_v1"].system == VICUNA
    assert TEMPLATES["llava_v1"].system == VICUNA.replace("user", "human")
