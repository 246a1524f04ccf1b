"""Where a picture stands in a conversation, and what may not be in a text: the same in all formats,
as every parser's texts pass through one function.
"""

import json
import math
import random
import re
import typing
from pathlib import Path

import pytest
from data_sets import RAW, expected, talk
from helpers import refused, toy_tokenizer
from input_files import array, instruct, lines, pair, pairs_in, records_in

from minialign.data.records import FORMATS, FormatName, LeftOut, format_of, pair_fields
from minialign.edge import CHECKPOINT
from minialign.errors import UserError

QUESTION = "What is on the table?"
# The picture at the head of a question, in its middle and at its end.
MARKED = [
    f"<image>\n{QUESTION}",
    f"<image>{QUESTION}",
    f"{QUESTION}\n<image>",
    f" {QUESTION} <image> ",
    f"\n<image>\n\n{QUESTION}",
]
# What is the template's to write, in a question and in an answer; {} stands for the text.
MARKUP = [
    "USER: {}",
    "{} ASSISTANT:",
    "{}\nASSISTANT: Yes.",
    "user: {}",
    "Human: {}",
    "Assistant: {}",
    "GPT: {}",
    "{}\n\nAssistant:",
    "### Human: {}",
    "###Assistant: {}",
    "{}\n### Response: Yes.",
    "[INST] {} [/INST]",
    "<<SYS>>\nBe brief.\n<</SYS>>\n{}",
    "<|im_start|>user\n{}<|im_end|>",
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    "<start_of_turn>user\n{}",
    "<｜User｜>{}",
    "<s>{}",
    "{}</s>",
    "{}<pad>",
    "<ImageHere>{}",
    "<Image>{}",
    "<image_1> {}",
    "<image-placeholder>\n{}",
    "<img></img>{}",
    "<im_start><im_patch><im_end>{}",
    "<video>\n{}",
    "<|image_pad|>{}",
]
# What looks like some of it and is a text.
PLAIN = [
    "Which user: the left one, or the human?",
    "What does the sign <exit> say? Is 1 < image > 0?",
    "Is the user's hand | or the assistant's <here>?",
    "Question: who is it?\nOptions:\nA: a human\nB: a robot",
    "What does `<img src='a.png'>` do?",
    "Is it <important>, <imagined> or <images>?",
    "### Steps\n1. Look [at] it. << and >>",
]


def with_text(form: str, question: str, answer: str = "A cup.") -> dict:
    """A format's first record, asking `question` and answered `answer` where it is rejected (of
    `instruct` where it is chosen)."""
    raw = json.loads(json.dumps(RAW[form][0]))
    name = {"pairs": "prompt", "vlfeedback": "prompt", "rlaif-v": "question"}.get(form)
    if form == "rlhf-v":
        inner = json.loads(raw["text"]) | {"question": question, "rejected": answer}
        return raw | {"text": json.dumps(inner)}
    if form == "alpaca":
        return raw | {"instruction": question, "input": "", "rejected": answer}
    if name is None:
        raw["conversations"][0]["value"] = question
    else:
        raw[name] = question

    if form == "instruct":
        raw["conversations"][1]["value"] = answer
    elif form == "povid":
        raw["rejected_conversations"][1]["value"] = answer
    elif form == "llava-rlhf":
        raw["output_2"]["value"] = answer
    elif form == "sharegpt":
        raw["rejected"]["value"] = answer
    elif form == "vlfeedback":
        raw["completions"][2]["response"] = answer
    else:
        raw["rejected"] = answer
    return raw


@pytest.mark.parametrize("form", FORMATS)
def test_the_placeholder_is_taken_out_in_every_format(form):
    parse = FORMATS[form].parse
    without = parse(with_text(form, QUESTION))
    assert without.turns == [("user", QUESTION)]
    assert [parse(with_text(form, text)) for text in MARKED] == [without] * len(MARKED)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_the_templates_is_refused_by_its_name(form):
    """In a question, in an answer and behind a placeholder; read, no text would hold it."""
    parse = FORMATS[form].parse
    for markup in MARKUP:
        text = markup.format(QUESTION)
        for raw in (
            with_text(form, text),
            with_text(form, f"<image>\n{text}"),
            with_text(form, QUESTION, text),
        ):
            message = refused(lambda raw=raw: parse(raw), "which is the template's to write")
            held = re.search(r"holds '(.+?)', which", message)[1]
            assert held.replace("\\n", "").strip() in text
    for text in PLAIN:
        assert parse(with_text(form, text)).turns == [("user", text)]


@pytest.mark.parametrize("form", FORMATS)
def test_two_placeholders_or_one_in_an_answer(form):
    parse = FORMATS[form].parse
    for text in ("<image>\n<image>\nWhat differs?", "<image>\nWhat does <image> mean?"):
        refused(lambda text=text: parse(with_text(form, text)), "2 placeholders <image> for one")
    message = "holds '<image>', which is the template's"
    refused(lambda: parse(with_text(form, QUESTION, "See <image>.")), message)


@pytest.mark.parametrize("seed", range(20))
def test_the_picture_stands_where_llava_puts_it(oracle, seed):
    """LLaVA takes the placeholder out of its turn, strips it, and writes it with a line end at the
    turn's head; the ids are those of that text in transformers' tokenizer."""
    rng = random.Random(seed)
    texts = [f"Text {number} of {seed}." for number in range(rng.choice([1, 3, 5]))]
    place = rng.randrange(0, len(texts), 2)
    at = rng.randrange(len(texts[place]) + 1)
    marked = [*texts]
    marked[place] = texts[place][:at] + rng.choice(["<image>", "<image>\n"]) + texts[place][at:]
    raw = {"id": "1", "image": "a.png", "conversations": talk(*marked, "An answer.")}
    record = FORMATS["instruct"].parse(raw)

    wanted = [*texts]
    wanted[place] = "<image>\n" + marked[place].replace("<image>", "").strip()
    turns = [f"USER: {text} ASSISTANT:" if n % 2 == 0 else f" {text}</s>"
             for n, text in enumerate(wanted)]  # fmt: skip
    theirs = oracle.transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = theirs("".join(turns), add_special_tokens=False).input_ids
    prompt = toy_tokenizer().prompt(record.turns, image_turn=record.image_turn)
    assert prompt[1:] == ids and record.image_turn == place


def messages(rng: random.Random, place: int | None, count: int) -> list[dict]:
    """Messages whose picture stands in the turn `place`, which parts say: all questions are parts,
    as TRL puts another picture into the first that is a text."""
    talk = []
    for number in range(count):
        text, role = f"Text {number}.", ("user", "assistant")[number % 2]
        content = text
        if rng.random() < 0.5 if role == "assistant" else place is not None:
            marked = [{"type": "image"}] if number == place else []
            content = [*marked, {"type": "text", "text": text}]
        talk.append({"role": role, "content": content})
    return talk


@pytest.mark.parametrize("seed", range(20))
def test_the_picture_stands_where_trl_puts_it(seed):
    """Rows of texts and of parts; and what we write of them, which is read back as it was."""
    data_utils = pytest.importorskip("trl.data_utils")
    rng = random.Random(seed)
    place = rng.choice([None, 0, 2, 4])
    prompt = messages(rng, place, 5)
    row = {"id": "1", "images": ["a.png"], "prompt": prompt, "chosen": "Yes.", "rejected": "No."}
    record = FORMATS["pairs"].parse(row)
    written = pair_fields(record, {"chosen": "Yes.", "rejected": "No."})

    for each in (prompt, written["prompt"]):
        theirs = data_utils.prepare_multimodal_messages(each, images=["PICTURE"])
        has = [[part["type"] for part in message["content"]] for message in theirs]
        assert [kinds[0] == "image" for kinds in has] == [n == (place or 0) for n in range(5)]
        assert [message["content"][-1]["text"] for message in theirs] == [
            text for _, text in record.turns
        ]
    assert record.image_turn == (place or 0)
    assert FORMATS["pairs"].parse(json.loads(json.dumps(written))) == record


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Q"}],
        [{"type": "image"}, {"type": "text", "text": "<image>\nQ"}],
    ],
)
def test_two_images_in_parts(content):
    row = pair(prompt=[{"role": "user", "content": content}])
    refused(lambda: FORMATS["pairs"].parse(row), "2 placeholders <image> for one picture")


@pytest.mark.parametrize("part", [{"type": "video"}, {"type": "audio", "text": "Q"}, "Q", 5])
def test_parts_of_another_kind(part):
    row = pair(prompt=[{"role": "user", "content": [part, {"type": "text", "text": "Q"}]}])
    refused(lambda: FORMATS["pairs"].parse(row), "field 'prompt', turn 1: ", "has a part of type")


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("form", FORMATS)
def test_spellings_of_one_picture(form):
    raw = {name: value for name, value in with_text(form, QUESTION).items() if "im" not in name}
    parse = FORMATS[form].parse
    for name in ("image", "images"):
        for value in ("a.png", ["a.png"], {"path": "a.png"}, [{"bytes": None, "path": "a.png"}]):
            assert parse(raw | {name: value}).image == "a.png"
        for value in (["a.png", "b.png"], [{"path": "a.png"}, "b.png"], ["a.png", "a.png"]):
            refused(lambda raw=raw | {name: value}: parse(raw), "2 pictures to a record")
        for value in ("", None, [], [""], [None], {"path": None, "bytes": None}):
            with pytest.raises(LeftOut, match="text without an image"):
                parse(raw | {name: value})
        bytes_of_it = {"bytes": "iVBORw0KGgo=" * 200_000, "path": "a.png"}
        remedy = "a picture's bytes; name a file, as docs/running.md's program for parquet does"
        message = refused(lambda raw=raw | {name: bytes_of_it}: parse(raw), name, remedy)
        assert len(message) < 200
        for value in (
            "https://x.org/a.png",
            "data:image/png;base64," + "A" * 2_000_000,
            "a" * 5000,
        ):
            message = refused(lambda raw=raw | {name: value}: parse(raw), name, "no name of a file")
            assert len(message) < 200
        for value in (7, [7], {"a": 1}, True):
            refused(lambda raw=raw | {name: value}: parse(raw), f"field {name!r} is not a text")
    assert parse(raw | {"image": "a.png", "images": ["a.png"]}).image == "a.png"
    two = {"image": "a.png", "images": ["b.png"]}
    refused(lambda: parse(raw | two), "fields 'image' and 'images' name different pictures")


@pytest.mark.parametrize("name,value", [
    ("image", "a.png"), ("path", "a.png"), ("url", "a.png"), ("image", {"path": "a.png"}),
    ("image_url", {"url": "a.png"}),
])  # fmt: skip
def test_a_picture_that_a_part_names(name, value):
    kind = "image_url" if name == "image_url" else "image"
    content = [{"type": kind, name: value}, {"type": "text", "text": "Q"}]
    row = {"prompt": [{"role": "user", "content": content}], "chosen": "A.", "rejected": "B."}
    record = FORMATS["pairs"].parse(row)
    assert (record.image, record.turns) == ("a.png", [("user", "Q")])
    assert FORMATS["pairs"].parse(row | {"images": ["a.png"]}).image == "a.png"
    refused(lambda: FORMATS["pairs"].parse(row | {"images": ["b.png"]}), "different pictures")


def test_texts_without_a_picture_are_counted(tmp_path, capsys):
    """In every format; they are not bad."""
    for form in FORMATS:
        path, image = tmp_path / form, {"image": "", "images": []}
        without = {k: v for k, v in RAW[form][0].items() if k not in ("image", "img_path")} | image
        path.write_bytes(lines(*RAW[form][:2], without))
        found = records_in(path)
        wanted = {record.id for record in expected(form)}
        assert {record.id for record in found} == wanted
        assert "1 records left out: text without an image" in "".join(capsys.readouterr())


# ---------------------------------------------------------------- conversations


@pytest.mark.parametrize("seed", range(12))
def test_conversations_without_a_prompt(seed):
    """TRL's implicit prompts: what both answers begin with, as TRL itself takes it out."""
    data_utils = pytest.importorskip("trl.data_utils")
    rng = random.Random(seed)
    prompt = messages(rng, None, rng.choice([1, 3, 5]))
    ends = [{"role": "assistant", "content": text} for text in ("Yes.", "No.")]
    row = {"chosen": [*prompt, ends[0]], "rejected": [*prompt, ends[1]]}
    theirs = data_utils.extract_prompt(row)
    ours = FORMATS["pairs"].parse(row | {"images": ["a.png"]})
    assert ours == FORMATS["pairs"].parse(theirs | {"images": ["a.png"]})
    assert (ours.chosen, ours.rejected, len(ours.turns)) == ("Yes.", "No.", len(prompt))
    # With the prompt beside it, which must be the same.
    again = row | {"images": ["a.png"], "prompt": prompt[0]["content"]}
    if len(prompt) == 1:
        assert FORMATS["pairs"].parse(again) == ours
    else:
        refused(lambda: FORMATS["pairs"].parse(again), "field 'prompt' is not how chosen and")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"chosen": "USER: Q ASSISTANT: A"}, "field 'prompt' is missing"),
        ({"rejected": [{"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}]},
         "chosen and rejected differ before their last message"),
        ({"rejected": [{"role": "assistant", "content": "B"}]}, "differ before their last message"),
        ({"rejected": [{"role": "user", "content": "Q"}]}, "turn 1 is from 'user'"),
        ({"rejected": [{"role": "user", "content": "Q"}] * 2}, "turn 2 is from 'user'"),
        ({"rejected": []}, "end with the assistant's message"),
    ],
)  # fmt: skip
def test_conversations_that_do_not_begin_alike(changes, message):
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    row = {"images": ["a.png"], "chosen": talk, "rejected": [*talk[:1], talk[1] | {"content": "B"}]}
    assert FORMATS["pairs"].parse(row).turns == [("user", "Q")]
    if isinstance(changes.get("chosen"), str):
        changes = changes | {"rejected": "USER: Q ASSISTANT: B"}
    refused(lambda: FORMATS["pairs"].parse(row | changes), message)


def test_system_texts_are_refused():
    """As a turn and as a column; an empty column says nothing."""
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Q"}
    for raw in (pair(prompt=[system, user]),):
        message = "field 'prompt', turn 1 is from 'system', whose text is the template's own here"
        refused(lambda raw=raw: FORMATS["pairs"].parse(raw), message, "; leave it out")
    for form in ("sharegpt", "alpaca", "instruct"):
        raw, parse = RAW[form][0], FORMATS[form].parse
        for name in ("system", "tools", "videos"):
            assert parse(raw | {name: ""}) == parse(raw | {name: None}) == parse(raw)
            odd = raw | {name: "Be brief."}
            refused(lambda parse=parse, odd=odd: parse(odd), f"field {name!r} has no place")


def test_answers_with_a_rating_of_none_do_not_count():
    """VLFeedback's N/A: whatever it stands beside, that answer is neither best nor worst."""
    parse, raw = FORMATS["vlfeedback"].parse, json.loads(json.dumps(RAW["vlfeedback"][0]))
    answers = raw["completions"]
    answers[1]["annotations"]["Helpfulness"]["Rating"] = "N/A"  # the best
    record = parse(raw)
    assert (record.chosen, record.rejected) == ("Middling.", expected("vlfeedback")[0].rejected)
    answers[2]["annotations"]["Helpfulness"]["Rating"] = "N/A"  # the worst
    assert (parse(raw).chosen, parse(raw).rejected) == ("Middling.", "")
    for answer in answers:
        answer["annotations"]["Visual Faithfulness"]["Rating"] = "N/A"
    with pytest.raises(LeftOut, match="all have N/A"):
        parse(raw)


# ---------------------------------------------------------------- JSON that is odd


@pytest.mark.parametrize(
    "text,message",
    [
        ('"extra": "\\ud800"', "field 'extra' holds half a surrogate pair"),
        ('"\\udfff": 1', "holds half a surrogate pair"),
        ('"extra": [{"deep": ["\\ud83d x"]}]', "field 'extra' holds half a surrogate pair"),
        ('"extra": ' + "9" * 5000, "Exceeds the limit"),
        ('"extra": 1, "extra": 2', "field 'extra' stands twice in an object"),
        ('"extra": {"a": {"chosen": "A", "chosen": "B"}}', "field 'chosen' stands twice"),
        (f'"bdhs": "{"x" * 2_000_000}"', "field 'bdhs' must be an object"),
        (f'"prompt": [{{"role": "{"x" * 2_000_000}", "content": "Q"}}]', "turn 1 is from 'xxxx"),
    ],
)
@pytest.mark.parametrize("write", [lines, array])
def test_odd_json(tmp_path, text, message, write):
    """In a field that nobody reads, too: what a file cannot hold may be copied into one."""
    odd = {k: v for k, v in pair(1).items() if f'"{k}"' not in text}
    whole = json.dumps(odd)[:-1] + ", " + text + "}"
    path = tmp_path / "data"
    data = write(pair(0), "@@", pair(2)).decode()
    path.write_text(data.replace("@@" if write is lines else '"@@"', whole))
    said = refused(lambda: pairs_in(path), str(path), message)
    assert len(said) < 500 + len(str(path))
    if write is lines:
        assert f"{path}, line 2: " in said and len(pairs_in(path, skip_bad=True)) == 2


@pytest.mark.parametrize("depth", range(900, 1010, 3))
def test_nested_as_deep_as_json_goes(tmp_path, depth):
    """Read and used, or one line: what is not too deep to read may be too deep to write."""
    path, nested = tmp_path / "data", "[" * depth + "]" * depth
    for write in (lines, array):
        data = write(pair(0), pair(1, extra="@@")).decode().replace('"@@"', nested)
        path.write_text(data)
        try:
            assert len(pairs_in(path)) == 2 and len(pairs_in(path)[1].id) == 6
        except UserError as error:
            assert str(path) in str(error)


def test_numbers_that_are_none(tmp_path):
    """NaN and numbers beyond a float, where a rating or a number is wanted."""
    for rating in (
        math.nan,
        math.inf,
        10**400,
        "1" * 5000,
        "nan",
        "1e999",
        None,
        [],
        "five",
    ):
        raw = json.loads(json.dumps(RAW["vlfeedback"][0]))
        raw["completions"][0]["annotations"]["Helpfulness"]["Rating"] = rating
        message = refused(lambda raw=raw: FORMATS["vlfeedback"].parse(raw), "no number")
        assert len(message) < 200
    instructed = instruct(0) | {"score": math.nan}  # nobody asks for it
    (tmp_path / "data.json").write_bytes(array(instructed))
    assert len(records_in(tmp_path / "data.json")) == 1


def test_the_documentation_is_the_table():
    """docs/data.md has a row per format, made of what the code says of it."""
    page = Path(__file__).parents[2].joinpath("docs/data.md").read_text(encoding="utf-8")
    rows = [
        f"| `{name}` | {' or '.join(f'`{fields}`' for fields in form.known_by)} | {form.what} |"
        for name, form in FORMATS.items()
    ]
    assert page.split("|---|---|---|\n")[1].split("\n\n")[0] == "\n".join(rows)
    assert list(typing.get_args(FormatName)) == list(FORMATS)


def test_the_format_whose_fields_match_most():
    for form, raws in RAW.items():
        assert {format_of(raw) for raw in raws} == {form}
    assert (
        format_of({"image": 1, "text": 2, "question": 3, "chosen": 4, "rejected": 5}) == "rlaif-v"
    )
    assert format_of({"chosen": [], "rejected": [], "id": 1}) == "pairs"
    assert format_of({"question": "Q", "chosen": "A"}) is None
