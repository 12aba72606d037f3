"""Tables of `studies.real_faces`, and what follows from them in words."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pandas as pd
import torch

from viewdiff_nb.studies.significance import LEVEL, Estimate, correction, holm, judged, over_seeds

RATES = {  # of a row, and what tables call them
    "FF": "FF acc %",
    "FP": "FP acc %",
    "eer": "EER %",
    "auc": "AUC %",
    "tar@1e-2": "TAR@1e-2 %",
    "tar@1e-3": "TAR@1e-3 %",
    "rank1": "rank-1 %, mean front",
    "rank1_one": "rank-1 %, one front",
}


def rate_estimate(results: dict, row: str, rate: str, other: str | None = None) -> Estimate:
    """A rate in percent, or how far it is above another row's; 95 % over folds of people, and over seeds.

    The standard error over people is the jackknife's, of leaving out the people of one fold (Efron & Stein 1981):
    sqrt((F - 1) / F sum (r_i - mean r)^2).
    """
    ours = [found[rate] for (name, _), found in sorted(results.items()) if name == row]
    theirs = [found[rate] for (name, _), found in sorted(results.items()) if name == other] if other else []
    if theirs:
        theirs = theirs * len(ours) if len(theirs) == 1 else theirs
        ours = ours * len(theirs) if len(ours) == 1 else ours
        ours = [
            (a - b, [x - y for x, y in zip(left, right, strict=True)])
            for (a, left), (b, right) in zip(ours, theirs, strict=True)
        ]
    left_out = 100 * torch.tensor([left for _, left in ours], dtype=torch.float64).mean(0)
    folds = len(left_out)
    error = ((folds - 1) * left_out.var(unbiased=False)).sqrt().item()
    over = over_seeds([100 * value for value, _ in ours])
    return replace(over, people_error=error, people=folds, seeds_error=over.seeds_error if over.seeds > 1 else 0.0)


def names_of(results: dict) -> list[str]:
    """The rows of results, in order."""
    return list(dict.fromkeys(name for name, _ in results))


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

    >>> in_words("(0.25, 1.0, 'even')")
    '0.25, 1.0, even'
    """
    return setting.strip("(,)").replace("'", "")


def rates_table(results: dict) -> pd.DataFrame:
    """Every row's rates in percent, mean ± half a 95 % interval, and the settings that most folds chose."""
    rows = {}
    for name in names_of(results):
        cells = {head: f"{rate_estimate(results, name, rate):.1f}" for rate, head in RATES.items()}
        settings: dict[str, int] = {}
        for (row, _), found in results.items():
            for setting, folds in found["settings"].items() if row == name else ():
                settings[setting] = settings.get(setting, 0) + folds
        most = max(settings, key=settings.__getitem__)
        rows[name] = cells | {"setting": f"{in_words(most)} in {settings[most]} of {sum(settings.values())}"}
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
    """How often each row chose each setting, over folds and seeds; those that choose nothing are left out."""
    rows = []
    for name in names_of(results):
        found: dict[str, int] = {}
        for (row, _), of_seed in results.items():
            for setting, folds in of_seed["settings"].items() if row == name else ():
                found[setting] = found.get(setting, 0) + folds
        by_count = sorted(found.items(), key=lambda item: -item[1])
        total = sum(found.values())
        shares = [(in_words(setting), f"{count} of {total}") for setting, count in by_count]
        rows += [{"model": name, "setting": words, "share": share} for words, share in shares]
    return pd.DataFrame(rows).set_index(["model", "setting"])


def findings(results: dict, base: str = "raw", rival: str = "ridge, shrunk to identity") -> str:
    """Who helps and who harms on profiles and on fronts, told apart or not, and the best row, as a Markdown list."""
    names = [name for name in names_of(results) if name != base]
    compared = {
        (name, rate): rate_estimate(results, name, rate, base) for rate in ("FP", "rank1", "FF") for name in names
    }
    compared |= {(name, "rival"): rate_estimate(results, name, "FP", rival) for name in names if name != rival}
    p_values = dict(zip(compared, holm([difference.p for difference in compared.values()]), strict=True))

    def those(rate: str, sign: int) -> str:
        told = [
            f"{name} ({compared[name, rate]:+.2f})"
            for name in names
            if (name, rate) in compared and p_values[name, rate] < LEVEL and sign * compared[name, rate].mean > 0
        ]
        return "; ".join(told) or "none"

    words = {"FP": "frontal-profile accuracy", "rank1": "rank-1 by the mean front", "FF": "frontal-frontal accuracy"}
    lines = [
        f"- In {text}, percentage points against {base}: **help**: {those(rate, 1)}. **Harm**: {those(rate, -1)}."
        for rate, text in words.items()
    ]
    lines.append(
        f"- Told from the {rival} in {words['FP']}: above it {those('rival', 1)}; below it {those('rival', -1)}."
    )
    best = max(names_of(results), key=lambda name: rate_estimate(results, name, "FP").mean)
    lines.append(f"- The highest {words['FP']} has {best}: {rate_estimate(results, best, 'FP'):.2f} %.")
    return "\n".join([*lines, f"- ({correction(len(compared))}; what is not named is not told apart)"])
