import math

import pandas as pd
import pytest

from viewdiff_nb.plots import BIN_NAMES, recognition_curves, save_table
from viewdiff_nb.studies import tables
from viewdiff_nb.studies.adaptation import STUDIED

BINS = ("all", "0-45", "45-90", "0-30", "30-45", "45-60", "60-75", "75-90")


def result(rank1, trainable=1000, lora=0, seconds=10.0):
    """A result in which resampling people moves every rate by .01 up or down, for all models alike."""
    rates = {"rank1": rank1, "tar": rank1 - 0.1, "auc": 0.9, "cosine": 0.5, "centred_cosine": 0.4, "mse": 0.002}
    people = {rate: [value - 0.01, value + 0.01] for rate, value in rates.items()}
    rates["views"] = 9
    both = {f"{part}{kind}": dict.fromkeys(BINS, of) for part in ("val", "test")
            for kind, of in (("", rates), ("_people", people))}  # fmt: skip
    return both | {"parameters": 9000, "trainable": trainable, "lora": lora, "train_seconds": seconds}


@pytest.fixture
def results():
    """Two seeds of everything; LoRA r=8 is better than full fine-tuning by .1 and .3."""
    found = {(name, seed): result(0.5) for name in ("base", "MLP", *STUDIED) for seed in (0, 1)}
    found["raw side view", 0] = result(0.5)
    found["full fine-tuning", 0], found["full fine-tuning", 1] = result(0.5, 9000), result(0.5, 9000, seconds=20.0)
    for seed, rank1, seconds in ((0, 0.6, 5.0), (1, 0.8, 5.0)):
        found["LoRA r=8", seed] = result(rank1, trainable=900, lora=900, seconds=seconds)
    return found


def test_student_interval_by_hand():
    mean, half = tables.mean_interval([0.6, 0.8])
    assert mean == pytest.approx(0.7)
    assert half == pytest.approx(12.706 * math.sqrt(0.02) / math.sqrt(2), rel=1e-4)
    assert math.isnan(tables.mean_interval([1.0])[1])


PEOPLE = 1.959964 * 0.01 * math.sqrt(2)  # of rates that move by .01 up or down


def test_rates_carry_the_uncertainty_of_people_and_seeds(results):
    found = tables.rate_estimate(results, "LoRA r=8", "rank1")
    assert found.mean == pytest.approx(0.7) and found.half == pytest.approx(math.hypot(PEOPLE, 12.7062 * 0.1), rel=1e-5)
    assert tables.rate_estimate(results, "raw side view", "rank1", "75-90").half == pytest.approx(PEOPLE, rel=1e-5)


def test_differences_are_paired_by_seed_and_by_people(results):
    found = tables.difference(results, "LoRA r=8", "full fine-tuning", "rank1")
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(12.7062 * 0.1, rel=1e-5)  # people move both alike
    assert "0.200 ± 1.271 above full fine-tuning in rank1 (all); the interval includes 0" in tables.verdict(
        results, "LoRA r=8", "full fine-tuning", "rank1")  # fmt: skip
    against_one = tables.difference(results, "LoRA r=8", "raw side view", "rank1")  # which has one seed
    assert against_one.mean == pytest.approx(0.2) and against_one.half == pytest.approx(1.27062, rel=1e-5)


def test_verdicts_say_which_way_and_how_sure(results):
    for seed in (0, 1):
        results["LoRA r=8", seed] = result(0.4 + 0.001 * seed)
    words = tables.verdict(results, "LoRA r=8", "full fine-tuning", "rank1")
    assert "below full fine-tuning" in words and "p < .001" in words
    single = {key: value for key, value in results.items() if key[1] == 0}
    assert "this holds for one training only" in tables.verdict(single, "LoRA r=8", "full fine-tuning", "rank1")
    assert len(tables.claims(results).splitlines()) == 11


def test_comparison_tells_apart_what_is(results):
    for seed in (0, 1):
        results["near", seed] = result(0.51)
        results["best", seed] = result(0.53)
    table = tables.comparison_table(results, "best", ["base", "near", "LoRA r=8"], "rank1", ("all",))
    assert table.loc["base", "all"] == "+0.030 ± 0.000 (p < .001)"  # .53 ± .028 and .5 ± .028 overlap
    assert table.loc["near", "all"].startswith("+0.020 ± 0.000 (p < .001)")
    assert table.loc["LoRA r=8", "all"].endswith("(not told apart)")
    results["best", 0] = results["best", 1] = result(0.6)
    assert "(apart)" in tables.comparison_table(results, "best", ["base"], "rank1", ("all",)).loc["base", "all"]


def test_the_best_model_is_chosen_on_validation_people(results):
    for seed in (0, 1):
        results["liked by test people", seed] = result(0.9) | {"val": result(0.3)["val"]}
        results["good", seed] = result(0.8)
    assert tables.best_on_validation(results, ["base", "liked by test people", "good"]) == "good"


def test_goals_are_checked_not_claimed(results):
    for seed in (0, 1):
        results["best", seed] = result(0.94)
    words = tables.goals(results, "best", ["raw side view", "MLP"])
    assert "rank1 (all): 0.940 ± 0.028, goal 0.93: reached" in words
    assert "tar (all): 0.840 ± 0.028 against 0.400 ± 0.028 of the best baseline" in words
    assert "**" not in words
    results["best", 0] = results["best", 1] = result(0.45)
    words = tables.goals(results, "best", ["raw side view", "MLP"])
    assert "goal 0.93: **missed**" in words and "**the intervals overlap**" in words and "**something is lost**" in words


def test_parameter_table_has_the_guide_beside_it():
    counts = {"full fine-tuning": {"parameters": 9000, "trainable": 9000, "lora": 0},
              "LoRA r=8": {"parameters": 9900, "trainable": 900, "lora": 900}}  # fmt: skip
    table = tables.parameter_table(counts)
    assert table.loc["LoRA r=8", "reduction"] == "90.0%" and table.loc["LoRA r=8", "guide: reduction"] == "80%"
    assert table.loc["full fine-tuning", "reduction"] == "0.0%"
    assert list(table.columns[:2]) == ["total", "guide: total"]


def test_quality_table_pairs_times_by_seed(results):
    table = tables.quality_table(results)
    assert table.loc["LoRA r=8", "training time"].startswith("38%")  # mean of 5/10 and 5/20
    assert table.loc["LoRA r=8", "rank-1"].startswith("0.700 ±")
    assert table.loc["base", "training time"] == "–" and table.loc["LoRA r=8", "guide: cosine"] == "0.984"
    assert "by rank-1: LoRA r=8 >" in tables.quality_findings(results)


def test_speed_table_and_findings():
    names = tuple(tables.GUIDE_SPEED)
    rows = [{"batch_size": 32, "amp": False, "name": n, "ms": 10.0 * (i + 1), "ms_low": 9.0, "ms_high": 12.0,
             "memory_mb": 100.0, "speed": 1 / (i + 1), "memory": 0.4} for i, n in enumerate(names)]  # fmt: skip
    table = tables.speed_table(pd.DataFrame(rows), 32, False)
    assert table.loc["LoRA r=4", "speed"] == "0.50x" and table.loc["LoRA r=4", "guide: speed"] == "2.5x"
    assert "LoRA r=8 0.33x (guide 2x)" in tables.speed_findings(pd.DataFrame(rows))


def test_recognition_table_and_figures(results, tmp_path):
    table = tables.recognition_table(results, "rank1")
    assert list(table.columns) == list(BINS) and table.loc["LoRA r=8", "75-90"].startswith("0.700 ± ")
    save_table(table, "t", tmp_path / "new", "Title", "a note")
    assert pd.read_csv(tmp_path / "new/t.csv", index_col=0).loc["base", "all"] == "0.500 ± 0.028"
    assert (tmp_path / "new/t.png").read_bytes()[:4] == b"\x89PNG"
    shown = ["full fine-tuning", "LoRA r=8"]
    figure = recognition_curves(tables.estimates(results, shown, "rank1", BIN_NAMES), "rank-1", "title")
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == shown
