from dataclasses import replace

import pytest
import torch
from conftest import people
from torch import nn

from viewdiff_nb.studies.adaptation import ADAPTATIONS
from viewdiff_nb.studies.benchmark import TrainingStep, machine, speed_and_memory
from viewdiff_nb.training.config import TrainConfig

SMALL = TrainConfig(d_model=32, nhead=4, num_layers=1, dim_feedforward=48, voxel_resolution=4)


def test_memory_of_a_step_counted_by_hand():
    """Linear(3, 2) on 5 rows: weights, gradients and two Adam moments each, plus what backward needs."""
    step = TrainingStep(SMALL, people(8), 5, amp=False)
    step.model = nn.Linear(3, 2, bias=False)
    step.optimizer = torch.optim.AdamW(step.model.parameters(), fused=True)
    step.trainable = list(step.model.parameters())
    x = torch.randn(5, 3)
    step.forward = lambda: step.model(x).square().sum()
    weight = 3 * 2 * 4
    states = 2 * weight + 4  # the two moments, and the step count
    kept = x.numel() * 4 + 5 * 2 * 4  # the input of the product, and of the square
    assert step.memory() == weight + weight + states + kept


def test_frozen_weights_need_no_gradient_and_no_state():
    faces = people(8)
    full = TrainingStep(SMALL, faces, 16, amp=False).memory()
    lora = TrainingStep(replace(SMALL, use_lora_attention=True), faces, 16, amp=False).memory()
    assert lora < full


def test_rows_and_ratios(monkeypatch):
    from viewdiff_nb.studies import benchmark

    monkeypatch.setattr(benchmark, "COMMON", replace(SMALL, batch_size=8))
    table = speed_and_memory(people(8), batch_sizes=(8,), rounds=2, steps=1, device="cpu")
    assert len(table) == 2 * len(ADAPTATIONS) and (table["ms"] > 0).all() and (table["ms_low"] <= table["ms_high"]).all()
    first = table[table["name"] == "full fine-tuning"]
    assert (first["speed"] == 1).all() and (first["memory"] == 1).all()
    row = table[(table["name"] == "LoRA r=8") & ~table["amp"]].iloc[0]
    assert row["speed"] == pytest.approx(first[~first["amp"]]["ms"].iloc[0] / row["ms"])


def test_the_machine_is_named():
    assert "torch" in machine("cpu") and "cores" in machine("cpu")
