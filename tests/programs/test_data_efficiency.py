import re
from pathlib import Path

import data_efficiency
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import people
from data_efficiency import (
    HALF_WAY,
    PEOPLE,
    RANKS,
    efficiency_table,
    families,
    findings,
    of_few,
    wide_table,
)
from studies_fixture import TINY

from viewdiff_nb.modules.adjusted import Adjusted
from viewdiff_nb.modules.baselines import PoseRidge, RawEmbedding
from viewdiff_nb.studies import real_models
from viewdiff_nb.studies.real_benchmark import stand_in
from viewdiff_nb.studies.real_faces import score_fold
from viewdiff_nb.studies.real_models import Family
from viewdiff_nb.studies.real_tables import RATES

BASES = [Path("base 0"), Path("base 1")]


@pytest.fixture(scope="module")
def benchmark():
    return stand_in(people(40, views=12, noise=0.6))


class Seen:
    """Candidates that remember whom they were given."""

    def __init__(self):
        self.calls = []

    def __call__(self, faces, seed, wanted):
        self.calls.append((faces, seed, wanted))
        return {HALF_WAY: RawEmbedding()}

    @property
    def names(self):
        return [faces.names for faces, _, _ in self.calls]


def test_so_many_people_are_drawn_by_the_seed():
    """All of their views, none twice; the seed and what is wanted are passed on."""
    faces, seen = people(30, views=4), Seen()
    for seed in (0, 0, 1, 2):
        of_few(seen, 7, faces, seed, [HALF_WAY])
    first, again, *others = seen.names
    assert first == again and len(set(first)) == 7 and set(first) < set(faces.names)
    assert len({first, *others}) == 3  # other seeds draw other people
    assert [(seed, wanted) for _, seed, wanted in seen.calls] == [(s, [HALF_WAY]) for s in (0, 0, 1, 2)]
    some = seen.calls[0][0]
    assert torch.bincount(some.person).tolist() == [4] * 7
    for row, name in enumerate(some.names):
        torch.testing.assert_close(some.src[some.person == row], faces.src[faces.person == faces.names.index(name)])
    of_few(seen, 30, faces, 5)
    assert set(seen.names[-1]) == set(faces.names)


def test_everybody_is_drawn_about_as_often():
    faces, seen = people(10, views=1), Seen()
    for seed in range(200):
        of_few(seen, 3, faces, seed)
    drawn = np.array([sum(name in names for names in seen.names) for name in faces.names])
    assert (np.abs(drawn - 60) < 30).all()  # 60 ± 6.5


@pytest.mark.parametrize("fold", [0, 7])
def test_nobody_of_the_tested_fold_is_drawn(benchmark, fold):
    seen = Seen()
    family = Family(lambda *given: of_few(seen, 35, *given), {"row": HALF_WAY}, random=True)
    found = score_fold(family, benchmark, fold, 1)
    tested = {benchmark.faces.names[i] for i in (benchmark.fold == fold).nonzero()[:, 0]}
    (names,) = seen.names  # nothing was chosen, so they were fitted once
    assert len(tested) == 4 and len(names) == 35 and not tested & set(names)
    assert found["row"]["setting"] == str(HALF_WAY) and set(seen.calls[0][2]) == {HALF_WAY}


@pytest.mark.parametrize(("count", "epochs"), [(10, 8), (50, 8), (100, 8), (150, 6), (225, 4), (450, 2)])
def test_fewer_people_are_seen_more_often(monkeypatch, count, epochs):
    """Two epochs of 450 people, as many steps of fewer, but eight epochs at most; from each seed's base, or from none."""
    trained = []

    def remember(config, build, bases, faces, seed, wanted=None):
        trained.append((config, tuple(bases)))
        return {}

    monkeypatch.setattr(data_efficiency, "trained_candidates", remember)
    every = families(TINY, BASES, count)
    monkeypatch.setattr(data_efficiency, "closed_candidates", lambda *_: {})
    for family in families(TINY, BASES, count).values():
        family.candidates(people(count, views=2), 0, [HALF_WAY])
    assert (
        len(every) == len(trained) + 4
        and len(trained) == len(RANKS) + 3
        and {config.epochs for config, _ in trained} == {epochs}
    )
    assert [bases for _, bases in trained] == [tuple(BASES)] * (len(RANKS) + 2) + [()]
    lora = [config for config, _ in trained if config.use_lora_attention]
    assert [config.rank for config in lora] == [*RANKS, 8] and all(c.lora_alpha == c.rank for c in lora)
    assert all(config.freeze_base for config in lora)
    assert [config.use_projection_layer for config, _ in trained] == [False] * 5 + [True, False, False]
    assert not any(config.freeze_base or config.use_lora_attention for config, _ in trained[-2:])


def test_rows_say_how_many_people():
    """Each names its own setting, so nothing is chosen, and is drawn anew with each seed."""
    every = families(TINY, BASES, 25)
    ways = [name.removesuffix(", 25 people") for name in every]
    networks = [f"LoRA r={rank}" for rank in RANKS] + ["LoRA r=8 + 3-D projection", "full fine-tuning", "from scratch"]
    assert ways[:8] == networks
    assert ways[8:] == ["centred by pose", "ridge", "within-class whitening", "whitening + canonical correlation"]
    for name, family in every.items():
        assert list(family.rows) == [name] and name.endswith(", 25 people") and family.random
        assert not callable(family.rows[name])
        from_base = "LoRA" in name or "fine-tuning" in name
        assert list(family.bases) == (BASES if from_base else [])
    assert not set(every) & set(families(TINY, BASES, 50))


def test_closed_forms_of_few_people_have_the_setting_of_their_row(benchmark):
    for name, family in families(TINY, BASES, 10).items():
        if not family.bases and "scratch" not in name:
            fitted = family.candidates(benchmark.faces, 0, None)
            model = fitted[family.rows[name]]
            predicted = model(benchmark.faces.src, **benchmark.faces.conditions(), return_residual=False)
            assert predicted.isfinite().all() and len(predicted) == len(benchmark.faces)


def test_the_ridge_goes_half_of_the_way():
    faces = people(20, views=8)
    (found,) = data_efficiency.ridge_half_way(faces).items()
    ridge = PoseRidge(faces.src, faces.angles, faces.target, 300.0, residual=True)
    given = faces.src, faces.angles, faces.keypoints_3d, faces.front
    expected = Adjusted(ridge, *given, step=0.5, centring="even")
    unit = F.normalize(faces.src, dim=1)
    assert found[0] == HALF_WAY == (1.0, 0.5, "even")
    torch.testing.assert_close(found[1].predict(unit, *given[1:3]), expected.predict(unit, *given[1:3]))


def test_a_network_of_few_people_is_trained_once(benchmark, monkeypatch):
    trained = []
    train_pass = real_models.train_pass

    def count(configs, split, model=None):
        trained.append((configs[0].epochs, configs[0].seed, len(split.train.names)))
        return train_pass(configs, split, model)

    monkeypatch.setattr(real_models, "train_pass", count)
    family = families(TINY, [], 30)["from scratch, 30 people"]
    found = score_fold(family, benchmark, 0, 1)
    assert trained == [(8, 1, 28)] and list(found) == ["from scratch, 30 people"]


def rates(value, seed=0, names=("rank1", "auc")):
    """Of one row and seed: each rate, and as much spread of resampled people that 1.96 times it is 1.96 percent."""
    spread = np.random.default_rng(seed).normal(0, 1, 400)
    spread = (spread - spread.mean()) / spread.std(ddof=1) * 0.01
    return {rate: (value + i / 100, (value + i / 100 + spread).tolist()) for i, rate in enumerate(names)}


WAYS = {"raw": 0.5, "ridge, 10 people": 0.6, "ridge, 450 people": 0.65, "LoRA r=8 + 3-D projection, 450 people": 0.7}


def test_the_table_is_by_way_and_number():
    """Percent, with half of the interval: the normal quantile times the spread of the resamples."""
    table = efficiency_table({(row, 0): rates(value) for row, value in WAYS.items()})
    assert list(table.columns) == ["way", "people", "rate", "mean", "half"]
    ways = [("raw", 0), ("ridge", 10), ("ridge", 450), ("LoRA r=8 + 3-D projection", 450)]
    expected = [[way, number, rate] for way, number in ways for rate in (RATES["rank1"], RATES["auc"])]
    assert table[["way", "people", "rate"]].to_numpy().tolist() == expected
    np.testing.assert_allclose(table["mean"], [50, 51, 60, 61, 65, 66, 70, 71])
    np.testing.assert_allclose(table["half"], 1.96, rtol=1e-3)
    (only,) = efficiency_table({("raw", 0): rates(0.5)}, ["auc"])["mean"]
    assert only == pytest.approx(51)


def test_the_wide_table_has_a_column_per_number_of_people():
    """By number, not by text; an empty cell is a way that was not tried with so many."""
    found = efficiency_table({(row, 0): rates(value) for row, value in WAYS.items()})
    table = wide_table(found)
    assert list(table.columns) == ["none", "10 people", "450 people"]
    ways = ("raw", "ridge", "LoRA r=8 + 3-D projection")
    assert table.index.tolist() == [(RATES[rate], way) for rate in ("rank1", "auc") for way in ways]
    assert table.loc[(RATES["rank1"], "ridge")].tolist() == ["", "60.0 ± 2.0", "65.0 ± 2.0"]
    assert table.loc[(RATES["auc"], "raw")].tolist() == ["51.0 ± 2.0", "", ""]


def test_findings_say_what_is_told_apart():
    """After Holm, of ten comparisons. The spread of a difference is 1.4 points: 20 are told, 1 is not, and 3, whose
    p-value is .034 by itself, neither."""
    values = {"LoRA r=8": 0.7, "full fine-tuning": 0.69, "from scratch": 0.5}
    values |= {"ridge": 0.73, "within-class whitening": 0.9}
    results = {("raw", 0): rates(0.67, seed=99)}
    for number in (25, 100):
        for i, (way, value) in enumerate(values.items()):
            results[f"{way}, {number} people", 0] = rates(value, seed=number + i)
    alone = findings({key: value for key, value in results.items() if "100" not in key[0]})
    assert re.sub(r" ± \d\.\d", "", alone).splitlines() == [
        "- LoRA r=8 against full fine-tuning, points of rank-1: 25 people: +1.0 (not told).",
        "- LoRA r=8 against from scratch, points of rank-1: 25 people: +20.0.",
        "- LoRA r=8 against ridge, points of rank-1: 25 people: -3.0 (not told).",
        "- LoRA r=8 against within-class whitening, points of rank-1: 25 people: -20.0.",
        "- LoRA r=8 against raw, points of rank-1: 25 people: +3.0 (not told).",
        "- (p after Holm, 5 comparisons)",
    ]
    both = re.sub(r" ± \d\.\d", "", findings(results))
    assert "against from scratch, points of rank-1: 25 people: +20.0; 100 people: +20.0." in both
    assert both.endswith("10 comparisons)") and both.count("not told") == 6


def test_the_numbers_of_people_reach_all_of_cfp_s_training_folds():
    assert PEOPLE[-1] == 450 and list(PEOPLE) == sorted(set(PEOPLE))


def test_more_people_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="10 people are asked for, the training folds have 4"):
        of_few(lambda *_: {}, 10, people(4), 0)
