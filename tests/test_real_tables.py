import math

import numpy as np
import pytest

from viewdiff_nb.studies.real_tables import (
    RATES,
    differences_table,
    findings,
    machines,
    names_of,
    rate_estimate,
    rate_rows,
    rates_table,
    settings_table,
)


def row(value, spread=0.002, setting="(1.0,)"):
    """A result whose folds differ by spread around value."""
    folds = [value + spread * (i - 4.5) / 4.5 for i in range(10)]
    without = [(sum(folds) - fold) / 9 for fold in folds]
    return dict.fromkeys(RATES, (value, without)) | {"settings": {setting: 7, "(0.5,)": 3}, "machines": ["here"]}


@pytest.fixture
def results():
    return {
        ("raw", 0): row(0.90),
        ("ridge, shrunk to identity", 0): row(0.93, 0.004),
        **{("model", seed): row(0.90 + 0.001 * seed, 0.001) for seed in range(3)},
        **{("bad model", seed): row(0.80 + 0.001 * seed, 0.003) for seed in range(3)},
    }


def test_every_rate_has_its_interval(results):
    table = rates_table(results)
    assert list(table.index) == names_of(results) and table.loc["raw", "FP acc %"].startswith("90.0 ± ")
    assert table.loc["bad model", "setting"] == "1.0 in 21 of 30"


def test_differences_are_signed_and_judged(results):
    table = differences_table(results, ["raw"])
    assert "raw" not in table.index and table.shape == (3, 4)
    assert table.loc["bad model"].str.startswith("-9.9").all() and table.loc["bad model"].str.contains("p <").all()
    assert table.loc["model"].str.contains("not told apart").all()


def test_findings_name_who_helps_and_who_harms(results):
    text = findings(results)
    first = text.splitlines()[0]
    assert "**help**: ridge, shrunk to identity (+3.00" in first and "**Harm**: bad model (-9.90" in first
    assert "above it none; below it model" in text and "has ridge, shrunk to identity: 93.00" in text


def test_nobody_helps_in_words(results):
    assert "**help**: none. **Harm**: none." in findings({key: row(0.9) for key in results})


def test_settings_are_counted_over_folds_and_seeds(results):
    assert settings_table(results).loc[("model", "0.5"), "share"] == "9 of 30"


def test_rows_for_plots_keep_the_order(results):
    rows = rate_rows(results, ("FP", "rank1"))
    assert list(rows["model"])[:4] == names_of(results) and set(rows["rate"]) == {RATES["FP"], RATES["rank1"]}


def test_machines_are_named_once(results):
    assert machines(results) == "here"
    results["raw", 0]["machines"] = ["elsewhere", "here"]
    assert machines(results) == "elsewhere and here"


def test_intervals_are_the_jackknife_s():
    values = [0.9, 0.92, 0.95, 0.91, 0.94, 0.9, 0.93, 0.96, 0.89, 0.9]
    without = [(sum(values) - v) / 9 for v in values]
    results = {("a", 0): {"FP": (sum(values) / 10, without)}, ("b", 0): {"FP": (0.5, [0.5] * 10)}}
    found = rate_estimate(results, "a", "FP")
    standard_error = 100 * np.std(values, ddof=1) / math.sqrt(10)  # of a mean the jackknife's is the usual one
    assert found.mean == pytest.approx(92.0) and found.people_error == pytest.approx(standard_error)
    assert found.people == 10 and found.seeds_error == 0
    apart = rate_estimate(results, "a", "FP", "b")
    assert apart.mean == pytest.approx(42.0) and apart.people_error == pytest.approx(standard_error)


def test_seeds_add_their_own_spread():
    of_seed = {0: 0.9, 1: 0.92, 2: 0.94}
    results = {("a", s): {"FP": (v, [v] * 10)} for s, v in of_seed.items()} | {("b", 0): {"FP": (0.9, [0.9] * 10)}}
    found = rate_estimate(results, "a", "FP", "b")  # one without seeds is compared with each
    assert (
        found.mean == pytest.approx(2.0) and found.seeds_error == pytest.approx(2 / math.sqrt(3)) and found.seeds == 3
    )
