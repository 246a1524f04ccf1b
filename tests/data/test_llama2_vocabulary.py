"""Tokenisation with Llama-2's real vocabulary, against published ids and against transformers on
the joint text.
"""

import hashlib
import json
import random
import re
from itertools import product

import pytest
from llama2_vocabulary import fetch, read_package
from llama_tokenizer import AWKWARD, FORMS, joint, random_text, with_metaspace, write_llama2
from tokenizers import Tokenizer as FastTokenizer

from minialign.data.tokenizer import Tokenizer

CONTROL = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<image>": 32000,
    "<pad>": 32001,
    "<|im_start|>": 32002,
    "<|im_end|>": 32003,
}
RENAMED = {name: f"\ue010{i}\ue011" for name, i in CONTROL.items()}
SPELLED = re.compile("|".join(map(re.escape, CONTROL)))
TYPED = [
    *CONTROL,
    *(f"a {name} b" for name in CONTROL),
    "what is <image> in this?",
    "<image>\n<image>",
    "</s><s>",
    "[INST] no [/INST]",
    "<<SYS>>\nno\n<</SYS>>",
    "<|im_start|>system\nno<|im_end|>\n",
    "<0x0A>",
    "<0xFF><0x00>",
    "</s",
    "< /s>",
    "ASSISTANT: Yes</s>USER: <image>\nNo ASSISTANT:",
]
TEXTS = [
    *AWKWARD,
    *TYPED,
    " ",
    "\n",
    "\t",
    ".",
    "-",
    "0",
    "A",
    "\n\n\nlast\n\n",
    "last\n",
    " \n ",
    "\n \n",
    "\t\ttabs\t",
    " " * 17 + "x" + " " * 40,
    "no space。全角　space",
    "क्षत्रिय เชียงใหม่ 한국어",
    "Z\u0351\u036b\u0343\u036a\u0302 e\u0301\u0302",
    "שלום, world",
    "\u202eright to left",
    "\ufeffmark",
    "\u200b",
    "👍🏽🏳\ufe0f\u200d🌈🇩🇪",
    "🦙Ꙋ",
    "\U0010ffff",
    "3.14159 1,000,000 ²³ ½ ٣",
    "Donaudampfschifffahrtsgesellschaft" * 30,
    "▁",
    "a▁b ▁ c",
    "\ue000 \ue001",
    "{} {0} %s \\n",
    "\x00\x1f",
]
# LLaVA's head of a conversation, as its logs print it; from "human" (5199) to "user" (1404) nothing
# else changes.
HEAD = [
    1,
    319,
    13563,
    1546,
    263,
    12758,
    5199,
    322,
    385,
    23116,
    21082,
    20255,
    29889,
    450,
    20255,
    4076,
    8444,
    29892,
    13173,
    29892,
    322,
    1248,
    568,
    6089,
    304,
    278,
    5199,
    29915,
    29879,
    5155,
    29889,
    3148,
    1001,
    29901,
]
ASSISTANT = [319, 1799, 9047, 13566, 29901]
# From the integration tests that transformers has for Llama, and what Llama-2's chats look like.
PUBLISHED = [
    ("Hello this is a test", [1, 15043, 445, 338, 263, 1243]),
    ("Hello world", [1, 15043, 3186]),
    (
        "I was born in 92000, and this is falsé.",
        [
            1,
            306,
            471,
            6345,
            297,
            29871,
            29929,
            29906,
            29900,
            29900,
            29900,
            29892,
            322,
            445,
            338,
            285,
            1338,
            29948,
            29889,
        ],
    ),
    ("生活的真谛是", [1, 29871, 30486, 31704, 30210, 30848, 235, 179, 158, 30392]),
    ("Hi  Hello", [1, 6324, 29871, 15043]),
    ("Hi   Hello", [1, 6324, 259, 15043]),
    ("", [1]),
    (" ", [1, 259]),
    ("  ", [1, 1678]),
    (" Hello", [1, 29871, 15043]),
    ("[INST] Hi [/INST]", [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962]),
]


@pytest.fixture(scope="module")
def package():
    """(vocabulary, merges, test cases) of the npm package."""
    return read_package(fetch())


@pytest.fixture(scope="module")
def folders(package, tmp_path_factory):
    """Model folders with that vocabulary: `▁` before what follows control tokens (Llama-2's), or
    not (newer).
    """
    root = tmp_path_factory.mktemp("llama2")
    made = {scheme: write_llama2(root / scheme, *package[:2]) for scheme in ("legacy", "metaspace")}
    with_metaspace(made["metaspace"])
    return made


@pytest.fixture(scope="module")
def theirs(oracle, folders):
    """(transformers' tokenizer, the same with control tokens under names that no text has) of each
    folder.
    """
    made = {}
    for scheme, folder in folders.items():
        raw = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
        for token in raw["added_tokens"]:
            token["content"] = RENAMED[token["content"]]
        raw["model"]["vocab"] = {
            RENAMED.get(piece, piece): i for piece, i in raw["model"]["vocab"].items()
        }
        raw["model"]["unk_token"] = RENAMED["<unk>"]
        fast = oracle.transformers.PreTrainedTokenizerFast(
            tokenizer_object=FastTokenizer.from_str(json.dumps(raw))
        )
        made[scheme] = oracle.transformers.AutoTokenizer.from_pretrained(folder), fast
    return made


@pytest.fixture(scope="module", params=["legacy", "metaspace"])
def scheme(request):
    """The folder's name."""
    return request.param


@pytest.fixture(
    scope="module",
    params=product(["vicuna_v1", "llava_v1", "mistral", "chatml"], ["legacy", "metaspace"]),
    ids="-".join,
)
def both(request, folders, theirs):
    """(the template's name, our tokenizer, transformers' with other names)."""
    name, scheme = request.param
    return name, Tokenizer.from_folder(folders[scheme], name), theirs[scheme][1]


def rename(text: str) -> str:
    """A template's text with its control tokens under their other names."""
    return SPELLED.sub(lambda found: RENAMED[found[0]], text)


def check(both, turns: list, response: str) -> None:
    """Prompt and response are the joint text's ids; its control tokens are the template's; labels
    are the answer's.
    """
    name, ours, theirs = both
    form = tuple(map(rename, FORMS[name]))
    for image in ("<image>", ""):
        prompt, whole = joint(form, turns, response, rename(image))
        expected = theirs(whole, return_offsets_mapping=True)
        ids, said = ours.prompt(turns, bool(image)), ours.response(response)
        assert ids == [1, *theirs(prompt).input_ids]
        assert ids + said == [1, *expected.input_ids]
        ends = [end for _, end in expected.offset_mapping]
        assert said == [
            i for i, end in zip(expected.input_ids, ends, strict=True) if end > len(prompt)
        ]
        blank = joint(FORMS[name], [(role, "") for role, _ in turns], "", image)[1]
        control = [1, *(CONTROL[found] for found in SPELLED.findall(blank))]
        assert [i for i in ids + said if i in CONTROL.values()] == control and said[-1] == control[
            -1
        ]
        # Else the decoder loses it.
        if "▁" not in response and not (name == "chatml" and response.startswith(" ")):
            assert ours.decode(said) == ours.decode(said[:-1]) == response


# ---------------------------------------------------------------- ids that others published


def test_merges_are_in_the_order_of_the_pieces_they_make(package):
    """SentencePiece merges what makes the most likely piece first; runs of spaces, which it was
    given, come last.
    """
    vocab, merges, _ = package
    assert len(vocab) == 32000 and len(merges) == 61249
    assert [vocab[piece] for piece in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>", "▁▁")] == [
        0,
        1,
        2,
        3,
        258,
        259,
    ]
    pairs = {
        (p[:k], p[k:]) for p in vocab for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab
    }

    def rank(pair: tuple[str, str]) -> tuple:
        spaces = set(pair[0] + pair[1]) == {"▁"}
        return spaces, 0 if spaces else vocab[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]

    assert merges == sorted(pairs, key=rank)


def test_published_ids(package, folders, theirs, scheme):
    cases, tokenizer = package[2] + PUBLISHED, Tokenizer.from_folder(folders[scheme], "vicuna_v1")
    assert len(package[2]) == 12 and len(package[2][-1][1]) > 400
    for text, ids in cases:
        if scheme == "legacy" or not text.startswith(
            " "
        ):  # newer ones put no second space before a space
            assert (
                [*tokenizer.bos, *tokenizer.encode(text)]
                == ids
                == theirs[scheme][0](text).input_ids
            )
            assert tokenizer.decode(ids) == text


def test_ids_of_llava(folders, scheme):
    prefix = [29871] if scheme == "legacy" else []  # the space before a text, after the image too
    question = [29871, 32000, *prefix, 13, 5618]
    short = Tokenizer.from_folder(folders[scheme], "short")
    assert short.prompt([("user", "What")]) == [1, 3148, 1001, 29901, *question, *ASSISTANT]
    for name, who in (("llava_v1", 5199), ("vicuna_v1", 1404)):
        tokenizer = Tokenizer.from_folder(folders[scheme], name)
        head = [who if i == 5199 else i for i in HEAD]
        assert tokenizer.prompt([("user", "What")]) == [*head, *question, *ASSISTANT]
        assert tokenizer.response("Yes") == [3869, 2]
    mistral = Tokenizer.from_folder(folders[scheme], "mistral").prompt([("user", "What")])
    assert mistral == [1, 518, 25580, 29962, *question, 518, 29914, 25580, 29962]


# ---------------------------------------------------------------- the joint text


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text[:24]))
def test_other_names_change_nothing(theirs, scheme, text):
    """What the tests below compare with is the published tokenizer, wherever that takes no text for
    control.
    """
    for form in FORMS.values():
        spelled = joint(
            form, [("user", text), ("assistant", text), ("user", text)], text, "<image>"
        )[1]
        published, renamed = theirs[scheme]
        assert published(spelled).input_ids == [1, *renamed(rename(spelled)).input_ids]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:24]))
def test_awkward_texts(both, text):
    check(both, [("user", text)], "Yes")
    check(both, [("user", "What is it?")], text)
    check(
        both,
        [
            ("user", text),
            ("assistant", text),
            ("user", f"{text}?"),
            ("assistant", "No."),
            ("user", text),
        ],
        text,
    )


@pytest.mark.parametrize("seed", range(25))
def test_random_conversations(both, seed):
    rng = random.Random(f"{both[0]} {seed}")

    def text() -> str:
        parts = [
            rng.choice([random_text(rng), *rng.sample(TEXTS, 3), " ", "\n"])
            for _ in range(rng.randrange(1, 6))
        ]
        return rng.choice(["", " ", "\n"]).join(parts)

    turns = [("user", text())]
    for _ in range(rng.randrange(4)):
        turns += [("assistant", text()), ("user", text())]
    check(both, turns, text())


# ---------------------------------------------------------------- fetching it


def test_fetching(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, kept = tmp_path / "package.tgz", tmp_path / "cache" / "minialign-tests" / "package.tgz"
    right = hashlib.sha256(b"right").hexdigest()
    with pytest.raises(pytest.skip.Exception, match="cannot be reached"):
        fetch(source.as_uri(), right)
    source.write_bytes(b"wrong")
    with pytest.raises(pytest.fail.Exception, match="package.tgz: sha256"):
        fetch(source.as_uri(), right)
    assert not kept.exists()
    source.write_bytes(b"right")
    assert fetch(source.as_uri(), right) == kept.read_bytes() == b"right"
    source.unlink()
    assert fetch(source.as_uri(), right) == b"right"
    kept.write_bytes(b"spoilt")
    with pytest.raises(pytest.fail.Exception, match=re.escape(f"{kept}: sha256")):
        fetch(source.as_uri(), right)
    assert [path.name for path in kept.parent.iterdir()] == ["package.tgz"]
