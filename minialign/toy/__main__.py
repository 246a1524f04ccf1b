"""The embedded world as files: pictures and records, rule-corrupted pairs, its checkpoint anew.

python -m minialign.toy --export runs/toy-pictures       # pictures, data.json (LLaVA-Instruct)
python -m minialign.toy --export runs/slides --split test --limit 3 --scale 4
python -m minialign.toy --corrupted runs/corrupted/pairs.jsonl
python -m minialign.toy --pretrain /tmp/toy-llava
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minialign import edge
from minialign.claims import require_new_file, require_own_folder
from minialign.cli import require, require_at_least, run_main
from minialign.files import folder_written_whole, write_json
from minialign.toy.world import (
    ALIGNMENT_HEARSAY,
    ALIGNMENT_KINDS,
    KINDS,
    TOY_RECORDS,
    alignment_records,
    picture,
    scene_of,
)


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.toy`."""

    export: str | None = None  # folder for pictures and their records, data.json
    # of which split; train and alignment are told from hearsay, as the model learns them
    split: Literal["train", "alignment", "validation", "test"] = "alignment"
    scale: int = 1  # pictures so many times as large as the model sees them, up to 4
    first: int = 0  # number of the first one; training has those of alignment up to 1,999
    # --export: what is asked of the pictures, in turn: description, existence, attribute
    kinds: str = ",".join(ALIGNMENT_KINDS)
    hearsay: float = ALIGNMENT_HEARSAY  # --export: how often the answers take hearsay for truth
    corrupted: str | None = None  # pairs file to write: y- by rule
    # LLaVA-Instruct file on pictures of the embedded world; `toy`: its alignment split
    data: str = "toy"
    seed: int = 0  # where the errors are and what they are follows from it
    limit: int | None = None  # so many records (--export: 500, --corrupted: 2000)
    pretrain: str | None = None  # folder for the toy checkpoint: tower, prior, then both joined


def export(config: Config) -> None:
    """Pictures, and their records in LLaVA-Instruct form."""
    folder, limit = Path(config.export), 500 if config.limit is None else config.limit
    kinds = tuple(config.kinds.split(","))
    records = alignment_records(limit, config.split, config.first, kinds, config.hearsay)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_written_whole(folder) as new:
        for record in records:
            picture(scene_of(record["image"]), config.scale).save(new / record["image"])
        write_json(new / "data.json", records)
    print(f"{folder}: {len(records)} pictures and data.json")


def corrupt(config: Config) -> None:
    """A pairs file of which the rejected responses are spoilt by rule."""
    limit = TOY_RECORDS if config.limit is None else config.limit
    records = edge.records_of(config.data, None, limit, config.seed, skip_bad=False)
    edge.write_corrupted(Path(config.corrupted), records, config.seed)
    print(f"{config.corrupted}: {len(records)} pairs")


def main(config: Config) -> None:
    """Write what is asked for."""
    nothing = "nothing to do; give --export DIR, --corrupted FILE or --pretrain DIR"
    given = (config.export, config.corrupted, config.pretrain)
    require(any(flag is not None for flag in given), nothing)
    require_at_least(config, limit=1, scale=1, first=0)
    require(0 <= config.hearsay <= 1, f"--hearsay {config.hearsay}: a share between 0 and 1")
    unknown = set(config.kinds.split(",")) - set(KINDS)
    some = f"some of {', '.join(KINDS)}, with commas between"
    require(not unknown, f"--kinds {config.kinds}: give {some}")
    require(config.scale <= 4, f"--scale {config.scale}: at most 4; more is not drawn")
    if config.corrupted is not None:
        require_new_file(config, "corrupted")
        corrupt(config)
    if config.export is not None:
        require_own_folder(config, "toy", "export")
        export(config)
    if config.pretrain is not None:
        require_own_folder(config, "toy", "pretrain")
        from minialign.toy.pretrain import pretrain  # here, as all else needs no model

        pretrain(Path(config.pretrain))


if __name__ == "__main__":
    run_main(main, Config, __doc__)
