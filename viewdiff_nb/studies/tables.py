"""The performance tables: the guide's three, measured, beside the guide's own figures, and recognition by yaw."""

import math
from collections.abc import Callable, Iterable

import pandas as pd
from scipy import stats

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
    "LoRA r=8 + prior": ("1.8x", "60%"),
}
GUIDE_QUALITY = {  # validation loss, cosine, training time
    "full fine-tuning": ("0.0123", "0.985", "100%"),
    "LoRA r=8": ("0.0125", "0.984", "40%"),
    "LoRA r=8 + 3-D projection": ("0.0118", "0.987", "60%"),
}


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t over independent values; nan for a single one).

    >>> [round(v, 3) for v in mean_interval([1.0, 2.0, 3.0])]   # 4.303 * 1 / sqrt(3)
    [2.0, 2.484]
    """
    series = pd.Series(list(values), dtype=float)
    if len(series) < 2:
        return float(series.mean()), math.nan
    half = stats.t.ppf(0.975, len(series) - 1) * series.std(ddof=1) / math.sqrt(len(series))
    return float(series.mean()), float(half)


def with_interval(values: Iterable[float], digits: int = 3) -> str:
    """mean ± half-width, e.g. '0.912 ± 0.004'; without the interval for a single value.

    >>> with_interval([0.5])
    '0.500'
    """
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def by_name(results: Results) -> dict[str, list[dict]]:
    """The results of each name, over seeds."""
    grouped: dict[str, list[dict]] = {}
    for (name, _), result in sorted(results.items(), key=lambda item: item[0][1]):
        grouped.setdefault(name, []).append(result)
    return grouped


def parameter_table(results: Results) -> pd.DataFrame:
    """Guide's table 1: parameters in all, trainable and in LoRA, and what is saved against full fine-tuning."""
    grouped = by_name(results)
    full = grouped["full fine-tuning"][0]["trainable"]
    rows = {}
    for name in [name for name in grouped if name in GUIDE_PARAMETERS or name in GUIDE_SPEED]:
        r = grouped[name][0]
        guide = GUIDE_PARAMETERS.get(name, ("–",) * 4)
        cells = (_millions(r["parameters"]), _millions(r["trainable"]), _millions(r["lora"]),
                 f"{1 - r['trainable'] / full:.1%}")  # fmt: skip
        heads = ("total", "trainable", "LoRA", "reduction")
        pairs = [((head, cell), (f"guide: {head}", told)) for head, cell, told in zip(heads, cells, guide, strict=True)]
        rows[name] = dict(item for pair in pairs for item in pair)
    return _frame(rows, "configuration")


def speed_table(measured: pd.DataFrame, batch_size: int, amp: bool) -> pd.DataFrame:
    """Guide's table 2 for one batch size and precision of `speed_and_memory`."""
    rows = {}
    for row in measured[(measured["batch_size"] == batch_size) & (measured["amp"] == amp)].itertuples():
        guide = GUIDE_SPEED.get(row.name, ("–", "–"))
        rows[row.name] = {"ms per step": f"{row.ms:.0f} ({row.ms_low:.0f}–{row.ms_high:.0f})",
                          "speed": f"{row.speed:.2f}x", "guide: speed": guide[0],
                          "MB": f"{row.memory_mb:.0f}", "memory": f"{row.memory:.0%}",
                          "guide: memory": guide[1]}  # fmt: skip
    return _frame(rows, "configuration")


def quality_table(results: Results) -> pd.DataFrame:
    """Guide's table 3 on validation people: loss, cosine, training time, and rank-1, which they do not tell."""
    grouped = by_name(results)
    full = [r["train_seconds"] for r in grouped["full fine-tuning"]]
    rows = {}
    for name in ("base", "full fine-tuning", "LoRA r=8", "LoRA r=8 + 3-D projection"):
        guide = GUIDE_QUALITY.get(name, ("–",) * 3)
        val = [r["val"]["all"] for r in grouped[name]]
        time = [r["train_seconds"] / f for r, f in zip(grouped[name], full, strict=True)]
        rows[name] = {
            "MSE x 1000": with_interval([1e3 * v["mse"] for v in val], 3), "guide: loss": guide[0],
            "cosine": with_interval(v["cosine"] for v in val), "guide: cosine": guide[1],
            "training time": "–" if name == "base" else _percent(time), "guide: time": guide[2],
            "rank-1": with_interval(v["rank1"] for v in val),
        }  # fmt: skip
    return _frame(rows, "model")


def recognition_table(results: Results, rate: str, part: str = "test") -> pd.DataFrame:
    """One rate (rank1, tar, auc, cosine, centred_cosine) by |yaw| bin, every model of the study."""
    grouped = by_name(results)
    bins = list(next(iter(grouped.values()))[0][part])
    rows = {name: {b: with_interval(r[part][b][rate] for r in found) for b in bins} for name, found in grouped.items()}
    return _frame(rows, "model")


def difference(results: Results, name: str, other: str, rate: str, where: str = "all") -> tuple[float, float]:
    """Mean of (name - other) over paired seeds on test people, and the half-width of its 95 % interval."""
    grouped = by_name(results)
    return mean_interval(a["test"][where][rate] - b["test"][where][rate]
                         for a, b in zip(grouped[name], grouped[other], strict=True))  # fmt: skip


def tidy(results: Results, names: Iterable[str], part: str = "test") -> pd.DataFrame:
    """One row per model, seed and yaw bin, with all rates as columns."""
    rows = [{"model": name, "seed": seed, "yaw": where, **rates}
            for (name, seed), result in results.items() if name in set(names)
            for where, rates in result[part].items()]  # fmt: skip
    order = {name: i for i, name in enumerate(names)}
    return pd.DataFrame(rows).sort_values("model", key=lambda column: column.map(order), kind="stable")


def verdict(results: Results, name: str, other: str, rate: str, where: str = "all") -> str:
    """A difference in words that follow from the numbers."""
    mean, half = difference(results, name, other, rate, where)
    if math.isnan(half):
        sure = "one seed, so this is no evidence"
    else:
        sure = "the interval excludes 0" if abs(mean) > half else "the interval includes 0: not told apart"
    spread = "" if math.isnan(half) else f" ± {half:.3f}"
    side = "above" if mean > 0 else "below"
    return f"{name} is {abs(mean):.3f}{spread} {side} {other} in {rate} ({where}); {sure}"


def claims(results: Results) -> str:
    """What the guide promises of LoRA and of the projection, and what came out, as a Markdown list."""
    adapted, full, lora = "LoRA r=8 + 3-D projection", "full fine-tuning", "LoRA r=8"
    lines = [
        verdict(results, lora, full, "rank1"),
        verdict(results, adapted, full, "rank1"),
        verdict(results, adapted, full, "tar"),
        verdict(results, adapted, lora, "rank1"),
        verdict(results, lora, full, "rank1", "0-45"),
        verdict(results, adapted, full, "rank1", "0-45"),
        verdict(results, adapted, full, "tar", "0-45"),
        verdict(results, "LoRA r=8 + prior", lora, "tar", "0-45"),
        verdict(results, "LoRA r=8 + prior", lora, "rank1", "45-90"),
        verdict(results, adapted, "MLP", "rank1"),
    ]
    return "\n".join(f"- {line}." for line in lines)


def speed_findings(measured: pd.DataFrame) -> str:
    """Measured against promised speed-up and memory, as a Markdown list."""
    lines = []
    for (batch, amp), rows in measured.groupby(["batch_size", "amp"]):
        by = rows.set_index("name")
        kind = "mixed precision" if amp else "float32"
        parts = [f"{name} {by.speed[name]:.2f}x (guide {speed})" for name, (speed, _) in GUIDE_SPEED.items()
                 if name != "full fine-tuning"]  # fmt: skip
        lines.append(f"- batch {batch}, {kind}: " + ", ".join(parts) + ".")
    lines.append("- Why less than promised: freezing W spares its gradient and its optimiser state, but the forward "
                 "pass and the backward pass through the activations stay; the adapters add work of their own, and so "
                 "do the voxels and the prior samples.")  # fmt: skip
    return "\n".join(lines)


def quality_findings(results: Results) -> str:
    """How MSE and cosine order the models, and how recognition does."""
    grouped = by_name(results)
    names = ["base", *GUIDE_QUALITY]
    near = grouped["raw side view"][0]["val"]["0-30"]["cosine"]

    def order(rate: str, best: Callable) -> str:
        score = {name: mean_interval(r["val"]["all"][rate] for r in grouped[name])[0] for name in names}
        return " > ".join(sorted(names, key=score.get, reverse=best is max))

    return (f"- by MSE, best first: {order('mse', min)}.\n- by cosine: {order('cosine', max)}.\n"
            f"- by rank-1: {order('rank1', max)}.\n"
            f"- The guide's cosine of .98 is out of reach here: even raw views below 30 degrees, which need no "
            f"correction, have a cosine of {near:.2f} with the frontal picture of the same person.")  # fmt: skip


def loss_table(results: dict[str, dict]) -> pd.DataFrame:
    """Rates on validation people for each task loss."""
    rates = ("rank1", "tar", "auc", "cosine", "centred_cosine", "mse")
    rows = {loss: {rate: f"{r['val']['all'][rate]:.4f}" for rate in rates} for loss, r in results.items()}
    return _frame(rows, "loss")


def loss_findings(results: dict[str, dict]) -> str:
    """Which loss is best by which rate."""
    def best(rate: str) -> str:
        return max(results, key=lambda loss: results[loss]["val"]["all"][rate])

    return f"Best by rank-1: **{best('rank1')}**; by TAR: **{best('tar')}**; by cosine: **{best('cosine')}**."


def _frame(rows: dict[str, dict[str, str]], index: str) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index)


def _millions(count: int) -> str:
    return f"{count / 1e6:.3f}M" if count else "0"


def _percent(shares: list[float]) -> str:
    mean, half = mean_interval(shares)
    return f"{mean:.0%}" + ("" if math.isnan(half) else f" ± {half:.0%}")
