"""BDHS and DPO on one picture: a page in eight stations, or one drawing of the whole idea.

python -m minialign.tour --out tour.html
python -m minialign.tour --out idea.svg                    # a name in .svg gives the drawing

Everything on it is measured by this run, on the embedded world and its model, the short DPO run
included, whose pairs are of other pictures. Differs from a real run in size alone: fewer pairs,
fewer steps.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minialign import edge
from minialign.claims import require_new_file
from minialign.cli import require, require_at_least, require_seed, run_main
from minialign.errors import UserError
from minialign.files import read_json, write_whole
from minialign.model.lora import adapters_off
from minialign.model.masks import Branch, TokenTree, build_tree, mask_of_seed
from minialign.sampling.assistant import Assistant
from minialign.sampling.bdhs import join, split_sentences
from minialign.sampling.generate import Sampling, generate
from minialign.sampling.similarity import lexical_cosine
from minialign.seeds import stable_seed
from minialign.tour import facts
from minialign.tour.facts import Round, Subject, Tour
from minialign.tour.idea import idea
from minialign.tour.stations import write_stations
from minialign.toy.drawing import SETTINGS
from minialign.toy.world import yes_or_no

SCRIPTS = Path(__file__).resolve().parents[2]
THRESHOLDS = (0.3, 0.7, 0.99)  # of Eq. 6; the toy's is the second, the paper's the third
SENTENCES = 3  # of y+ that the tree is drawn of


@dataclass(frozen=True)
class Config:
    """Flags of `python -m minialign.tour`."""

    out: str = "tour.html"  # page to write, or drawing (.svg)
    scene: int = 78  # number of the picture, of the validation split; this one shows DPO well
    pairs: int = 320  # pictures of which DPO gets pairs
    steps: int = 40  # steps of the short DPO run
    seed: int = 0  # everything that is drawn follows from it


def algorithm_1(assistant: Assistant, subject: Subject, config, limit: int = 0) -> list[Round]:
    """sample_bdhs.py::sample for one example, iteration by iteration; at most `limit` of them.

    config: a `Config` of that script.
    """
    import sample_bdhs  # here, as it stands beside the package (`main`)

    tokenizer, chosen = assistant.tokenizer, subject.record.chosen
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    rounds = []
    for iteration in range(1, config.n_bdhs + 1):
        guided = iteration < config.n_bdhs
        seed = sample_bdhs.draw_seed(config.seed, subject.record, iteration)
        visible = mask_of_seed(len(subject.image.packing), config.rho_th, seed)
        cuts, sequence = sample_bdhs.completion_tree(assistant, subject, visible, guided, seed)
        stops = tokenizer.sentence_ends if guided else {tokenizer.eos_id}
        seeds = [[stable_seed(seed, k) for k in range(len(cuts))]]
        completions = generate(
            assistant.model,
            [sequence],
            subject.features,
            sampling,
            stops,
            seeds,
            tokenizer.pad_id,
        )[0]
        response = join(cuts, [completion.ids for completion in completions], tokenizer.decode)
        texts = [
            join([cut], [completion.ids], tokenizer.decode)[len(cut.kept) :].strip()
            for cut, completion in zip(cuts, completions, strict=True)
        ]
        similarity = lexical_cosine(response, chosen)
        stopped = all(completion.stopped for completion in completions)
        again = similarity >= config.eps_s or not stopped or not response

        starts = [start for start, _ in split_sentences(chosen)] if guided else [0]
        swapped = [
            not chosen.startswith(cut.kept, start) for cut, start in zip(cuts, starts, strict=True)
        ]
        probabilities = facts.next_probabilities(assistant, subject, sequence)
        likely = facts.likely_words(assistant, probabilities)
        rounds.append(
            Round(
                seed,
                guided,
                visible,
                cuts,
                swapped,
                sequence,
                completions,
                texts,
                likely,
                response,
                similarity,
                again,
            )
        )
        if not again or iteration == limit:
            break
    return rounds


def yes_no_rounds(assistant: Assistant, subject: Subject, config) -> tuple[Subject, list[Round]]:
    """Algorithm 1 on a question for Yes or No, with the first seed by which something is swapped
    and something sampled again, so that all its lines are seen.
    """
    scene = subject.scene
    name = next((o for o in SETTINGS[scene.setting] if o not in scene.objects), "kettle")
    record = replace(
        subject.record,
        turns=[("user", f"Is there a {name}?")],
        chosen=yes_or_no(name, name in scene.objects),
    )
    asked, rounds = replace(subject, record=record), []
    for seed in range(50):
        rounds = algorithm_1(assistant, asked, replace(config, seed=seed))
        swapped = any(swap for each in rounds for swap in each.swapped)
        if swapped and len(rounds) > 1:
            break
    return asked, rounds


def drawn_tree(assistant: Assistant, subject: Subject, config) -> tuple[TokenTree, list[str]]:
    """The tree of one BDHS call on the first sentences of y+, with what was sampled in place and
    hidden columns kept, and the labels of its columns.
    """
    text = subject.record.chosen
    end = split_sentences(text)[:SENTENCES][-1][1]
    short = replace(subject, record=replace(subject.record, chosen=text[:end]))
    done = algorithm_1(assistant, short, config, limit=1)[0]
    branches = [
        Branch(branch.ids + completion.ids, branch.fork)
        for branch, completion in zip(done.sequence.branches, done.completions, strict=True)
    ]
    sequence = replace(done.sequence, branches=branches)
    tokenizer = assistant.tokenizer
    tree = build_tree([sequence], tokenizer.image_id, tokenizer.pad_id, drop_hidden=False)
    labels = facts.token_words(assistant, tree.ids[0].tolist())
    first = next(i for i, feature in enumerate(tree.feature[0]) if feature >= 0)
    for column, feature in enumerate(tree.feature[0].tolist()):
        if feature >= 0:
            labels[column] = f"patch {column - first + 1}"
    return tree, labels


def train(config: Config, out: Path) -> None:
    """A short run of train_dpo.py on BDHS pairs of its own."""
    flags = ["--limit", config.pairs, "--steps", config.steps, "--seed", config.seed]
    command = ["train_dpo.py", *map(str, flags), "--eval-images", "0", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=SCRIPTS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in `main`
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {done.returncode}; see above")


def measure(config: Config, run: Path) -> Tour:
    """All that the page shows; `run` is the folder that `train` has written."""
    import sample_bdhs

    sampling = sample_bdhs.Config(seed=config.seed)
    sampling = edge.with_defaults(sampling, sample_bdhs.DEFAULTS)
    base = Assistant.from_folder(edge.CHECKPOINT)
    trained = Assistant.from_folder(edge.CHECKPOINT, adapter=str(run / "adapter"))
    subject = facts.subject_of(base, config.scene)

    # One draw of rho_i, three thresholds: what one hides, the next does too.
    masked = []
    for rho_th in THRESHOLDS:
        visible = mask_of_seed(len(subject.image.packing), rho_th, config.seed)
        masked.append((rho_th, visible, facts.answer(base, subject, visible)))

    rounds = algorithm_1(base, subject, sampling)
    asked, asked_rounds = yes_no_rounds(base, subject, sampling)
    tree, labels = drawn_tree(base, subject, sampling)
    texts = (subject.record.chosen, rounds[-1].response)
    pair = [base.tokenizer.response(text) for text in texts]
    with adapters_off(trained.model):
        ref_logps = facts.pair_logps(trained, subject, pair)
    return Tour(
        subject=subject,
        answer=facts.answer(base, subject),
        masked=masked,
        tree=tree,
        labels=labels,
        chosen_at=len(base.tokenizer.prompt(subject.record.turns)) - 1 + len(subject.image.packing),
        rounds=rounds,
        eps_s=sampling.eps_s,
        yes_no=asked,
        yes_no_rounds=asked_rounds,
        beta=read_json(run / "config.json", "run again")["beta"],
        training=f"{config.steps} steps on BDHS pairs of {config.pairs} other pictures",
        logps=facts.pair_logps(trained, subject, pair),
        ref_logps=ref_logps,
        words=[facts.token_words(base, ids) for ids in pair],
        answer_after=facts.answer(trained, subject),
        moved=facts.moved_words(base, trained, subject),
        differences=facts.differences(base, trained, subject, rounds[0], pair),
    )


def main(config: Config) -> None:
    """Train, measure, draw."""
    require_new_file(config)
    require_at_least(config, scene=0, pairs=1, steps=1)
    even = config.scene % 2 == 0 and config.scene < 10**9
    require(even, f"--scene {config.scene}: an even number below 10^9; others ask for Yes or No")
    require_seed(config.seed)
    there = (SCRIPTS / "train_dpo.py").is_file()
    require(there, f"{SCRIPTS}: no train_dpo.py; start the tour in a checkout of minialign")
    torch.set_num_threads(1)  # the model is tiny: on a busy machine a second thread costs minutes
    sys.path.append(str(SCRIPTS))  # for sample_bdhs, wherever this was started

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(config, run)
        tour = measure(config, run)

    out = Path(config.out)
    if out.suffix == ".svg":
        write_whole(out, idea(tour))
    else:
        write_stations(out, tour, config)
    print(f"{out}: {tour.training}, picture {tour.subject.record.image}")


if __name__ == "__main__":
    run_main(main, Config, __doc__)
