"""tests.gpu and the processes of its rows: one that fails or hangs costs nothing but itself."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from helpers import refused

from tests.bench.rows import Facts, Job, Runner, descendants, reason
from tests.bench.sizes import TINY

ROW = """
import subprocess, sys, time
from pathlib import Path
from tests.bench.rows import Facts
facts = Facts(Path(sys.argv[sys.argv.index("--out") + 1]))
"""
SLEEP = "time.sleep(600)"
# A process in a session of its own, as torchrun's are; its id is told.
SLEEPER = "subprocess.Popen(['sleep', '600'], start_new_session=True).pid"


def job(code: str, *rows: str, **options) -> Job:
    """A process that runs `code`, which has `facts`."""
    options = {"limit": 60.0} | options
    return Job(rows, [sys.executable, "-c", f"{ROW}\n{code}"], **options)


def run(jobs: list[Job], *options) -> tuple[dict[str, dict], list[dict[str, dict]]]:
    """The rows, and what was reported after each job."""
    reports = []
    rows = Runner(lambda found: reports.append(dict(found)), *options).run(jobs)
    return rows, reports


def alive(pid: int) -> bool:
    """Whether it runs still; one that has ended and that nobody has asked after does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# ---------------------------------------------------------------- a row and its process


def test_a_row_costs_nothing_but_itself():
    """One raises, one hangs, one hangs with half of its facts, one that has shared its process
    with a row that is done; the rows behind them are measured. Each is reported at once."""
    jobs = [
        job("print('so far so good'); 1 / 0", "raises"),
        job(SLEEP, "hangs", limit=0.5),
        job(f"facts.add('half', found=7); {SLEEP}", "half", limit=1.5),
        job("facts.finish('one', found=1); 1 / 0", "one", "two"),
        job("pass", "silent"),
        job("facts.skip('left-out', 'no such thing here')", "left-out"),
        job("facts.add('fine', part=1); facts.finish('fine', whole=2)", "fine"),
    ]
    rows, reports = run(jobs)
    assert {name: row["status"] for name, row in rows.items()} == {
        "raises": "failed",
        "hangs": "timeout",
        "half": "timeout",
        "one": "ok",
        "two": "failed",
        "silent": "failed",
        "left-out": "skipped",
        "fine": "ok",
    }
    assert rows["raises"]["error"].splitlines()[0] == "so far so good"
    assert rows["raises"]["error"].splitlines()[-1].startswith("ZeroDivisionError")
    assert "not done after 0.5 s" in rows["hangs"]["error"] and rows["hangs"]["seconds"] < 10
    assert rows["half"]["found"] == 7 and rows["one"]["found"] == 1
    assert rows["silent"]["error"] == "gave no result"
    assert rows["left-out"]["error"] == "no such thing here"
    assert (rows["fine"]["part"], rows["fine"]["whole"], "error" in rows["fine"]) == (1, 2, False)
    assert [len(report) for report in reports] == [1, 2, 3, 5, 6, 7, 8]


def test_what_hangs_is_ended_with_all_that_it_has_started():
    """In another session, too."""
    code = f"facts.add('row', pid={SLEEPER}); {SLEEP}"
    rows, _ = run([job(code, "row", limit=3.0)])
    assert rows["row"]["status"] == "timeout" and rows["row"]["pid"] > 0
    assert not alive(rows["row"]["pid"])


def test_facts_are_whole_at_any_time(tmp_path):
    """Of two rows; what is added later is added."""
    facts = Facts(tmp_path / "facts.json")
    facts.add("a", one=1)
    facts.add("b", two=2)
    facts.finish("a", three=3)
    found = json.loads((tmp_path / "facts.json").read_text())
    assert found == {"a": {"one": 1, "status": "ok", "three": 3}, "b": {"two": 2}}
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_the_line_of_an_error_that_says_most():
    trace = "Traceback (most recent call last):\n  File 'x', line 1\n"
    trace += "AssertionError: 8 == 9\nsee there"
    assert reason(trace) == "AssertionError: 8 == 9"
    assert reason("torch.OutOfMemoryError: of 5 GB") == "torch.OutOfMemoryError: of 5 GB"
    assert reason(f"{trace}\nnot done after 5 s") == "AssertionError: 8 == 9"
    assert reason("step 1\nerror: --row x: one of a, b") == "error: --row x: one of a, b"
    assert reason("step 1\nstep 2\nnot done after 5 s") == "not done after 5 s"


def test_time_that_is_not_left():
    """A row is not begun whose least time is not there, another is; a limit ends with the time."""
    done = "facts.finish('{0}')"
    begin = time.monotonic()
    jobs = [
        job(done.format("long"), "long", least=100.0),
        job(done.format("short"), "short", least=1.0),
        job(SLEEP, "endless"),
        job(done.format("late"), "late", least=1.0),
    ]
    rows, _ = run(jobs, 4.0)
    statuses = [row["status"] for row in rows.values()]
    assert statuses == ["skipped", "ok", "timeout", "skipped"]
    assert "no time" in rows["long"]["error"] and "wants 100" in rows["long"]["error"]
    assert "no time" in rows["late"]["error"] and time.monotonic() - begin < 20


def test_rows_that_need_another():
    jobs = [
        job("1 / 0", "model"),
        job("facts.finish('a')", "a", needs="model"),
        job("facts.finish('b')", "b"),
        job("facts.finish('c')", "c", needs="b"),
    ]
    rows, _ = run(jobs)
    statuses = [row["status"] for row in rows.values()]
    assert statuses == ["failed", "skipped", "ok", "ok"]
    assert rows["a"]["error"] == "needs the row model"


def test_rows_beside_one_another():
    """Those that are not timed run together, and with fewer threads each; one that is timed, alone.

    Each writes down when it began and ended.
    """
    code = "import os; a = time.time(); time.sleep(1.0)\n"
    code += "threads = os.environ['OMP_NUM_THREADS']\n"
    code += "facts.finish('{0}', span=[a, time.time()], threads=threads)"
    names = ("a", "b", "timed", "c")
    jobs = [job(code.format(name), name, beside=name != "timed") for name in names]
    rows, _ = run(jobs, 60.0, 2)
    (a0, a1), (b0, b1), (t0, t1), (c0, _) = [rows[name]["span"] for name in names]
    assert max(a0, b0) < min(a1, b1) and max(a1, b1) < t0 and t1 < c0
    assert rows["a"]["threads"] == str(max(1, os.cpu_count() // 2))
    assert rows["timed"]["threads"] == os.environ["OMP_NUM_THREADS"]


def test_an_interrupted_run_leaves_nothing_behind():
    """Where the report is refused, say: what still runs beside it is ended."""

    def full(rows: dict) -> None:
        raise OSError("no space left on device")

    jobs = [
        job("facts.finish('a')", "a", beside=True),
        job(SLEEP, "b", beside=True),
        job("facts.finish('c')", "c", beside=True),
    ]
    before = set(descendants(os.getpid()))
    with pytest.raises(OSError, match="no space"):
        Runner(full, 60.0, 2).run(jobs)
    assert not {pid for pid in set(descendants(os.getpid())) - before if alive(pid)}


# ---------------------------------------------------------------- the command

pytest.importorskip("transformers")
from tests.bench import models  # noqa: E402
from tests.gpu import __main__ as gpu  # noqa: E402
from tests.gpu import correct, kernels, ours, roads  # noqa: E402
from tests.gpu.kernels import Kernel  # noqa: E402


def test_every_row_has_its_place():
    """Each is known to the process that measures it, is named once, and has its time; the roads
    alone and the checks run beside one another."""
    for name, device in (("tiny", "cpu"), ("7b", "cuda")):
        size = gpu.scaled(gpu.Config(size=name, device=device))
        jobs = gpu.plan(size, Path("folder"))
        rows = [row for job in jobs for row in job.rows]
        assert len(set(rows)) == len(rows) and size.device == device
        assert rows[:3] == ["model", "sampling", "gradients"]
        for job in jobs:
            assert 0 < job.least < job.limit
            unknown = [row for row in job.rows if not known(row)]
            assert not unknown and (job.needs == "model") == (not job.beside)
    firsts = [rows.index(row) for row in ("our-step", "road-dpo", "dpo-step", "dpo-step-liger")]
    assert firsts == sorted(firsts)


def known(row: str) -> bool:
    """Whether a process measures such a row, alone or beside the first of its process."""
    from tests.bench.row import WORK
    from tests.gpu.row import work_of

    return row in WORK or row == "dpo-step-cached-ref" or callable(work_of(row))


def test_some_of_the_rows():
    """What is asked for, by name or by pattern, and the model where one of them needs it."""
    jobs = gpu.plan(gpu.scaled(gpu.Config(size="tiny", device="cpu")), Path("folder"))

    def rows(patterns: str) -> list[str]:
        return [row for job in gpu.selected(jobs, patterns) for row in job.rows]

    assert rows("sampling,road-p*") == ["sampling", "road-ppo", "road-ppo-shard", "road-ppo-bf16"]
    assert rows("dpo-step-cached-ref") == ["model", "dpo-step", "dpo-step-cached-ref"]
    assert rows("nothing") == [] and len(rows("*")) == sum(len(job.rows) for job in jobs)


def test_kernels_of_a_step():
    """By hand: what eight steps take beyond none, the longest first, with their shares."""
    few, more = {"a": Kernel(1.0, 2)}, {"a": Kernel(5.0, 10), "b": Kernel(12.0, 4)}
    found = kernels.difference(more, few, 4)
    assert found == {"a": Kernel(1.0, 2.0), "b": Kernel(3.0, 1.0)}
    lines = kernels.table(found, top=1)
    assert len(lines) == 2 and lines[0].split() == ["4.000", "ms", "100", "%", "3", "calls", "all"]
    assert lines[1].split() == ["3.000", "ms", "75%", "1", "calls", "b"]


def test_a_road_that_ends_badly(tmp_path, monkeypatch, capsys):
    """What its script said last is there, and what is known of it."""
    monkeypatch.setitem(roads.ROADS, "bad", roads.Road("train_dpo.py", ("--beta", "-1")))
    facts = Facts(tmp_path / "facts.json")
    with pytest.raises(SystemExit):
        roads.measure("bad", "road-bad", TINY, tmp_path, facts)
    assert reason(capsys.readouterr().out).startswith("error: --beta -1")
    assert list(facts.rows["road-bad"]) == ["road_seconds"]


def test_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    config = gpu.Config(out=str(tmp_path))
    refused(lambda: gpu.main(config), "--device cuda", "--device cpu --size tiny")


def test_gradients_here_and_on_the_cpu(tmp_path):
    """In each type, and with layers that are run again: none is too far."""
    facts = Facts(tmp_path / "facts.json")
    correct.measure_gradients("gradients", TINY, tmp_path, facts)
    row = facts.rows["gradients"]
    assert row["status"] == "ok" and row["bfloat16"]["loss"] > 0
    assert max(row["float32 --recompute"].values()) <= 1e-3


def test_recomputing_takes_less_memory(tmp_path):
    """The same loss and gradient norm, which it checks, at a lower peak."""
    facts = Facts(tmp_path / "facts.json")
    size = gpu.scaled(gpu.Config(size="tiny", device="cpu"))
    folder = models.make_folder(size, tmp_path / "model")
    ours.measure_step("plain", size, folder, facts)
    ours.measure_step("again", size, folder, facts, recompute=True)
    plain, again = facts.rows["plain"], facts.rows["again"]
    assert "checked" in again and again["peak"] < plain["peak"]


def test_a_row_that_nobody_knows():
    """Its process fails alone, and the table says why."""
    from tests.gpu.row import work_of

    with pytest.raises(KeyError, match="our-nonsense"):
        work_of("our-nonsense")
    trace = "Traceback (most recent call last):\n  File 'x', line 1\nKeyError: 'our-nonsense'"
    printed = gpu.table({"our-nonsense": {"status": "failed", "seconds": 3.0, "error": trace}})
    assert f"{'our-nonsense':27}{'failed':9}" in printed and "KeyError: 'our-nonsense'" in printed


def test_the_command(tmp_path, monkeypatch, capsys):
    """Quick rows at the smallest size: all end well, a table says so, a road's pairs were timed."""
    monkeypatch.setattr(gpu, "OURS", {"our-step": (90, 1)})
    monkeypatch.setattr(gpu, "EXTRA_OURS", {})
    gpu.main(gpu.Config(str(tmp_path / "new"), 5.0, "tiny", "cpu", "our-*,road-sample", 2))
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())
    statuses = {name: row["status"] for name, row in found["rows"].items()}
    assert statuses == {
        "model": "ok",
        "our-step": "ok",
        "road-sample": "ok",
    }
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "new" / "table.txt").read_text())
    assert all(f"{name:27}{status:9}" in printed for name, status in statuses.items())
    assert found["rows"]["road-sample"]["first_pair_seconds"] > 0
    assert found["rows"]["our-step"]["cached_seconds"] > 0
    assert "aten::" in found["rows"]["our-step"]["kernels"][1]  # the one that took longest
    assert "our-step\n" in (tmp_path / "new" / "kernels.txt").read_text()
    assert len(list((tmp_path / "new").iterdir())) == 3
