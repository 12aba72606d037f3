import math
import re

import pandas as pd
import pytest
import torch
from scipy import stats

from viewdiff_nb.faces import FaceViews, split_by_person
from viewdiff_nb.metrics import FAR
from viewdiff_nb.plots import BIN_NAMES
from viewdiff_nb.studies import adaptation, tables

BINS = ("all", "0-45", "45-90", "0-30", "30-45", "45-60", "60-75", "75-90")


def result(rank1, trainable=1000, lora=0, seconds=10.0):
    """A result in which resampling people moves every rate by .01 up or down, for all models alike."""
    rates = {"rank1": rank1, "tar": rank1 - 0.1, "auc": 0.9, "cosine": 0.5, "centred_cosine": 0.4, "mse": 0.002}
    people = {rate: [value - 0.01, value + 0.01] for rate, value in rates.items()}
    rates |= {"views": 9, "people": 300}
    both = {
        f"{part}{kind}": dict.fromkeys(BINS, of)
        for part in ("val", "test")
        for kind, of in (("", rates), ("_people", people))
    }
    return both | {"parameters": 9000, "trainable": trainable, "lora": lora, "train_seconds": seconds}


@pytest.fixture
def results():
    """Two seeds of everything; LoRA r=8 is better than full fine-tuning by .1 and .3."""
    found = {(name, seed): result(0.5) for name in ("base", "MLP", "full fine-tuning", "LoRA r=8") for seed in (0, 1)}
    found["raw side view", 0] = result(0.5)
    found["full fine-tuning", 0], found["full fine-tuning", 1] = result(0.5, 9000), result(0.5, 9000, seconds=20.0)
    for seed, rank1, seconds in ((0, 0.6, 5.0), (1, 0.8, 5.0)):
        found["LoRA r=8", seed] = result(rank1, trainable=900, lora=900, seconds=seconds)
    return found


PEOPLE = 1.967930 * 0.01 * math.sqrt(2)  # of rates of 300 people that move by .01 up or down


def test_rates_carry_the_uncertainty_of_people_and_seeds(results):
    found = tables.rate_estimate(results, "LoRA r=8", "rank1")
    assert found.mean == pytest.approx(0.7) and found.half == pytest.approx(math.hypot(PEOPLE, 12.7062 * 0.1), rel=1e-5)
    assert tables.rate_estimate(results, "raw side view", "rank1", "75-90").half == pytest.approx(PEOPLE, rel=1e-5)


def test_differences_are_paired_by_seed_and_by_people(results):
    found = tables.difference(results, "LoRA r=8", "full fine-tuning", "rank1")
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(12.7062 * 0.1, rel=1e-5)  # people move both alike
    against_one = tables.difference(results, "LoRA r=8", "raw side view", "rank1")  # which has one seed
    assert against_one.mean == pytest.approx(0.2) and against_one.half == pytest.approx(1.27062, rel=1e-5)


def test_comparison_tells_apart_what_is(results):
    for seed in (0, 1):
        results["near", seed] = result(0.51)
        results["best", seed] = result(0.53 + 1e-6 * seed)
    table = tables.comparison_table(results, "best", ["base", "near", "LoRA r=8"], "rank1", ("all",))
    assert table.loc["base", "all"] == "+0.030 ± 0.000 (p < .001)"
    assert table.loc["near", "all"] == "+0.020 ± 0.000 (p < .001)"
    assert table.loc["LoRA r=8", "all"].endswith("(not told apart)")


def test_a_comparison_is_corrected_for_the_size_of_its_table(results):
    differences = [0.1, 0.101]
    for seed, apart in enumerate(differences):
        results["best", seed] = result(0.5 + apart)
    p = stats.ttest_1samp(differences, 0).pvalue
    for bins in (BINS[:1], BINS[:4]):
        table = tables.comparison_table(results, "best", ["base", "MLP"], "rank1", bins)
        assert table.loc["MLP", "all"].endswith(f"(p {2 * len(bins) * p:.3f})".replace("0.", "."))
        assert f"Holm, {2 * len(bins)} comparisons" in table.index.name  # in the CSV and in the picture
    table = tables.comparison_table(results, "best", ["base", "MLP"], "rank1", BINS)  # 16 * .0032 is .0507
    assert 0.05 < 16 * p < 0.06 and (table.map(lambda cell: "not told apart" in cell)).all(axis=None)


def small_set(people, views):
    """Random people whose views are noisy copies of their fronts, by yaw."""
    front, person = torch.randn(people, 32), torch.arange(people).repeat_interleave(views)
    yaw = torch.linspace(-89, 89, views).repeat(people)
    angles = torch.stack((0 * yaw, yaw.deg2rad(), 0 * yaw), 1)
    src = front[person] + yaw.abs()[:, None] / 45 * torch.randn(len(yaw), 32)
    return FaceViews(tuple(map(str, range(people))), front, src, torch.randn(len(yaw), 5, 3), angles, person)


@pytest.mark.parametrize("people,views", [(72, 8), (60, 16)])
def test_the_notebook_of_your_own_faces_works_at_its_minimum(people, views):
    """What notebook 05 makes of as few people: held-out people scored, tables of rates, a comparison by yaw."""
    test = split_by_person(small_set(people, views), val=people // 6, test=people // 6).test
    results = {("raw side view", 0): adaptation.score(test.src, test, "test", fars=(FAR,))}
    results["trained model", 0] = adaptation.score(test.src + test.target, test, "test", fars=(FAR,))
    bins = [name for name in BIN_NAMES if name in results["raw side view", 0]["test"]]
    for rate in ("rank1", "tar", "eer", "accuracy", "cosine"):
        table = tables.recognition_table(results, rate)
        table = table.map(lambda cell: bool(re.fullmatch(r"\d\.\d{3} (± \d\.\d{3}|\([≤≥] \d\.\d{3}\))", cell)))
        assert table.all(axis=None), rate
    compared = tables.comparison_table(results, "trained model", ["raw side view"], "tar", ("all", *bins))
    assert not compared.map(lambda cell: "nan" in cell or "too few" in cell).any(axis=None)


def test_a_set_too_small_for_a_rate_says_so():
    test = small_set(20, 6)
    results = {("raw side view", 0): adaptation.score(test.src, test, "test")}
    assert tables.recognition_table(results, "tar@1e-4").eq("too few").all(axis=None)
    assert not tables.recognition_table(results, "tar").eq("too few").any(axis=None)
    results["other", 0] = results["raw side view", 0]
    table = tables.comparison_table(results, "other", ["raw side view"], "tar@1e-4", ("all",))
    assert table.loc["raw side view", "all"] == "too few"


def test_parameter_table_has_the_guide_beside_it():
    counts = {
        "full fine-tuning": {"parameters": 9000, "trainable": 9000, "lora": 0},
        "LoRA r=8": {"parameters": 9900, "trainable": 900, "lora": 900},
    }
    table = tables.parameter_table(counts)
    assert table.loc["LoRA r=8", "reduction"] == "90.0%" and table.loc["LoRA r=8", "guide: reduction"] == "80%"
    assert table.loc["full fine-tuning", "reduction"] == "0.0%"
    assert list(table.columns[:2]) == ["total", "guide: total"]


def test_speed_table_and_findings():
    names = tuple(tables.GUIDE_SPEED)
    rows = [
        {
            "batch_size": 32,
            "amp": False,
            "name": n,
            "ms": 10.0 * (i + 1),
            "ms_low": 9.0,
            "ms_high": 12.0,
            "memory_mb": 100.0,
            "speed": 1 / (i + 1),
            "memory": 0.4,
        }
        for i, n in enumerate(names)
    ]
    table = tables.speed_table(pd.DataFrame(rows), 32, False)
    assert table.loc["LoRA r=4", "speed"] == "0.50x" and table.loc["LoRA r=4", "guide: speed"] == "2.5x"
    assert "LoRA r=8 0.33x (guide 2x)" in tables.speed_findings(pd.DataFrame(rows))


def test_recognition_table_and_estimates(results):
    table = tables.recognition_table(results, "rank1")
    assert list(table.columns) == list(BINS) and table.loc["LoRA r=8", "75-90"].startswith("0.700 ± ")
    assert table.loc["base", "all"] == "0.500 ± 0.028"
    found = tables.estimates(results, ["full fine-tuning", "LoRA r=8"], "rank1", BIN_NAMES)
    assert list(found) == ["model", "yaw", "mean", "half"]
    assert list(found["model"].unique()) == ["full fine-tuning", "LoRA r=8"] and list(found["yaw"][:5]) == BIN_NAMES
    assert found["mean"].tolist() == pytest.approx([0.5] * 5 + [0.7] * 5)


def shipped(**means) -> pd.DataFrame:
    rows = [
        {"model": model, "rate": rate, "yaw": yaw, "mean": mean + 0.1 * (yaw == "0-45"), "half": 0.01}
        for model, mean in means.items()
        for rate in ("rank1", "mse", "cosine")
        for yaw in ("all", "0-45")
    ]
    return pd.DataFrame(rows)


def test_the_highest_rate_of_a_column_is_marked():
    table = tables.rates_by_yaw(shipped(a=0.5, b=0.7, c=0.6), ["a", "c"], "rank1")
    assert table.to_dict("index") == {
        "a": {"all": "0.500 ± 0.010", "0-45": "0.600 ± 0.010"},
        "c": {"all": "0.600 ± 0.010 *", "0-45": "0.700 ± 0.010 *"},
    }


def test_quality_stands_beside_the_guide_in_both_recipes():
    rates = shipped(**{"base": 0.5, "LoRA r=8": 0.6, "guide: LoRA r=8": 0.4, "MLP": 0.9})
    table = tables.quality_table(rates)
    assert list(table.index) == ["base", "LoRA r=8", "guide: LoRA r=8"]
    assert table.loc["LoRA r=8", "MSE x 1000"] == "600.000 ± 10.000"
    assert table["guide: cosine"].tolist() == ["–", "0.984", "0.984"]
    assert list(table) == ["MSE x 1000", "guide: loss", "cosine", "guide: cosine", "rank-1"]
