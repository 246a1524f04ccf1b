"""A tokenizer in the form of Llama-2's, its template's words, and texts that are hard to tokenise."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. "
)
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


def llama2_folder(folder: Path, chatml: bool = True) -> Path:
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
            *([(32002, "<|im_start|>", True), (32003, "<|im_end|>", True)] if chatml else []),
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
