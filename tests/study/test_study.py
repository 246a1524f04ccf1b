"""The study's bookkeeping: which commands run, what they share, and what is left of them."""

import importlib
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from study_counts import some_runs

from minialign.cli import parse_config
from minialign.edge import with_defaults
from minialign.errors import UserError
from minialign.evaluation.metrics import SETTINGS_OF_POPE, Counts, bootstrap, interval
from minialign.files import write_json, write_whole
from minialign.study import __main__ as study
from minialign.study.__main__ import ROWS, Config
from minialign.study.findings import judge
from minialign.study.seeds import by_seed
from minialign.training.flags import check_training
from minialign.training.progress import require_run_folder

CLAIMS = ("BDHS against the base", "BDHS against supervised fine-tuning on y+")
METRICS = '{"step": 1, "pairs": 16}\n{"step": 2, "pairs": 3}\n'


def evaluated(seed: int, images: int, unsteady: bool) -> list[Counts]:
    """Counts of images: seeds differ in the length of the first description alone; where a row is
    unsteady they find everything or nothing, in turns.
    """
    [counts] = some_runs(50, 1, images)
    counts[0]["length"] = seed
    if unsteady:
        counts = [image | {"found": image["objects"] * (seed % 2)} for image in counts]
    return counts


@pytest.fixture
def unsteady() -> set[str]:
    """The rows whose seeds dominate: a test adds them."""
    return set()


@pytest.fixture
def programs(monkeypatch, unsteady):
    """In the place of the programs: what they were called with, and the files that they leave."""
    calls = []

    def run(program: str, flags: list[str]) -> None:
        calls.append((program, flags))
        out, options = flags[1], dict(zip(flags[::2], flags[1::2], strict=False))
        if "--annotator" in options and "--pairs" in options:
            figures = {}
            for i, path in enumerate(options["--pairs"].split(",")):
                figures[path] = {"accuracy": {"value": 0.5 + 0.1 * i}}
            return write_json(Path(out), figures)
        if "--eval-images" in options:
            images, seed = int(options["--eval-images"]), int(options["--seed"])
            [before] = some_runs(100, 1, images)
            after = evaluated(seed, images, Path(out).name.rpartition("-")[0] in unsteady)
            write_json(Path(out) / "counts.json", {"before": before, "after": after})
            write_whole(Path(out) / "metrics.jsonl", METRICS)
        write_whole(Path(out + study.LAST[f"{program} {flags[0]}"]), "done")

    monkeypatch.setattr(study, "run", run)
    return calls


def run_study(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr("sys.argv", ["study", *argv])
    study.main(parse_config(study.Config, ""))


def test_study_leaves_rows_and_findings(tmp_path, monkeypatch, programs, capsys):
    out = tmp_path / "study"
    run_study(monkeypatch, "--out", str(out), "--rows", "bdhs,sft", "--seeds", "2", "--images", "6")
    found = json.loads((out / "study.json").read_text())
    assert list(found) == ["made", "rows", "findings", "rewards"] and found["rewards"] == []
    made = {"split": "test", "images": 6, "limit": 2000, "seeds": 2, "threads": 1}
    made |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    assert found["made"] == made
    assert [r["row"] for r in found["rows"]] == ["base", "bdhs", "sft"]
    for each in found["rows"]:
        # The base is before all seeds.
        assert each["seeds"] == (1 if each["row"] == "base" else 2) and each["images"] == 6
        assert (each["steps"], each["pairs"]) == ((0, 0) if each["row"] == "base" else (4, 38))
        for name in ("chair_i", "chair_s", "recall", *(f"pope_{s}" for s in SETTINGS_OF_POPE)):
            assert each["metrics"][name].keys() == {"value", "low", "high"}
    pooled = bootstrap([evaluated(seed, 6, False) for seed in (0, 1)])
    for name, values in pooled.items():
        assert found["rows"][1]["metrics"][name] == interval(values)
    assert found["rows"][1]["by_seed"] == by_seed([evaluated(s, 6, False) for s in (0, 1)])
    lengths = found["rows"][1]["by_seed"]["length"]
    assert lengths[1] - lengths[0] == pytest.approx(1 / 6, abs=1e-5)
    base = bootstrap(some_runs(100, 1, 6))
    assert found["rows"][0]["metrics"]["recall"] == interval(base["recall"])
    assert found["findings"] == judge({"base": base, "bdhs": pooled, "sft": pooled})
    assert {f["status"] for f in found["findings"] if f["rows"] == "bdhs - sft"} == {"ours"}
    shown, page = capsys.readouterr().out, (out / "study.html").read_text()
    assert all(
        name in text
        for name in ("base", "bdhs", "sft", "POPE adversarial", *CLAIMS)
        for text in (shown, page)
    )


def test_rows_whose_seeds_dominate_get_more_of_them(tmp_path, monkeypatch, programs, unsteady):
    """And no others do; what was run is not run again, and a study that was killed goes on."""
    unsteady.add("sft")
    flags = ["--out", str(tmp_path), "--rows", "bdhs,sft", "--images", "6", "--seeds", "3"]
    run_study(monkeypatch, *flags)
    trained = [Path(flags[flags.index("--out") + 1]).name for _, flags in programs]
    trained = [name for name in trained if not name.endswith(".jsonl")]
    assert trained == [
        *(f"bdhs-{seed}" for seed in range(3)),
        *(f"sft-{seed}" for seed in range(5)),
    ]
    found = {row["row"]: row for row in json.loads((tmp_path / "study.json").read_text())["rows"]}
    assert (found["bdhs"]["seeds"], found["sft"]["seeds"]) == (3, 5)
    assert (found["sft"]["steps"], found["sft"]["pairs"]) == (5 * 2, 5 * 19)
    assert found["sft"]["by_seed"]["recall"] == [0, 1, 0, 1, 0]
    pooled = bootstrap([evaluated(seed, 6, True) for seed in range(5)])
    assert found["sft"]["metrics"]["recall"] == interval(pooled["recall"])

    ran = len(programs)
    (tmp_path / "sft-4" / "report.html").unlink()
    run_study(monkeypatch, *flags)
    assert len(programs) == ran + 1 and str(tmp_path / "sft-4") in programs[-1][1]
    again = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert again == list(found.values())


def test_one_seed_does_not_say_how_seeds_differ(tmp_path, monkeypatch, programs, unsteady):
    unsteady.add("sft")
    flags = ["--out", str(tmp_path), "--rows", "sft", "--images", "6", "--seeds", "1"]
    run_study(monkeypatch, *flags)
    assert len(programs) == 2


def test_flags_of_a_row(tmp_path, programs):
    config = Config(out=str(tmp_path), seeds=1, split="validation", images=4, limit=50)
    study.run_row("noise", 3, config)
    (sample, sample_flags), (train, train_flags) = programs
    assert (sample, train) == ("sample_bdhs.py", "train_dpo.py")
    pairs = str(tmp_path / "noise-3.jsonl")
    assert sample_flags == [
        "--out",
        pairs,
        "--seed",
        "3",
        "--limit",
        "50",
        "--noise-steps",
        "500",
    ]
    options = dict(zip(train_flags[::2], train_flags[1::2], strict=True))
    assert options == {
        "--pairs": pairs,
        "--out": str(tmp_path / "noise-3"),
        "--seed": "3",
        "--eval-split": "validation",
        "--eval-images": "4",
        "--steps": "4",
    }
    programs.clear()
    study.run_row("sft", 0, Config(out=str(tmp_path), images=4))
    assert programs[0][1][-2:] == ["--limit", "2000"] and programs[1][1][-4:] == [
        "--loss",
        "sft",
        "--lr",
        "3e-4",
    ]


def test_an_out_with_spaces_and_braces_stays_one_word(tmp_path, programs):
    out = str(tmp_path / "my {row} study")
    study.run_row("online-dpo", 0, Config(out=out, images=4))
    [(_, flags)] = programs
    assert (
        flags[:2] == ["--out", f"{out}/online-dpo-0"]
        and Path(out, "online-dpo-0/counts.json").exists()
    )


def module_of(program: str):
    """The module of a program by the name that a command has for it."""
    name = program.removesuffix(".py")
    return importlib.import_module("minialign.toy.__main__" if name == "minialign.toy" else name)


def may_be_written(config, read: list[str]) -> None:
    """The program's own check of --out, where the files and folders that it reads are there."""
    shutil.rmtree(config.out)
    for word in read:
        if word.startswith(str(Path(config.out).parent)):
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            if not Path(word).exists():
                Path(word).touch()
    require_run_folder(config)


SIZED = {"bdhs-quarter": 13, "bdhs-half": 25, "bdhs-double": 100}  # of 50 records


@pytest.mark.parametrize("row", ROWS)
def test_flags_of_every_row_are_known_to_the_programs(tmp_path, row, programs):
    """They pass the programs' own checks, rows go once over as many records, and what is made
    before is for what comes later.
    """
    study.run_row(row, 1, Config(out=str(tmp_path), images=5, limit=50))
    trained = None
    for number, (program, flags) in enumerate(programs):
        module = module_of(program)
        parsed = parse_config(module.Config, "", flags)
        assert flags[1].startswith(str(tmp_path))
        assert parsed.seed == (0 if "--export" in flags else 1)
        if "--steps" in flags or program == "minialign.rlhf.reward_model":
            for made in ("--reward", "--annotator", "--adapter"):
                if made in flags and str(tmp_path) in flags[flags.index(made) + 1]:
                    Path(flags[flags.index(made) + 1]).mkdir(parents=True)  # as it is by then
            trained = with_defaults(parsed, module.DEFAULTS)
            trained = replace(trained, lora_alpha=128.0)  # as the rank gives it
            if getattr(trained, "beta", 0.1) is None:
                trained = replace(trained, beta=0.1)  # as the loss gives it
            check = getattr(module, "check", check_training)
            check(trained)
            may_be_written(trained, flags[2:])
        if flags is not programs[-1][1]:
            later = " ".join(word for _, words in programs[number + 1 :] for word in words)
            assert flags[1] in later
    records = SIZED.get(row, 50)
    assert (trained.steps, trained.eval_images) == (math.ceil(records / 16), 5)
    assert trained.batch_size == 16


def test_records_of_a_row(tmp_path, programs):
    """As many as --limit, or of those what the row's name says."""
    for row in ("bdhs", *SIZED):
        programs.clear()
        study.run_row(row, 0, Config(out=str(tmp_path), images=5, limit=50))
        flags = programs[0][1]
        assert flags[flags.index("--limit") + 1] == str(SIZED.get(row, 50))


def test_the_base_is_not_one_that_was_trained(tmp_path, monkeypatch, programs):
    """A row that begins with another's adapter says nothing of it, even if it comes first."""
    flags = ["--out", str(tmp_path), "--seeds", "1", "--images", "5", "--rows"]
    message = "begins with another row's adapter; name a row as well that begins with the base"
    with pytest.raises(UserError, match=message):
        run_study(monkeypatch, *flags, "bdhs-online-dpo")
    real = study.run_row

    def run_row(row: str, seed: int, config: Config) -> dict:
        found = real(row, seed, config)
        return found | {"before": None} if row == "bdhs-online-dpo" else found

    monkeypatch.setattr(study, "run_row", run_row)
    run_study(monkeypatch, *flags, "bdhs-online-dpo,slic")
    base, *_ = json.loads((tmp_path / "study.json").read_text())["rows"]
    expected = interval(bootstrap([some_runs(100, 1, 5)[0]])["recall"])
    assert base["row"] == "base" and base["metrics"]["recall"] == expected


def test_rows_share_what_is_made_once(tmp_path, monkeypatch, programs):
    """Nothing is made twice, not even the adapter with which another row begins; a row's own pairs
    lie in its folder.
    """
    run_study(monkeypatch, "--out", str(tmp_path), "--seeds", "2", "--images", "5")
    made = [flags[1] for _, flags in programs]
    assert len(made) == len(set(made))
    assert {str(tmp_path / f"{row}-{seed}") for row in ROWS for seed in (0, 1)} < set(made)

    readers: dict[str, set[str]] = {}
    for _, flags in programs:
        for word in flags[2:]:
            if word in made:
                name = Path(flags[1]).name.rpartition("-")[0]
                readers.setdefault(Path(word).name, set()).add(name)
    assert readers["bdhs-1.jsonl"] == {"bdhs", "sft", "ipo", "slic"}
    trained = {"corrupted", "distorted", "mixed-dpo", "online-bdhs-corrupted", "reward-corrupted"}
    assert trained < readers["corrupted-1.jsonl"]
    assert readers["unguided-0.jsonl"] == {"unguided"}


def test_table_7(tmp_path, monkeypatch, programs, capsys):
    """The reward models that pay a row, and no others, are asked about every kind of held-out
    pairs, which no training has seen.
    """
    argv = ["--out", str(tmp_path), "--seeds", "2", "--images", "5", "--rows"]
    argv.append("ppo-corrupted,rloo,rloo-ranked")
    run_study(monkeypatch, *argv)
    found = json.loads((tmp_path / "study.json").read_text())["rewards"]
    kinds = [(each["learned_from"], each["asked_about"]) for each in found]
    assert kinds == [
        (a, b) for a in ("corrupted", "ranked") for b in ("corrupted", "bdhs", "ranked")
    ]
    assert [each["accuracy"] for each in found] == 2 * [[0.5, 0.5], [0.6, 0.6], [0.7, 0.7]]
    [export] = [flags for _, flags in programs if flags[:2] == ["--export", f"{tmp_path}/held-out"]]
    assert export[2:] == ["--first", "8000", "--limit", "300"]
    asked = [flags for program, flags in programs if "--pairs" in flags and "--annotator" in flags]
    assert [flags[flags.index("--annotator") + 1] for flags in asked] == [
        str(tmp_path / f"reward-{kind}-{seed}" / "merged")
        for kind in ("corrupted", "ranked")
        for seed in (0, 1)
    ]
    ran = len(programs)
    run_study(monkeypatch, *argv)
    assert len(programs) == ran  # nothing again
    assert "Reward models (Table 7)" in (tmp_path / "study.html").read_text()


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, programs):
    flags = ["--out", str(tmp_path), "--rows", "bdhs", "--images", "5"]
    run_study(monkeypatch, *flags, "--seeds", "1")
    assert len(programs) == 2
    first = (tmp_path / "study.json").read_text()
    run_study(monkeypatch, *flags, "--seeds", "1")
    assert len(programs) == 2 and (tmp_path / "study.json").read_text() == first
    run_study(monkeypatch, *flags, "--seeds", "2")  # one more seed
    assert len(programs) == 4 and str(tmp_path / "bdhs-1") in programs[-1][1]
    (tmp_path / "bdhs-1" / "report.html").unlink()  # as a killed run leaves it
    write_whole(tmp_path / "bdhs-1" / "checkpoint" / "progress.safetensors", "")
    run_study(monkeypatch, *flags, "--seeds", "2")
    assert (
        len(programs) == 5 and "--resume" in programs[-1][1] and "--resume" not in programs[-2][1]
    )
    (
        tmp_path / "bdhs-1.jsonl.stats.json"
    ).unlink()  # killed while it sampled: what is missing is sampled
    (tmp_path / "bdhs-1" / "report.html").unlink()
    run_study(monkeypatch, *flags, "--seeds", "2")
    assert [program for program, _ in programs[5:]] == ["sample_bdhs.py", "train_dpo.py"]
    assert "--resume" not in programs[5][1]


@pytest.mark.parametrize("flags", [["--split", "validation"], ["--images", "6"], ["--limit", "9"]])
def test_rows_of_other_settings_are_not_taken_for_these(tmp_path, monkeypatch, programs, flags):
    run_study(
        monkeypatch, "--out", str(tmp_path), "--rows", "bdhs", "--seeds", "1", "--images", "5"
    )
    before = (tmp_path / "study.json").read_text()
    with pytest.raises(
        UserError,
        match=f"settings.json: of another {flags[0][2:]}, which was .* now; name another --out",
    ):
        run_study(
            monkeypatch,
            "--out",
            str(tmp_path),
            "--rows",
            "bdhs",
            "--seeds",
            "1",
            "--images",
            "5",
            *flags,
        )
    assert len(programs) == 2 and (tmp_path / "study.json").read_text() == before


def test_a_row_of_other_commands_is_refused_and_a_new_row_is_not(tmp_path, monkeypatch, programs):
    flags = ["--out", str(tmp_path), "--seeds", "1", "--images", "5", "--rows"]
    run_study(monkeypatch, *flags, "bdhs")
    monkeypatch.setitem(ROWS, "slic", [*ROWS["slic"][:-1], ROWS["slic"][-1] + " --lr 1"])
    run_study(monkeypatch, *flags, "bdhs,slic")
    monkeypatch.setitem(ROWS, "bdhs", [*ROWS["bdhs"][:-1], ROWS["bdhs"][-1] + " --lr 1"])
    ran = len(programs)
    with pytest.raises(
        UserError, match="settings.json: of another row bdhs, which was .* now; name another --out"
    ):
        run_study(monkeypatch, *flags, "slic,bdhs")
    run_study(monkeypatch, *flags, "slic")
    assert len(programs) == ran == 3


def test_a_study_that_goes_on_leaves_the_settings_as_they_are(tmp_path, monkeypatch, programs):
    """Several that go on side by side would write them at the same moment."""
    flags = ["--out", str(tmp_path), "--seeds", "1", "--images", "5", "--rows"]
    run_study(monkeypatch, *flags, "bdhs,sft")
    written: list[str] = []
    monkeypatch.setattr(study, "write_json", lambda path, value: written.append(path.name))
    run_study(monkeypatch, *flags, "sft")
    assert written == ["study.json"]
    run_study(monkeypatch, *flags, "slic")
    assert written == ["study.json", "settings.json", "study.json"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--rows", "bdsh"],
        ["--rows", ""],
        ["--rows", "bdhs,bdhs"],
        ["--seeds", "0"],
        ["--images", "0"],
        ["--limit", "0"],
    ],
)
def test_wrong_flags(tmp_path, monkeypatch, programs, flags):
    with pytest.raises(UserError, match=f"^{flags[0]} {flags[1]}"):
        run_study(monkeypatch, "--out", str(tmp_path / "out"), *flags)
    assert programs == [] and not (tmp_path / "out").exists()


def test_a_script_that_fails_ends_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SCRIPTS", tmp_path)
    (tmp_path / "sample_bdhs.py").write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match=r"^sample_bdhs\.py --out .* ended with exit code 2"):
        study.run_row("bdhs", 0, Config(out=str(tmp_path / "out")))


def test_scripts_are_where_the_study_looks_for_them():
    programs = {name.split()[0] for name in study.LAST}
    scripts = {name for name in programs if name.endswith(".py")}
    assert scripts == {"sample_bdhs.py", "train_dpo.py", "train_online.py"}
    assert all((study.SCRIPTS / name).is_file() for name in scripts)


def test_modules_run_as_scripts_do(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    study.run("minialign.toy", ["--corrupted", str(pairs), "--limit", "2"])
    assert len(pairs.read_text().splitlines()) == 2
