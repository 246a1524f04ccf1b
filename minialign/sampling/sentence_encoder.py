"""Alg. 1, line 18: how similar a sampled response is to the chosen one.

phi is the cosine of two sentence embeddings; a sample with phi >= eps_s (0.97) says too nearly the
same. The encoders are BERT and MPNet, read from a sentence-transformers folder: the paper's
all-mpnet-base-v2, or the five times smaller all-MiniLM-L6-v2. One class serves both, for they
differ in three things only:
              BERT               MPNet
  positions   0, 1, 2, ...       2, 3, 4, ... (padding: 1)
  token type  row 0 is added     none
  attention   no bias            a learned bias per head and relative distance, the same in every layer

The numerics follow transformers (`BertModel`, `MPNetModel`) and sentence-transformers (truncation,
pooling), in evaluation mode and float32. With no encoder there is `lexical_cosine` of word
trigrams."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn

from minialign.errors import UserError
from minialign.files import read_json

REMEDY = "give a complete sentence-transformers folder, such as a copy of all-mpnet-base-v2"
MPNET_PADDING = 1  # MPNet's padding token id, and the position of every padding token
MPNET_BUCKETS = 32  # of relative distances; as in transformers, whatever config.json says
MPNET_MAX_DISTANCE = 128  # relative distances from here on share the last bucket of their direction

# Our module -> the checkpoint's, without ".weight" and ".bias"; None: the model has no such module.
# From "query" on, ours comes after "layers.N." and theirs after "encoder.layer.N.".
KEY_TABLE = {  # ours        BERT                               MPNet
    "word": ("embeddings.word_embeddings", "embeddings.word_embeddings"),
    "position": ("embeddings.position_embeddings", "embeddings.position_embeddings"),
    "token_type": ("embeddings.token_type_embeddings", None),
    "relative_bias": (None, "encoder.relative_attention_bias"),
    "input_norm": ("embeddings.LayerNorm", "embeddings.LayerNorm"),
    "query": ("attention.self.query", "attention.attn.q"),
    "key": ("attention.self.key", "attention.attn.k"),
    "value": ("attention.self.value", "attention.attn.v"),
    "attention_out": ("attention.output.dense", "attention.attn.o"),
    "attention_norm": ("attention.output.LayerNorm", "attention.LayerNorm"),
    "up": ("intermediate.dense", "intermediate.dense"),
    "down": ("output.dense", "output.dense"),
    "norm": ("output.LayerNorm", "output.LayerNorm"),
}
UNUSED_KEYS = (
    "embeddings.position_ids",
    "pooler.",
)  # in the checkpoint, not part of a sentence embedding


@dataclass(frozen=True)
class EncoderConfig:
    """The fields of a BERT or MPNet `config.json` that shape the encoder, under their names
    there."""

    model_type: str  # "bert" or "mpnet"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    type_vocab_size: int = 2  # BERT only


class Layer(nn.Module):
    """One post-norm transformer layer: x = norm(x + attention(x)), then x = norm(x +
    feed_forward(x))."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.query, self.key, self.value, self.attention_out = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.attention_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D); bias (B, 1 or H, 1 or T, T) is added to the scaled scores, -inf at
        padding."""
        projected = (self.query(x), self.key(x), self.value(x))  # (B, T, D) each
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected
        )  # (B, H, T, D/H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, H, T, D/H)
        x = self.attention_norm(
            x + self.attention_out(attended.transpose(1, 2).flatten(2))
        )  # (B, T, D)
        return self.norm(x + self.down(F.gelu(self.up(x))))  # (B, T, D)


class Encoder(nn.Module):
    """BERT or MPNet without dropout and without the pooler; follows transformers' numerics."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.model_type == "bert":
            self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        else:
            self.relative_bias = nn.Embedding(MPNET_BUCKETS, config.num_attention_heads)
        self.input_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Token ids (B, T) and keep (B, T), False at padding -> hidden states (B, T, D)."""
        steps = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        bias = keep.float().log()[:, None, None, :]  # (B, 1, 1, T), 0 at tokens and -inf at padding
        if self.config.model_type == "bert":
            x = self.word(ids) + self.position(steps) + self.token_type.weight[0]  # (B, T, D)
        else:
            real = (ids != MPNET_PADDING).long()  # (B, T)
            positions = real.cumsum(1) * real + MPNET_PADDING  # (B, T)
            x = self.word(ids) + self.position(positions)  # (B, T, D)
            buckets = relative_buckets(steps - steps[:, None])  # (T, T)
            bias = bias + self.relative_bias(buckets).permute(2, 0, 1)  # (B, H, T, T)
        x = self.input_norm(x)
        for layer in self.layers:
            x = layer(x, bias)
        return x


def relative_buckets(distance: Tensor) -> Tensor:
    """The buckets of T5 and MPNet: key minus query position (any shape, int) -> bucket (same shape,
    int).

    The lower half of the buckets is for keys at or before the query, the upper half for keys after
    it. Within a half, the first `exact` buckets hold one distance each; the others widen with the
    log of the distance."""
    half, exact = MPNET_BUCKETS // 2, MPNET_BUCKETS // 4
    far = distance.abs()
    growth = torch.log(far.clamp(min=1).float() / exact) / math.log(MPNET_MAX_DISTANCE / exact)
    wide = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, wide) + half * (distance > 0)


class SentenceEncoder:
    """Texts to unit-length embeddings; follows the numerics of sentence-transformers' `encode`."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, pooling: str):
        self.encoder = encoder
        # adds the special tokens, truncates, pads to the longest of a batch
        self.tokenizer = tokenizer
        self.pooling = pooling  # "mean" over the tokens, or "cls": the first token

    @classmethod
    def from_folder(cls, path: str | Path, device: str = "cpu") -> "SentenceEncoder":
        """Read a sentence-transformers folder; anything missing or not supported is a
        `UserError`."""
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; {REMEDY}, or name no encoder to compare word trigrams"
            )
        pooling, config = read_pooling(folder), read_config(folder / "config.json")
        return cls(read_encoder(folder, config).to(device), read_tokenizer(folder, config), pooling)

    def embed(self, texts: list[str], batch_size: int = 32) -> Tensor:
        """Embed N texts -> (N, D) float32, each row of length 1, on the encoder's device.

        A text longer than the folder's `max_seq_length` (in tokens, special ones included) is cut
        there. The rows are of unit length whether or not the folder has a `Normalize` module."""
        weight = self.encoder.word.weight
        embeddings = weight.new_empty(len(texts), weight.shape[1])  # (N, D)
        for start in range(0, len(texts), batch_size):
            batch = slice(start, start + batch_size)
            rows = self.tokenizer.encode_batch(texts[batch])
            ids = torch.tensor([row.ids for row in rows], device=weight.device)  # (B, T)
            keep = torch.tensor(
                [row.attention_mask for row in rows], device=weight.device
            ).bool()  # (B, T)
            hidden = self.encoder(ids, keep)  # (B, T, D)
            mean = (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)  # (B, D)
            embeddings[batch] = mean if self.pooling == "mean" else hidden[:, 0]
        return F.normalize(embeddings, dim=-1)

    def cosine(self, first: list[str], second: list[str]) -> list[float]:
        """phi of `first[i]` and `second[i]`, in [-1, 1]; `ValueError` where the lists differ in
        length."""
        if len(first) != len(second):
            raise ValueError(
                f"pairs need lists of one length, got {len(first)} and {len(second)} texts"
            )
        both = self.embed(first + second)  # (2N, D)
        return (both[: len(first)] * both[len(first) :]).sum(-1).clamp(-1, 1).tolist()


def unusable(path: Path, why: str) -> UserError:
    """The error to raise for a file of the encoder folder that this module cannot use."""
    return UserError(f"{path}: {why}; {REMEDY}")


def read_pooling(folder: Path) -> str:
    """The pooling that `modules.json` and its pooling folder name: "mean" or "cls"."""
    path = folder / "modules.json"
    try:
        modules = {
            m["type"].rpartition(".")[2]: m["path"] for m in json.loads(path.read_text("utf-8"))
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise unusable(path, f"not readable as a list of modules ({error!r})") from None
    if list(modules) not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise unusable(
            path, f"modules {list(modules)}: only Transformer, Pooling, Normalize are supported"
        )
    path = folder / modules["Pooling"] / "config.json"
    config = read_json(path, REMEDY)
    modes = [
        key for key, on in config.items() if key.startswith("pooling_mode_") and on
    ]  # flags, or,
    modes = modes or [config.get("pooling_mode")]  # in newer folders, a name
    for mode, flag in (("mean", "pooling_mode_mean_tokens"), ("cls", "pooling_mode_cls_token")):
        if modes in ([mode], [flag]):
            return mode
    raise unusable(path, f"pooling {modes} is neither mean nor cls")


def read_config(path: Path) -> EncoderConfig:
    """Read and check the `config.json` of a BERT or MPNet."""
    stored = read_json(path, REMEDY)
    if stored.get("model_type") not in ("bert", "mpnet"):
        raise unusable(path, f"model_type {stored.get('model_type')!r} is neither bert nor mpnet")
    for key, only in (
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
    ):
        if stored.get(key, only) != only:
            raise unusable(path, f"{key} {stored[key]!r} is not supported, only {only!r}")
    known = {
        field.name: stored[field.name] for field in fields(EncoderConfig) if field.name in stored
    }
    try:
        return EncoderConfig(**known)
    except TypeError as error:
        raise unusable(path, f"a field is missing ({error})") from None


def read_tokenizer(folder: Path, config: EncoderConfig) -> Tokenizer:
    """Read `tokenizer.json`, with the truncation of `sentence_bert_config.json`, not its own."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise unusable(path, f"not readable as a tokenizer ({error})") from None
    path = folder / "sentence_bert_config.json"
    settings = read_json(path, REMEDY)
    limit, special = (
        settings.get("max_seq_length"),
        tokenizer.num_special_tokens_to_add(is_pair=False),
    )
    room = config.max_position_embeddings - (
        MPNET_PADDING + 1 if config.model_type == "mpnet" else 0
    )
    if not isinstance(limit, int) or not 0 < special < limit <= room:
        bounds = (
            f"more than the special tokens ({special}, at least 1) and at most {room} positions"
        )
        raise unusable(path, f"max_seq_length is {limit}, must be {bounds}")
    if settings.get("do_lower_case"):
        rest = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
    tokenizer.enable_padding(
        pad_id=MPNET_PADDING
    )  # to the longest text of a batch; BERT takes any id there
    tokenizer.enable_truncation(limit)
    return tokenizer


def checkpoint_key(name: str, model_type: str) -> str:
    """The checkpoint's name of our parameter: "layers.3.down.bias" ->
    "encoder.layer.3.output.dense.bias"."""
    column = ("bert", "mpnet").index(model_type)
    *layer, module, leaf = name.split(".")  # layer is ["layers", "3"] or []
    prefix = f"encoder.layer.{layer[1]}." if layer else ""
    return f"{prefix}{KEY_TABLE[module][column]}.{leaf}"


def read_encoder(folder: Path, config: EncoderConfig) -> Encoder:
    """Read `model.safetensors` as float32; a missing, unknown or misshapen weight is a
    `UserError`."""
    path = folder / "model.safetensors"
    if not path.is_file() and any(folder.glob("*.bin")):
        raise UserError(
            f"{path}: only pickle (.bin) here, which is never loaded; convert it to safetensors"
        )
    try:
        stored = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise unusable(path, f"not readable as safetensors ({error})") from None
    stored = {key.removeprefix(f"{config.model_type}."): tensor for key, tensor in stored.items()}
    stored = {
        key: tensor.float() for key, tensor in stored.items() if not key.startswith(UNUSED_KEYS)
    }
    with torch.device("meta"):  # shapes only; the weights are put in below
        encoder = Encoder(config)
    wanted = {checkpoint_key(name, config.model_type): name for name in encoder.state_dict()}
    found = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    expected = {key: tuple(encoder.get_parameter(name).shape) for key, name in wanted.items()}
    wrong = [key for key in sorted(expected | found) if expected.get(key) != found.get(key)]
    if wrong:
        listed = (f"{key} (expected {expected.get(key)}, found {found.get(key)})" for key in wrong)
        raise unusable(path, f"does not fit config.json: {', '.join(listed)}")
    encoder.load_state_dict({wanted[key]: tensor for key, tensor in stored.items()}, assign=True)
    return encoder.requires_grad_(False)
