"""The study's arithmetic by hand: pooled counts, paired intervals, verdicts; and its bookkeeping of runs."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from minialign import study
from minialign.errors import UserError
from minialign.files import write_json
from minialign.metrics import SETTINGS_OF_POPE, bootstrap, interval
from minialign.study import FINDINGS, ROWS, Config, judge

METRICS = ("pope_adversarial", "recall", "chair_i")


def bootstrapped(value: float, low: float, high: float) -> np.ndarray:
    """1 + 1000 numbers: the value, then evenly spread ones, so that 95 % of them lie between low and high."""
    spread = (high - low) / 0.95
    middle = (low + high) / 2
    return np.concatenate([[value], np.linspace(middle - spread / 2, middle + spread / 2, 1000)])


def verdicts(**rows) -> dict[str, str]:
    """id -> status, from rows of {metric: array}."""
    return {finding["id"]: finding["status"] for finding in judge(rows)}


def row(pope, recall, chair) -> dict[str, np.ndarray]:
    return dict(zip(METRICS, (bootstrapped(*values) for values in (pope, recall, chair)), strict=True))


ZERO = row((0, 0, 0), (0, 0, 0), (0, 0, 0))
IDS = ("bdhs lowers adversarial POPE error", "bdhs misses fewer objects", "bdhs lowers CHAIR_i")


def test_an_interval_is_the_middle_95_percent():
    found = interval(np.concatenate([[7.0], np.random.default_rng(0).permutation(np.arange(1001.0))]))
    assert found == {"value": 7.0, "low": 25.0, "high": 975.0}  # the value itself is no resample
    assert interval(bootstrapped(0.2, 0.1, 0.4)) == {"value": 0.2, "low": 0.1, "high": 0.4}


def test_directions():
    """POPE accuracy and recall should rise, CHAIR_i should fall."""
    better = row((0.1, 0.05, 0.2), (0.1, 0.001, 0.2), (-0.1, -0.2, -0.05))
    worse = row((-0.1, -0.2, -0.05), (-0.1, -0.2, -0.001), (0.1, 0.05, 0.2))
    unclear = row((0.1, -0.001, 0.2), (0.1, -0.1, 0.3), (-0.1, -0.2, 0.001))
    assert verdicts(base=ZERO, bdhs=better) == dict.fromkeys(IDS, "reproduced")
    assert verdicts(base=ZERO, bdhs=worse) == dict.fromkeys(IDS, "not reproduced")
    assert verdicts(base=ZERO, bdhs=unclear) == dict.fromkeys(IDS, "undecided")
    assert verdicts(base=better, bdhs=ZERO) == dict.fromkeys(IDS, "not reproduced")


def test_an_interval_that_touches_zero_decides_nothing():
    touching = row((0.1, 0.0, 0.2), (-0.1, -0.2, 0.0), (-0.1, -0.2, 0.0))
    assert verdicts(base=ZERO, bdhs=touching) == dict.fromkeys(IDS, "undecided")


def test_only_rows_that_were_run_are_judged():
    assert judge({"base": ZERO}) == [] and judge({"sft": ZERO, "noise": ZERO, "base": ZERO}) == []
    assert verdicts(base=ZERO, bdhs=ZERO).keys() == set(IDS)
    everything = verdicts(**dict.fromkeys(("base", *ROWS), ZERO))
    assert everything.keys() == FINDINGS.keys()
    for _, first, second, direction in FINDINGS.values():
        assert first in ROWS and second in (*ROWS, "base") and direction in (-1, 1)


def test_evidence_says_what_was_compared():
    better = row((0.1234, 0.05, 0.2), (0, 0, 0), (0, 0, 0))
    finding = judge({"base": ZERO, "bdhs": better})[0]
    assert finding == {
        "id": IDS[0],
        "status": "reproduced",
        "evidence": "pope_adversarial bdhs - base: +0.123 [+0.050, +0.200]",
    }


# ---------------------------------------------------------------- bootstrap


COUNTED = ("images", "length", "objects", "mentioned", "hallucinated", "typical", "true", "coloured", "wrong_colour",
           "placed", "wrong_place", "hallucinating", "found")  # fmt: skip
POPE = {f"{setting}_{part}": 0 for setting in SETTINGS_OF_POPE for part in ("tp", "fp", "fn", "tn")}


def image_counts(rng: random.Random) -> dict[str, float]:
    """Counts of one image, as toybench.py makes them: what was never counted is missing, as in a Counter."""
    counts = {name: rng.randrange(5) for name in COUNTED} | {"images": 1, "objects": rng.randrange(1, 5)}
    return {name: value for name, value in counts.items() if value} | {name: rng.randrange(4) for name in POPE}


def some_runs(seed: int, runs: int, images: int) -> list[list[dict]]:
    rng = random.Random(seed)
    return [[image_counts(rng) for _ in range(images)] for _ in range(runs)]


@pytest.mark.parametrize("seed,runs,images", [(0, 1, 1), (1, 1, 7), (2, 3, 5), (3, 4, 12)])
def test_pooled_metrics_equal_sums_by_hand(seed, runs, images):
    counts = some_runs(seed, runs, images)

    def total(name: str) -> int:
        return sum(image.get(name, 0) for run in counts for image in run)

    def per(a: float, b: float) -> float:
        return a / b if b else 0.0

    expected = {
        "chair_i": per(total("hallucinated"), total("mentioned")),
        "chair_s": per(total("hallucinating"), total("images")),
        "recall": per(total("found"), total("objects")),
        "length": per(total("length"), runs * images),
    }
    for name in SETTINGS_OF_POPE:
        tp, fp, fn, tn = (total(f"{name}_{part}") for part in ("tp", "fp", "fn", "tn"))
        expected[f"pope_{name}"] = per(tp + tn, tp + fp + fn + tn)
        expected[f"pope_{name}_f1"] = per(2 * tp, 2 * tp + fp + fn)
    found = bootstrap(counts, 50)
    for name, value in expected.items():
        assert found[name].shape == (51,) and found[name][0] == pytest.approx(value, abs=1e-12), name


def test_two_runs_of_two_images_by_hand():
    """Every resample takes images for all runs alike, and runs for all images alike."""
    found, objects = [[1, 5], [2, 0]], [3, 7]
    runs = [[POPE | {"found": f, "objects": o} for f, o in zip(run, objects, strict=True)] for run in found]
    recall = bootstrap(runs, 400)["recall"]
    assert recall[0] == (1 + 5 + 2 + 0) / 20
    drawn = [(2, 0), (1, 1), (0, 2)]  # how often each of two is drawn
    possible = {
        sum(i[b] * r[a] * found[a][b] for a in (0, 1) for b in (0, 1)) / (2 * sum(i[b] * objects[b] for b in (0, 1)))
        for i in drawn
        for r in drawn
    }
    assert len(possible) == 9 and set(recall.round(12)) == {round(value, 12) for value in possible}


def test_one_image_of_one_run_has_no_spread():
    for name, values in bootstrap(some_runs(5, 1, 1), 30).items():
        assert np.array_equal(values, np.full_like(values, values[0]), equal_nan=True), name


def test_the_same_counts_twice_differ_by_exactly_nothing():
    counts = some_runs(6, 3, 20)
    first, second = bootstrap(counts), bootstrap(json.loads(json.dumps(counts)))
    for name in first:
        assert np.array_equal(first[name] - second[name], np.zeros(1001)) and first[name].std() > 0
    assert set(verdicts(base=first, bdhs=second).values()) == {"undecided"}
    assert {f["evidence"].split(": ")[1] for f in judge({"base": first, "bdhs": second})} == {"+0.000 [+0.000, +0.000]"}


def test_rows_are_paired_by_image():
    """One more object found in every image of four objects: the difference is 1/4 in every resample."""
    rng = random.Random(7)
    base = [[POPE | {"images": 1, "objects": 4, "found": rng.randrange(4)} for _ in range(15)] for _ in range(2)]
    more = [[image | {"found": image["found"] + 1} for image in run] for run in base]
    difference = bootstrap(more)["recall"] - bootstrap(base)["recall"]
    assert np.abs(difference - 0.25).max() < 1e-12
    assert bootstrap(base)["recall"].std() > 0.01  # unpaired, the interval would be wide
    assert verdicts(base=bootstrap(base), bdhs=bootstrap(more))[IDS[1]] == "reproduced"


def test_a_row_may_lack_a_count_that_another_has():
    """No false yes anywhere: the name does not occur, and resampling must not depend on it."""
    counts = some_runs(8, 2, 9)
    without = [[{k: v for k, v in image.items() if k != "wrong_place"} for image in run] for run in counts]
    first, second = bootstrap(counts), bootstrap(without)
    assert np.array_equal(first["recall"], second["recall"]) and not second["position_errors"].any()


# ---------------------------------------------------------------- runs


@pytest.fixture
def scripts(monkeypatch):
    """In the place of the two scripts: what they were called with, and files as train_dpo.py leaves them."""
    calls = []

    def run(script: str, flags: list[str]) -> None:
        calls.append((script, flags))
        out = Path(flags[flags.index("--out") + 1])
        if script == "train_dpo.py":
            images, seed = int(flags[flags.index("--eval-images") + 1]), int(flags[flags.index("--seed") + 1])
            write_json(out / "counts.json", {
                "before": some_runs(100, 1, images)[0], "after": some_runs(seed, 1, images)[0],
            })  # fmt: skip
            (out / "report.html").write_text("a page")

    monkeypatch.setattr(study, "run", run)
    return calls


def run_study(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr("sys.argv", ["study", *argv])
    study.main()


def test_study_leaves_rows_and_findings(tmp_path, monkeypatch, scripts, capsys):
    out = tmp_path / "study"
    run_study(monkeypatch, "--out", str(out), "--rows", "bdhs,sft", "--seeds", "2", "--images", "6")
    found = json.loads((out / "study.json").read_text())
    assert found.keys() == {"rows", "findings"}
    assert [r["row"] for r in found["rows"]] == ["base", "bdhs", "sft"]
    for each in found["rows"]:
        assert each["seeds"] == 2 and each["images"] == 6
        for name in ("chair_i", "chair_s", "recall", *(f"pope_{s}" for s in SETTINGS_OF_POPE)):
            assert each["metrics"][name].keys() == {"value", "low", "high"}
    pooled = bootstrap([some_runs(0, 1, 6)[0], some_runs(1, 1, 6)[0]])
    assert found["rows"][1]["metrics"]["recall"] == interval(pooled["recall"])
    base = bootstrap([some_runs(100, 1, 6)[0]] * 2)
    assert found["rows"][0]["metrics"]["recall"] == interval(base["recall"])
    assert found["findings"] == judge({"base": base, "bdhs": pooled, "sft": pooled})
    assert {f["status"] for f in found["findings"] if "supervised" in f["id"]} == {"undecided"}  # the same counts
    assert all(f.keys() == {"id", "status", "evidence"} for f in found["findings"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("base", "bdhs", "sft", "pope_adversarial", *IDS))


def test_flags_of_a_row(tmp_path, monkeypatch, scripts):
    config = Config(out=str(tmp_path), seeds=1, split="validation", images=4, limit=50)
    study.run_row("noise", 3, config)
    (sample, sample_flags), (train, train_flags) = scripts
    assert (sample, train) == ("sample_bdhs.py", "train_dpo.py")
    pairs = str(tmp_path / "noise-3" / "pairs.jsonl")
    assert sample_flags == ["--out", pairs, "--seed", "3", "--limit", "50", "--noise-steps", "500", "--rho-th", "0"]
    options = dict(zip(train_flags[::2], train_flags[1::2], strict=True))
    assert options == {
        "--pairs": pairs, "--out": str(tmp_path / "noise-3"), "--seed": "3",
        "--eval-split": "validation", "--eval-images": "4",
    }  # fmt: skip
    scripts.clear()
    study.run_row("sft", 0, Config(out=str(tmp_path), images=4))
    assert "--limit" not in scripts[0][1] and scripts[1][1][-4:] == ["--loss", "sft", "--lr", "1e-3"]


@pytest.mark.parametrize("row", ROWS)
def test_flags_of_every_row_are_known_to_the_scripts(row):
    import sample_bdhs
    import train_dpo
    from minialign.cli import parse_config

    sample_flags, train_flags = ROWS[row]
    given = ["--rho-th", "0", "--temperature", "0", "--workers", "0"]
    sample_bdhs.check(parse_config(sample_bdhs.Config, "", [*sample_flags, *given]))
    parse_config(train_dpo.Config, "", [*train_flags, "--eval-split", "test", "--eval-images", "5"])


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, scripts):
    flags = ["--out", str(tmp_path), "--rows", "bdhs", "--images", "5"]
    run_study(monkeypatch, *flags, "--seeds", "1")
    assert len(scripts) == 2
    first = (tmp_path / "study.json").read_text()
    run_study(monkeypatch, *flags, "--seeds", "1")
    assert len(scripts) == 2 and (tmp_path / "study.json").read_text() == first
    run_study(monkeypatch, *flags, "--seeds", "2")  # one more seed
    assert len(scripts) == 4 and str(tmp_path / "bdhs-1") in scripts[-1][1]
    (tmp_path / "bdhs-1" / "report.html").unlink()  # as a killed run leaves it
    (tmp_path / "bdhs-1" / "checkpoint").mkdir()
    (tmp_path / "bdhs-1" / "checkpoint" / "progress.safetensors").write_text("")
    run_study(monkeypatch, *flags, "--seeds", "2")
    assert len(scripts) == 6 and "--resume" in scripts[-1][1] and "--resume" not in scripts[-3][1]


@pytest.mark.parametrize("flags", [["--split", "validation"], ["--images", "6"], ["--limit", "9"]])
def test_rows_of_other_settings_are_not_taken_for_these(tmp_path, monkeypatch, scripts, flags):
    run_study(monkeypatch, "--out", str(tmp_path), "--rows", "bdhs", "--seeds", "1", "--images", "5")
    before = (tmp_path / "study.json").read_text()
    with pytest.raises(UserError, match=f"settings.json: of another {flags[0][2:]}, .* and not .*; name another --out"):
        run_study(monkeypatch, "--out", str(tmp_path), "--rows", "bdhs", "--seeds", "1", "--images", "5", *flags)
    assert len(scripts) == 2 and (tmp_path / "study.json").read_text() == before


@pytest.mark.parametrize(
    "flags", [["--rows", "bdsh"], ["--rows", ""], ["--rows", "bdhs,bdhs"], ["--seeds", "0"], ["--images", "0"]]
)
def test_wrong_flags(tmp_path, monkeypatch, scripts, flags):
    with pytest.raises(UserError, match=f"^{flags[0]} {flags[1]}"):
        run_study(monkeypatch, "--out", str(tmp_path / "out"), *flags)
    assert scripts == [] and not (tmp_path / "out").exists()


def test_a_script_that_fails_ends_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SCRIPTS", tmp_path)
    (tmp_path / "sample_bdhs.py").write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match=r"^sample_bdhs\.py --out .* ended with exit code 2"):
        study.run_row("bdhs", 0, Config(out=str(tmp_path / "out")))
