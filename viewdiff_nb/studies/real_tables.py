"""Tables of `studies.real_faces`, and what follows from them in words."""

import ast
from collections import Counter
from collections.abc import Iterable, Sequence

import pandas as pd

from viewdiff_nb.studies.real_rates import names_of, rate_estimate
from viewdiff_nb.studies.significance import LEVEL, correction, holm, judged

RATES = {  # of a row, and what tables call them
    "FF": "FF acc %",
    "FP": "FP acc %",
    "eer": "EER %",
    "auc": "AUC %",
    "tar@1e-2": "TAR@1e-2 %",
    "tar": "TAR@1e-3 %",
    "rank1": "rank-1 %, mean front",
    "rank1_one": "rank-1 %, one front",
}


def rate_rows(results: dict, rates: Sequence[str]) -> pd.DataFrame:
    """A row per model and rate: model, rate (its words), mean, half, for plots."""
    found = [(name, RATES[rate], rate_estimate(results, name, rate)) for rate in rates for name in names_of(results)]
    rows = [(name, words, of_rate.mean, of_rate.half) for name, words, of_rate in found]
    return pd.DataFrame(rows, columns=["model", "rate", "mean", "half"])


def machines(results: dict) -> str:
    """On which machines results were made."""
    return " and ".join(sorted({name for found in results.values() for name in found["machines"]}))


def in_words(setting: str) -> str:
    """A setting, which is stored as the text of a tuple, to read.

    >>> in_words("(0.25, 1.0, 'even')"), in_words("(300.0, 0.5, 'none')"), in_words("(0.9, 'even')")
    ('0.25 of the epochs, step 1.0, centred', 'strength 300.0, step 0.5', 'shrinkage 0.9, centred')
    >>> in_words("(0.7, 0.5, 'common')"), in_words("(0.9, 0.3, 0.5, 'summed')")
    ('shrinkage 0.7, power 0.5', 'shrinkages 0.9 and 0.3, weights 0.5 and 0.5')
    >>> in_words("(0.5, 0.25, 0.0)"), in_words("(0.5, 0.25, 0.3)")
    ('0.5 of the epochs, step 0.25', '0.5 of the epochs, step 0.25, weights 0.7 and 0.3')
    """
    *numbers, kind = ast.literal_eval(setting)
    if kind == "common":
        return f"shrinkage {numbers[0]}, power {numbers[1]}"
    if kind == "summed":
        return f"shrinkages {numbers[0]} and {numbers[1]}, weights {1 - numbers[2]:g} and {numbers[2]:g}"
    if not isinstance(kind, str):
        weights = f", weights {1 - kind:g} and {kind:g}" if kind else ""
        return f"{numbers[0]} of the epochs, step {numbers[1]}{weights}"
    words = {"even": ["centred"], "none": []}.get(kind, [str(kind)])
    if len(numbers) == 2:
        first = f"strength {numbers[0]}" if numbers[0] > 1 else f"{numbers[0]} of the epochs"
        words = [first, f"step {numbers[1]}", *words]
    elif numbers:
        words = [f"shrinkage {numbers[0]}", *words]
    return ", ".join(words) or "not centred"


def setting_counts(results: dict, row: str) -> list[tuple[str, int]]:
    """A row's settings in words, and in how many folds and seeds each was chosen, most often first."""
    counts: Counter[str] = Counter()
    for (name, _), found in results.items():
        if name == row:
            counts.update({in_words(setting): folds for setting, folds in found["settings"].items()})
    return counts.most_common()


def rates_table(results: dict) -> pd.DataFrame:
    """Every row's rates in percent, mean ± half a 95 % interval, and the settings that most folds chose."""
    rows = {}
    for name in names_of(results):
        cells = {head: f"{rate_estimate(results, name, rate):.1f}" for rate, head in RATES.items()}
        (most, folds), *others = setting_counts(results, name)
        total = folds + sum(count for _, count in others)
        rows[name] = cells | {"most often chosen": f"{most} ({folds} of {total})"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def differences_table(
    results: dict, others: Iterable[str], rates: Sequence[str] = ("FF", "FP", "auc", "rank1")
) -> pd.DataFrame:
    """How far each row is above others, paired by fold and seed, in percentage points; p after Holm over the table."""
    found = {
        (name, f"{RATES[rate]} against {other}"): rate_estimate(results, name, rate, other)
        for name in names_of(results)
        for other in others
        for rate in rates
        if name != other
    }
    table = pd.Series(judged(found, "+.2f"), index=pd.MultiIndex.from_tuples(found)).unstack(sort=False)
    return table.fillna("–").rename_axis(f"model ({correction(len(found))})")


def settings_table(results: dict) -> pd.DataFrame:
    """How often each row chose each setting, over folds and seeds."""
    rows = []
    for name in names_of(results):
        found = setting_counts(results, name)
        total = sum(count for _, count in found)
        rows += [(name, setting, f"{count} of {total}") for setting, count in found]
    return pd.DataFrame(rows, columns=["model", "setting", "share"]).set_index(["model", "setting"])


RIVALS = ("centred by pose", "ridge, shrunk to identity", "whitening + canonical correlation")


def findings(results: dict, base: str = "raw", rivals: Sequence[str] = RIVALS) -> str:
    """Who is told above and below raw on profiles and on fronts, who from the rivals, as a Markdown list."""
    names, rivals = names_of(results), [rival for rival in rivals if rival in names_of(results)]
    words = {"FP": "frontal-profile accuracy", "rank1": "rank-1 by the mean front", "FF": "frontal-frontal accuracy"}
    asked = [(base, rate) for rate in words] + [(rival, "FP") for rival in rivals]
    compared = {
        (other, rate, name): rate_estimate(results, name, rate, other)
        for other, rate in asked
        for name in names
        if name not in (base, other)
    }
    p_values = dict(zip(compared, holm([difference.p for difference in compared.values()]), strict=True))

    def told(other: str, rate: str, sign: int) -> str:
        found = [
            f"{name} ({difference:+.2f})"
            for (against, of_rate, name), difference in compared.items()
            if (against, of_rate) == (other, rate)
            and p_values[against, of_rate, name] < LEVEL
            and sign * difference.mean > 0
        ]
        return "; ".join(found) or "none"

    lines = [
        f"- In {words[rate]}, percentage points against {other}: told above it: {told(other, rate, 1)}. "
        f"Told below it: {told(other, rate, -1)}."
        for other, rate in asked
    ]
    best = max(names, key=lambda name: rate_estimate(results, name, "FP").mean)
    lines.append(f"- The highest {words['FP']} has {best}: {rate_estimate(results, best, 'FP'):.2f} %.")
    return "\n".join([*lines, f"- ({correction(len(compared))}; what is not named is not told apart)"])
