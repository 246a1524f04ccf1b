"""The findings: the paper's difference of two rows, metric by metric, and what our paired intervals
say to its sign.

The sign is not the same for every metric: in the paper guided BDHS is ahead of unguided on POPE and
behind it in recall. So each metric of a claim has its own verdict: reproduced if the whole 95 %
interval of our difference lies on the side of zero on which the paper's difference does, not
reproduced if all of it lies on the other, else undecided. Sizes are not compared, as the models are
not the same. What the paper has no figure for has no verdict: CHAIR, and controls of our own.

`corrupted` stands for POVID's pairs, of which the paper takes 5,000 in Table 6, and all in Tables 2
and 12. IPO and SLiC are held against DPO on the pairs of `bdhs`, in the paper on POVID's.
"""

from dataclasses import dataclass

import numpy as np

from minialign.evaluation.metrics import interval

# Figures that are compared. CHAIR is not reported in the paper.
METRICS = ("pope_adversarial", "recall", "chair_i")


@dataclass(frozen=True)
class Claim:
    """What the paper says of two rows, in points of LLaVA-1.6-7B's POPE accuracy and of recall on
    COCO; None where it has no such pair.
    """

    text: str
    row: str
    other: str
    table: str  # of the paper, or `OURS`
    pope: float | None = None
    recall: float | None = None

    def paper(self, metric: str) -> float | None:
        """The paper's difference on a metric."""
        return {"pope_adversarial": self.pope, "recall": self.recall}.get(metric)


OURS = "a control of our own"
CLAIMS = [
    Claim("BDHS against the base", "bdhs", "base", "Table 6", +2.35, +7.45),
    Claim("BDHS against supervised fine-tuning on y+", "bdhs", "sft", OURS),
    Claim("guided against unguided", "bdhs", "unguided", "Table 15", +0.05, -1.46),
    Claim("some of the image against none (rho_th 1)", "bdhs", "rho-1", "Table 15", +0.05, +0.21),
    Claim("attention mask against pixel noise", "bdhs", "noise", "Table 6", +0.15, +0.42),
    Claim("500 steps of noise against 300", "noise", "noise-300", OURS),
    Claim("500 steps of noise against 100", "noise", "noise-100", OURS),
    Claim("true y+ against y+ that errs", "bdhs-exact", "bdhs", OURS),
    Claim("direct questions among the pairs against none", "bdhs-questions", "bdhs", OURS),
    Claim("all pairs against a quarter", "bdhs", "bdhs-quarter", OURS),
    Claim("all pairs against a half", "bdhs", "bdhs-half", OURS),
    Claim("twice as many pairs against all", "bdhs-double", "bdhs", OURS),
    Claim("DPO on corrupted pairs against the base", "corrupted", "base", "Table 6", +1.78, +3.67),
    Claim("BDHS against corrupted pairs", "bdhs", "corrupted", "Table 6", +0.57, +3.78),
    Claim("both rejected responses against BDHS alone", "bdhs-corrupted", "bdhs", OURS),
    Claim("plain DPO against its distortion", "corrupted", "distorted", "Table 6", -0.15, +2.41),
    Claim("IPO against DPO", "ipo", "bdhs", "Table 12", -0.47, -3.67),
    Claim("SLiC against DPO", "slic", "bdhs", "Table 12", +0.19, +0.84),
    Claim("online against offline BDHS", "online-bdhs", "bdhs", "Table 6", +0.08, -1.49),
    Claim("online against offline BDHS, true y+", "online-bdhs-exact", "bdhs-exact", OURS),
    Claim("online BDHS against offline, Eq. 5", "online-bdhs-corrupted", "bdhs-corrupted", OURS),
    Claim("offline against online DPO", "corrupted", "online-dpo", "Table 2", +1.60, +5.03),
    Claim("offline against online DPO, 10 % of verdicts wrong", "corrupted", "oracle-10", OURS),
    Claim("offline against online DPO, 20 % of verdicts wrong", "corrupted", "oracle-20", OURS),
    Claim("mixed against online DPO", "mixed-dpo", "online-dpo", "Table 2", +1.54, +6.09),
    Claim("mixed against offline DPO", "mixed-dpo", "corrupted", "Table 2", -0.06, +1.06),
    Claim("truth against base as judge", "online-dpo", "claims-judge", "Table 11", -0.05, +1.05),
    Claim("the base as judge, by claims, against no training", "claims-judge", "base", OURS),
    Claim("the base as judge, side by side, against no training", "self-judge", "base", OURS),
    Claim("online DPO behind offline against offline", "bdhs-online-dpo", "bdhs", OURS),
    Claim("RLOO against online DPO on the same truth", "rloo", "online-dpo", OURS),
    Claim("PPO against online DPO on the same truth", "ppo", "online-dpo", OURS),
    Claim("RLOO on rewards of corrupted pairs against DPO", "rloo-corrupted", "corrupted", OURS),
    Claim("PPO on rewards of corrupted pairs against DPO", "ppo-corrupted", "corrupted", OURS),
    Claim("RLOO on rewards of descriptions against DPO", "rloo-descriptions", "corrupted", OURS),
    Claim("RLOO on rewards of ranked pairs", "rloo-ranked", "base", "Table 8", +0.77, -3.56),
]


def judge(metrics: dict[str, dict[str, np.ndarray]]) -> list[dict]:
    """A finding for every claim whose rows were run, and each metric: {"claim", "rows", "table",
    "metric", "paper", "difference", "status"}; `metrics` holds every row's bootstrap.
    """
    findings = []
    for claim in CLAIMS:
        if claim.row not in metrics or claim.other not in metrics:
            continue
        for metric in METRICS:
            paper = claim.paper(metric)
            difference = interval(metrics[claim.row][metric] - metrics[claim.other][metric])
            findings.append(
                {
                    "claim": claim.text,
                    "rows": f"{claim.row} - {claim.other}",
                    "table": claim.table,
                    "metric": metric,
                    "paper": paper,
                    "difference": difference,
                    "status": status_of(difference, paper),
                }
            )
    return findings


def shown_difference(difference: dict) -> str:
    """Value and interval with their signs."""
    if difference["value"] is None:
        return "not measured"
    return "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)


def status_of(difference: dict, paper: float | None) -> str:
    """Where a difference's interval lies: on the paper's side of zero, on the other, or on both;
    `ours` where the paper has no difference.
    """
    if paper is None:
        return "ours"
    if difference["value"] is None:
        return "undecided"
    ends = [difference["low"] * paper, difference["high"] * paper]
    if min(ends) > 0:
        return "reproduced"
    return "not reproduced" if max(ends) < 0 else "undecided"
