"""The performance tables: the guide's three, measured, beside the guide's own figures, and recognition by yaw."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import pandas as pd

from viewdiff_nb.studies.significance import Estimate, correction, estimate, judged

Results = dict[tuple[str, int], dict]  # of a name and a seed, as `controls.final` gives them

# The guide's "performance comparison" chapter. It does not say how they came about.
GUIDE_PARAMETERS = {  # total, trainable, LoRA, reduction
    "full fine-tuning": ("10M", "10M", "0", "0%"),
    "LoRA r=4": ("10M", "1M", "1M", "90%"),
    "LoRA r=8": ("10M", "2M", "2M", "80%"),
    "LoRA r=16": ("10M", "3M", "3M", "70%"),
}
GUIDE_SPEED = {  # training speed, memory
    "full fine-tuning": ("1x", "100%"),
    "LoRA r=4": ("2.5x", "40%"),
    "LoRA r=8": ("2x", "50%"),
    "LoRA r=8 + 3-D projection": ("1.5x", "70%"),
    "LoRA r=8 + 3-D projection 16³": ("1.5x", "70%"),
    "LoRA r=8 + prior": ("1.8x", "60%"),
}
GUIDE_QUALITY = {  # validation loss, cosine
    "full fine-tuning": ("0.0123", "0.985"),
    "LoRA r=8": ("0.0125", "0.984"),
    "LoRA r=8 + projection 16³": ("0.0118", "0.987"),
}


def by_name(results: Results) -> dict[str, list[dict]]:
    """The results of each name, over seeds."""
    grouped: dict[str, list[dict]] = {}
    for (name, _), result in sorted(results.items(), key=lambda item: item[0][1]):
        grouped.setdefault(name, []).append(result)
    return grouped


def rate_estimate(results: Results, name: str, rate: str, where: str = "all", part: str = "test") -> Estimate:
    """A rate of a model: mean over seeds, with the uncertainty of seeds and people."""
    found = by_name(results)[name]
    resampled = [r[f"{part}_people"][where][rate] for r in found]
    return estimate([r[part][where][rate] for r in found], resampled, found[0][part][where]["people"])


def difference(results: Results, name: str, other: str, rate: str, where: str = "all", part: str = "test") -> Estimate:
    """Of (name - other), paired by seed and by the people drawn. What nothing random is in has one seed only."""
    ours, theirs = (by_name(results)[of] for of in (name, other))
    pairs = list(zip(ours, theirs * len(ours) if len(theirs) == 1 else theirs, strict=True))
    apart = [a[part][where][rate] - b[part][where][rate] for a, b in pairs]
    drawn = [[r[f"{part}_people"][where][rate] for r in pair] for pair in pairs]
    resampled = [[x - y for x, y in zip(*both, strict=True)] for both in drawn]
    return estimate(apart, resampled, ours[0][part][where]["people"])


def estimates(results: Results, names: Iterable[str], rate: str, bins: Iterable[str]) -> pd.DataFrame:
    """One row per model and yaw bin, columns model, yaw, mean, half, for plots."""
    found = [(name, where, rate_estimate(results, name, rate, where)) for name, where in product(names, bins)]
    rows = [(name, where, e.mean, e.half) for name, where, e in found]
    return pd.DataFrame(rows, columns=["model", "yaw", "mean", "half"])


def parameter_table(counts: dict[str, dict[str, int]]) -> pd.DataFrame:
    """Guide's table 1: parameters in all, trainable and in LoRA, and what is saved against full fine-tuning.

    Args:
        counts: {configuration: `parameter_counts` of its model}.
    """
    found = pd.DataFrame.from_dict(counts, orient="index").rename_axis("configuration")
    table = found[["parameters", "trainable", "lora"]].map(lambda count: f"{count / 1e6:.3f}M" if count else "0")
    table.columns = ["total", "trainable", "LoRA"]
    saved = 1 - found["trainable"] / found.loc["full fine-tuning", "trainable"]
    table["reduction"] = saved.map("{:.1%}".format)
    return _beside_guide(table, GUIDE_PARAMETERS, {head: head for head in table})


def speed_table(measured: pd.DataFrame, batch_size: int, amp: bool) -> pd.DataFrame:
    """Guide's table 2 for one batch size and precision of `speed_and_memory`."""
    rows = measured[(measured["batch_size"] == batch_size) & (measured["amp"] == amp)].set_index("name")
    table = pd.DataFrame(index=rows.index.rename("configuration"))
    table["ms per step"] = [f"{row.ms:.0f} ({row.ms_low:.0f}–{row.ms_high:.0f})" for row in rows.itertuples()]
    table["speed"] = rows["speed"].map("{:.2f}x".format)
    table["MB"] = rows["memory_mb"].map("{:.0f}".format)
    table["memory"] = rows["memory"].map("{:.0%}".format)
    return _beside_guide(table, GUIDE_SPEED, {"speed": "speed", "memory": "memory"})


def recognition_table(results: Results, rate: str, part: str = "test") -> pd.DataFrame:
    """One rate of `recognition_by_yaw` by |yaw| bin, every model of the study."""
    grouped = by_name(results)
    bins = list(next(iter(grouped.values()))[0][part])
    rows = {name: {b: str(rate_estimate(results, name, rate, b, part)) for b in bins} for name in grouped}
    return _frame(rows, "model")


def rates_by_yaw(rates: pd.DataFrame, models: Sequence[str], rate: str) -> pd.DataFrame:
    """A rate of `benchmarks/controls.py` by |yaw| bin, a row a model; the highest of a column is marked.

    Args:
        rates: of its rates.csv: a row per model, rate and yaw, with mean and half.
    """
    found = rates[(rates["rate"] == rate) & rates["model"].isin(models)]
    mean, half = (found.pivot(index="model", columns="yaw", values=column) for column in ("mean", "half"))
    bins = list(dict.fromkeys(found["yaw"]))
    rows = {
        model: {
            yaw: f"{mean.at[model, yaw]:.3f} ± {half.at[model, yaw]:.3f}" + " *" * (mean[yaw].idxmax() == model)
            for yaw in bins
        }
        for model in models
    }
    return _frame(rows, "model (* highest)")


def quality_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Guide's table 3 on test people: loss and cosine, and rank-1, which they do not tell.

    Args:
        rates: as for `rates_by_yaw`, of models in both recipes; "guide: NAME" is NAME in the guide's own.
    """
    shown = {"mse": ("MSE x 1000", 1000.0), "cosine": ("cosine", 1.0), "rank1": ("rank-1", 1.0)}
    wanted = {"base", *GUIDE_QUALITY} | {name for name in rates["model"] if name.startswith("guide: ")}
    found = rates[(rates["yaw"] == "all") & rates["model"].isin(wanted)].set_index(["model", "rate"])
    rows = {
        name: {
            head: f"{scale * found.at[(name, rate), 'mean']:.3f} ± {scale * found.at[(name, rate), 'half']:.3f}"
            for rate, (head, scale) in shown.items()
        }
        for name in dict.fromkeys(found.index.get_level_values(0))
    }
    guide = GUIDE_QUALITY | {f"guide: {name}": said for name, said in GUIDE_QUALITY.items()}
    return _beside_guide(_frame(rows, "model"), guide, {"MSE x 1000": "loss", "cosine": "cosine"})


def comparison_table(
    results: Results, name: str, others: Iterable[str], rate: str, bins: Sequence[str], part: str = "test"
) -> pd.DataFrame:
    """How far name is above each of the others, by yaw bin: the paired difference with its interval and p-value.

    The p-values are corrected for all cells of the table at once, see `significance.holm`.
    """
    pairs = list(product(others, bins))
    found = {(other, where): difference(results, name, other, rate, where, part) for other, where in pairs}
    table = pd.Series(judged(found), index=pd.MultiIndex.from_tuples(pairs)).unstack(sort=False)
    return table.rename_axis(f"{name} against ({correction(len(found))})")


def speed_findings(measured: pd.DataFrame) -> str:
    """Measured against promised speed-up, as a Markdown list."""
    lines = []
    for (batch, amp), rows in measured.groupby(["batch_size", "amp"]):
        speed = rows.set_index("name")["speed"]
        parts = [f"{name} {speed[name]:.2f}x (guide {guide})" for name, (guide, _) in list(GUIDE_SPEED.items())[1:]]
        lines.append(f"batch {batch}, {'mixed precision' if amp else 'float32'}: {', '.join(parts)}")
    lines.append(
        "Why less than promised: freezing W spares its gradient and its optimiser state, but the forward pass and the "
        "backward pass through the activations stay; the adapters add work of their own, and so do the voxels and the "
        "prior samples"
    )
    return "\n".join(_listed(lines))


LATEX = {"\\": r"\textbackslash ", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "±": r"$\pm$"} | {
    **{"³": "$^3$", "°": r"$^\circ$", "λ": r"$\lambda$", "≥": r"$\geq$", "−": "$-$", "×": r"$\times$", "–": "--"}
}


def latex(table: pd.DataFrame, caption: str = "") -> str:
    """A table for a paper, in booktabs' rules; what ends with * is bold.

    >>> print(latex(pd.DataFrame({"rank-1, %": ["78 ± 1", "94 ± 1 *"]}, ["raw", "ours"]).rename_axis("model")))
    \\begin{tabular}{ll}
    \\toprule
    model & rank-1, \\% \\\\
    \\midrule
    raw & 78 $\\pm$ 1 \\\\
    ours & \\textbf{94 $\\pm$ 1} \\\\
    \\bottomrule
    \\end{tabular}
    <BLANKLINE>
    """

    def cell(value: object) -> str:
        text = str(value)
        escaped = "".join(LATEX.get(letter, letter) for letter in text.removesuffix(" *"))
        return rf"\textbf{{{escaped}}}" if text.endswith(" *") else escaped

    shown = table.reset_index().map(cell)
    return shown.rename(columns=cell).to_latex(index=False, escape=False, caption=(caption and cell(caption)) or None)


def _listed(lines: Iterable[str]) -> list[str]:
    return [f"- {line}." for line in lines]


def _beside_guide(table: pd.DataFrame, guide: Mapping[str, Sequence[str]], heads: dict[str, str]) -> pd.DataFrame:
    """Adds the guide's figures: behind each column of heads one that is named after the guide's word for it."""
    for i, (head, word) in enumerate(heads.items()):
        cells = [guide[name][i] if name in guide else "–" for name in table.index]
        table.insert(table.columns.get_loc(head) + 1, f"guide: {word}", cells)
    return table


def _frame(rows: dict[str, dict[str, str]], index: str) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index)
