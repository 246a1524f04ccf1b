"""The rows of the comparison: the commands that each takes, in order.

Their words hold places to fill: {study} is the study's --out, {row} and {seed} what is run, the
others its own flags."""

from minialign.toy.edge import TOY_RECORDS

BDHS, CORRUPTED = (
    "{study}/bdhs-{seed}.jsonl",
    "{study}/corrupted-{seed}.jsonl",
)  # pairs that several rows train on
RANKED = "{study}/ranked-{seed}.jsonl"
OWN = "{study}/{row}-{seed}/pairs.jsonl"  # a row's own
DRAW = "--seed {seed} --limit {limit}"
TRAIN = "--out {study}/{row}-{seed} --seed {seed} --steps {steps} --eval-split {split} --eval-images {images}"
SAMPLE_BDHS = f"sample_bdhs.py --out {BDHS} {DRAW}"
CORRUPT = f"minialign.toy.corrupt --out {CORRUPTED} {DRAW}"
OFFLINE, ONLINE = (
    f"train_dpo.py {TRAIN} --pairs",
    f"train_online.py {TRAIN} --limit {{limit}} --method",
)
REWARD = "train_dpo.py --out {study}/reward-{kind}-{seed} --loss reward --lr 1e-3 --steps 500 --seed {seed} --pairs"
PAID = "--reward {study}/reward-corrupted-{seed}/merged"  # by a reward model of constructed pairs
# Table 7: a reward model of each kind of pairs, asked about held-out pairs of all kinds, on records
# that none has seen.
REWARD_MODELS = {
    "corrupted": [CORRUPT, f"{REWARD} {CORRUPTED}".replace("{kind}", "corrupted")],
    "ranked": [
        f"minialign.ranked --out {RANKED} {DRAW}",
        f"{REWARD} {RANKED}".replace("{kind}", "ranked"),
    ],
}
HELD = "{study}/held-out"
EXPORT = f"minialign.toy --export {HELD} --first {TOY_RECORDS} --limit 300"
HELD_OUT = {
    "corrupted": f"minialign.toy.corrupt --out {HELD}/corrupted.jsonl --data {HELD}/data.json",
    "bdhs": f"sample_bdhs.py --out {HELD}/bdhs.jsonl --data {HELD}/data.json",
    "ranked": f"minialign.ranked --out {HELD}/ranked.jsonl --data {HELD}/data.json",
}
# The rates were chosen on validation, for each row (docs/sweep.md); 2e-4, the toy's default, goes
# unsaid.
ROWS = {
    "bdhs": [SAMPLE_BDHS, f"{OFFLINE} {BDHS}"],
    "sft": [SAMPLE_BDHS, f"{OFFLINE} {BDHS} --loss sft --lr 1e-3"],
    "unguided": [f"sample_bdhs.py --out {OWN} {DRAW} --no-guided", f"{OFFLINE} {OWN}"],
    "noise": [
        f"sample_bdhs.py --out {OWN} {DRAW} --noise-steps 500 --rho-th 0",
        f"{OFFLINE} {OWN}",
    ],
    "corrupted": [CORRUPT, f"{OFFLINE} {CORRUPTED}"],
    "distorted": [CORRUPT, f"{OFFLINE} {CORRUPTED} --rejected distorted"],
    "online-bdhs": [f"{ONLINE} online-bdhs --lr 5e-4"],
    "online-dpo": [f"{ONLINE} online-dpo --lr 5e-4 --annotator oracle"],
    "self-judge": [f"{ONLINE} online-dpo --lr 5e-4 --annotator self"],
    "mixed-dpo": [CORRUPT, f"{ONLINE} mixed-dpo --lr 5e-4 --annotator oracle --data {CORRUPTED}"],
    "ipo": [
        SAMPLE_BDHS,
        f"{OFFLINE} {BDHS} --loss ipo --beta 0.02",
    ],  # at App. A's 0.8-1.0 it hardly moves
    "slic": [SAMPLE_BDHS, f"{OFFLINE} {BDHS} --loss slic --beta 0.1"],
    "rloo": [f"{ONLINE} rloo --lr 5e-4 --beta 0.05"],
    "ppo": [f"{ONLINE} ppo --lr 1e-4 --beta 0.05"],
    "rloo-reward": [*REWARD_MODELS["corrupted"], f"{ONLINE} rloo --lr 5e-4 --beta 0.05 {PAID}"],
    "ppo-reward": [*REWARD_MODELS["corrupted"], f"{ONLINE} ppo --lr 1e-4 --beta 0.05 {PAID}"],
}
# Program -> its last file, as it follows what its first flag names: where that stands, the command
# is done.
LAST = {
    "sample_bdhs.py": ".stats.json",
    "minialign.toy.corrupt": "",
    "minialign.toy": "/data.json",
    "minialign.ranked": "",
    "minialign.annotate": "",
    "train_dpo.py": "/report.html",
    "train_online.py": "/report.html",
}
