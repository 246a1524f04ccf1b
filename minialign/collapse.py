"""Signs that a policy learns to please the reward and unlearns its language, read from the rows of metrics.jsonl.

The first rows, in which the policy is still near the reference, are held against the latest. The rows alone decide, so
that a resumed run stops where an undisturbed one does. The signs, each enough to stop:
  Eq. 2           it has fallen: the KL costs more than the reward has risen, or the reward has fallen too
  entropy         next to nothing is left of it: every prompt has its one answer; or it is many times what it was
  repetition      the responses say the same thing over and over
A reward that is deceived at a price Eq. 2 allows, in fluent and varied words, shows in none of them: a bound on the
KL, `kl_stop`, is the one that does not depend on what a collapse looks like.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NGRAM = 4  # tokens
NOISE = 6.0  # standard errors by which Eq. 2 has to have fallen: it is asked after every step, and may err in none
SCORE, REWARD, KL = "objective/scores", "objective/rlhf_reward", "objective/kl"  # r; r - beta KL; per response
ENTROPY, REPETITION = "objective/entropy", "sampled/repetition"


@dataclass(frozen=True)
class CollapseLimits:
    """From where on it is a collapse."""

    kl_stop: float | None = None  # nats per response, in any one step; None: no bound
    signs: bool = True  # whether the signs stop a run, too
    first: int = 3  # steps that are averaged of the beginning, before a high rate has ruined anything
    window: int = 10  # steps that are averaged at least of the latest; a tenth of a long run
    entropy: float = 0.1  # share of the first entropy, and the other way round
    repetition: float = 0.5  # mean share of n-grams that are repeated


def repetition(ids: Sequence[int]) -> float:
    """Share of a response's token n-grams that have occurred in it before: 0 where none has, or it is shorter."""
    ngrams = list(zip(*(ids[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def collapse(rows: list[dict], limits: CollapseLimits) -> str | None:
    """What was seen, if the run has to stop at its latest row; else None. Rows without samples do not count.

    The signs need two full windows of rows; `kl_stop` holds from the first step on.
    """
    sampled = [row for row in rows if KL in row]
    if not sampled:
        return None
    step, kl = sampled[-1]["step"], sampled[-1][KL]
    if limits.kl_stop is not None and kl > limits.kl_stop:
        return f"step {step}: a KL of {kl:.2f} nats per response, above --kl-stop {limits.kl_stop}"
    window = max(limits.window, len(sampled) // 10)
    if not limits.signs or len(sampled) < 2 * window:
        return None
    early, late = sampled[: limits.first], sampled[-window:]
    figures = {name: (mean(early, name), mean(late, name)) for name in (SCORE, REWARD, KL, ENTROPY, REPETITION)}
    worse, risen = fallen(early, late), figures[SCORE][1] > figures[SCORE][0]
    signs = {
        "the KL costs more than the reward has risen": worse and risen,
        "the reward has fallen": worse and not risen,
        "the entropy is all but gone": figures[ENTROPY][1] < limits.entropy * figures[ENTROPY][0],
        "the policy babbles": limits.entropy * figures[ENTROPY][1] > figures[ENTROPY][0],
        "the responses repeat themselves": figures[REPETITION][1] > limits.repetition,
    }
    seen = [sign for sign, there in signs.items() if there]
    changes = ", ".join(f"{name} {first:.3g} -> {now:.3g}" for name, (first, now) in figures.items())
    return f"step {step}: {' and '.join(seen)} ({changes})" if seen else None


def fallen(early: list[dict], late: list[dict]) -> bool:
    """Eq. 2 has fallen by more than its noise, which is that of the latest steps."""
    error = statistics.stdev(row[REWARD] for row in late) * (1 / len(early) + 1 / len(late)) ** 0.5
    return mean(late, REWARD) < mean(early, REWARD) - NOISE * error


def mean(rows: list[dict], name: str) -> float:
    """Mean of a metric over some rows."""
    return statistics.fmean(row[name] for row in rows)
