"""Sample rejected responses by Bias-Driven Hallucination Sampling: Algorithm 1 over a data set.

    python sample_bdhs.py                       # the embedded world, its own checkpoint
    python sample_bdhs.py --model DIR --data FILE --images DIR --encoder DIR --out pairs.jsonl

The policy completes the chosen response y+ while most of the image is hidden from it (Eq. 6) or
drowned in noise (Eq. 9). What it then says is what its language prior says: a plausible
hallucination, and a rejected response that nobody had to write.

Reads records of any format in minialign/data/records.py and writes a pairs file
(minialign/sampling/pairs_file.py). A killed run continues where it stopped: whole batches are
appended, and what is there is not sampled again. An example's pair depends on --seed and its id
alone, not on the batch size or --limit; repeated ids are numbered.

The README lists where this departs from the paper, or chooses what the paper leaves open.
"""

import random
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

from minialign import edge
from minialign.claims import claim_file, require_place
from minialign.cli import (
    is_out_of_memory,
    require,
    require_at_least,
    require_device,
    require_temperature,
    require_torchrun,
    run_main,
)
from minialign.data.images import ImageProcessor, PreparedImage
from minialign.data.prefetch import load_ahead
from minialign.data.record_files import sift
from minialign.data.records import FormatName, Record, pair_record, sharegpt_fields
from minialign.data.templates import asked_form
from minialign.data.tokenizer import Tokenizer
from minialign.errors import UserError
from minialign.fields import shortened
from minialign.files import append_lines, read_lines, write_json
from minialign.model.hf_folder import empty_model, fingerprint, load_weights
from minialign.model.masks import Branch, Sequence, mask_of_seed
from minialign.sampling.assistant import Assistant
from minialign.sampling.bdhs import (
    WHOLE_RESPONSE,
    Cut,
    can_be_cut,
    cut_sentence,
    join,
    split_sentences,
)
from minialign.sampling.generate import Sampling, generate
from minialign.sampling.noise import noise_of_seed
from minialign.sampling.pairs_file import (
    Sampled,
    beside,
    pair_line,
    require_same_records,
    require_same_sampling,
    statistics,
)
from minialign.sampling.similarity import WITHOUT_ENCODER, Similarity, load_similarity
from minialign.seeds import stable_seed
from minialign.training import parallel
from minialign.training.progress import claim_run

# What stands for a flag that is not given: the paper's value, and the toy model's, which was chosen
# on validation images.
DEFAULTS = {
    "rho_th": (0.99, 0.7),
    "workers": (4, 0),
}


@dataclass(frozen=True)
class Config:
    """Flags."""

    model: str = "toy"  # Hugging Face LLaVA folder, or `toy`
    # data file (LLaVA-Instruct, POVID, ...), or `toy` for the embedded world's alignment split
    data: str = "toy"
    format: FormatName | None = None  # of the data file; else that of its first record
    images: str = "toy"  # folder of the pictures, or `toy`
    # form of conversation: vicuna_v1, llava_v1, mistral, chatml, short, a file; else the model's
    template: str | None = None
    out: str = "runs/bdhs/pairs.jsonl"  # pairs file to write, or to continue
    rho_th: float | None = None  # Eq. 6: an image token is hidden with this probability
    n_bdhs: int = 5  # iterations at most; the last one is unguided, if it is not the only one
    eps_s: float = 0.97  # a response this similar to y+ or more is sampled again
    # BDHS_noise: diffusion steps of Eq. 9 (500 in the paper), instead of the mask
    noise_steps: int = 0
    guided: bool = True  # complete y+'s sentences (Eq. 7); --no-guided samples whole responses
    # sentence-transformers folder (all-mpnet-base-v2); without it a lexical cosine
    encoder: str | None = None
    # Silent in the paper: the decoding temperature.
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
    workers: int | None = None  # threads that decode pictures ahead
    sharegpt: bool = False  # also write OUT.sharegpt.json, the pairs in LLaMA-Factory's form
    skip_bad_records: bool = False  # skip and count malformed records instead of stopping


@dataclass(frozen=True)
class Example:
    """A record to sample for, with its picture."""

    record: Record
    picture: Image.Image
    image: PreparedImage


def draw_seed(seed: int, record: Record, iteration: int, step: int | None = None) -> int:
    """The seed of an iteration's draws for a record: mask, noise, swaps, cuts and tokens. It is
    stored with the pair, so that they can be drawn again. In training every `step` has its own."""
    parts = [seed, record.id, iteration]
    if step is not None:
        parts.append(step)
    return stable_seed(*parts) % 2**31


def completion_tree(
    assistant: Assistant, example: Example, visible: torch.Tensor, guided: bool, seed: int
) -> tuple[list[Cut], Sequence]:
    """Eq. 7, Alg. 1 l. 9-14: y+ cut in every sentence, and the tree in which each is completed.

    The trunk is image, prompt and y+; a branch forks from it at each cut and begins with what a
    swap has put there. Unguided, or where y+ is a single word, of which nothing could be kept,
    there is one branch behind the prompt. visible: Eq. 6's mask.
    """
    record, tokenizer = example.record, assistant.tokenizer
    prompt = tokenizer.prompt(record.turns, image_turn=record.image_turn)
    if guided and can_be_cut(record.chosen):
        rng, chosen_ids = random.Random(seed), tokenizer.answer(record.chosen)
        # In every sentence: Yes and No swapped one time in two, then a cut at a random word.
        cuts = [
            cut_sentence(record.chosen, span, chosen_ids, tokenizer.answer, rng)
            for span in split_sentences(record.chosen)
        ]
    else:
        chosen_ids, cuts = [], [WHOLE_RESPONSE]

    # `kept_ids` are y+'s up to the cut; the first `shared` of them stand in the trunk, the others,
    # of a swapped word or of a token that the cut has split, begin the branch.
    branches = [Branch(cut.kept_ids[cut.shared :], len(prompt) + cut.shared) for cut in cuts]
    # No branch sees what is behind the last fork.
    chosen_ids = chosen_ids[: max(cut.shared for cut in cuts)]
    image, trunk = example.image, prompt + chosen_ids
    return cuts, Sequence(trunk, branches, image.features, visible, image.packing)


def sample(
    assistant: Assistant,
    similarity: Similarity,
    examples: list[Example],
    config,
    features: list[torch.Tensor] | None = None,
    step: int | None = None,
) -> list[Sampled]:
    """Algorithm 1 for a batch of examples: a rejected response for each.

    config has this script's flags of the same names. features (tiles, patches, D): of every
    picture, where the tower has seen them already; of noisy ones they serve nothing. step: see
    `draw_seed`.
    """
    tokenizer, processor = assistant.tokenizer, assistant.processor
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    if features is None and not config.noise_steps:
        tiles = [len(example.image.pixels) for example in examples]
        features = assistant.encode([example.image for example in examples]).split(tiles)
    results: list[Sampled | None] = [None] * len(examples)
    pending = list(range(len(examples)))  # those without a response that is different enough

    for iteration in range(1, config.n_bdhs + 1):
        # l. 5-7: the last iteration is unguided, a whole response. Where there is but one
        # iteration, it is guided.
        last = iteration == config.n_bdhs and config.n_bdhs > 1
        guided = config.guided and not last
        seeds = [draw_seed(config.seed, examples[i].record, iteration, step) for i in pending]

        # Eq. 9 (BDHS_noise): noisy pixels, which the tower has to see anew.
        if config.noise_steps:
            noisy_images = [
                processor.prepare(noise_of_seed(examples[i].picture, config.noise_steps, seed))
                for i, seed in zip(pending, seeds, strict=True)
            ]
            tower_features = assistant.encode(noisy_images)
        else:
            tower_features = torch.cat([features[i] for i in pending])

        all_cuts, sequences, token_seeds = [], [], []
        for i, seed in zip(pending, seeds, strict=True):
            # Eq. 6 (BDHS_attn): an image token is hidden with probability rho_th. Nobody attends
            # to it, so that it is left out of the sequence; the others keep their positions.
            visible = mask_of_seed(len(examples[i].image.packing), config.rho_th, seed)
            cuts, sequence = completion_tree(assistant, examples[i], visible, guided, seed)
            all_cuts.append(cuts)
            sequences.append(sequence)
            token_seeds.append([stable_seed(seed, k) for k in range(len(cuts))])

        # l. 15: all sentences of all examples are completed at once, from one prefill.
        stops = tokenizer.sentence_ends if guided else {tokenizer.eos_id}
        completions = generate(
            assistant.model,
            sequences,
            tower_features,
            sampling,
            stops,
            token_seeds,
            tokenizer.pad_id,
        )

        # l. 16: what was kept and what was completed, joined.
        responses = [
            join(cuts, [completion.ids for completion in row], tokenizer.decode)
            for cuts, row in zip(all_cuts, completions, strict=True)
        ]

        # l. 17-19: what is too similar to y+ is sampled again, with another mask and other cuts.
        # Of the last iteration's responses phi is only noted, for Fig. 10.
        phis = similarity(responses, [examples[i].record.chosen for i in pending])
        again = []
        for n, i in enumerate(pending):
            truncated = not all(completion.stopped for completion in completions[n])
            results[i] = Sampled(
                rejected=responses[n],
                iterations=iteration,
                similarity=round(phis[n], 4),
                mask_seed=seeds[n],
                guided=all_cuts[n][0] is not WHOLE_RESPONSE,
                truncated=truncated,
            )
            # Differs from the paper: what is empty or was cut off is sampled again, too; in the
            # last iteration it is kept as it is.
            if phis[n] >= config.eps_s or truncated or not responses[n]:
                again.append(i)
        pending = again
        if not pending:
            break
    return results


def check_sampling(config) -> None:
    """Refuse values of the flags of Algorithm 1 and of sampling that make no sense."""
    require(0 <= config.rho_th <= 1, f"--rho-th {config.rho_th}: a probability between 0 and 1")
    require(config.n_bdhs >= 1, f"--n-bdhs {config.n_bdhs}: at least 1")
    require(0 <= config.eps_s <= 1, f"--eps-s {config.eps_s}: a similarity between 0 and 1")
    steps = config.noise_steps
    require(0 <= steps <= 1000, f"--noise-steps {steps}: between 0 and 1000")
    require_temperature(config.temperature)
    require(0 < config.top_p <= 1, f"--top-p {config.top_p}: above 0, at most 1")
    require(config.max_new_tokens >= 1, f"--max-new-tokens {config.max_new_tokens}: at least 1")


def check(config: Config) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    check_sampling(config)
    require_at_least(config, batch_size=1, limit=1, workers=0)
    require_place(config)
    out = Path(config.out)
    require(not out.is_dir(), f"--out {out}: is a folder; name the pairs file to write")
    require(out.is_file() or not out.exists(), f"--out {out}: is no ordinary file; name another")
    require_device(config.device)
    require_torchrun(config.shard)


def main(config: Config) -> None:
    """Sample every record that the pairs file does not hold yet."""
    if config.noise_steps and config.rho_th is None:
        config = replace(config, rho_th=0.0)  # noise instead of the mask
    config = edge.with_defaults(config, DEFAULTS)
    pictures = edge.picture_source(config.images)
    check(config)
    parallel.start(config.device)
    folder, out = edge.model_folder(config.model), Path(config.out)
    records = edge.records_of(
        config.data, config.format, config.limit, config.seed, config.skip_bad_records
    )

    # What an earlier run has left is not sampled again, and nobody else writes there meanwhile.
    settings = asdict(config) | {"weights": fingerprint(folder)}
    settings["template"] = asked_form(config.template)
    require_same_sampling(out, settings)
    parallel.on_rank0(lambda: claim_file(out))
    require_same_sampling(out, settings)  # another may have ended in between
    pairs = read_lines(out, "name another --out")
    require_same_records(out, pairs, records)
    known = {pair["id"] for pair in pairs}
    todo = [record for record in records if record.id not in known]
    if known:
        print(f"{out}: {len(known)} pairs are there, {len(todo)} to go")

    # The model, on the meta device at first: names, shapes and types, no memory yet.
    model = empty_model(folder, getattr(torch, config.dtype))
    assistant = Assistant(
        model, Tokenizer.from_folder(folder, config.template), ImageProcessor.from_folder(folder)
    )

    # FSDP2: a process keeps its rows of every tensor.
    if config.shard == "full":
        from torch.distributed.fsdp import fully_shard  # here, as it takes a second

        mesh = parallel.mesh(config.device)
        for unit in (*model.language_model.layers, model.vision_tower, model):
            fully_shard(unit, mesh=mesh)
        parallel.after_sharding(model)

    load_weights(model, folder, config.device)  # each process reads its rows
    assistant.announce(folder)
    similarity = load_similarity(config.encoder, config.device)
    if config.encoder is None and config.model != "toy":
        print(WITHOUT_ENCODER)

    def load(record: Record) -> Example:
        """A record with its picture; refused where these leave no position for a completion."""
        picture = pictures(record.image)
        image = assistant.processor.prepare(picture)
        needed = len(assistant.tokenizer.answer(record.chosen)) + 1
        assistant.require_positions(record.turns, image, needed, record.image_turn)
        return Example(record, picture, image)

    def load_batch(batch: list[Record]) -> tuple[list[Example], list[str]]:
        """The examples of a batch, and what is wrong with records that are left out."""
        places = ((record.place or f"record {record.id}", record) for record in batch)
        examples, refused = sift(places, load, config.skip_bad_records)
        return examples, [f"{place}: {error}" for place, error in refused]

    # Each process samples every n-th batch; rank 0 appends what all have sampled, in order.
    batches = [todo[i : i + config.batch_size] for i in range(0, len(todo), config.batch_size)]
    mine = parallel.even(parallel.shard_batch(batches), [])
    left_out, unreadable = 0, []
    bar = tqdm(total=len(todo), desc="bdhs", unit="pair", disable=parallel.rank() > 0)
    with closing(load_ahead(mine, load_batch, config.workers)) as loaded, bar:
        for examples, refused in loaded:
            with parallel.unsharded(model):
                sampled = sample(assistant, similarity, examples, config) if examples else []
            lines = [
                pair_line(example.record, result, config)
                for example, result in zip(examples, sampled, strict=True)
                if result.rejected  # an empty response is no pair
            ]
            seen = len(examples) + len(refused)
            for new, count, bad in parallel.gather((lines, seen, refused)):
                if new and parallel.rank() == 0:
                    if not pairs:  # settings are pinned with the first pair
                        write_json(beside(out, "config"), settings)
                    append_lines(out, new)
                pairs += new
                left_out += count - len(new)
                unreadable += bad
                bar.update(count)

    if unreadable and parallel.rank() == 0:
        tqdm.write(f"{len(unreadable)} records left out, the first: {unreadable[0]}")
    first = "".join(unreadable[:1])
    none = f"none of {len(todo)} records could be used: {first}"
    require(bool(pairs) or not unreadable, none)
    stats = statistics(pairs, config.n_bdhs, config.eps_s) | {"left_out": left_out}
    parallel.on_rank0(lambda: write_json(beside(out, "stats"), stats))
    if config.sharegpt:
        lines = [sharegpt_fields(pair) for pair in pairs]
        parallel.on_rank0(lambda: write_json(beside(out, "sharegpt"), lines))
    if pairs:
        first = pair_record(pairs[0])
        print(f"y+, chosen:   {shortened(first.chosen)!r}")
        print(f"y-, rejected: {shortened(first.rejected)!r}")
    shares = [f"{share:.1%} after {i}" for i, share in enumerate(stats["resolved"], start=1)]
    print(
        f"{out}: {len(pairs)} pairs, {left_out} left out; accepted (Fig. 10): "
        f"{', '.join(shares)}; identical: {stats['identical']}; cut off: {stats['truncated']}"
    )
    if stats["truncated"] > len(pairs) / 2:
        limit = f"--max-new-tokens {config.max_new_tokens}"
        print(f"most responses were cut off at {limit}: raise it, in another --out")


def sample_for(config, out: Path) -> Path:
    """BDHS pairs of the embedded world in `out`, from the model that is about to be trained with a
    script's flags."""
    claim_run(config)
    pairs = out / "pairs.jsonl"
    own = Config(
        model=config.model,
        template=config.template,
        out=str(pairs),
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        limit=config.limit,
        shard=config.shard,
    )
    try:
        main(own)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        apart = out.with_name(f"{out.name}-pairs.jsonl")
        first = f"run `sample_bdhs.py --batch-size 8 --out {apart}` first"
        flag = "--pairs" if hasattr(config, "pairs") else "--data"
        message = f"out of memory while pairs were sampled; {first}, then this with {flag} {apart}"
        raise UserError(message) from error
    return pairs


if __name__ == "__main__":
    run_main(main, Config, __doc__, DEFAULTS)
