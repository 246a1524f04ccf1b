"""docs/scaling.md: its tables are those of the formulas, which agree with hand; growth is measured
on equal work."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.bench import memory, scaling
from tests.bench.plot import write_plot
from tests.bench.scaling import Plan

ROOT = Path(__file__).resolve().parents[2]
# Of a layer of the 7B, by hand: four squares of 4096 and three matrices of 4096 x 11008, two norms;
# adapters of rank 128 on all seven.
MATRICES = 4 * 4096**2 + 3 * 4096 * 11008
ADAPTERS = 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
LAYER = 2 * (MATRICES + 2 * 4096) + 4 * ADAPTERS  # bytes: bfloat16, and float32
PROJECTOR = 1024 * 4096 + 4096 + 4096**2 + 4096
TOKENS = 60 + 2340 + 2 * 100


def test_the_pages_tables_are_these():
    """And it shows every plot that is there."""
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    remedy = "run python -m tests.bench.scaling, and put its table into docs/scaling.md"
    for title, table in scaling.tables().items():
        assert table in page, f"{title}: {remedy}"
    plots = {path.name for path in (ROOT / "docs").glob("scaling-*.svg")}
    assert set(re.findall(r"\]\((scaling-[\w-]+\.svg)\)", page)) == plots and len(plots) == 3


def test_bytes_by_hand():
    """Weights of the 7B; what is trained, its gradients and moments; shards among eight."""
    # Embeddings, head, norm, newline; the original projector.
    outside = 2 * (2 * 32064 * 4096 + 4096 + 4096) + 4 * PROJECTOR
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 5 * 1024 + 4 * 1024
    tower = 1024 * (3 * 14 * 14 + 577 + 1 + 4) + 24 * block
    model, trained = scaling.policy("7B"), 4 * (32 * ADAPTERS + PROJECTOR)
    assert memory.trained_bytes(model) == trained
    assert memory.frozen_bytes(model) == outside + 2 * tower + 32 * 2 * (MATRICES + 2 * 4096)
    assert Plan("7B", 1, "none").parts["gradients and moments"] == 3 * trained
    shared = Plan("7B", 8, "full").parts
    over = 8 * 73 - 577  # rows of the tower's position table, which do not go round
    assert shared["weights"] == (Plan("7B", 8, "none").parts["weights"] + over * 1024 * 2) / 8
    assert shared["gathered"] == outside + 4 * PROJECTOR + 2 * LAYER


def test_an_annotator_by_hand():
    """The 34B's frozen weights, whole or dealt out to eight; in shards embeddings, head, projector
    and what else no layer holds stay gathered, and two layers while it judges."""
    layer = 2 * (7168 * (2 * 56 + 2 * 8) * 128 + 3 * 7168 * 20480 + 2 * 7168)
    projector = 4 * (1024 * 7168 + 7168 + 7168**2 + 7168)
    outside = 2 * (2 * 64064 * 7168 + 7168 + 7168) + projector
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 5 * 1024 + 4 * 1024
    tower = 2 * (1024 * (3 * 14 * 14 + 577 + 1 + 4) + 24 * block)
    over = 8 * 73 - 577  # rows of the tower's position table, which do not go round
    whole = scaling.judge_phases("7B", "34B", 8, sharded=False)
    shared = scaling.judge_phases("7B", "34B", 8, sharded=True)
    assert whole["annotator"] == outside + tower + 60 * layer
    share = (whole["annotator"] + over * 1024 * 2) / 8
    assert shared["annotator"] == share + outside

    # To answer in words it is gathered beside its shards.
    assert share + whole["annotator"] > scaling.LARGE
    # What the policy takes is the same, but for two layers of the annotator's.
    saved = whole["annotator"] - shared["annotator"]
    for phase, apart in (("answers", 0), ("judged", 2 * layer), ("learns", 0)):
        assert whole[phase] - shared[phase] == saved - apart
    assert whole["learns"] - whole["annotator"] == sum(Plan("7B", 8, "full").parts.values())


def test_seconds_by_hand():
    """Two passes of eight GPUs. The frozen matrices: 6 FLOPs a number and token; gathering: three
    times each layer."""
    plain, shards = Plan("7B", 8, "none"), Plan("7B", 8, "full")
    assert scaling.batch()[0].ids.shape == (1, TOKENS) and scaling.batch()[1] == 5
    step, cached = shards.step(), shards.step(cached=True)
    features = 576 + 36 * 48  # of the whole picture and its tiles, the padding left out
    wide = features * (6 * 1024 * 4096 + 8 * 4096**2)
    assert step.projector == pytest.approx(2 * wide / (0.5 * 67e12))
    # Attention, head and tower come to it.
    products = 2 * TOKENS * (6 * 32 * MATRICES + 6 * 32 * ADAPTERS)
    assert products < step.base * 0.5 * 989e12 < 1.15 * products
    whole, trained = memory.whole_bytes(shards.model), memory.trained_bytes(shards.model)
    assert step.hidden == pytest.approx(2 * (whole + 2 * 32 * LAYER + trained) * 7 / 8 / 450e9)
    assert step.hidden - cached.hidden == pytest.approx(2 * 32 * LAYER * 7 / 8 / 450e9)
    assert plain.step().summing == pytest.approx(2 * trained * 7 / 8 / 450e9)
    assert plain.step().base == step.base and plain.step().hidden == step.summing == 0
    # The reference's forward pass, twice; and attention, head, projector.
    matrices = 2 * 32 * MATRICES * TOKENS * 2
    assert matrices < (step.base - cached.base) * 0.5 * 989e12 < 1.2 * matrices
    assert Plan("7B", 1, "none").step().summing == 0
    assert scaling.bus(8) > scaling.bus(32) == 8 * 50e9


@pytest.mark.parametrize("shard", ["none", "full"])
def test_more_gpus_are_faster_by_as_much(shard):
    """Times per pair fall with every GPU, but not by more than there are; the batch grows only
    where it must."""
    plans = [Plan("13B", gpus, shard) for gpus in (2, 8, 16, 64)]
    assert [plan.batch_size for plan in plans] == [16, 16, 16, 64]
    for few, many in pairwise(plans):
        ratio = few.step().total / few.batch_size / (many.step().total / many.batch_size)
        assert 0.8 * many.gpus / few.gpus < ratio <= many.gpus / few.gpus


def test_recompute_where_it_must_be(monkeypatch):
    """It is another forward pass; and what does not fit even so is not timed."""
    plan = Plan("7B", 8, "full")
    # That of the reference; the policy has adapters, too.
    forward = plan.step().base - plan.step(cached=True).base
    forward += 2 * 2 * 32 * ADAPTERS * TOKENS / (0.5 * 989e12)
    assert not plan.recompute and plan.fits
    monkeypatch.setattr(scaling, "LARGE", sum(plan.parts.values()) - 1)
    tight = replace(plan)
    assert tight.recompute and tight.fits
    assert tight.parts["activations"] < plan.parts["activations"] / 10
    assert tight.step().base == pytest.approx(plan.step().base + forward)
    monkeypatch.setattr(scaling, "LARGE", 1e9)
    assert not replace(plan).fits and "memory" in replace(plan).bound()


def test_slow_networks_are_seen(monkeypatch):
    """A step takes as long as its gathering where that is longer."""
    plan = Plan("7B", 32, "full")
    assert plan.step().total == plan.step().computing and "computing" in plan.bound()
    monkeypatch.setattr(scaling, "NETWORK", scaling.NETWORK / 100)
    assert plan.step().total == plan.step().hidden > plan.step().computing
    assert "gathering" in plan.bound()


def test_a_plot(tmp_path):
    """A picture of its own, with a mark per point, both axes from zero."""
    lines = {"a < b": [(1, 2.0), (5, 40.0)], "c": [(2, 3.0), (3, 4.0), (10, 7.5)]}
    write_plot(tmp_path / "new" / "plot.svg", "x & y", "ms", lines)
    tree = ElementTree.parse(tmp_path / "new" / "plot.svg").getroot()
    kinds = [element.tag.rpartition("}")[2] for element in tree.iter()]
    said = [element.text for element in tree.iter() if element.text]
    assert kinds.count("circle") == 5
    assert {"a < b", "c", "x & y", "ms", "0", "10", "40"} <= set(said)
    heights = [float(e.get("cy")) for e in tree.iter() if e.tag.endswith("circle")]
    assert heights[0] > heights[1] and len(set(heights)) == 5


# ---------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def growth():
    """The measurements, where transformers is there to make a folder."""
    pytest.importorskip("transformers")
    from tests.bench import growth

    return growth


@pytest.fixture(scope="module")
def small():
    """The bench's size, but smaller."""
    from tests.bench import sizes

    text, vision = sizes.text_config(579, 48, 64, 2, 3), sizes.vision_config(24, 3, 2, 4)
    size = replace(sizes.TINY, text=text, vision=vision)
    return replace(size, lora_rank=2, question_words=3, sentence_tokens=4)


def test_memory_by_length(growth, small, tmp_path):
    """The formula is what is kept, on an AnyRes picture, too; the responses are as long as was
    said."""
    rows = growth.memory_rows(small, tmp_path, (3, 40))
    assert [row["kept"] for row in rows] == [row["formula"] for row in rows]
    assert rows[1]["tokens"] - rows[0]["tokens"] == 2 * 37
    assert growth.memory_table(rows).count("\n") == 4


def test_times_are_of_equal_work(growth, small, tmp_path):
    """BDHS completes so many sentences, each by all its tokens, behind so many image tokens."""
    from tests.bench.sampling import recorded

    assistant = growth.loaded(small, tmp_path)
    tokens = len(assistant.processor.layout(growth.picture(0))[1])
    for sentences, rho_th in ((1, 0.0), (3, 0.99)):
        [sequence], [completions] = recorded(growth.bdhs_work(small, assistant, sentences, rho_th))
        assert [len(completion.ids) for completion in completions] == [4] * sentences
        assert len(sequence.image_visible) == tokens
        assert sequence.image_visible.all() == (rho_th == 0)


def test_lines_of_times(growth, small, tmp_path):
    """A point for each length, count or picture, in their order."""
    lines = growth.dpo_times(small, tmp_path / "dpo", (2, 9), 1)
    assert list(lines) == ["reference computed", "--ref-cache"]
    assert all([x for x, _ in line] == [2, 9] for line in lines.values())
    [line] = growth.sentence_times(small, tmp_path / "sentences", (1, 2), 1).values()
    assert [x for x, _ in line] == [1, 2] and all(y > 0 for _, y in line)
    few, all_ = growth.image_times(small, tmp_path / "images", (3, 4), 1).values()
    # The whole, and the rows of 2 x 2 tiles that are no padding.
    tokens = [9 + 4 * (6 + 1), 16 + 6 * (8 + 1)]
    assert [x for x, _ in few] == [x for x, _ in all_] == tokens
