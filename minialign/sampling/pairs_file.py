"""The pairs file that sample_bdhs.py writes: its lines, and how a killed run goes on in it.

JSON Lines of id, images, prompt, chosen, rejected, external (the record's own rejected response, if
it has one), which are lists of messages, and bdhs, which says how the pair came about. Beside it
stand FILE.config.json, the settings that it was sampled with, FILE.stats.json and, with --sharegpt,
FILE.sharegpt.json, the pairs as LLaMA-Factory reads them.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from minialign.cli import require
from minialign.data.records import Record, pair_fields, pair_record
from minialign.files import require_same_settings

# Settings that may be others when a run is continued.
MAY_CHANGE = (
    "out",
    "limit",
    "batch_size",
    "skip_bad_records",
    "sharegpt",
    "workers",
    "shard",
    "device",
)


@dataclass(frozen=True)
class Sampled:
    """A rejected response y- and how it came about."""

    rejected: str
    iterations: int  # after which it was kept
    similarity: float  # phi, to y+
    mask_seed: int  # draws its mask and cuts again
    guided: bool  # False: a whole response, not y+'s sentences completed
    truncated: bool  # the length limit ended a completion


def beside(out: Path, what: str) -> Path:
    """The file beside the pairs file that holds its settings or its statistics."""
    return out.with_name(f"{out.name}.{what}.json")


def require_same_sampling(out: Path, settings: dict) -> None:
    """Refuse a pairs file that is there and was not sampled with these settings, and files that
    stand where those beside it go and that no sampling has made.
    """
    for what in ("config", "stats", "sharegpt"):
        path = beside(out, what)
        known = out.exists() or not path.exists()
        # A run may have been killed between its settings and the first pair.
        settled = what == "config" and not known and "eps_s" in path.read_text("utf-8", "replace")
        message = "is there, and would be written beside --out; name another --out"
        require(known or settled, f"{path}: {message}")

    if out.exists() and out.stat().st_size > 0:
        path = beside(out, "config")
        require_same_settings(path, settings, MAY_CHANGE, "name another --out")


def require_same_records(out: Path, pairs: list[dict], records: list[Record]) -> None:
    """Refuse to continue a pairs file that was sampled from other data under the same ids."""
    by_id = {record.id: record for record in records}
    for number, pair in enumerate(pairs, start=1):
        wanted, kept = by_id.get(pair["id"]), pair_record(pair)
        if wanted is None:
            continue
        names = ("image", "turns", "image_turn", "chosen")
        same = all(getattr(kept, name) == getattr(wanted, name) for name in names)
        where = f"{out}, line {number}: {pair['id']!r} is another record in --data"
        require(same and kept.external == wanted.rejected, f"{where}; name another --out")


def pair_line(record: Record, sampled: Sampled, config) -> dict:
    """One line of the pairs file; TRL reads it as it is."""
    bdhs = asdict(sampled) | {"rho_th": config.rho_th, "noise_steps": config.noise_steps}
    responses = {"chosen": record.chosen, "rejected": bdhs.pop("rejected")}
    if record.rejected:
        responses["external"] = record.rejected  # for Eq. 5
    return pair_fields(record, responses) | {"bdhs": bdhs}


def statistics(pairs: list[dict], n_bdhs: int, eps_s: float) -> dict[str, object]:
    """What FILE.stats.json holds of the pairs."""
    return {
        "pairs": len(pairs),
        "resolved": resolved_curve(pairs, n_bdhs, eps_s),
        "identical": sum(pair["chosen"] == pair["rejected"] for pair in pairs),
        "truncated": sum(pair["bdhs"]["truncated"] for pair in pairs),
    }


def resolved_curve(pairs: list[dict], n_bdhs: int, eps_s: float) -> list[float]:
    """Fig. 10: the share of the pairs that differ from y+ (phi < eps_s) and are whole, after 1, 2,
    ... iterations."""
    needed: Counter[int] = Counter()
    for pair in pairs:
        bdhs = pair["bdhs"]
        # What the last iteration samples is kept, different and whole or not.
        different = bdhs["similarity"] < eps_s and not bdhs["truncated"]
        if bdhs["iterations"] < n_bdhs or different:
            needed[bdhs["iterations"]] += 1

    shares, resolved = [], 0
    for iteration in range(1, n_bdhs + 1):
        resolved += needed[iteration]
        shares.append(round(resolved / max(1, len(pairs)), 4))
    return shares
