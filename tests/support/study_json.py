"""A small study.json: the base, bdhs, and another row, which learned from nothing."""

from minialign.study.page import ASKED, RANGED, SHOWN

FIGURE = {"value": 0.5, "low": 0.25, "high": 0.75}


def row_json(row: str, seeds: int = 3, pairs: int = 30, **by_seed: list) -> dict:
    """A row of study.json whose figures are all 0.5 [0.25, 0.75]."""
    metrics = dict.fromkeys((*SHOWN, *ASKED), FIGURE)
    metrics["length"] = {"value": 34, "low": 33, "high": 35}
    values = dict.fromkeys(RANGED, [0.1] * seeds) | by_seed
    facts = {"row": row, "seeds": seeds, "images": 5, "steps": 4, "pairs": pairs}
    return facts | {"metrics": metrics, "by_seed": values}


def findings(row: str, other: str) -> list[dict]:
    """A claim's three findings, of each status one."""
    claim = {"claim": f"{row} beats {other}", "rows": f"{row} - {other}", "table": "Table 6"}
    claim["difference"] = {"value": 0.1, "low": -0.25, "high": 0.2}
    return [
        claim | {"metric": "pope_adversarial", "paper": 2.35, "status": "reproduced"},
        claim | {"metric": "recall", "paper": -1.0, "status": "not reproduced"},
        claim | {"metric": "chair_i", "paper": None, "status": "ours"},
    ]


def study_json() -> dict:
    """The whole of it."""
    made = {"date": "2000-01-02", "torch": "9.9", "threads": 1, "split": "test", "images": 5}
    rows = [row_json("base", 1, 0), row_json("bdhs", recall=[0.3, 0.9, 0.4])]
    return {
        "made": made | {"limit": 2000, "seeds": 3},
        "rows": [*rows, row_json("another", 5, 0)],
        "findings": [*findings("bdhs", "base"), *findings("bdhs", "another")],
        "rewards": [{"learned_from": "a", "asked_about": "b", "accuracy": [0.5, 0.9, 0.7]}],
    }
