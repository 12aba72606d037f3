"""The performance tables: the guide's three, measured, beside the guide's own figures, and recognition by yaw."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pandas as pd

from viewdiff_nb.studies.significance import Estimate, correction, estimate, in_words, judged, over_seeds

Results = dict[tuple[str, int], dict]

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


def with_interval(values: Iterable[float], digits: int = 3) -> str:
    """mean ± half-width, e.g. '0.912 ± 0.004'; a single value has no interval.

    >>> with_interval([0.5])
    '0.500 (one seed)'
    """
    return f"{over_seeds(values):.{digits}f}"


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
    grouped = by_name(results)
    ours, theirs = grouped[name], grouped[other]
    if len(theirs) == 1:
        theirs = theirs * len(ours)
    pairs = list(zip(ours, theirs, strict=True))
    apart = [a[part][where][rate] - b[part][where][rate] for a, b in pairs]
    resampled = [
        [x - y for x, y in zip(*(r[f"{part}_people"][where][rate] for r in pair), strict=True)] for pair in pairs
    ]
    return estimate(apart, resampled, ours[0][part][where]["people"])


def comparison_table(
    results: Results, name: str, others: Iterable[str], rate: str, bins: Iterable[str], part: str = "test"
) -> pd.DataFrame:
    """How far name is above each of the others, by yaw bin.

    Each cell holds the paired difference with its own 95 % interval over seeds and people, and its p-value, or "not
    told apart" from .05 on. The p-values are corrected for all cells of the table at once, see `significance.holm`.
    """
    bins, others = list(bins), list(others)
    found = {(other, where): difference(results, name, other, rate, where, part) for other in others for where in bins}
    cells = judged(found)
    rows = {other: {where: cells[other, where] for where in bins} for other in others}
    return _frame(rows, f"{name} against ({correction(len(found))})")


def best_on_validation(results: Results, names: Iterable[str], rate: str = "tar") -> str:
    """The model that is best by a rate on validation people; test people must not choose."""
    return max(names, key=lambda name: rate_estimate(results, name, rate, part="val").mean)


def parameter_table(counts: dict[str, dict[str, int]]) -> pd.DataFrame:
    """Guide's table 1: parameters in all, trainable and in LoRA, and what is saved against full fine-tuning.

    Args:
        counts: {configuration: `parameter_counts` of its model}.
    """
    full = counts["full fine-tuning"]["trainable"]
    rows = {}
    for name, count in counts.items():
        guide = GUIDE_PARAMETERS.get(name, ("–",) * 4)
        cells = (
            _millions(count["parameters"]),
            _millions(count["trainable"]),
            _millions(count["lora"]),
            f"{1 - count['trainable'] / full:.1%}",
        )
        heads = ("total", "trainable", "LoRA", "reduction")
        pairs = [((head, cell), (f"guide: {head}", told)) for head, cell, told in zip(heads, cells, guide, strict=True)]
        rows[name] = dict(item for pair in pairs for item in pair)
    return _frame(rows, "configuration")


def speed_table(measured: pd.DataFrame, batch_size: int, amp: bool) -> pd.DataFrame:
    """Guide's table 2 for one batch size and precision of `speed_and_memory`."""
    rows = {}
    for row in measured[(measured["batch_size"] == batch_size) & (measured["amp"] == amp)].itertuples():
        guide = GUIDE_SPEED.get(row.name, ("–", "–"))
        rows[row.name] = {
            "ms per step": f"{row.ms:.0f} ({row.ms_low:.0f}–{row.ms_high:.0f})",
            "speed": f"{row.speed:.2f}x",
            "guide: speed": guide[0],
            "MB": f"{row.memory_mb:.0f}",
            "memory": f"{row.memory:.0%}",
            "guide: memory": guide[1],
        }
    return _frame(rows, "configuration")


def quality_table(results: Results) -> pd.DataFrame:
    """Guide's table 3 on validation people: loss, cosine, training time, and rank-1, which they do not tell."""
    grouped = by_name(results)
    full = [r["train_seconds"] for r in grouped["full fine-tuning"]]
    rows = {}
    for name in ("base", "full fine-tuning", "LoRA r=8", "LoRA r=8 + 3-D projection"):
        guide = GUIDE_QUALITY.get(name, ("–",) * 3)
        val = {rate: rate_estimate(results, name, rate, part="val") for rate in ("mse", "cosine", "rank1")}
        time = [r["train_seconds"] / f for r, f in zip(grouped[name], full, strict=True)]
        rows[name] = {
            "MSE x 1000": f"{1e3 * val['mse'].mean:.3f} ± {1e3 * val['mse'].half:.3f}",
            "guide: loss": guide[0],
            "cosine": str(val["cosine"]),
            "guide: cosine": guide[1],
            "training time": "–" if name == "base" else f"{over_seeds(time):.0%}",
            "guide: time": guide[2],
            "rank-1": str(val["rank1"]),
        }
    return _frame(rows, "model")


def recognition_table(results: Results, rate: str, part: str = "test") -> pd.DataFrame:
    """One rate of `recognition_by_yaw` by |yaw| bin, every model of the study."""
    grouped = by_name(results)
    bins = list(next(iter(grouped.values()))[0][part])
    rows = {name: {b: str(rate_estimate(results, name, rate, b, part)) for b in bins} for name in grouped}
    return _frame(rows, "model")


def estimates(results: Results, names: Iterable[str], rate: str, bins: Iterable[str]) -> pd.DataFrame:
    """One row per model and yaw bin, columns model, yaw, mean, half, for plots."""
    bins = list(bins)
    found = {(name, where): rate_estimate(results, name, rate, where) for name in names for where in bins}
    return pd.DataFrame(
        [{"model": name, "yaw": where, "mean": e.mean, "half": e.half} for (name, where), e in found.items()]
    )


def verdicts(results: Results, comparisons: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Differences in words that follow from the numbers, p-values corrected for all of them at once.

    Args:
        comparisons: (name, other, rate, where) each.
    """
    found = [difference(results, *comparison) for comparison in comparisons]
    lines = []
    for (name, other, rate, where), apart, sure in zip(comparisons, found, in_words(found), strict=True):
        if apart.seeds == 1:
            sure += ", for this one training only"
        side = "above" if apart.mean > 0 else "below"
        size = replace(apart, mean=abs(apart.mean))
        lines.append(f"{name} is {size:.3f} {side} {other} in {rate} ({where}): {sure}")
    return lines


def claims(results: Results) -> str:
    """What the guide promises of LoRA and of the projection, and what came out, as a Markdown list."""
    adapted, full, lora = "LoRA r=8 + 3-D projection", "full fine-tuning", "LoRA r=8"
    lines = verdicts(
        results,
        [
            (lora, full, "rank1", "all"),
            (lora, full, "tar", "all"),
            (adapted, full, "rank1", "all"),
            (adapted, full, "tar", "all"),
            (adapted, lora, "rank1", "all"),
            (adapted, lora, "tar", "all"),
            (lora, full, "rank1", "0-45"),
            (adapted, full, "rank1", "0-45"),
            (adapted, full, "tar", "0-45"),
            ("LoRA r=8 + prior", lora, "tar", "0-45"),
            ("LoRA r=8 + prior", lora, "rank1", "45-90"),
        ],
    )
    return "\n".join([*(f"- {line}." for line in lines), f"- ({correction(len(lines))})"])


GOALS = {("rank1", "all"): 0.93, ("rank1", "60-75"): 0.88, ("rank1", "75-90"): 0.70, ("tar", "all"): 0.83}


def goals(results: Results, name: str, others: Iterable[str]) -> str:
    """Whether the model reaches `GOALS`, is apart from all others, and loses nothing near the front, in words."""
    lines = []
    for (rate, where), goal in GOALS.items():
        found = rate_estimate(results, name, rate, where)
        lines.append(f"{rate} ({where}): {found}, goal {goal:.2f}: {'reached' if found.mean >= goal else '**missed**'}")
    for rate in ("rank1", "tar"):
        for where in ("all", "45-60", "60-75", "75-90"):
            ours = rate_estimate(results, name, rate, where)
            near = max(others, key=lambda other: rate_estimate(results, other, rate, where).mean)
            theirs = rate_estimate(results, near, rate, where)
            apart = "the intervals do not overlap" if ours.low > theirs.high else "**the intervals overlap**"
            lines.append(f"{rate} ({where}): {ours} against {theirs} of the best baseline, {near}: {apart}")
        front = difference(results, name, "raw side view", rate, "0-30")
        kept = "nothing is lost" if front.high >= 0 else "**something is lost**"
        lines.append(f"{rate} (0-30): {front:+.3f} against the raw side view: {kept}")
    return "\n".join(f"- {line}." for line in lines)


def speed_findings(measured: pd.DataFrame) -> str:
    """Measured against promised speed-up and memory, as a Markdown list."""
    lines = []
    for (batch, amp), rows in measured.groupby(["batch_size", "amp"]):
        by = rows.set_index("name")
        kind = "mixed precision" if amp else "float32"
        parts = [
            f"{name} {by.speed[name]:.2f}x (guide {speed})"
            for name, (speed, _) in GUIDE_SPEED.items()
            if name != "full fine-tuning"
        ]
        lines.append(f"- batch {batch}, {kind}: " + ", ".join(parts) + ".")
    lines.append(
        "- Why less than promised: freezing W spares its gradient and its optimiser state, but the forward "
        "pass and the backward pass through the activations stay; the adapters add work of their own, and so "
        "do the voxels and the prior samples."
    )
    return "\n".join(lines)


def quality_findings(results: Results) -> str:
    """How MSE and cosine order the models, and how recognition does."""
    grouped = by_name(results)
    names = ["base", *GUIDE_QUALITY]
    near = grouped["raw side view"][0]["val"]["0-30"]["cosine"]

    def order(rate: str, best: Callable) -> str:
        score = {name: over_seeds(r["val"]["all"][rate] for r in grouped[name]).mean for name in names}
        return " > ".join(sorted(names, key=score.get, reverse=best is max))

    return (
        f"- by MSE, best first: {order('mse', min)}.\n- by cosine: {order('cosine', max)}.\n"
        f"- by rank-1: {order('rank1', max)}.\n"
        f"- The guide's cosine of .98 is out of reach here: even raw views below 30 degrees, which need no "
        f"correction, have a cosine of {near:.2f} with the frontal picture of the same person."
    )


def _frame(rows: dict[str, dict[str, str]], index: str) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index)


def _millions(count: int) -> str:
    return f"{count / 1e6:.3f}M" if count else "0"
