"""Tokenizers in the form of Llama-2's, the templates' words, and texts hard to tokenise."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, processors

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
# template -> (what stands before the first turn, a question, an answer), as the models' pages have
# them.
FORMS = {
    "short": ("", "USER: {} ASSISTANT:", " {}</s>"),
    "vicuna_v1": (VICUNA, "USER: {} ASSISTANT:", " {}</s>"),
    "llava_v1": (VICUNA.replace("user", "human"), "USER: {} ASSISTANT:", " {}</s>"),
    "mistral": ("", "[INST] {} [/INST]", " {} </s>"),
    "chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        "{}<|im_end|>",
    ),
}
AWKWARD = [
    "plain words",
    "two  spaces",
    " leading",
    "trailing ",
    "   ",
    "line\nbreak",
    "\n\n",
    "\nleading newline",
    "tab\there",
    "naïve café",
    "日本語のテキスト",
    "😀 and 👩\u200d👩\u200d👧",
    "x=1;y=[2]",
    "A.B?C!",
    "''quoted''",
    "USER: fake ASSISTANT: turn",
    "\u00a0non-breaking",
    "\r\ncarriage",
    "<0x41>",
    "< s >",
    "<<>>",
    "bell \x07",
    "a" * 300,
    "e\u0301 combining",
    "العربية",
    "0123456789",
    "https://example.org/?q=1&r=%20",
]


def random_text(rng: random.Random) -> str:
    """Characters of any kind, with spaces and line breaks among them; none that is `▁`."""
    kinds = [
        (32, 127),
        (32, 33),
        (10, 11),
        (0xA0, 0x17F),
        (0x400, 0x4FF),
        (0x4E00, 0x4E80),
        (0x1F600, 0x1F640),
    ]
    return "".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(1, 60)))


def joint(form: tuple[str, str, str], turns: list, response: str, image: str) -> tuple[str, str]:
    """(prompt, whole) of a conversation as one text with its control tokens spelled out, but for
    the first.
    """
    text, question, answer = form
    head = f"{image}\n" if image else ""
    for number, (role, content) in enumerate(turns):
        if role == "user":
            text += question.format(f"{head if number == 0 else ''}{content}")
        else:
            text += answer.format(content)
    return text, text + answer.format(response)


def llama2_folder(folder: Path, chatml: bool = True) -> Path:
    """A folder in the form of LLaVA-1.5's: no pre-tokenizer, `<image>` and `<pad>` added behind the
    vocabulary.

    The pieces are few, and those of `USER: <image>\\nWhat` stand at their real ids.
    """
    pieces = {
        "▁": 29871,
        ":": 29901,
        "▁US": 3148,
        "ER": 1001,
        "What": 5618,
        "US": 3308,
        "Wh": 8809,
        "at": 271,
        "▁▁": 259,
        "▁A": 319,
        "▁is": 338,
        "is": 275,
        "▁▁▁▁": 268,
    }
    merges = ["▁ ▁", "▁▁ ▁▁", "a t", "E R", "i s", "▁ is", "▁ A", "U S", "▁ US", "W h", "Wh at"]
    vocab = (
        {"<unk>": 0, "<s>": 1, "</s>": 2}
        | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
        | pieces
    )
    for code in range(33, 127):
        vocab.setdefault(chr(code), 31000 + code)
    taken = set(vocab.values())
    vocab |= {f"unused {i}": i for i in range(32000) if i not in taken}
    return write_llama2(folder, vocab, [tuple(pair.split()) for pair in merges], chatml)


def write_llama2(
    folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], chatml: bool = True
) -> Path:
    """Such a folder of any vocabulary."""
    fast = FastTokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    folder.mkdir()
    raw = json.loads(fast.to_str())
    raw["added_tokens"] = [
        {
            "id": i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }
        for i, content, special in [
            (0, "<unk>", True),
            (1, "<s>", True),
            (2, "</s>", True),
            (32000, "<image>", False),
            (32001, "<pad>", True),
            *([(32002, "<|im_start|>", True), (32003, "<|im_end|>", True)] if chatml else []),
        ]
    ]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<pad>",
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    ids = {"image_token_index": 32000, "pad_token_id": 32001}
    config = {"model_type": "llava", "text_config": {"vocab_size": 32064}} | ids
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_metaspace(folder: Path) -> None:
    """`▁` goes before the beginning of the text alone, not after control tokens: as newer
    tokenizers have it.
    """
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["normalizer"] = None
    raw["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
