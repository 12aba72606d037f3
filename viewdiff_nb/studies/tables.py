"""The performance tables: the guide's three, measured, beside the guide's own figures, and recognition by yaw."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import pandas as pd

from viewdiff_nb.studies.significance import Estimate, correction, estimate, in_words, judged, over_seeds

Results = dict[tuple[str, int], dict]  # of a name and a seed, as `adaptation.run_study` gives them

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
GUIDE_QUALITY = {  # validation loss, cosine, training time
    "full fine-tuning": ("0.0123", "0.985", "100%"),
    "LoRA r=8": ("0.0125", "0.984", "40%"),
    "LoRA r=8 + 3-D projection": ("0.0118", "0.987", "60%"),
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


def best_on_validation(results: Results, names: Iterable[str], rate: str = "tar") -> str:
    """The model that is best by a rate on validation people; test people must not choose."""
    return max(names, key=lambda name: rate_estimate(results, name, rate, part="val").mean)


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


def quality_table(results: Results) -> pd.DataFrame:
    """Guide's table 3 on validation people: loss, cosine, training time, and rank-1, which they do not tell."""
    seconds = {name: [r["train_seconds"] for r in found] for name, found in by_name(results).items()}
    rows = {}
    for name in ("base", *GUIDE_QUALITY):
        mse, cosine, rank1 = (rate_estimate(results, name, rate, part="val") for rate in ("mse", "cosine", "rank1"))
        share = [s / full for s, full in zip(seconds[name], seconds["full fine-tuning"], strict=True)]
        rows[name] = {
            "MSE x 1000": f"{1e3 * mse.mean:.3f} ± {1e3 * mse.half:.3f}",
            "cosine": str(cosine),
            "training time": "–" if name == "base" else f"{over_seeds(share):.0%}",
            "rank-1": str(rank1),
        }
    heads = {"MSE x 1000": "loss", "cosine": "cosine", "training time": "time"}
    return _beside_guide(_frame(rows, "model"), GUIDE_QUALITY, heads)


def recognition_table(results: Results, rate: str, part: str = "test") -> pd.DataFrame:
    """One rate of `recognition_by_yaw` by |yaw| bin, every model of the study."""
    grouped = by_name(results)
    bins = list(next(iter(grouped.values()))[0][part])
    rows = {name: {b: str(rate_estimate(results, name, rate, b, part)) for b in bins} for name in grouped}
    return _frame(rows, "model")


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


def verdicts(results: Results, comparisons: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Differences in words that follow from the numbers, p-values corrected for all of them at once.

    Args:
        comparisons: (name, other, rate, where) each.
    """
    found = [difference(results, *comparison) for comparison in comparisons]
    lines = []
    for (name, other, rate, where), apart, sure in zip(comparisons, found, in_words(found), strict=True):
        size, side = replace(apart, mean=abs(apart.mean)), "above" if apart.mean > 0 else "below"
        only = ", for this one training only" if apart.seeds == 1 else ""
        lines.append(f"{name} is {size:.3f} {side} {other} in {rate} ({where}): {sure}{only}")
    return lines


def claims(results: Results) -> str:
    """What the guide promises of LoRA and of the projection, and what came out, as a Markdown list."""
    adapted, full, lora, prior = "LoRA r=8 + 3-D projection", "full fine-tuning", "LoRA r=8", "LoRA r=8 + prior"
    pairs = ((lora, full), (adapted, full), (adapted, lora))
    comparisons = [(*pair, rate, "all") for pair in pairs for rate in ("rank1", "tar")]
    comparisons += [(lora, full, "rank1", "0-45"), (adapted, full, "rank1", "0-45"), (adapted, full, "tar", "0-45")]
    comparisons += [(prior, lora, "tar", "0-45"), (prior, lora, "rank1", "45-90")]
    return "\n".join([*_listed(verdicts(results, comparisons)), f"- ({correction(len(comparisons))})"])


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


def quality_findings(results: Results) -> str:
    """How MSE and cosine order the models, and how recognition does."""
    grouped = by_name(results)
    lines = []
    for rate, words, sign in (("mse", "MSE, best first", -1), ("cosine", "cosine", 1), ("rank1", "rank-1", 1)):
        means = {
            name: sign * over_seeds(r["val"]["all"][rate] for r in grouped[name]).mean
            for name in ("base", *GUIDE_QUALITY)
        }
        lines.append(f"by {words}: {' > '.join(sorted(means, key=means.__getitem__, reverse=True))}")
    near = grouped["raw side view"][0]["val"]["0-30"]["cosine"]
    lines.append(
        "The guide's cosine of .98 is out of reach here: even raw views below 30 degrees, which need no correction, "
        f"have a cosine of {near:.2f} with the frontal picture of the same person"
    )
    return "\n".join(_listed(lines))


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
