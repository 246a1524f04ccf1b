"""Counts become figures, and every figure has a bootstrap 95 % interval over images.

CHAIR_i: share of mentioned objects that are not there; CHAIR_s: share of descriptions with at least
one; recall: share of the objects that are mentioned; POPE: accuracy, precision, recall, F1, share
of yes, and share of answers that hold neither yes nor no (which POPE takes for yes).
"""

import numpy as np

Counts = dict[str, float]  # of one image
Sum = tuple[str, ...]  # names of counts that are added up; a name that stands twice counts twice
Figures = dict[str, tuple[Sum, Sum]]  # name -> what stands above the line, and below it
Interval = dict[str, float | None]  # value, low and high
SETTINGS_OF_POPE = ("random", "popular", "adversarial")
DIRECT_QUESTIONS = ("cell", "colour", "position", "count", "setting")  # of the embedded world

CHAIR: Figures = {
    "chair_i": (("hallucinated",), ("mentioned",)),
    "chair_s": (("hallucinating",), ("images",)),
    "recall": (("found",), ("objects",)),
}

# What the keys mean; an arrow says which way is better.
WORDS = {
    "chair_i": "hallucinated objects ↓",
    "chair_s": "texts with one or more ↓",
    "recall": "objects mentioned ↑",
    "typical_share": "hallucinations, typical",
    "colour_errors": "wrong colours ↓",
    "position_errors": "wrong places ↓",
    "setting_errors": "wrong settings ↓",
    "length": "words in a description",
    "ask": "direct questions, right ↑",
    "ask_cell": "what is there, right ↑",
    "ask_colour": "which colour, right ↑",
    "ask_position": "where, right ↑",
    "ask_count": "how often, right ↑",
    "ask_setting": "which setting, right ↑",
    "accuracy": "pairs ranked right ↑",
    "first": "first answer preferred",
    "ties": "ties",
    "unparsable": "pairs without a verdict ↓",
}
WORDS_OF_POPE = {
    "": "accuracy ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "f1": "F1 ↑",
    "yes": "share of Yes",
    "unclear": "neither Yes nor No ↓",
}


def in_words(name: str) -> str:
    """A figure's name for people; one that is not known stays as it is."""
    first, *rest = name.split("_")
    if first != "pope":
        return WORDS.get(name, name)
    setting = rest.pop(0) if rest and rest[0] in SETTINGS_OF_POPE else ""
    return f"POPE {setting}".strip() + ", " + WORDS_OF_POPE.get("_".join(rest), name)


def pope_verdict(answer: str) -> bool:
    """POPE's reading of an answer: in its first sentence, without commas, the word No, no or not
    means no.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "no", "not") for word in words)


def pope_figures(setting: str) -> Figures:
    """POPE's figures of one setting ("" where there is but one), from its true and false yeses and
    noes.
    """
    name = f"pope_{setting}" if setting else "pope"
    tp, fp, fn, tn = f"{setting}_tp", f"{setting}_fp", f"{setting}_fn", f"{setting}_tn"
    return {
        name: ((tp, tn), (tp, fp, fn, tn)),
        f"{name}_precision": ((tp,), (tp, fp)),
        f"{name}_recall": ((tp,), (tp, fn)),
        f"{name}_f1": ((tp, tp), (tp, tp, fp, fn)),
        f"{name}_yes": ((tp, fp), (tp, fp, fn, tn)),
        f"{name}_unclear": ((f"{setting}_unclear",), (tp, fp, fn, tn)),
    }


def toy_figures() -> Figures:
    """The figures of the embedded world, in which colours and places can be wrong, too, and in
    which direct questions have one right answer.
    """
    figures = CHAIR | {
        "typical_share": (("typical",), ("hallucinated",)),
        "colour_errors": (("wrong_colour",), ("coloured",)),
        "position_errors": (("wrong_place",), ("placed",)),
        "setting_errors": (("wrong_setting",), ("settings",)),
        "length": (("length",), ("images",)),
    }
    for setting in SETTINGS_OF_POPE:
        of_setting = pope_figures(setting)
        for name in (f"pope_{setting}", f"pope_{setting}_f1", f"pope_{setting}_yes"):
            figures[name] = of_setting[name]
    right, asked = ([f"{what}_{kind}" for kind in DIRECT_QUESTIONS] for what in ("right", "asked"))
    figures["ask"] = (tuple(right), tuple(asked))
    for kind in DIRECT_QUESTIONS:
        figures[f"ask_{kind}"] = ((f"right_{kind}",), (f"asked_{kind}",))
    return figures


TOY_FIGURES = toy_figures()


def ratio(sums: dict[str, np.ndarray], above: Sum, below: Sum) -> np.ndarray:
    """A figure from summed counts, arrays over resamples; NaN where there was nothing to count."""
    dividend = sum(sums[name] for name in above)
    divisor = sum(sums[name] for name in below)
    nothing = np.full_like(divisor, np.nan)
    return np.divide(dividend, divisor, out=nothing, where=divisor > 0)


def bootstrap(
    runs: list[list[Counts]], resamples: int = 1000, figures: Figures = TOY_FIGURES
) -> dict[str, np.ndarray]:
    """Figures of the runs' pooled counts, (1 + resamples,) each: as they are, then over resampled
    images and runs.

    `runs` are evaluations of the same images, one per training seed. Which images are drawn depends
    on their number alone, so that two rows of a study are resampled alike and their difference is
    paired by image, however many runs each of them has.
    """
    names = sorted({name for above, below in figures.values() for name in (*above, *below)})
    table = [[[image.get(name, 0) for name in names] for image in run] for run in runs]
    counts = np.array(table, dtype=float)  # (runs, images, counts)
    n_runs, n_images, _ = counts.shape

    # How often each image, and each run, is drawn; the first row is the sample itself. Images come
    # first: behind runs they would depend on how many runs there are.
    rng = np.random.default_rng(0)
    images = rng.multinomial(n_images, np.full(n_images, 1 / n_images), resamples)
    of_runs = rng.multinomial(n_runs, np.full(n_runs, 1 / n_runs), resamples)
    images = np.concatenate([np.ones((1, n_images)), images])
    of_runs = np.concatenate([np.ones((1, n_runs)), of_runs])

    totals = np.einsum("br,bi,ric->cb", of_runs, images, counts, optimize=True)
    sums = dict(zip(names, totals, strict=True))
    return {name: ratio(sums, above, below) for name, (above, below) in figures.items()}


def rounded(value: float) -> float | None:
    """A figure as files have it; None where nothing was there to measure."""
    return None if np.isnan(value) else round(float(value), 5)


def interval(values: np.ndarray) -> Interval:
    """A bootstrapped figure with its 95 % interval; None where nothing was there to measure."""
    if np.isnan(values[0]):
        return {"value": None, "low": None, "high": None}
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"value": rounded(values[0]), "low": rounded(low), "high": rounded(high)}


def with_intervals(runs: list[list[Counts]], figures: Figures = TOY_FIGURES) -> dict[str, Interval]:
    """Every figure of one or more runs on the same images."""
    return {name: interval(values) for name, values in bootstrap(runs, figures=figures).items()}


def print_table(columns: dict[str, dict[str, Interval]]) -> None:
    """One line per figure, in words, one column per run: value and interval."""
    names = list(next(iter(columns.values())))
    width = max(len(in_words(name)) for name in names) + 2
    widths = [max(23, len(title) + 2) for title in columns]
    heads = zip(columns, widths, strict=True)
    print(" " * width + "".join(f"{title:>{room}}" for title, room in heads))
    for name in names:
        cells = zip(columns.values(), widths, strict=True)
        texts = [f"{cell_text(column[name]):>{room}}" for column, room in cells]
        print(f"{in_words(name):{width}}" + "".join(texts))


def cell_text(cell: Interval) -> str:
    """A figure and its interval, as the table has them."""
    if cell["value"] is None:
        return "not measured"
    form = form_of(cell["value"])
    return f"{cell['value']:{form}} [{cell['low']:{form}}, {cell['high']:{form}}]"


def form_of(value: float) -> str:
    """How a figure is written: one decimal of a length, three of a share."""
    return ".1f" if value >= 10 else ".3f"
