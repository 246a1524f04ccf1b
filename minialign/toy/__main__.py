"""The embedded world as files, and its checkpoint made anew."""

import json
from dataclasses import dataclass
from pathlib import Path

from minialign.cli import require, run_main
from minialign.files import write_whole
from minialign.toy.world import alignment_records, picture, scene_of


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.toy`."""

    pretrain: bool = False  # make the toy checkpoint: tower, prior, then both joined
    out: str | None = None  # folder that --pretrain writes
    export: str | None = None  # folder for pictures and data.json
    limit: int = 500  # how many records --export writes
    first: int = 0  # number of the first one; training has those up to 1,999


def main(config: Config) -> None:
    """Make the checkpoint, or write files."""
    require(
        config.pretrain or config.export is not None,
        "nothing to do; give --pretrain or --export DIR",
    )
    require(
        config.out is not None or not config.pretrain,
        "--out is missing; name the folder that --pretrain writes",
    )
    require(config.limit >= 1, f"--limit {config.limit}: at least 1")
    require(0 <= config.first < 10**8, f"--first {config.first}: between 0 and a hundred million")
    if config.pretrain:
        from minialign.toy.pretrain import pretrain

        pretrain(Path(config.out))
    if config.export:
        folder, records = Path(config.export), alignment_records(config.limit, first=config.first)
        folder.mkdir(parents=True, exist_ok=True)
        for record in records:
            picture(scene_of(record["image"])).save(folder / record["image"])
        write_whole(folder / "data.json", json.dumps(records, indent=1) + "\n")
        print(f"{folder}: {len(records)} pictures and data.json")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
