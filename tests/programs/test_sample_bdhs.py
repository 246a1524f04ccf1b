"""sample_bdhs.py as a user runs it: what its pairs hold, how others read them, and what it
counts."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import toy_assistant, toy_tokenizer
from input_files import pairs_in
from script_runs import contents, instruct_file, read_lines, sample, train

import sample_bdhs
from minialign import edge
from minialign.data.images import ImageProcessor
from minialign.data.record_files import open_pairs
from minialign.data.tokenizer import Tokenizer
from minialign.model.masks import image_attention_mask, mask_of_seed
from minialign.sampling.bdhs import split_sentences
from minialign.sampling.pairs_file import Sampled
from minialign.toy import world
from minialign.training.outputs import places_of_cuts, report_pairs


def test_pairs_file(model, tmp_path):
    pairs = sample(model, tmp_path / "deep" / "pairs.jsonl")
    records = world.alignment_records(7)
    assert len(pairs) == 7
    for pair, record in zip(pairs, records, strict=True):
        assert list(pair) == ["id", "images", "prompt", "chosen", "rejected", "bdhs"]
        assert pair["id"] == record["id"] and pair["images"] == [record["image"]]
        question, answer = (turn["value"] for turn in record["conversations"])
        assert pair["prompt"] == [{"role": "user", "content": question.removeprefix("<image>\n")}]
        assert pair["chosen"] == [{"role": "assistant", "content": answer}]
        assert pair["rejected"][0]["content"].strip()
        kinds = {name: type(value) for name, value in pair["bdhs"].items()}
        assert kinds == {
            "iterations": int,
            "similarity": float,
            "mask_seed": int,
            "guided": bool,
            "truncated": bool,
            "rho_th": float,
            "noise_steps": int,
        }
        assert 1 <= pair["bdhs"]["iterations"] <= 3 and 0 <= pair["bdhs"]["similarity"] <= 1
        assert pair["bdhs"]["guided"] == (pair["bdhs"]["iterations"] < 3)
        assert pair["bdhs"]["rho_th"] == 0.7
    assert len({pair["bdhs"]["mask_seed"] for pair in pairs}) == 7
    files = ["pairs.jsonl", "pairs.jsonl.config.json", "pairs.jsonl.stats.json"]
    assert sorted(contents(tmp_path / "deep")) == files
    config = json.loads((tmp_path / "deep" / "pairs.jsonl.config.json").read_text())
    assert config["model"] == model and config["max_new_tokens"] == 5 and config["encoder"] is None


def test_the_stored_seed_draws_the_mask_that_was_used(model, tmp_path, monkeypatch):
    used = []

    def spy(patches, rho_th, seed):
        mask = image_attention_mask(patches, rho_th, torch.Generator().manual_seed(seed))
        used.append(mask.tolist())
        return mask

    monkeypatch.setattr(sample_bdhs, "mask_of_seed", spy)
    pairs = sample(model, tmp_path / "pairs.jsonl", n_bdhs=1)
    records = open_pairs(str(tmp_path / "pairs.jsonl"), None)
    shown = report_pairs(records, toy_assistant(), world.open_picture, None)
    assert [pair.visible for pair in shown] == used and len(pairs) == len(used) == 7
    assert all(0 < sum(mask) < 36 for mask in used)


def test_tokens_of_all_tiles_are_counted(model, tmp_path):
    """AnyRes: the mask is shown over the whole picture, and counted over its tiles, too."""
    sample(model, tmp_path / "pairs.jsonl", limit=2)
    processor = ImageProcessor(48, 8, pinpoints=((96, 48), (48, 96), (96, 96)))
    assistant = replace(toy_assistant(), processor=processor)
    records = open_pairs(str(tmp_path / "pairs.jsonl"), None)
    for pair, number in zip(
        report_pairs(records, assistant, world.open_picture, None), [0, 1], strict=True
    ):
        seed = records.parse(number).bdhs["mask_seed"]
        tokens = len(processor.layout(world.open_picture(pair.record.image))[1])
        mask = mask_of_seed(tokens, 0.7, seed)
        whole = f"{int(mask[:36].sum())} of 36 in the whole picture"
        assert tokens > 36 and len(pair.visible) == 36
        assert pair.tokens == f"{whole}, {int(mask.sum())} of {tokens} with its tiles"


def test_what_a_run_says(model, tmp_path, capsys):
    """The first pair; that responses were cut off, where most were; what is lost without an
    encoder, once."""
    pairs = sample(model, tmp_path / "pairs.jsonl", max_new_tokens=1)
    out = capsys.readouterr().out
    assert sum(pair["bdhs"]["truncated"] for pair in pairs) > len(pairs) / 2
    assert "most responses were cut off at --max-new-tokens 1: raise it" in out
    assert f"y-, rejected: {pairs[0]['rejected'][0]['content']!r}" in out
    assert "accepted (Fig. 10)" in out and out.count("no --encoder: ") == 1
    sample("toy", tmp_path / "longer.jsonl", max_new_tokens=128, limit=2)
    out = capsys.readouterr().out
    assert "most responses" not in out and "no --encoder" not in out


def test_the_places_of_cuts_are_those_that_were_cut(tmp_path, monkeypatch):
    """Redrawn for the report; what stands before each in y- stands so in y+, but for a swap."""
    used, real = [], sample_bdhs.completion_tree

    def spy(*args):
        found = real(*args)
        used.append([cut.kept for cut in found[0]])
        return found

    monkeypatch.setattr(sample_bdhs, "completion_tree", spy)
    sample("toy", tmp_path / "pairs.jsonl", limit=24, n_bdhs=1, max_new_tokens=20, batch_size=24)
    records = open_pairs(str(tmp_path / "pairs.jsonl"), None)
    shown = report_pairs(records, toy_assistant(), world.open_picture, edge.truth_of("toy"))
    marked = 0
    for pair, kept in zip(shown, used, strict=False):
        if not any(pair.cuts):
            continue
        rejected = pair.record.rejected
        sentences = split_sentences(rejected)
        starts = [start for start, _ in sentences]
        cut = [rejected[a:b] for a, b in zip(starts, pair.cuts[1], strict=True)]
        assert cut == kept
        assert len(pair.cuts[0]) <= len(pair.cuts[1])
        marked += 1
    assert marked >= 6


def test_no_places_where_another_text_stands():
    """Of another sampler's response, or with another seed, nothing is marked."""
    encode = toy_tokenizer().answer
    assert places_of_cuts("A cup is red. It is.", "One sentence.", 0, encode) == ([], [])
    assert places_of_cuts("The cup is red.", "Some dog ran.", 3, encode) == ([], [])


def test_other_readers_take_the_pairs(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    pairs = sample(model, tmp_path / "pairs.jsonl")
    path, cache = str(tmp_path / "pairs.jsonl"), str(tmp_path / "cache")
    found = datasets.Dataset.from_json(path, cache_dir=cache)
    assert found.to_list() == pairs
    kinds = {str(found.features[name]) for name in ("prompt", "chosen", "rejected")}
    assert kinds == {"List({'role': Value('string'), 'content': Value('string')})"}


def test_records_of_one_turn_and_of_several_are_messages(model, tmp_path):
    """TRL takes texts or messages, and looks at one row to know which."""
    talks = [
        [("human", "<image>\nWhat is there?"), ("gpt", "A red cup.")],
        [
            ("human", "Is there a cup?\n<image>"),
            ("gpt", "Yes."),
            ("human", "Which colour?"),
            ("gpt", "It is red."),
        ],
    ]
    data = instruct_file(tmp_path / "data.json", *talks)
    pairs = sample(model, tmp_path / "pairs.jsonl", data=data)
    assert pairs[0]["prompt"] == [{"role": "user", "content": "What is there?"}]
    assert pairs[1]["prompt"] == [
        {"role": "user", "content": "Is there a cup?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Which colour?"},
    ]
    for pair, answer in zip(pairs, ("A red cup.", "It is red."), strict=True):
        assert pair["chosen"] == [{"role": "assistant", "content": answer}]
        assert [set(message) for message in pair["rejected"]] == [{"role", "content"}]
    records = pairs_in(tmp_path / "pairs.jsonl")
    assert records[1].turns == [
        ("user", "Is there a cup?"),
        ("assistant", "Yes."),
        ("user", "Which colour?"),
    ]
    assert [record.chosen for record in records] == ["A red cup.", "It is red."]
    rows = train(model, tmp_path / "out", pairs=str(tmp_path / "pairs.jsonl"))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_trl_takes_the_pairs(model, oracle, tmp_path, monkeypatch):
    """Its collator for pictures, as the lines are: the picture's tokens stand in the turn where it
    stands here, and the texts are the same."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    later = [("human", "Hello."), ("gpt", "Hi."), ("human", "<image>\nWhat is there?")]
    talks = [
        [("human", "<image>\nWhat is there?"), ("gpt", "A red cup.")],
        [*later, ("gpt", "A blue cup.")],
    ]
    data = instruct_file(tmp_path / "data.json", *talks)
    real, places = Tokenizer.prompt, []

    def prompt(tokenizer, turns, image=True, image_turn=0):
        places.append((len(turns), image_turn))
        return real(tokenizer, turns, image, image_turn)

    monkeypatch.setattr(Tokenizer, "prompt", prompt)
    pairs = sample(model, tmp_path / "pairs.jsonl", data=data)
    assert [record.image_turn for record in pairs_in(tmp_path / "pairs.jsonl")] == [0, 2]

    tokens = oracle.transformers.AutoTokenizer.from_pretrained(model)
    tokens.image_token, tokens.image_token_id = "<image>", tokens.convert_tokens_to_ids("<image>")
    form = (
        "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{{ '</s>' }}{% endfor %}"
    )
    processor = oracle.transformers.LlavaProcessor(
        oracle.transformers.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48),
        tokens,
        patch_size=8,
        chat_template=form,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    rows = [
        {"images": [world.open_picture(pair["images"][0])]}
        | {name: pair[name] for name in ("prompt", "chosen", "rejected")}
        for pair in pairs
    ]
    batch = trainer.DataCollatorForVisionPreference(processor)(rows)
    picture, heads = "<image>" * 36, ["user: ", "user: Hello.</s>assistant: Hi.</s>user: "]
    for head, ids, pair in zip(heads, batch["input_ids"], pairs, strict=False):
        text = tokens.decode(ids).replace("<pad>", "").replace("</s> ", "</s>")
        chosen = pair["chosen"][0]["content"]
        expected = f"{head}{picture}What is there?</s>assistant: {chosen}</s>"
        assert text.replace(" ", "") == expected.replace(" ", "")
    train(model, tmp_path / "out", pairs=str(tmp_path / "pairs.jsonl"))
    assert set(places) == {(1, 0), (3, 2)}  # whoever asks, sampling and training


def test_stats(model, tmp_path, monkeypatch):
    """Four samples made up: different at once, at the last try, never; and an empty one, which is
    no pair."""

    def made_up(assistant, similarity, examples, config):
        return [
            Sampled("Other.", 1, 0.1, 5, True, False),
            Sampled("Late", 3, 0.9, 5, False, True),
            Sampled(examples[2].record.chosen, 3, 1.0, 5, False, False),
            Sampled("", 3, 0.0, 5, True, False),
        ]

    monkeypatch.setattr(sample_bdhs, "sample", made_up)
    pairs = sample(model, tmp_path / "pairs.jsonl", limit=4, batch_size=4)
    chosen = pairs[2]["chosen"][0]["content"]
    assert [pair["rejected"][0]["content"] for pair in pairs] == ["Other.", "Late", chosen]
    stats = json.loads((tmp_path / "pairs.jsonl.stats.json").read_text())
    assert stats == {
        "pairs": 3,
        "resolved": [0.3333] * 3,
        "identical": 1,
        "truncated": 1,
        "left_out": 1,
    }
    assert len(pairs_in(tmp_path / "pairs.jsonl")) == 2  # the identical one teaches nothing


def test_iterations_follow_eps_s(model, tmp_path, monkeypatch):
    """Everything is too similar at 0, so all is tried to the end, unguided at last; at 1 the first
    try is taken."""
    # A model of random weights never stops by itself: let that count as whole.
    real = sample_bdhs.generate

    def whole(*args):
        return [[replace(each, stopped=True) for each in row] for row in real(*args)]

    monkeypatch.setattr(sample_bdhs, "generate", whole)
    never = sample(model, tmp_path / "never.jsonl", eps_s=0.0)
    assert {(pair["bdhs"]["iterations"], pair["bdhs"]["guided"]) for pair in never} == {(3, False)}
    once = sample(model, tmp_path / "once.jsonl", eps_s=1.0)
    assert {(pair["bdhs"]["iterations"], pair["bdhs"]["guided"]) for pair in once} == {(1, True)}
    unguided = sample(model, tmp_path / "unguided.jsonl", eps_s=1.0, guided=False)
    assert not any(pair["bdhs"]["guided"] for pair in unguided)
    noise = sample(model, tmp_path / "noise.jsonl", eps_s=1.0, rho_th=0.0, noise_steps=500)
    assert [pair["rejected"] for pair in noise] != [pair["rejected"] for pair in once]


@pytest.mark.parametrize(("flags", "rho_th"), [({}, 0.0), ({"rho_th": 0.4}, 0.4)])
def test_noise_stands_instead_of_the_mask(model, tmp_path, flags, rho_th):
    """Unless both are asked for: BDHS_noise hides no image token."""
    config = sample_bdhs.Config(model, noise_steps=500, limit=2, max_new_tokens=3, n_bdhs=1)
    sample_bdhs.main(replace(config, out=str(tmp_path / "pairs.jsonl"), **flags))
    bdhs = [pair["bdhs"] for pair in read_lines(tmp_path / "pairs.jsonl")]
    assert {(each["rho_th"], each["noise_steps"]) for each in bdhs} == {(rho_th, 500)}
