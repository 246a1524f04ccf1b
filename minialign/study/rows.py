"""The rows of the comparison: the commands that each takes, in order.

Their words hold places to fill: {study} is the study's --out, {row} and {seed} what is run, the
others its own flags. The first flag of a command names what it writes.
"""

from minialign.toy.world import TOY_RECORDS

# Pairs that several rows train on, and a row's own.
BDHS = "{study}/bdhs-{seed}.jsonl"
CORRUPTED = "{study}/corrupted-{seed}.jsonl"
RANKED = "{study}/ranked-{seed}.jsonl"
OWN = "{study}/{row}-{seed}/pairs.jsonl"

DRAW = "--seed {seed} --limit {limit}"
SAMPLE = "sample_bdhs.py --out"
SAMPLE_BDHS = f"{SAMPLE} {BDHS} {DRAW}"
CORRUPT = f"minialign.toy --corrupted {CORRUPTED} {DRAW}"
RANK = f"minialign.annotate --out {RANKED} --rank toy {DRAW}"

TRAIN = (
    "--out {study}/{row}-{seed} --seed {seed} --steps {steps} "
    "--eval-split {split} --eval-images {images}"
)
OFFLINE = f"train_dpo.py {TRAIN} --pairs"
ONLINE = f"train_online.py {TRAIN} --limit {{limit}} --method"
RLOO = f"minialign.rlhf.rloo {TRAIN} --limit {{limit}} --lr 5e-4 --beta 0.05"
PPO = f"minialign.rlhf.ppo {TRAIN} --limit {{limit}} --lr 1e-4 --beta 0.05"

# Table 7: a reward model of each kind of pairs, asked about held-out pairs of all kinds, on records
# that none has seen.
REWARD = "minialign.rlhf.reward_model --out {study}/reward-KIND-{seed} --seed {seed} --pairs"
REWARD_MODELS = {
    "corrupted": [CORRUPT, f"{REWARD} {CORRUPTED}".replace("KIND", "corrupted")],
    "ranked": [RANK, f"{REWARD} {RANKED}".replace("KIND", "ranked")],
}
PAID = "--reward {study}/reward-corrupted-{seed}/merged"  # by a reward model of constructed pairs
HELD = "{study}/held-out"
EXPORT = f"minialign.toy --export {HELD} --first {TOY_RECORDS} --limit 300"
HELD_OUT = {
    "corrupted": f"minialign.toy --corrupted {HELD}/corrupted.jsonl --data {HELD}/data.json",
    "bdhs": f"{SAMPLE} {HELD}/bdhs.jsonl --data {HELD}/data.json",
    "ranked": f"minialign.annotate --out {HELD}/ranked.jsonl --rank {HELD}/data.json",
}

# The rates were chosen on validation, for each row (docs/sweep.md); 2e-4, the toy's default, goes
# unsaid.
ROWS = {
    "bdhs": [SAMPLE_BDHS, f"{OFFLINE} {BDHS}"],
    "sft": [SAMPLE_BDHS, f"{OFFLINE} {BDHS} --loss sft --lr 1e-3"],
    "unguided": [f"{SAMPLE} {OWN} {DRAW} --no-guided", f"{OFFLINE} {OWN}"],
    "noise": [f"{SAMPLE} {OWN} {DRAW} --noise-steps 500 --rho-th 0", f"{OFFLINE} {OWN}"],
    "corrupted": [CORRUPT, f"{OFFLINE} {CORRUPTED}"],
    "distorted": [CORRUPT, f"{OFFLINE} {CORRUPTED} --rejected distorted"],
    "online-bdhs": [f"{ONLINE} online-bdhs --lr 5e-4"],
    "online-dpo": [f"{ONLINE} online-dpo --lr 5e-4 --annotator oracle"],
    "self-judge": [f"{ONLINE} online-dpo --lr 5e-4 --annotator self"],
    "mixed-dpo": [CORRUPT, f"{ONLINE} mixed-dpo --lr 5e-4 --annotator oracle --data {CORRUPTED}"],
    # At App. A's beta of 0.8-1.0 IPO hardly moves.
    "ipo": [SAMPLE_BDHS, f"{OFFLINE} {BDHS} --loss ipo --beta 0.02"],
    "slic": [SAMPLE_BDHS, f"{OFFLINE} {BDHS} --loss slic --beta 0.1"],
    "rloo": [RLOO],
    "ppo": [PPO],
    "rloo-reward": [*REWARD_MODELS["corrupted"], f"{RLOO} {PAID}"],
    "ppo-reward": [*REWARD_MODELS["corrupted"], f"{PPO} {PAID}"],
}

# Program and first flag -> the last file that it writes, as it follows what the flag names: where
# that stands, the command is done.
LAST = {
    "sample_bdhs.py --out": ".stats.json",
    "minialign.toy --corrupted": "",
    "minialign.toy --export": "/data.json",
    "minialign.annotate --out": "",
    "train_dpo.py --out": "/report.html",
    "train_online.py --out": "/report.html",
    "minialign.rlhf.reward_model --out": "/report.html",
    "minialign.rlhf.rloo --out": "/report.html",
    "minialign.rlhf.ppo --out": "/report.html",
}
