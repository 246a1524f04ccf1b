"""Sample rejected responses by Bias-Driven Hallucination Sampling: Algorithm 1 over a data set.

    python sample_bdhs.py                       # the embedded world, its own checkpoint
    python sample_bdhs.py --model DIR --data FILE --images DIR --encoder DIR --out pairs.jsonl

Reads records of any format in minialign/records.py, writes a pairs file: JSON Lines of id, images,
prompt, chosen (the record's answer, or its chosen one), rejected (sampled), external (the record's
own rejected one, if it has one) and bdhs (iterations, similarity, mask_seed, guided, truncated,
rho_th, noise_steps). A killed run continues where it stopped: whole batches are appended, and what
is there is not sampled again. An example's pair depends on --seed and its id alone, not on the
batch size or --limit; repeated ids are numbered. Where a record has earlier turns, prompt, chosen
and rejected are lists of messages in the whole file.

Differs from the paper: see minialign/bdhs.py. Without --encoder the similarity is lexical, not
MPNet's."""

from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from minialign import parallel
from minialign.bdhs import Bdhs, BdhsConfig, Example, Sampled
from minialign.chat import Tokenizer, announce
from minialign.checkpoint import empty_model, fingerprint, load_weights, resolve_model
from minialign.cli import (
    fill,
    is_out_of_memory,
    require,
    require_at_least,
    require_device,
    require_images,
    require_temperature,
    run_main,
)
from minialign.data import collect, read_records, sift
from minialign.errors import UserError
from minialign.files import append_lines, read_lines, size_of, write_json
from minialign.flags import require_torchrun
from minialign.generate import Sampling
from minialign.images import ImageProcessor, open_image
from minialign.loader import load_ahead
from minialign.records import BDHS_FIELDS, FormatName, Record, pair_record, preference_fields
from minialign.resume import require_same_settings
from minialign.similarity import load_similarity

# What stands for a flag that is not given: the paper's value, or the toy model's, chosen on
# validation.
PAPER = {"rho_th": 0.99, "workers": 4}
TOY = {"rho_th": 0.7, "workers": 0}
MAY_CHANGE = (
    "out",
    "limit",
    "batch_size",
    "skip_bad_records",
    "workers",
    "shard",
    "device",
)  # when a run is continued


@dataclass(frozen=True)
class Config:
    """Flags."""

    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    data: str = "toy"  # data file (LLaVA-Instruct, POVID, ...), or `toy` for the embedded world's alignment split
    format: FormatName | None = None  # of the data file; else that of its first record
    images: str = "toy"  # folder of the pictures, or `toy`
    template: str | None = None  # vicuna, llava_v1, mistral, chatml or short; else the model's own
    out: str = "runs/bdhs/pairs.jsonl"  # pairs file to write, or to continue
    # Eq. 6: an image token is hidden with this probability (0.99; toy: 0.7)
    rho_th: float | None = None
    n_bdhs: int = 5  # iterations at most; the last one is unguided
    eps_s: float = 0.97  # a response this similar to y+ or more is sampled again
    noise_steps: int = 0  # BDHS_noise: diffusion steps of Eq. 9 (500 in the paper, with --rho-th 0)
    guided: bool = True  # complete y+'s sentences (Eq. 7); --no-guided samples whole responses
    # sentence-transformers folder (all-mpnet-base-v2); without it a lexical cosine
    encoder: str | None = None
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus sampling
    max_new_tokens: int = 128  # limit of one completion
    batch_size: int = 32  # examples sampled together
    seed: int = 0  # masks, cuts, swaps and tokens follow from it
    # a random subset of so many records, which follows from --seed (toy: the first 2000)
    limit: int | None = None
    device: str = "cpu"  # torch device
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    # under torchrun: a whole model per process, or FSDP2's shards of one
    shard: Literal["none", "full"] = "none"
    workers: int | None = None  # threads that decode pictures ahead (4; toy: 0)
    skip_bad_records: bool = False  # skip and count malformed records instead of stopping


def check_sampling(config) -> None:
    """Refuse values of the flags of Algorithm 1 and of sampling that make no sense."""
    require(0 <= config.rho_th <= 1, f"--rho-th {config.rho_th}: a probability between 0 and 1")
    require(config.n_bdhs >= 1, f"--n-bdhs {config.n_bdhs}: at least 1")
    require(0 <= config.eps_s <= 1, f"--eps-s {config.eps_s}: a similarity between 0 and 1")
    require(
        0 <= config.noise_steps <= 1000, f"--noise-steps {config.noise_steps}: between 0 and 1000"
    )
    require_temperature(config.temperature)
    require(0 < config.top_p <= 1, f"--top-p {config.top_p}: above 0, at most 1")
    require(config.max_new_tokens >= 1, f"--max-new-tokens {config.max_new_tokens}: at least 1")


def check(config: Config) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    check_sampling(config)
    require_at_least(config, batch_size=1, limit=1, workers=0)
    require(
        not Path(config.out).is_dir(),
        f"--out {config.out}: is a folder; name the pairs file to write",
    )
    require_images(config.images)
    same = Path(config.out).resolve() == Path(config.data).resolve()
    require(
        not same, f"--out {config.out}: is --data too, and would be overwritten; name another file"
    )
    require_device(config.device)
    require_torchrun(config.shard)


def beside(out: Path, what: str) -> Path:
    """The file beside the pairs file that holds its settings or its statistics."""
    return out.with_name(f"{out.name}.{what}.json")


def pairs_of_earlier_run(out: Path, settings: dict) -> list[dict]:
    """What an earlier run of the same settings left in the pairs file; any other file is left
    alone."""
    if not out.exists() or out.stat().st_size == 0:
        return []
    remedy = "name another --out"
    require_same_settings(beside(out, "config"), settings, MAY_CHANGE, remedy)
    pairs = read_lines(out, remedy)
    collect(
        ((f"{out}, line {number}", pair) for number, pair in enumerate(pairs, start=1)),
        sampled_pair,
        None,
        False,
    )
    return pairs


def sampled_pair(pair: dict) -> Record:
    """A line that this script wrote: a pair, and all that is noted of its sampling."""
    record = pair_record(pair)
    missing = [name for name in BDHS_FIELDS if name not in record.bdhs]
    if missing:
        raise UserError(f"field 'bdhs.{missing[0]}' is missing")
    return record


def with_pictures(
    records: list[Record], config: Config, bdhs: Bdhs
) -> tuple[list[tuple[Record, Example]], list[str]]:
    """The records with their pictures; and what is wrong with those left out, if --skip-bad-records
    is given."""

    def opened(record: Record) -> tuple[Record, Example]:
        example = Example(
            record.id, open_image(config.images, record.image), record.turns, record.chosen
        )
        bdhs.require_room(example)
        return record, example

    placed = ((record.place or f"record {record.id}", record) for record in records)
    examples, refused = sift(placed, opened, config.skip_bad_records)
    return examples, [f"{place}: {error}" for place, error in refused]


def pair_line(record: Record, sampled: Sampled, config: Config, messages: bool) -> dict:
    """One line of the pairs file; TRL reads it as it is."""
    bdhs = asdict(sampled) | {"rho_th": config.rho_th, "noise_steps": config.noise_steps}
    answers = {"chosen": record.chosen, "rejected": bdhs.pop("rejected")}
    if record.rejected:
        answers["external"] = record.rejected  # for Eq. 5
    fields = preference_fields(record.turns, answers, messages)
    return {"id": record.id, "images": [record.image], **fields, "bdhs": bdhs}


def require_same_records(out: Path, pairs: list[dict], records: list[Record]) -> None:
    """Refuse to continue a pairs file that was sampled from other data under the same ids."""
    by_id = {record.id: record for record in records}
    for number, pair in enumerate(pairs, start=1):
        kept, record = pair_record(pair), by_id.get(pair["id"])
        found, wanted = (kept.image, kept.turns, kept.chosen, kept.external), record
        same = (
            wanted is None or (wanted.image, wanted.turns, wanted.chosen, wanted.rejected) == found
        )
        require(
            same,
            f"{out}, line {number}: {pair['id']!r} is another record in --data; name another --out",
        )


def resolved_curve(pairs: list[dict], n_bdhs: int, eps_s: float) -> list[float]:
    """Fig. 10: the share of the pairs that are whole and differ from y+ (below eps_s) after 1, 2,
    ... iterations."""
    found = [pair["bdhs"] for pair in pairs]
    # Whatever is sampled last is kept, different and whole or not.
    whole = (
        b
        for b in found
        if b["iterations"] < n_bdhs or b["similarity"] < eps_s and not b["truncated"]
    )
    needed = Counter(b["iterations"] for b in whole)
    return [
        round(sum(needed[i] for i in range(1, n + 1)) / max(1, len(pairs)), 4)
        for n in range(1, n_bdhs + 1)
    ]


def main(config: Config) -> None:
    """Sample every record that the pairs file does not hold yet."""
    config = fill(config, TOY if config.model == "toy" else PAPER)
    check(config)
    parallel.start(config.device)
    folder = resolve_model(config.model)
    records = read_records(
        config.data, config.format, config.limit, config.seed, config.skip_bad_records
    )
    messages = any(len(record.turns) > 1 for record in records)
    out, settings = Path(config.out), asdict(config) | {"weights": fingerprint(folder)}
    pairs = pairs_of_earlier_run(out, settings)
    bare = bool(pairs) and isinstance(pairs[0]["prompt"], str)
    said = "its prompts are texts, and some records have several turns, which need messages"
    require(not (bare and messages), f"--out {out}: {said}; name another --out")
    messages = messages or bool(pairs) and not bare
    known, size = {pair["id"] for pair in pairs}, size_of(out)
    require_same_records(out, pairs, records)
    todo = [record for record in records if record.id not in known]
    if known:
        print(f"{out}: {len(known)} pairs are there, {len(todo)} to go")

    model = empty_model(folder, getattr(torch, config.dtype))
    if config.shard == "full":
        from torch.distributed.fsdp import fully_shard  # here, as it takes a second

        mesh = parallel.mesh(config.device)
        for unit in (*model.language_model.layers, model.vision_tower, model):
            fully_shard(unit, mesh=mesh)
        parallel.after_sharding(model)
    load_weights(model, folder, config.device)  # each process reads its rows
    tokenizer = Tokenizer.from_folder(folder, config.template)
    knobs = {f.name: getattr(config, f.name) for f in fields(BdhsConfig) if f.name != "sampling"}
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    announce(folder, model, tokenizer)
    similarity = load_similarity(config.encoder, config.device)
    processor = ImageProcessor.from_folder(folder)
    bdhs = Bdhs(model, tokenizer, processor, similarity, BdhsConfig(**knobs, sampling=sampling))
    parallel.on_rank0(lambda: write_json(beside(out, "config"), settings))
    left_out, unreadable = 0, []  # an empty response is no pair; and what is wrong with pictures
    parts = [
        todo[first : first + config.batch_size] for first in range(0, len(todo), config.batch_size)
    ]
    mine = parallel.even(parallel.shard_batch(parts), [])
    ahead = load_ahead(mine, lambda part: with_pictures(part, config, bdhs), config.workers)
    with (
        closing(ahead),
        tqdm(total=len(todo), desc="bdhs", unit="pair", disable=parallel.rank() > 0) as bar,
    ):
        for batch, bad in ahead:
            with parallel.unsharded(model):
                sampled = bdhs.sample([example for _, example in batch]) if batch else []
            both = zip((record for record, _ in batch), sampled, strict=True)
            own = [pair_line(r, s, config, messages) for r, s in both if s.rejected]
            for new, seen, others_bad in parallel.gather(
                (own, len(batch) + len(bad), bad)
            ):  # in the data's order
                if parallel.rank() == 0:
                    size = append_lines(out, new, size)
                pairs += new
                unreadable += others_bad
                left_out += seen - len(new)
                bar.update(seen)
    if unreadable and parallel.rank() == 0:
        tqdm.write(f"{len(unreadable)} pictures left out, the first: {unreadable[0]}")

    require(
        bool(pairs) or not unreadable,
        f"none of {len(todo)} pictures could be read: {''.join(unreadable[:1])}",
    )
    curve = resolved_curve(pairs, config.n_bdhs, config.eps_s)
    same = sum(pair["chosen"] == pair["rejected"] for pair in pairs)
    truncated = sum(pair["bdhs"]["truncated"] for pair in pairs)
    stats = {
        "pairs": len(pairs),
        "resolved": curve,
        "identical": same,
        "truncated": truncated,
        "left_out": left_out,
    }
    parallel.on_rank0(lambda: write_json(beside(out, "stats"), stats))
    shown = ", ".join(f"{share:.1%} after {i}" for i, share in enumerate(curve, start=1))
    print(
        f"{out}: {len(pairs)} pairs, {left_out} left out; different from y+ (Fig. 10): {shown}; identical: {same}; "
        f"truncated: {truncated}"
    )


def sample_for(config, out: Path) -> Path:
    """BDHS pairs of the embedded world in `out`, from the model that is about to be trained with a
    script's flags."""
    pairs = out / "pairs.jsonl"
    shared = ("model", "template", "seed", "device", "dtype", "limit", "shard")
    try:
        main(Config(**{name: getattr(config, name) for name in shared}, out=str(pairs)))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = f"run `sample_bdhs.py --batch-size 8 --out {pairs}` first, then this with --pairs {pairs}"
        raise UserError(f"out of memory while pairs were sampled; {said}") from error
    return pairs


if __name__ == "__main__":
    run_main(main, Config, __doc__)
