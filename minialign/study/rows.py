"""The rows of the comparison: the commands that each takes, in order.

Commands are templates: {study} is the study's --out, {row} and {seed} what is run, {limit} the
number of records, {steps} that of the steps once over them; {half} records and {half_steps} are
half as many, {quarter} and {double} likewise. The first flag of a command names what it writes.
Row `bdhs`, seed 0, of 2,000 records:

    sample_bdhs.py --out STUDY/bdhs-0.jsonl --seed 0 --limit 2000
    train_dpo.py --out STUDY/bdhs-0 --seed 0 --eval-split test --eval-images 500 --steps 125 \\
        --pairs STUDY/bdhs-0.jsonl
"""

from minialign.toy.world import TOY_RECORDS

SIZES = {"quarter": 0.25, "half": 0.5, "double": 2}  # other numbers of records, times --limit

# Pairs that several rows train on, and those of one row alone. None lies in a folder that training
# writes into.
BDHS = "{study}/bdhs-{seed}.jsonl"
CORRUPTED = "{study}/corrupted-{seed}.jsonl"
DESCRIBED = "{study}/descriptions-{seed}.jsonl"
RANKED = "{study}/ranked-{seed}.jsonl"
OWN = "{study}/{row}-{seed}.jsonl"

SEED = "--seed {seed}"
DRAW = f"{SEED} --limit {{limit}}"
SAMPLE = "sample_bdhs.py --out"
SAMPLE_BDHS = f"{SAMPLE} {BDHS} {DRAW}"
SAMPLE_OWN = f"{SAMPLE} {OWN} {SEED}"
CORRUPT = f"minialign.toy --corrupted {CORRUPTED} {DRAW}"

# Other records of the embedded world: of exact y+; a third of them direct questions; descriptions
# alone.
EXACT = "{study}/exact"
QUESTIONS = "{study}/questions"
DESCRIPTIONS = "{study}/descriptions"
EXPORT = "minialign.toy --export"
EXPORT_EXACT = f"{EXPORT} {EXACT} --limit {{limit}} --hearsay 0"
EXPORT_QUESTIONS = f"{EXPORT} {QUESTIONS} --limit {{limit}} --kinds description,existence,attribute"
EXPORT_DESCRIPTIONS = f"{EXPORT} {DESCRIPTIONS} --limit {{double}} --kinds description"

RUN = "--out {study}/{row}-{seed}"
EVALUATE = "--eval-split {split} --eval-images {images}"
TRAIN = f"{RUN} {SEED} {EVALUATE} --steps {{steps}}"
OFFLINE = f"train_dpo.py {TRAIN} --pairs"
ONLINE = f"train_online.py {TRAIN} --limit {{limit}} --method"
RLOO = f"minialign.rlhf.rloo {TRAIN} --limit {{limit}}"
PPO = f"minialign.rlhf.ppo {TRAIN} --limit {{limit}}"


def reward_folder(kind: str) -> str:
    """Where the reward model of a kind of pairs is trained."""
    return f"{{study}}/reward-{kind}-{{seed}}"


def reward_model(kind: str, pairs: str) -> str:
    """Its training."""
    return f"minialign.rlhf.reward_model --out {reward_folder(kind)} {SEED} --pairs {pairs}"


# Table 7: reward models of three kinds of pairs, and the held-out pairs that they are asked about,
# of records behind those that training draws on.
REWARD_MODELS = {
    "corrupted": [CORRUPT, reward_model("corrupted", CORRUPTED)],
    "descriptions": [
        EXPORT_DESCRIPTIONS,
        f"minialign.toy --corrupted {DESCRIBED} {SEED} --data {DESCRIPTIONS}/data.json "
        "--limit {double}",
        reward_model("descriptions", DESCRIBED),
    ],
    "ranked": [
        f"minialign.annotate --out {RANKED} --rank toy {DRAW}",
        reward_model("ranked", RANKED) + " --lr 1e-3",
    ],
}

HELD = "{study}/held-out"
EXPORT_HELD = f"{EXPORT} {HELD} --first {4 * TOY_RECORDS} --limit 300"
HELD_OUT = {
    "corrupted": f"minialign.toy --corrupted {HELD}/corrupted.jsonl --data {HELD}/data.json",
    "bdhs": f"{SAMPLE} {HELD}/bdhs.jsonl --data {HELD}/data.json",
    "ranked": f"minialign.annotate --out {HELD}/ranked.jsonl --rank {HELD}/data.json",
}


def bdhs_of_size(size: str) -> list[str]:
    """Row `bdhs` on more or fewer records, once over them."""
    train = f"train_dpo.py {RUN} {SEED} {EVALUATE} --steps {{{size}_steps}} --pairs {OWN}"
    return [f"{SAMPLE_OWN} --limit {{{size}}}", train]


def paid(program: str, kind: str) -> list[str]:
    """A row of RLHF that a reward model of a kind of pairs pays."""
    return [*REWARD_MODELS[kind], f"{program} --reward {reward_folder(kind)}/merged"]


# The rates were chosen on validation, for each row (docs/sweep.md); where none is said it is the
# toy's default of the program, 2e-4 of all but RLHF's.
ROWS = {
    # Algorithm 1, and how much is hidden, cut or blurred.
    "bdhs": [SAMPLE_BDHS, f"{OFFLINE} {BDHS}"],
    "sft": [SAMPLE_BDHS, f"{OFFLINE} {BDHS} --loss sft --lr 3e-4"],
    "unguided": [f"{SAMPLE} {OWN} {DRAW} --no-guided", f"{OFFLINE} {OWN}"],
    "rho-1": [f"{SAMPLE} {OWN} {DRAW} --rho-th 1", f"{OFFLINE} {OWN}"],
    "noise": [f"{SAMPLE} {OWN} {DRAW} --noise-steps 500", f"{OFFLINE} {OWN}"],
    "noise-300": [f"{SAMPLE} {OWN} {DRAW} --noise-steps 300", f"{OFFLINE} {OWN}"],
    "noise-100": [f"{SAMPLE} {OWN} {DRAW} --noise-steps 100", f"{OFFLINE} {OWN}"],
    # Other records, and more or fewer of them (Fig. 7).
    "bdhs-exact": [
        EXPORT_EXACT,
        f"{SAMPLE_OWN} --data {EXACT}/data.json",
        f"{OFFLINE} {OWN}",
    ],
    "bdhs-questions": [
        EXPORT_QUESTIONS,
        f"{SAMPLE_OWN} --data {QUESTIONS}/data.json",
        f"{OFFLINE} {OWN}",
    ],
    "bdhs-quarter": bdhs_of_size("quarter"),
    "bdhs-half": bdhs_of_size("half"),
    "bdhs-double": bdhs_of_size("double"),
    # Pairs from outside, and both kinds of rejected responses (Eq. 5).
    "corrupted": [CORRUPT, f"{OFFLINE} {CORRUPTED}"],
    "distorted": [CORRUPT, f"{OFFLINE} {CORRUPTED} --rejected distorted --lr 5e-4"],
    "bdhs-corrupted": [
        CORRUPT,
        f"{SAMPLE_OWN} --data {CORRUPTED}",
        f"{OFFLINE} {OWN} --rejected both",
    ],
    # The other losses.
    "ipo": [SAMPLE_BDHS, f"{OFFLINE} {BDHS} --loss ipo --lr 5e-4"],
    "slic": [SAMPLE_BDHS, f"{OFFLINE} {BDHS} --loss slic"],
    # Algorithm 1 by the current policy.
    "online-bdhs": [f"{ONLINE} online-bdhs"],
    "online-bdhs-exact": [
        EXPORT_EXACT,
        f"{ONLINE} online-bdhs --data {EXACT}/data.json",
    ],
    "online-bdhs-corrupted": [
        CORRUPT,
        f"{ONLINE} online-bdhs --gamma 0.5 --data {CORRUPTED}",
    ],
    # Two responses, and who ranks them.
    "online-dpo": [f"{ONLINE} online-dpo --lr 5e-4 --annotator oracle"],
    "oracle-10": [f"{ONLINE} online-dpo --lr 5e-4 --annotator oracle:0.1"],
    "oracle-20": [f"{ONLINE} online-dpo --lr 5e-4 --annotator oracle:0.2"],
    "self-judge": [f"{ONLINE} online-dpo --lr 5e-4 --annotator self"],
    "claims-judge": [f"{ONLINE} online-dpo --lr 5e-4 --annotator self --verdict claims"],
    "mixed-dpo": [CORRUPT, f"{ONLINE} mixed-dpo --lr 5e-4 --annotator oracle --data {CORRUPTED}"],
    "bdhs-online-dpo": [
        SAMPLE_BDHS,
        f"{OFFLINE} {BDHS}".replace("{row}", "bdhs"),
        f"{ONLINE} online-dpo --lr 5e-4 --annotator oracle "
        "--adapter {study}/bdhs-{seed}/adapter --reference adapter",
    ],
    # RLHF, paid by the truth and by reward models.
    "rloo": [RLOO],
    "ppo": [PPO],
    "rloo-corrupted": paid(RLOO, "corrupted"),
    "ppo-corrupted": paid(PPO, "corrupted"),
    "rloo-descriptions": paid(RLOO, "descriptions"),
    "rloo-ranked": paid(RLOO, "ranked"),
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
