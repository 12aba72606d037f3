"""Equal trials, a choice by code, and new seeds."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from studies_fixture import TINY, small_split

from viewdiff_nb.studies import controls
from viewdiff_nb.studies.controls import Effort
from viewdiff_nb.studies.store import Store
from viewdiff_nb.training import TrainingDiverged

TRIALS = (
    {"lr": 1e-3, "lora_lr": 1e-3, "weight_decay": 0.01, "dropout": 0.1},
    {"lr": 1e-2, "lora_lr": 1e-2, "weight_decay": 1.0, "dropout": 0.0},
)
TOY_EFFORT = Effort(TINY, TRIALS, (1,), 1, 1, 1, 1)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    split = small_split()
    made = TOY_EFFORT, split, Store(split, tmp_path)
    monkeypatch.setitem(controls.EFFORTS, "toy", TOY_EFFORT)
    monkeypatch.setattr(controls, "setting", lambda effort: made)
    return "toy"


def test_the_trial_with_the_highest_tar_is_chosen(toy, monkeypatch):
    tar = {0: 0.4, 1: 0.6}
    monkeypatch.setattr(
        controls, "try_out", lambda effort, name, i: {"settings": TRIALS[i], "val": {"all": {"tar": tar[i]}}}
    )
    assert controls.choose(toy, "LoRA r=8") == TRIALS[1]
    tar[0] = 0.7
    assert controls.choose(toy, "LoRA r=8") == TRIALS[0]
    assert controls.choose(toy, "guide: LoRA r=8") == {}


def test_a_trial_that_diverges_counts_as_one(toy, monkeypatch):
    def diverge(*_):
        raise TrainingDiverged("no number")

    monkeypatch.setattr(controls, "_trained", diverge)
    found = controls.try_out(toy, "small transformer", 0)
    assert found["val"]["all"]["tar"] == -1.0 and found["settings"] == TRIALS[0]


def test_shipped_settings_are_those_of_the_table(tmp_path, monkeypatch):
    settings = {"lr": 0.5}
    pd.DataFrame([{"model": "LoRA r=8", "settings": json.dumps(settings)}]).to_csv(tmp_path / "models.csv")
    monkeypatch.setattr(controls, "CONTROL_RESULTS", tmp_path)
    controls.shipped_settings.cache_clear()
    try:
        assert controls.choose("shipped", "LoRA r=8") == settings
    finally:
        controls.shipped_settings.cache_clear()


@pytest.mark.parametrize(
    "name", ["LoRA r=4", "projection, pose not undone", "MLP, 256 wide", "guide: full fine-tuning"]
)
def test_what_was_chosen_is_trained_with_another_seed_and_scored_once(toy, name):
    found = controls.final(toy, name, 1)
    assert found["settings"] in ({}, *TRIALS)
    assert set(found["test"]) == set(found["test_people"]) and "val" in found
    assert found["key"]["config"]["seed"] == 1
    again = controls.final(toy, name, 1)
    assert again == found  # from the store


def test_cross_view_rows_start_from_a_model_of_single_views(toy):
    found = controls.final(toy, "cross-view, 2 views that do not meet", 1)
    average = controls.final(toy, "average, 2 views", 1)
    assert found["key"]["config"]["base_model_path"] == average["key"]["config"]["base_model_path"]
    assert found["test"]["all"]["views"] == average["test"]["all"]["views"] == 40 * 6  # groups of two of twelve


def test_fewer_people_see_as_many_samples(toy, monkeypatch):
    seen = []
    original = controls._trained

    def watched(effort, name, config, split=None):
        seen.append((config.epochs, len(split.train), len(split.train.names)))
        return original(effort, name, config, split)

    monkeypatch.setattr(controls, "choose", lambda *_: TRIALS[0])
    monkeypatch.setattr(controls, "_trained", watched)
    controls.fewer(toy, "MLP, 256 wide", 15, 6, 1)
    assert seen == [(4, 15 * 6, 15)]  # a quarter of 30 people's 12 views, four times


def test_all_have_the_same_trials_and_a_new_seed():
    assert len(controls.TRIALS) == len({tuple(trial.items()) for trial in controls.TRIALS}) == 24
    assert 0 not in controls.FULL.seeds  # which was tuned with
    assert replace(controls.FULL, trials=()) == controls.EFFORTS["shipped"]
