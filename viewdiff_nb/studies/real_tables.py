"""Tables of `studies.real_faces`, and what follows from them in words."""

from collections.abc import Iterable, Sequence

import pandas as pd

from viewdiff_nb.studies.real_faces import rate_estimate
from viewdiff_nb.studies.significance import LEVEL, correction, holm, judged

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
        rows[name] = cells | {"setting": f"{most} in {settings[most]} of {sum(settings.values())}"}
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
        rows += [{"model": name, "setting": setting, "share": f"{count} of {total}"} for setting, count in by_count]
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
