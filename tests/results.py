"""docs/results.json, and what docs/results.md and the README show of it.

    python -m tests.results STUDY.json

STUDY.json is what `python -m minialign.study` has written; docs/results.json is its copy, and holds
the coverage of its intervals besides, which is simulated where it is not there yet (some two
minutes). In both pages all between `<!-- NAME -->` and `<!-- end -->` is written anew.
"""

import argparse
import re
import textwrap
from pathlib import Path

from minialign.cli import guarded, require
from minialign.errors import UserError
from minialign.evaluation.metrics import cell_text
from minialign.files import read_json, write_json, write_whole
from minialign.study.page import VERDICTS, tables
from tests.bench.coverage import coverage
from tests.bench.scaling import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results.json"
PAGES = (ROOT / "docs/results.md", ROOT / "README.md")
BLOCKS = ("made", "rows", "asked", "ranges", "findings", "verdicts", "rewards", "readme")
MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def paragraph(text: str) -> str:
    """Prose in the pages' width."""
    return textwrap.fill(text, 120, break_on_hyphens=False) + "\n"


def made_text(study: dict) -> str:
    """How it was run."""
    made = study["made"]
    text = f"{made['date']}, torch {made['torch']}, OMP_NUM_THREADS {made['threads']}; "
    text += f"{made['limit']:,} records for most rows, {made['images']} {made['split']} images, "
    text += f"seeds 0-{made['seeds'] - 1}"
    more = [f"`{row['row']}`" for row in study["rows"] if row["seeds"] > made["seeds"]]
    if more:
        text += ", and more of rows whose seeds differ much more than their images do: "
        text += ", ".join(more)
    return paragraph(f"{text}. Intervals are 95 %, by bootstrap over images and seeds.")


def verdicts_text(study: dict) -> str:
    """How many differences were looked at, and how far their intervals can be trusted."""
    statuses = [finding["status"] for finding in study["findings"]]
    counts = {word: statuses.count(status) for status, word in VERDICTS.items()}
    counted = ", ".join(f"{count} {word}" for word, count in counts.items())
    text = f"{len(statuses)} differences, of which {sum(counts.values())} have a verdict ({counted}"
    text += "), each at 95 % by itself. Nothing corrects for their number: where every interval "
    text += "holds at 95 %, "
    text += f"{0.05 * len(statuses):.1f} of them miss the true value on average, by chance alone. "

    # {seeds: how often the interval holds, by how much seeds differ}
    held: dict[int, list[str]] = {}
    for case in study["coverage"]:
        held.setdefault(case["seeds"], []).append(f"{100 * case['coverage']:.1f}")
    ratios = ", ".join(dict.fromkeys(f"{case['ratio']:g}" for case in study["coverage"]))
    shares = "; ".join(f"{', '.join(each)} % with {seeds} seeds" for seeds, each in held.items())
    text += f"How often an interval holds where seeds deviate {ratios} times as much as images do, "
    return paragraph(f"{text}on drawn counts (`python -m tests.bench.coverage`): {shares}.")


def readme_table(study: dict) -> str:
    """The base, and BDHS behind it."""
    rows = {row["row"]: row for row in study["rows"]}
    before, after = rows["base"]["metrics"], rows["bdhs"]["metrics"]
    lines = []
    for name, words in (
        ("chair_i", "hallucinated share of mentioned objects (CHAIR_i) ↓"),
        ("chair_s", "descriptions with a hallucination (CHAIR_s) ↓"),
        ("recall", "objects that are mentioned (recall) ↑"),
        ("pope_adversarial", "accuracy on adversarial POPE ↑"),
    ):
        lines.append([words, cell_text(before[name]), cell_text(after[name])])
    seeds = rows["bdhs"]["seeds"]
    text = f"Over {seeds} seeds (95 % intervals over images and seeds; chosen on other images):\n\n"
    return text + markdown(" | before | after BDHS + DPO", lines)


def blocks(study: dict) -> dict[str, str]:
    """What stands between the marks of the pages, by their names; nothing of what a study lacks."""
    texts = dict.fromkeys(BLOCKS, "")
    texts["made"] = made_text(study)
    texts["verdicts"] = verdicts_text(study)
    texts["readme"] = readme_table(study)
    for name, table in tables(study).items():
        texts[name] = markdown(" | ".join(table.heads), table.lines)
    return texts


def filled(page: str, texts: dict[str, str]) -> str:
    """The page with each of its blocks anew."""

    def block(match: re.Match) -> str:
        text = texts[match[2]]
        return match[1] + (f"\n{text}\n" if text else "") + match[3]

    return MARKED.sub(block, page)


def main(args: argparse.Namespace) -> None:
    """Write the copy and both pages."""
    remedy = "name the study.json that python -m minialign.study has written"
    study = read_json(Path(args.study), remedy)
    for name in ("made", "rows", "findings", "rewards"):
        require(name in study, f"{args.study}: has no `{name}`; {remedy}")
    try:
        names = {row["row"] for row in study["rows"]}
        lacking = "has no row bdhs, of which the README's table is; run the study with it"
        require({"base", "bdhs"} <= names, f"{args.study}: {lacking}")
        chosen = "is of the images that rates were chosen on; run it on --split test"
        require(study["made"]["split"] == "test", f"{args.study}: {chosen}")
        if "coverage" not in study:
            study["coverage"] = coverage()
        texts = blocks(study)
    except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{args.study}: is not a whole study ({error!r}); {remedy}") from error
    pages = {path: filled(path.read_text("utf-8"), texts) for path in PAGES}
    write_json(RESULTS, study)
    for path, page in pages.items():
        write_whole(path, page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY.json")
    guarded(main, parser.parse_args())
