import numpy as np
import pytest

from viewdiff_nb.studies.real_rates import names_of
from viewdiff_nb.studies.real_tables import (
    RATES,
    differences_table,
    findings,
    in_words,
    machines,
    rate_rows,
    rates_table,
    settings_table,
)

PEOPLE = np.random.default_rng(0).standard_normal(400)


def row(value, spread=0.002, setting="(1.0, 1.0, 'none')"):
    """A result whose resamples of people spread around value."""
    drawn = (value + spread * PEOPLE).tolist()
    settings = {setting: 7, "(0.25, 0.5, 'even')": 3}
    return dict.fromkeys(RATES, (value, drawn)) | {"settings": settings, "machines": ["here"]}


@pytest.fixture
def results():
    return {
        ("raw", 0): row(0.90),
        ("ridge, shrunk to identity", 0): row(0.93, 0.003),
        **{("model", seed): row(0.90 + 0.001 * (seed - 1), 0.0021) for seed in range(3)},
        **{("bad model", seed): row(0.80 + 0.0001 * seed, 0.003) for seed in range(3)},
    }


def test_every_rate_has_its_interval(results):
    table = rates_table(results)
    assert list(table.index) == names_of(results) and table.loc["raw", "FP acc %"].startswith("90.0 ± 0.4")
    assert table.loc["bad model", "most often chosen"] == "1.0 of the epochs, step 1.0 (21 of 30)"


def test_differences_are_signed_and_judged(results):
    table = differences_table(results, ["raw"])
    assert "raw" not in table.index and table.shape == (3, 4)
    assert table.loc["bad model"].str.startswith("-9.99").all() and table.loc["bad model"].str.contains("p <").all()
    assert table.loc["model"].str.contains("not told apart").all()


def test_findings_name_who_is_above_and_who_is_below(results):
    text = findings(results)
    first = text.splitlines()[0]
    assert "told above it: ridge, shrunk to identity (+3.00" in first and "Told below it: bad model (-9.99" in first
    against_ridge = next(line for line in text.splitlines() if "against ridge" in line)
    assert "told above it: none" in against_ridge and "model (-3.00" in against_ridge
    assert "has ridge, shrunk to identity: 93.00" in text and "against centred by pose" not in text


def test_nobody_is_told_apart_in_words(results):
    assert "told above it: none. Told below it: none." in findings({key: row(0.9) for key in results})


def test_settings_are_counted_over_folds_and_seeds(results):
    assert settings_table(results).loc[("model", "0.25 of the epochs, step 0.5, centred"), "share"] == "9 of 30"
    assert (
        in_words("('even',)") == "centred" and in_words("('none',)") == "not centred" and in_words("('raw',)") == "raw"
    )


def test_rows_for_plots_keep_the_order(results):
    rows = rate_rows(results, ("FP", "rank1"))
    assert list(rows["model"])[:4] == names_of(results) and set(rows["rate"]) == {RATES["FP"], RATES["rank1"]}


def test_machines_are_named_once(results):
    assert machines(results) == "here"
    results["raw", 0]["machines"] = ["elsewhere", "here"]
    assert machines(results) == "elsewhere and here"
