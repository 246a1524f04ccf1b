"""The three scripts as several processes, on gloo: one, two and three give the same, whole models
or shards."""

import importlib
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forks import Forked
from helpers import toy_model
from input_files import pairs_in
from judges import judged
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_runs import read_lines
from torchruns import children, command, finish, killed, launch, run, start, wait_for

from minialign.cli import parse_config
from minialign.edge import CHECKPOINT
from minialign.rlhf.scorers import load_reward_model, save_head
from minialign.training import parallel
from minialign.training.optimizer import batches_of_run

SIZES = "--lora-rank 4 --batch-size 5 --seed 3"
SHORT = "--max-new-tokens 24"
TIMES = ("time/sampling", "time/training")


def run_alone(program: str, flags: str) -> None:
    """One process, this one."""
    module = importlib.import_module(program.removesuffix(".py"))
    module.main(parse_config(module.Config, "", flags.split()))


def rows_of(out: Path) -> list[dict]:
    """The rows of metrics.jsonl without their times."""
    rows = read_lines(out / "metrics.jsonl")
    return [{name: row[name] for name in row if name not in TIMES} for row in rows]


# How far several processes may be from one, relative where a value is above 1: the table in
# docs/running.md.
LOGGED, LOSS_OF_IPO, WEIGHTS = 2e-5, 5e-4, 5e-5
# In bfloat16: what the first step logs, later losses (and IPO's), and weights.
HALF_FIRST, HALF_LOSS, HALF_LOSS_OF_IPO, HALF_WEIGHTS = 5e-3, 5e-2, 1.0, 1e-2
HALF_SAMPLED = 5e-2  # the first step of what samples, where the draws are the same


def tolerance(step: int, name: str, dtype: str, loss: str) -> float:
    """Of a logged value; in bfloat16 only losses are compared behind the first step, as a pair that
    is nearly a tie may change sides."""
    if dtype == "float32":
        return LOSS_OF_IPO if loss == "ipo" and name in ("loss", "grad_norm") else LOGGED
    if step == 1:
        return HALF_FIRST
    if name == "loss":
        return HALF_LOSS_OF_IPO if loss == "ipo" else HALF_LOSS
    return math.inf


def assert_same_rows(one: Path, other: Path, dtype: str = "float32", loss: str = "") -> None:
    """Loss curves, and whatever else is logged."""
    rows, others = rows_of(one), rows_of(other)
    assert len(rows) == len(others) > 0
    for row, also in zip(rows, others, strict=True):
        for each in (row, also):  # the first process's: of other numbers, another prompt, or none
            each.pop("example", None)
        assert row.keys() == also.keys()
        for name, value in row.items():
            apart = tolerance(row["step"], name, dtype, loss)
            assert also[name] == pytest.approx(value, abs=apart, rel=apart), (row["step"], name)


def assert_same_training(one: Path, other: Path, dtype: str = "float32", loss: str = "") -> None:
    """What is logged, and final adapters."""
    assert_same_rows(one, other, dtype, loss)
    first, second = (load_file(path / "adapter/adapter_model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    apart = WEIGHTS if dtype == "float32" else HALF_WEIGHTS
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype == torch.float32
        assert torch.allclose(tensor, second[name], atol=apart, rtol=0), name


@pytest.fixture(scope="session")
def alone(pairs, tmp_path_factory) -> Path:
    """Four steps of one process: batches of 5, of which the last of an epoch, the third, has 4."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run_alone("train_dpo.py", flags_of("toy", pairs, out))
    return out


def flags_of(model: str, pairs: str, out: Path) -> str:
    return f"--model {model} --pairs {pairs} {SIZES} --steps 4 --eval-images 12 --out {out}"


@pytest.mark.parametrize(("processes", "shard"), [(2, "none"), (2, "full"), (3, "full")])
def test_any_number_of_processes_trains_the_same(alone, pairs, tmp_path, processes, shard):
    """With three, a process has one pair or two, and of the last batch one or none with
    --accumulate 2."""
    flags = flags_of("toy", pairs, tmp_path)
    done = run(processes, "train_dpo.py", f"{flags} --shard {shard} --accumulate 2")
    assert_same_training(alone, tmp_path)
    assert (tmp_path / "counts.json").read_bytes() == (
        alone / "counts.json"
    ).read_bytes()  # of the same images
    assert done.stdout.count("pairs, of which the reference") == 1  # the first process speaks
    assert not re.search(r"Traceback|Error", done.stderr)


@pytest.mark.parametrize(
    ("loss", "dtype", "processes", "shard"),
    [
        ("ipo", "float32", 3, "none"),
        ("slic", "float32", 2, "full"),
        ("dpo", "bfloat16", 2, "full"),
        ("ipo", "bfloat16", 2, "none"),
    ],
)
def test_losses_and_types(model, pairs, tmp_path, loss, dtype, processes, shard):
    """Frozen weights may be in bfloat16; what is trained is float32, and so are the gradients that
    are summed."""
    flags = f"--model {model} --pairs {pairs} {SIZES} --limit 8 --steps 3 --eval-images 0 --lr 1e-3"
    flags += f" --loss {loss} --dtype {dtype}"
    run_alone("train_dpo.py", f"{flags} --out {tmp_path}/one")
    run(processes, "train_dpo.py", f"{flags} --out {tmp_path}/many --shard {shard}")
    assert_same_training(tmp_path / "one", tmp_path / "many", dtype, loss)


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("sample_bdhs.py", "--limit 6 --batch-size 3 --max-new-tokens 8"),
        ("train_dpo.py", f"--limit 3 --steps 2 {SIZES} --eval-images 3"),
        ("train_online.py", f"--limit 3 --steps 2 {SIZES} --eval-images 0 --max-new-tokens 24"),
        (
            "minialign.rlhf.ppo",
            f"--limit 3 --steps 2 {SIZES} --k 2 --eval-images 0 --max-new-tokens 24",
        ),
    ],
    ids=lambda value: value if "--" not in value else "",
)
def test_whatever_samples_does_so_in_bfloat16_shards(tmp_path, program, flags):
    """What is only sampled from is frozen, too: then FSDP takes weights of two types."""
    flags = f"--dtype bfloat16 {flags} --out"
    run_alone(program, f"{flags} {tmp_path}/one")
    run(2, program, f"--shard full {flags} {tmp_path}/two")
    if program == "sample_bdhs.py":
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
        return
    # Behind the first step other tokens may be drawn.
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for row in (*one, *two):
        row.pop("example", None)
    assert len(one) == len(two) == 2 and all(map(math.isfinite, two[1].values()))
    assert two[0] == pytest.approx(one[0], abs=HALF_SAMPLED, rel=HALF_SAMPLED)
    assert (tmp_path / "two/merged/model.safetensors").exists()


def test_a_reference_of_its_own_and_tied_embeddings_in_shards(pairs, tmp_path):
    """What the policy starts from stays the reference, whole in every process; a tied head is its
    embedding."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "tied"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    head = next(key for key in tensors if key.endswith("lm_head.weight"))
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != head},
        folder / "model.safetensors",
    )
    flags = f"--model {folder} --pairs {pairs} {SIZES} --steps 3 --eval-images 0 --lr 1e-3"
    run_alone("train_dpo.py", f"{flags} --out {tmp_path}/start")
    flags += f" --adapter {tmp_path / 'start/adapter'} --reference adapter"
    run_alone("train_dpo.py", f"{flags} --out {tmp_path}/one")
    run(2, "train_dpo.py", f"{flags} --out {tmp_path}/two --shard full")
    assert rows_of(tmp_path / "one")[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_processes_share_a_reference_cache(model, pairs, tmp_path, capsys):
    """What two processes in shards have found, in uneven shares, one process looks up, and trains
    the same."""
    flags = f"--model {model} --pairs {pairs} {SIZES} --epochs 2 --eval-images 0 --lr 1e-3"
    flags += " --batch-size 2 --limit 8"  # the third process has none
    cache = f"--ref-cache {tmp_path}/cache"
    run(3, "train_dpo.py", f"{flags} {cache} --shard full --out {tmp_path}/three")
    run_alone("train_dpo.py", f"{flags} {cache} --out {tmp_path}/one")
    # And the idle batch's, which is no pair.
    assert "log-probs of 9 pairs" in capsys.readouterr().out
    run_alone("train_dpo.py", f"{flags} --out {tmp_path}/plain")
    assert_same_training(tmp_path / "plain", tmp_path / "three")
    assert_same_training(tmp_path / "plain", tmp_path / "one")


@pytest.mark.parametrize("method", ["online-bdhs", "mixed-dpo"])
def test_online_training_in_shards(model, tmp_path, method):
    """The whole model is gathered to sample from; every process draws for its own records what one
    would.

    The stored pairs of mixed-dpo are the toy model's, who ends a sentence: random weights go on up
    to every limit."""
    answers = model if method == "online-bdhs" else "toy"
    flags = f"--model {answers} {SIZES} --method {method} --limit 9"
    flags += " --steps 3 --eval-images 0 --rho-th 0.7 --max-new-tokens 6 --n-bdhs 2"
    flags += " --annotator oracle --lr 1e-3"
    run_alone("train_online.py", f"{flags} --out {tmp_path}/one")
    run(2, "train_online.py", f"{flags} --out {tmp_path}/two --shard full")
    rows = rows_of(tmp_path / "one")
    # Some are dropped: uneven shares.
    assert len({row["pairs"] for row in rows}) > 1 or rows[0]["pairs"] < 5
    assert_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("annotator", "verdict"),
    [("toy", "logprobs"), ("self", "claims")],
)
def test_online_dpo_with_a_judge_in_shards(tmp_path, annotator, verdict):
    """The second process has two batches to judge, the first one three: in its idle turn it goes
    with the other."""
    flags = f"--model toy {SIZES} --method online-dpo --accumulate 3 --limit 9 --steps 2 --lr 1e-3"
    flags += f" --eval-images 0 --max-new-tokens 40 --annotator {annotator} --verdict {verdict}"
    run_alone("train_online.py", f"{flags} --out {tmp_path}/one")
    run(2, "train_online.py", f"{flags} --out {tmp_path}/two --shard full")
    assert any(row["pairs"] for row in rows_of(tmp_path / "one"))
    assert_same_training(tmp_path / "one", tmp_path / "two")


@pytest.fixture(scope="session")
def rewarding(tmp_path_factory) -> str:
    """The toy with a head of random weights, as a reward model's folder."""
    folder = tmp_path_factory.mktemp("rewarding") / "merged"
    shutil.copytree(CHECKPOINT, folder)
    weight = torch.randn(1, toy_model().config.text.hidden_size)
    save_head(weight, folder)
    return str(folder)


@pytest.mark.parametrize("judge", ["logprobs", "claims", "generated", "reward"])
def test_an_annotator_in_shards(rewarding, judge):
    """Three comparisons for two processes, one of which has an idle turn: the verdicts of one
    process, and each holds half of the model."""
    folder, verdict = ("toy", judge) if judge != "reward" else (rewarding, "logprobs")
    [alone], [whole] = judged(folder, verdict, shard=False)
    done = run(2, "tests/support/judges.py", f"{folder} {verdict}")
    [first, second], shares = json.loads(done.stdout.splitlines()[-1])
    assert [first[0], second[0], first[1]] == [json.loads(json.dumps(each)) for each in alone]
    assert second[1] == [] and any(each[0][0] is not None for each in alone)
    assert whole == 1 and shares == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.parametrize(
    ("program", "processes", "shard", "own"),
    [
        ("minialign.rlhf.rloo", 2, "none", "--batch-size 5"),
        ("minialign.rlhf.ppo", 3, "full", "--batch-size 2 --updates 2"),
    ],
)
def test_rlhf_by_several_processes(model, tmp_path, program, processes, shard, own):
    """Advantages are whitened over all processes, of which the third has no record at all."""
    flags = f"--model {model} {SIZES} {own} --limit 9 --steps 3 --eval-images 0"
    flags += " --max-new-tokens 6 --k 3 --lr 1e-3"
    run_alone(program, f"{flags} --out {tmp_path}/one")
    run(processes, program, f"{flags} --out {tmp_path}/many --shard {shard}")
    assert_same_training(tmp_path / "one", tmp_path / "many")


def test_a_reward_model_in_shards(model, pairs, tmp_path):
    """Loss curve and head."""
    flags = f"--model {model} --pairs {pairs} {SIZES} --steps 4 --batch-size 2"
    run_alone("minialign.rlhf.reward_model", f"{flags} --out {tmp_path}/one")
    run(3, "minialign.rlhf.reward_model", f"{flags} --out {tmp_path}/three --shard full")
    assert_same_training(tmp_path / "one", tmp_path / "three")
    folders = [tmp_path / name / "merged" for name in ("one", "three")]
    one, three = (load_reward_model(folder, "cpu", torch.float32) for folder in folders)
    heads = [reward.assistant.model.scalar_head.weight for reward in (one, three)]
    assert torch.allclose(*heads, atol=1e-5)


def test_sampling_by_three(model, tmp_path):
    """Two batches for three processes: the same bytes, in the data's order; and a run of three goes
    on alone."""
    flags = f"--model {model} --rho-th 0.7 --max-new-tokens 5 --batch-size 4 --n-bdhs 3"
    for processes, shard in ((1, "none"), (3, "full")):
        run(
            processes,
            "sample_bdhs.py",
            f"{flags} --limit 7 --shard {shard} --out {tmp_path}/{processes}.jsonl",
        )
    one, three = tmp_path / "1.jsonl", tmp_path / "3.jsonl"
    assert three.read_bytes() == one.read_bytes() and len(pairs_in(one)) > 5
    assert Path(f"{three}.stats.json").read_bytes() == Path(f"{one}.stats.json").read_bytes()
    for each in (one, three):
        run_alone("sample_bdhs.py", f"{flags} --limit 9 --out {each}")
    assert three.read_bytes() == one.read_bytes()


def test_a_process_that_dies_ends_the_others(model, pairs, tmp_path, capsys):
    """By kill -9, as for want of memory: no hang, a line that says so, and one process goes on from
    the checkpoint."""
    flags = f"--model {model} --pairs {pairs} {SIZES} --steps 12 --save-every 2 --eval-images 0"
    flags += " --lr 1e-3"
    words = command(2, "train_dpo.py", f"{flags} --shard full --out {tmp_path}/two")
    done = killed(
        tmp_path / "two/metrics.jsonl",
        start(words),
        lambda process: os.kill(children(process)[1], signal.SIGKILL),
    )
    assert done.returncode != 0
    assert "error: another process has ended" in done.stderr and "[rank0]" not in done.stderr
    assert "(SIGKILL)" in done.stderr  # torchrun names the one that was killed
    assert 3 <= len(rows_of(tmp_path / "two")) < 12
    run_alone("train_dpo.py", f"{flags} --resume --out {tmp_path}/two")
    assert "steps are done" in capsys.readouterr().out
    run_alone("train_dpo.py", f"{flags} --out {tmp_path}/one")
    assert_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("script", ["train_dpo.py", "train_online.py", "sample_bdhs.py"])
def test_shards_need_torchrun(tmp_path, script):
    done = launch(1, script, f"--shard full --out {tmp_path}/out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    [said] = done.stderr.splitlines()
    assert said.startswith(
        "error: --shard full: start with torchrun, as in `torchrun --nproc-per-node 8 train_dpo.py"
    )


def test_sigterm_to_one_ends_all_after_the_same_step(model, pairs, tmp_path):
    """As a scheduler ends a job, every process hears it at another moment; here only the second one
    ever does."""
    flags = f"--model {model} --pairs {pairs} {SIZES} --steps 40 --save-every 40 --eval-images 0"
    done = killed(
        tmp_path / "metrics.jsonl",
        Forked(2, "train_dpo.py", f"{flags} --shard full --out {tmp_path}".split()),
        lambda process: os.kill(children(process)[1], signal.SIGTERM),
    )
    steps = len(rows_of(tmp_path))
    said = f"ended after step {steps}; --resume goes on from there"
    assert done.returncode == 0 and 3 <= steps < 40 and done.stderr.count(said) == 1
    with safe_open(tmp_path / "checkpoint/progress.safetensors", "pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == steps


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8])
def test_every_record_is_dealt_out_once(monkeypatch, processes):
    monkeypatch.setattr(parallel, "size", lambda: processes)
    for batch in batches_of_run(range(23), 5, seed=4, epochs=2):
        dealt = []
        for rank in range(processes):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            dealt.append(parallel.shard_batch(batch))
        assert sorted(sum(dealt, [])) == sorted(batch)
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


STUCK = """
import os, sys, threading, time
def stuck(number):
    open(f"{sys.argv[1]}/{number}-{os.environ['RANK']}", "w")
    time.sleep(1000)
threading.Thread(target=stuck, args=[1], name="other").start()
stuck(0)
"""


def test_a_run_that_hangs_says_where(tmp_path):
    """The stacks of all threads of both processes, which then end."""
    (tmp_path / "stuck.py").write_text(STUCK)
    process = Forked(2, str(tmp_path / "stuck.py"), [str(tmp_path)])
    wait_for(lambda: len(list(tmp_path.glob("[01]-[01]"))) == 4, process)
    pids = children(process)
    with pytest.raises(pytest.fail.Exception) as failure:
        finish(process, 0.1)
    said = str(failure.value)
    assert "not done after 0.1 s" in said and said.count("Fatal Python error: Aborted") == 2
    assert len(re.findall(r"stuck.py\", line 5 in stuck", said)) == 4
    assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
