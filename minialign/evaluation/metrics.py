"""Counts become figures, and every figure has a bootstrap 95 % interval over images.

CHAIR_i: share of mentioned objects that are not there; CHAIR_s: share of descriptions with at least
one; recall: share of the objects that are mentioned; POPE: accuracy, precision, recall, F1, share
of yes, and share of answers that hold neither yes nor no (which POPE takes for yes)."""

import numpy as np

Counts = dict[str, float]  # of one image
Figures = dict[
    str, tuple[str, str]
]  # name -> what is added up above the line, and below it; twice is times two
PARTS = ("tp", "fp", "fn", "tn")  # true and false yeses, false and true noes
SETTINGS_OF_POPE = ("random", "popular", "adversarial")


def pope_figures(setting: str) -> Figures:
    """POPE's figures of one setting ("" where there is but one), from its true and false yeses and
    noes."""
    name = f"pope_{setting}" if setting else "pope"
    tp, fp, fn, tn = (f"{setting}_{part}" for part in PARTS)
    return {
        name: (f"{tp} {tn}", f"{tp} {fp} {fn} {tn}"),
        f"{name}_precision": (tp, f"{tp} {fp}"),
        f"{name}_recall": (tp, f"{tp} {fn}"),
        f"{name}_f1": (f"{tp} {tp}", f"{tp} {tp} {fp} {fn}"),
        f"{name}_yes": (f"{tp} {fp}", f"{tp} {fp} {fn} {tn}"),
        f"{name}_unclear": (f"{setting}_unclear", f"{tp} {fp} {fn} {tn}"),
    }


CHAIR: Figures = {
    "chair_i": ("hallucinated", "mentioned"),
    "chair_s": ("hallucinating", "images"),
    "recall": ("found", "objects"),
}
TOY: Figures = (
    CHAIR
    | {  # the embedded world's
        "typical_share": ("typical", "hallucinated"),
        "colour_errors": ("wrong_colour", "coloured"),
        "position_errors": ("wrong_place", "placed"),
        "length": ("length", "images"),
    }
    | {
        name: parts
        for setting in SETTINGS_OF_POPE
        for name, parts in pope_figures(setting).items()
        if not name.endswith(("_precision", "_recall", "_unclear"))
    }
)


def ratios(sums: dict[str, np.ndarray], figures: Figures) -> dict[str, np.ndarray]:
    """Figures from summed counts (arrays over bootstrap resamples); NaN where there was nothing to
    count."""

    def added(names: str) -> np.ndarray:
        return sum(sums[name] for name in names.split())

    def per(a, b):
        return np.divide(a, b, out=np.full_like(b, np.nan, dtype=float), where=b > 0)

    return {name: per(added(above), added(below)) for name, (above, below) in figures.items()}


def bootstrap(
    runs: list[list[Counts]], resamples: int = 1000, figures: Figures = TOY
) -> dict[str, np.ndarray]:
    """Figures of the runs' pooled counts, (1 + resamples,) each: as they are, then over resampled
    images and runs.

    `runs` are evaluations of the same images, one per training seed. The resampling depends on the
    numbers of runs and images alone, so that two rows of a study are resampled alike and their
    difference is paired."""
    names = sorted(
        {name for above, below in figures.values() for name in f"{above} {below}".split()}
    )
    tables = np.array(
        [[[c.get(name, 0) for name in names] for c in counts] for counts in runs], dtype=float
    )
    rng, (n_runs, n_images, _) = np.random.default_rng(0), tables.shape
    images = rng.multinomial(n_images, np.full(n_images, 1 / n_images), resamples)
    of_runs = rng.multinomial(n_runs, np.full(n_runs, 1 / n_runs), resamples)
    images = np.concatenate([np.ones((1, n_images)), images])  # the first row is the sample itself
    of_runs = np.concatenate([np.ones((1, n_runs)), of_runs])
    sums = np.einsum("br,bi,ric->cb", of_runs, images, tables, optimize=True)
    return ratios(dict(zip(names, sums, strict=True)), figures)


def interval(values: np.ndarray) -> dict[str, float | None]:
    """A bootstrapped figure as {value, low, high} of its 95 % interval; None where nothing was
    there to measure."""
    if np.isnan(values[0]):
        return dict.fromkeys(("value", "low", "high"))
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {
        "value": round(float(values[0]), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
    }


def with_intervals(
    runs: list[list[Counts]], figures: Figures = TOY
) -> dict[str, dict[str, float | None]]:
    """Every figure of one or more runs on the same images: {name: {value, low, high}}."""
    return {name: interval(values) for name, values in bootstrap(runs, figures=figures).items()}


def print_table(columns: dict[str, dict[str, dict[str, float | None]]]) -> None:
    """One line per figure, one column per run: value and interval."""
    names = [name for name in next(iter(columns.values()))]
    width = max(22, *(len(name) + 2 for name in names))
    print(f"{'':{width}}" + "".join(f"{title:>26}" for title in columns))
    for name in names:
        values = [column[name] for column in columns.values()]
        cells = [
            "not measured"
            if v["value"] is None
            else f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"
            for v in values
        ]
        print(f"{name:{width}}" + "".join(f"{cell:>26}" for cell in cells))
