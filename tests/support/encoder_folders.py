"""Random sentence encoders of transformers, and sentence-transformers folders of them."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

KINDS = ("bert", "mpnet")
SPECIAL = {"bert": ("[CLS]", "[SEP]", "[PAD]", "[UNK]"), "mpnet": ("<s>", "</s>", "<pad>", "[UNK]")}
WORDS = [f"w{i}" for i in range(60)]
# max_seq_length of the random folders: beyond 128, so that far relative distances occur
LIMIT = 200


def make_tokenizer(kind: str) -> Tokenizer:
    """One id per word, `cls words sep`; its own padding and truncation, at 16, must not be used."""
    cls, sep, pad, unk = SPECIAL[kind]
    special = [pad, unk, cls, sep] if kind == "bert" else [cls, pad, sep, unk]  # padding: 0 or 1
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unk))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])]
    )
    tokenizer.enable_padding(length=16, pad_id=vocab[pad], pad_token=pad)
    tokenizer.enable_truncation(16)
    return tokenizer


def make_encoder(kind: str, seed: int) -> torch.nn.Module:
    """A BERT or MPNet of transformers, of random size, with weights large enough for every part to
    matter."""
    transformers = pytest.importorskip("transformers")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads = rng.choice([2, 3, 4])
    config_class, model_class = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "mpnet": (transformers.MPNetConfig, transformers.MPNetModel),
    }[kind]
    config = config_class(
        vocab_size=len(WORDS) + 4,
        hidden_size=heads * rng.choice([4, 8]),
        num_hidden_layers=rng.choice([2, 3]),
        num_attention_heads=heads,
        intermediate_size=rng.choice([24, 40]),
        max_position_embeddings=LIMIT + 2,
        layer_norm_eps=rng.choice([1e-12, 1e-5, 1e-2]),
        pad_token_id=0 if kind == "bert" else 1,
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean, std = float(name.endswith("LayerNorm.weight")), 1.0 if "relative" in name else 0.3
            weight.normal_(mean, std)
    return model


def make_folder(folder: Path, oracle: torch.nn.Module, kind: str, pooling: str = "mean") -> Path:
    """Save `oracle` as a sentence-transformers folder."""
    oracle.save_pretrained(folder, safe_serialization=True)
    make_tokenizer(kind).save(str(folder / "tokenizer.json"))
    modules = []
    for path, name in ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"):
        modules.append({"path": path, "type": f"sentence_transformers.models.{name}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LIMIT}))
    names = ("cls_token", "mean_tokens", "max_tokens")
    flags = {f"pooling_mode_{name}": name.startswith(pooling) for name in names}
    config = {"word_embedding_dimension": 1, **flags}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


def set_fields(path: Path, **changes) -> None:
    """Set fields of a JSON object; None deletes a field."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))
