"""Sentence embeddings by BERT or MPNet, from a sentence-transformers folder: Alg. 1, line 18.

The paper's encoder is all-mpnet-base-v2; all-MiniLM-L6-v2, a BERT, is five times smaller. One class
serves both, for they differ in three things only:
              BERT               MPNet
  positions   0, 1, 2, ...       2, 3, 4, ... (padding: 1)
  token type  row 0 is added     none
  attention   no bias            a learned bias per head and relative distance, the same in every
                                 layer

The numerics follow transformers (`BertModel`, `MPNetModel`) and sentence-transformers (truncation,
pooling), in evaluation mode and float32.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn

from minialign.data.tokenizer_file import sound
from minialign.errors import UserError
from minialign.fields import (
    ANYTHING,
    broken_rule,
    flag,
    number,
    one_of,
    path_below,
    read_fields,
    shown,
    text,
    whole,
)
from minialign.files import read_json
from minialign.model.hf_folder import read_tensors, some_of

REMEDY = "give a complete sentence-transformers folder, such as a copy of all-mpnet-base-v2"
MPNET_PADDING = 1  # MPNet's padding token id, and the position of every padding token
MPNET_BUCKETS = 32  # of relative distances; as in transformers, whatever config.json says
MPNET_MAX_DISTANCE = 128  # relative distances from here on share the last bucket of their direction

# Our module -> the checkpoint's, both without ".weight" and ".bias". Those of a layer come after
# "layers.N." in ours, after "encoder.layer.N." in theirs.
SHARED = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "input_norm": "embeddings.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
BERT = {
    "token_type": "embeddings.token_type_embeddings",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
}
MPNET = {
    "relative_bias": "encoder.relative_attention_bias",
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "attention_out": "attention.attn.o",
    "attention_norm": "attention.LayerNorm",
}
KEYS = {"bert": SHARED | BERT, "mpnet": SHARED | MPNET}
# In the checkpoint, but not part of a sentence embedding.
UNUSED_KEYS = ("embeddings.position_ids", "pooler.")

# config.json's fields: those of an `EncoderConfig`, and what would be another encoder.
CONFIG = {
    "model_type": one_of(*KEYS),
    "vocab_size": whole(2, 2**22),
    "hidden_size": whole(1, 2**14),
    "num_hidden_layers": whole(1, 512),
    "num_attention_heads": whole(1, 2**10),
    "intermediate_size": whole(1, 2**16),
    "max_position_embeddings": whole(1, 2**20),
    "layer_norm_eps": number(1e-30, 1),
    "type_vocab_size": whole(1, 2**10, default=2),
}
SUPPORTED = {
    "hidden_act": one_of("gelu", default="gelu"),
    "position_embedding_type": one_of("absolute", default="absolute"),
    "is_decoder": one_of(False, default=False),
}
MODULE = {"type": text(), "path": path_below()}


@dataclass(frozen=True)
class EncoderConfig:
    """The fields of a BERT's or MPNet's `config.json` that shape it, by their names there."""

    model_type: str  # "bert" or "mpnet"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    type_vocab_size: int  # BERT only


class Layer(nn.Module):
    """A post-norm transformer layer: x = norm(x + attention(x)), x = norm(x + feed_forward(x))."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D); bias (B, 1 or H, 1 or T, T) is added to the scaled scores, -inf
        at padding."""
        q = self.in_heads(self.query(x))
        k = self.in_heads(self.key(x))
        v = self.in_heads(self.value(x))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, H, T, D/H)
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, D)
        x = self.attention_norm(x + self.attention_out(attended))
        return self.norm(x + self.down(F.gelu(self.up(x))))

    def in_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D/H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Encoder(nn.Module):
    """BERT or MPNet without dropout and without the pooler."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_position_embeddings, width)
        if config.model_type == "bert":
            self.token_type = nn.Embedding(config.type_vocab_size, width)
        else:
            self.relative_bias = nn.Embedding(MPNET_BUCKETS, config.num_attention_heads)
        self.input_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Token ids (B, T) and keep (B, T), False at padding -> hidden states (B, T, D)."""
        steps = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        bias = keep.float().log()[:, None, None, :]  # (B, 1, 1, T), 0 at tokens and -inf at padding
        if self.config.model_type == "bert":
            x = self.word(ids) + self.position(steps) + self.token_type.weight[0]
        else:
            real = (ids != MPNET_PADDING).long()  # (B, T)
            positions = real.cumsum(1) * real + MPNET_PADDING  # (B, T)
            x = self.word(ids) + self.position(positions)
            buckets = relative_buckets(steps - steps[:, None])  # (T, T)
            bias = bias + self.relative_bias(buckets).permute(2, 0, 1)  # (B, H, T, T)

        x = self.input_norm(x)  # (B, T, D)
        for layer in self.layers:
            x = layer(x, bias)
        return x


def relative_buckets(distance: Tensor) -> Tensor:
    """The buckets of T5 and MPNet: key minus query position -> bucket, both int of any shape.

    The lower half of the buckets is for keys at or before the query, the upper half for keys after
    it. Within a half, the first `exact` buckets hold one distance each; the others widen with the
    log of the distance.
    """
    half, exact = MPNET_BUCKETS // 2, MPNET_BUCKETS // 4
    far = distance.abs()
    growth = torch.log(far.clamp(min=1).float() / exact) / math.log(MPNET_MAX_DISTANCE / exact)
    wide = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, wide) + half * (distance > 0)


class SentenceEncoder:
    """Texts to embeddings of length 1, with the numerics of sentence-transformers' `encode`."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, pooling: str):
        self.encoder = encoder
        # Adds the special tokens, truncates, pads to the longest of a batch.
        self.tokenizer = tokenizer
        self.pooling = pooling  # "mean" over the tokens, or "cls": the first token

    @classmethod
    def from_folder(cls, path: str | Path, device: str = "cpu") -> "SentenceEncoder":
        """Read a sentence-transformers folder; a `UserError` where anything is missing or not
        supported."""
        folder = Path(path)
        if not folder.is_dir():
            remedy = f"{REMEDY}, or name no encoder to compare word trigrams"
            raise UserError(f"{folder}: no such folder; {remedy}")
        pooling, config = read_pooling(folder), read_config(folder / "config.json")
        return cls(read_encoder(folder, config).to(device), read_tokenizer(folder, config), pooling)

    def embed(self, texts: list[str], batch_size: int = 32) -> Tensor:
        """N texts -> (N, D) float32 on the encoder's device, each row of length 1, whether or not
        the folder has a `Normalize` module.

        A text longer than the folder's `max_seq_length`, in tokens with the special ones, is cut
        there.
        """
        weight = self.encoder.word.weight
        embeddings = weight.new_empty(len(texts), weight.shape[1])  # (N, D)
        for start in range(0, len(texts), batch_size):
            batch = slice(start, start + batch_size)
            with sound("the encoder's tokenizer.json fails on a text"):
                rows = self.tokenizer.encode_batch(texts[batch])
            ids = torch.tensor([row.ids for row in rows], device=weight.device)  # (B, T)
            keep = torch.tensor([row.attention_mask for row in rows], device=weight.device).bool()
            hidden = self.encoder(ids, keep)  # (B, T, D)
            mean = (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)  # (B, D)
            embeddings[batch] = mean if self.pooling == "mean" else hidden[:, 0]
        if not embeddings.isfinite().all():
            raise UserError("the sentence encoder gives numbers that are not finite; use another")
        return F.normalize(embeddings, dim=-1)

    def cosine(self, first: list[str], second: list[str]) -> list[float]:
        """phi of `first[i]` and `second[i]`, in [-1, 1]; a `ValueError` where the lists differ in
        length."""
        if len(first) != len(second):
            raise ValueError(f"lists of {len(first)} and {len(second)} texts")
        both = self.embed(first + second)  # (2N, D)
        return (both[: len(first)] * both[len(first) :]).sum(-1).clamp(-1, 1).tolist()


# ---------------------------------------------------------------- the folder's files


def unusable(path: Path, why: str) -> UserError:
    """The error to raise for a file of the folder that cannot be used."""
    return UserError(f"{path}: {why}; {REMEDY}")


def read_pooling(folder: Path) -> str:
    """The pooling that `modules.json` and its pooling folder name: "mean" or "cls"."""
    path = folder / "modules.json"
    modules = {}
    for module in read_json(path, REMEDY, list):
        if not isinstance(module, dict):
            raise unusable(path, "no list of modules")
        fields = read_fields(path, module, MODULE)
        modules[fields["type"].rpartition(".")[2]] = fields["path"]
    if list(modules) not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        supported = "only Transformer, Pooling, Normalize are supported"
        raise unusable(path, f"modules {shown(list(modules))}: {supported}")

    # Older folders have a flag for each pooling, newer ones a name.
    path = folder / modules["Pooling"] / "config.json"
    config = read_json(path, REMEDY)
    flags = {name: flag(default=False) for name in config if name.startswith("pooling_mode_")}
    modes = [name for name, on in read_fields(path, config, flags).items() if on]
    modes = modes or [config.get("pooling_mode")]
    if modes in (["mean"], ["pooling_mode_mean_tokens"]):
        return "mean"
    if modes in (["cls"], ["pooling_mode_cls_token"]):
        return "cls"
    raise unusable(path, f"pooling {shown(modes)} is neither mean nor cls")


def read_config(path: Path) -> EncoderConfig:
    """Read and check the `config.json` of a BERT or MPNet."""
    raw = read_json(path, REMEDY)
    config = EncoderConfig(**read_fields(path, raw, CONFIG))
    read_fields(path, raw, SUPPORTED)
    if config.hidden_size % config.num_attention_heads:
        rule = f"it must divide hidden_size {config.hidden_size}"
        raise broken_rule(path, "num_attention_heads", config.num_attention_heads, rule)
    return config


def read_tokenizer(folder: Path, config: EncoderConfig) -> Tokenizer:
    """Read `tokenizer.json`, with the truncation of `sentence_bert_config.json`, not its own."""
    path = folder / "tokenizer.json"
    raw = read_json(path, REMEDY)
    with sound(path):
        tokenizer = Tokenizer.from_str(json.dumps(raw))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        ids = [*tokenizer.get_vocab().values(), *tokenizer.encode("a").ids]
    if max(ids, default=0) >= config.vocab_size:
        raise unusable(path, f"has ids up to {max(ids)}, config.json {config.vocab_size} in all")

    # The longest text, in tokens: older folders say so in one file, newer ones in the other.
    path = folder / "sentence_bert_config.json"
    declared = {"max_seq_length": ANYTHING, "do_lower_case": flag(default=False)}
    settings = read_fields(path, read_json(path, REMEDY), declared)
    room = config.max_position_embeddings
    if config.model_type == "mpnet":
        room -= MPNET_PADDING + 1
    name, limit = "max_seq_length", settings["max_seq_length"]
    if limit is None:
        path, name = folder / "tokenizer_config.json", "model_max_length"
        limit = read_fields(path, read_json(path, REMEDY), {name: number(1, 1e40)})[name]
        limit = min(int(limit), room)
    if type(limit) is not int or not 0 < special < limit <= room:
        above = f"more than the special tokens ({special}, at least 1)"
        rule = f"it must be {above} and at most {room} positions"
        raise broken_rule(path, name, limit, rule)

    if settings["do_lower_case"]:
        rest = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
    tokenizer.enable_padding(pad_id=MPNET_PADDING)  # BERT takes any id there
    tokenizer.enable_truncation(limit)
    return tokenizer


def checkpoint_key(name: str, model_type: str) -> str:
    """The checkpoint's name of our parameter: "layers.3.down.bias" is
    "encoder.layer.3.output.dense.bias"."""
    *layer, module, leaf = name.split(".")  # layer is ["layers", "3"] or []
    prefix = f"encoder.layer.{layer[1]}." if layer else ""
    return f"{prefix}{KEYS[model_type][module]}.{leaf}"


def read_encoder(folder: Path, config: EncoderConfig) -> Encoder:
    """Read `model.safetensors` as float32; a missing, unknown or misshapen weight is a
    `UserError`."""
    path = folder / "model.safetensors"
    if not path.is_file() and any(folder.glob("*.bin")):
        only = "only pickle (.bin) here, which is never loaded; convert it to safetensors"
        raise UserError(f"{path}: {only}")
    if not path.is_file():
        raise unusable(path, "no such file")
    stored = {}
    for key, tensor in read_tensors(path):
        key = key.removeprefix(f"{config.model_type}.")
        if not key.startswith(UNUSED_KEYS):
            stored[key] = tensor.float()

    with torch.device("meta"):  # shapes only; the weights are put in below
        encoder = Encoder(config)
    ours = {checkpoint_key(name, config.model_type): name for name in encoder.state_dict()}
    expected = {key: tuple(encoder.get_parameter(name).shape) for key, name in ours.items()}
    found = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    wrong = [key for key in sorted(expected | found) if expected.get(key) != found.get(key)]
    if wrong:
        listed = {f"{key} (expected {expected.get(key)}, found {found.get(key)})" for key in wrong}
        raise unusable(path, f"does not fit config.json: {some_of(listed)}")
    encoder.load_state_dict({ours[key]: tensor for key, tensor in stored.items()}, assign=True)
    return encoder.requires_grad_(False)
