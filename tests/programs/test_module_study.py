import module_study as study
import pytest
from conftest import people
from studies_fixture import TINY, small_split

from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.studies.store import Store


def test_all_modules_and_view_counts_run_and_are_tabled(tmp_path):
    split = small_split()
    options = {"seeds": [0, 1], "workers": 1, "store": Store(split, tmp_path)}
    modules = study.module_study(TINY, split, **options)
    views = study.multi_view_study(TINY, split, **options)
    assert {name for name, _ in modules} == {"base", *study.MODULES}
    assert modules["LoRA without pose", 0]["trainable"] < modules["LoRA", 0]["trainable"]
    table = study.module_table(modules, "val")
    assert list(table.index) == ["base", *study.MODULES] and "±" in table.loc["LoRA", "TAR ≥ 45°"]
    earned = study.earnings_table(modules, "test")
    assert list(earned.index) == ["LoRA", "projection", "pose in LoRA", "LoRA", "projection", "prior"]
    assert len(study.multi_view_table(views, "test")) == 2 * 3 * 2
    study.write_tables(modules, views, tmp_path / "tables", "note")
    assert len(list((tmp_path / "tables").glob("*.csv"))) == len(list((tmp_path / "tables").glob("*.png"))) == 6


def test_fused_views_are_scored_by_person():
    """Views that are noise around their front: the mean of several is nearer than one."""
    faces = people(60, views=6, noise=2.0)
    rates = {v: study.multi_view_rates(RawEmbedding(), faces, v)["rank1"] for v in (1, 3, 6)}
    assert rates[1] < rates[3] < rates[6]


def test_earnings_are_paired_differences():
    def rates(value):
        bins = {where: {"rank1": value, "tar": value} for where in ("all", "0-45", "45-90")}
        return {"val": bins, "test": bins, "trainable": 1}

    results = {(name, s): rates(0.5 + 0.1 * s) for name in ("base", *study.MODULES) for s in (0, 1, 2)}
    for s in (0, 1, 2):
        results["LoRA", s] = rates(0.7 + 0.1 * s + 1e-5 * s)
    table = study.earnings_table(results, "val")
    assert "Holm, 24 comparisons" in table.index.name
    table = table.reset_index()
    assert table.loc[0, "rank-1 ≥ 45°"] == "+0.200 ± 0.000 (p < .001)"
    assert table.loc[1, "rank-1 ≥ 45°"] == "+0.000 ± 0.000 (not told apart)"
    assert table.loc[0, "added"] == "alone"


def test_too_few_views_to_fuse():
    with pytest.raises(ValueError, match="no person has 7 views to fuse"):
        study.multi_view_rates(RawEmbedding(), people(5, views=6), 7)


def test_view_batches_fit_all_view_counts():
    assert all(study.VIEW_BATCH % views == 0 for views in study.VIEW_COUNTS)
