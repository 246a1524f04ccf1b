"""The tour's page: eight stations, each a heading, some sentences, a figure, and the lines of code
that it is made by.
"""

import math
from pathlib import Path

import torch

from minialign.align.losses import dpo_loss, log_ratio_difference
from minialign.evaluation.charts import show
from minialign.evaluation.report import escape, tagged, word_diff, write_page
from minialign.tour.drawing import (
    STYLE,
    WORDS,
    bar,
    image_tag,
    key_of,
    kinds_of,
    matrix_drawing,
    tree_drawing,
    with_false_words,
)
from minialign.tour.facts import Moved, Round, Subject, Tour
from minialign.toy.world import with_article


def station(number: int, title: str, text: str, figure: str, code: str) -> str:
    """One station; `code` names lines of code as FILE::NAME, with spaces between."""
    names = " · ".join(f"<code>{escape(name)}</code>" for name in code.split())
    return f"""<section id="station-{number}"><h2>{number} · {title}</h2>
<p>{text}</p>
<figure>{figure}</figure>
<p class="code">Made by {names}</p></section>
"""


def write_stations(path: Path, tour: Tour, config) -> None:
    """Write the page to `path`; config: the program's flags."""
    settings = {"picture": tour.subject.record.image, "training": tour.training}
    settings |= {"seed": config.seed}
    intro = """BDHS makes a rejected response out of a good one. It hides most of the picture, cuts
every sentence, and lets the model go on: what it then says comes from its habits. DPO teaches the
model to prefer the good response. Here is all of it on one picture. Every number was measured by
the run that made this page. <span class="false">Red words in bold</span> are false: the picture's
exact truth says so. By default the picture is one on which this model errs and DPO helps; how often
that is so, docs/results.md says."""
    stations = (
        scene_station,
        answer_station,
        mask_station,
        tree_station,
        algorithm_station,
        pair_station,
        moved_station,
        plain_station,
    )
    body = "".join(draw(tour) for draw in stations)
    title = "minialign: BDHS and DPO in eight stations"
    write_page(path, title, settings, f"<style>{STYLE}</style><p>{intro}</p>{body}")


def scene_station(tour: Tour) -> str:
    """1: the picture, what is on it, and y+."""
    subject = tour.subject
    rows = ""
    for name, places in subject.scene.objects.items():
        where = ", ".join(f"{colour}, in the {place}" for place, colour in places.items())
        rows += f"<li>{escape(with_article(name))}: {escape(where)}</li>"
    picture = image_tag(subject.scene, None, "The picture")
    chosen = with_false_words(subject.scene, subject.record.chosen)
    return station(
        1,
        "A picture and its truth",
        "The model is asked a question about a picture. The data set holds a good answer, the "
        "<em>chosen</em> response (in the paper y<sup>+</sup>). Here the picture is drawn, so that "
        "its truth is known exactly.",
        f"""<div class="row"><div>{picture}</div><div><p>A {subject.scene.setting} with</p>
<ul>{rows}</ul></div><div><small>question</small><p>{escape(subject.record.asked)}</p>
<small>chosen</small><p class="kept">{chosen}</p></div></div>""",
        "minialign/toy/world.py::make_scene minialign/toy/world.py::alignment_records",
    )


def answer_station(tour: Tour) -> str:
    """2: what the base says."""
    return station(
        2,
        "What the model says",
        "This is the model before any alignment, and its likeliest answer. It sees the picture, "
        "but it was taught by texts whose authors had not always looked. So it names what such a "
        "place usually has.",
        f"<blockquote>{with_false_words(tour.subject.scene, tour.answer)}</blockquote>",
        "minialign/toy/benchmark.py::false_words minialign/toy/benchmark.py::count_description",
    )


def mask_station(tour: Tour) -> str:
    """3: Eq. 6 at several thresholds."""
    parts = ""
    for rho_th, visible, answer in tour.masked:
        shown = f"{int(visible.sum())} of {len(visible)} patches visible"
        picture = image_tag(tour.subject.scene, visible, f"rho_th {rho_th}: {shown}")
        said = with_false_words(tour.subject.scene, answer)
        parts += f"<div>{picture}<small><code>rho_th</code> = {rho_th}: {shown}</small>"
        parts += f"<p>{said}</p></div>"
    return station(
        3,
        "Hide the picture: Eq. 6",
        "Every patch <em>i</em> draws a number &rho;<sub>i</sub> between 0 and 1, and is visible "
        "if that is at least <code>rho_th</code> (&rho;<sub>th</sub>). A hidden patch is seen by "
        "no token at all. The less the model sees, the more it makes up.",
        f'<div class="row">{parts}</div>',
        "minialign/model/masks.py::image_attention_mask minialign/model/masks.py::build_tree",
    )


def tree_station(tour: Tour) -> str:
    """4: one call's token tree, and who attends to whom in it."""
    kinds = kinds_of(tour.tree, tour.chosen_at)
    names = {kind: words for kind, words in WORDS.items() if kind in kinds}
    tree = tree_drawing(tour.tree, tour.labels, kinds)
    matrix = matrix_drawing(tour.tree, tour.labels, kinds)
    return station(
        4,
        "One tree for all sentences",
        "The first sentences of the chosen response stand in one sequence, the <em>trunk</em>. "
        "Each is cut, and from every cut a <em>branch</em> goes on. A query sees a visible key "
        "that is not later than itself, on its own branch or on the trunk before the fork. That "
        "is the only rule.",
        f"""{key_of(names)}<div class="row"><div>{tree}
<figcaption>Downwards: positions.</figcaption></div><div style="flex-grow: 2">{matrix}
<figcaption>Rows are queries, columns keys. Point at a cell, or tap it, to read both
names.</figcaption></div></div>""",
        "minialign/model/masks.py::may_attend sample_bdhs.py::completion_tree",
    )


def algorithm_station(tour: Tour) -> str:
    """5: Algorithm 1, line by line, on a description and on a Yes or No."""
    figure = ""
    for number, each in enumerate(tour.rounds, start=1):
        figure += round_block(tour, tour.subject, number, each)
    question, chosen = escape(tour.yes_no.record.asked), escape(tour.yes_no.record.chosen)
    figure += f"""<p>The same for a question, &ldquo;{question}&rdquo;, and its chosen response
&ldquo;{chosen}&rdquo;, with the first seed by which a word is swapped and a response sampled
again. Here waved words are those that differ from it.</p>"""
    for number, each in enumerate(tour.yes_no_rounds, start=1):
        figure += round_block(tour, tour.yes_no, number, each)
    return station(
        5,
        "Algorithm 1, line by line",
        "Blue is kept of the chosen response; what follows it was sampled while the patches were "
        "hidden. Bars show the likeliest first words. The joined text is the <em>rejected</em> "
        "response (y<sup>-</sup>), unless it is too similar to the chosen one.",
        figure,
        "sample_bdhs.py::sample minialign/sampling/bdhs.py::cut_sentence "
        "minialign/sampling/bdhs.py::join minialign/sampling/similarity.py::lexical_cosine",
    )


def round_block(tour: Tour, subject: Subject, number: int, each: Round) -> str:
    """One iteration."""
    lines = ""
    for i, cut in enumerate(each.cuts):
        swap = " <small>l. 11-13: Yes and No were swapped</small>" if each.swapped[i] else ""
        words = "".join(
            f"<span>{escape(word)} {share:.2f} {bar(share, 'branch0')}</span> "
            for word, share in each.likely[i]
        )
        kept = escape(cut.kept) + (" " if cut.kept else "")
        lines += f'<li><span class="kept">{kept}</span><span class="new">{escape(each.texts[i])}'
        lines += f'</span>{swap}<div class="note words">{words}</div></li>'
    guided = "guided: the response is cut" if each.guided else "the last one: a whole response"
    shown = f"{int(each.visible.sum())} of {len(each.visible)} patches visible"
    joined = with_false_words(subject.scene, each.response)
    if subject is tour.yes_no:  # where the truth counts objects alone, and a denial is none
        different = word_diff(subject.record.chosen, each.response)[1]
        joined = tagged(each.response, {"del": different})
    verdict = "not below: sampled again" if each.again else "below: this is y<sup>-</sup>"
    return f"""<div class="round"><h3>Iteration {number}</h3>
<p class="note">l. 5-7, {guided}. Eq. 6: {shown}.</p>
{image_tag(subject.scene, each.visible, shown)}
<p class="note">l. 9-15, split, cut at a random word, completed:</p><ol>{lines}</ol>
<p class="note">l. 16, joined:</p><p>{joined}</p>
<p class="note">l. 17-19: similarity (&phi;) {each.similarity:.3f}, <code>eps_s</code>
(&epsilon;<sub>s</sub>) {tour.eps_s}, {verdict}.</p></div>"""


def pair_station(tour: Tour) -> str:
    """6: the pair's log-probs, and Eq. 3 of them."""
    sums = [logps.sum() for logps in (*tour.logps, *tour.ref_logps)]
    chosen, rejected, ref_chosen, ref_rejected = sums
    h = log_ratio_difference(*sums)
    loss = dpo_loss(*sums, tour.beta)
    texts = ""
    for name, words, logps, ref_logps in zip(
        ("chosen", "rejected"), tour.words, tour.logps, tour.ref_logps, strict=True
    ):
        spans = ""
        for word, ratio in zip(words, (logps - ref_logps).tolist(), strict=True):
            colour = "chosen" if ratio > 0 else "false"
            share = round(60 * min(1.0, abs(ratio) / 2))
            style = f"background: color-mix(in srgb, var(--{colour}) {share}%, transparent)"
            title = f"{show(ratio, '+.2f')} nats"
            spans += f'<span style="{style}" title="{title}">{escape(word)}</span> '
        texts += f'<small>{name}</small><p class="words">{spans}</p>'
    table = ""
    for name, policy, ref in (
        ("chosen", chosen, ref_chosen),
        ("rejected", rejected, ref_rejected),
    ):
        cells = [show(value.item(), ".4f") for value in (policy, ref, policy - ref)]
        table += f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    sigmoid = torch.sigmoid(tour.beta * h).item()
    facts = f"""h = {show(h.item(), ".4f")}; <code>beta</code> (&beta;) = {tour.beta};
&beta;h = {show((tour.beta * h).item(), ".4f")}; sigmoid(&beta;h) = {sigmoid:.4f};
loss = -log sigmoid(&beta;h) = {loss.item():.4f}"""
    return station(
        6,
        "The pair, and Eq. 3",
        "A pair is one sequence: picture and question once, then two branches. The "
        "<em>policy</em> (&pi;<sub>&theta;</sub>) is scored against the <em>reference</em> "
        "(&pi;<sub>ref</sub>), the model as it was. Before training both are the same, so h is 0 "
        f"and the loss log 2 = {math.log(2):.4f}; these are the numbers after it.",
        f"""<div class="wide"><table><tr><th>log-prob, summed</th><td>policy</td><td>reference</td>
<td>difference</td></tr>{table}</table></div>
<p id="eq3">{facts}</p>{texts}
<figcaption>Blue: the policy finds the word likelier than the reference does; red: less
likely. h is the chosen response's difference less the rejected one's.</figcaption>""",
        "minialign/align/logps.py::token_logps minialign/align/losses.py::dpo_loss "
        "minialign/model/lora.py::adapters_off",
    )


def moved_station(tour: Tour) -> str:
    """7: the answer after DPO, and where probability has gone."""
    rows = "".join(moved_row(each) for each in tour.moved)
    return station(
        7,
        "The same question after DPO",
        f"DPO ran for {escape(tour.training)}. Then the same question was asked again. Below, the "
        "probability of the object's word behind each place's name: of the word that the picture "
        "shows, and of the likeliest other one before training, which the language prior puts "
        "there.",
        f"""<div class="row"><div><small>before</small>
<p>{with_false_words(tour.subject.scene, tour.answer)}</p></div><div><small>after</small>
<p>{with_false_words(tour.subject.scene, tour.answer_after)}</p></div></div>
<div class="wide"><table class="texts"><tr><th>place</th><td>picture's word<small>before, after
</small></td><td>prior's word<small>before, after</small></td></tr>{rows}</table></div>""",
        "train_dpo.py::main minialign/tour/facts.py::moved_words",
    )


def moved_row(moved: Moved) -> str:
    """One place's words."""
    cells = ""
    words = (moved.picture_word, moved.prior_word)
    for i, (word, kind) in enumerate(zip(words, ("chosen", "branch0"), strict=True)):
        shares = "".join(
            f"<small>{share:.3f} {bar(share, kind)}</small>"
            for share in (moved.before[i], moved.after[i])
        )
        cells += f"<td>{escape(word)}{shares}</td>"
    return f"<tr><th>{escape(moved.place)}</th>{cells}</tr>"


def plain_station(tour: Tour) -> str:
    """8: the plain computation beside the shared one."""
    rows = "".join(
        f"<tr><th>{escape(what)}</th><td>{largest:.1e}</td></tr>"
        for what, largest in tour.differences.items()
    )
    return station(
        8,
        "Nothing of it is approximate",
        "Sharing a trunk and dropping hidden patches saves work and changes nothing. The same "
        "log-probs were computed plainly: one sequence after the other, every patch in it, and a "
        "mask over the hidden ones. Float32 rounding is all that is left.",
        f"""<div class="wide"><table class="texts"><tr><th>compared</th>
<td>largest difference of a log-prob</td></tr>{rows}</table></div>""",
        "minialign/tour/facts.py::plain_logps minialign/tour/facts.py::differences",
    )
