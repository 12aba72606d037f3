from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import DEVICES, people
from gpu.steps import CapturedStep, CountedStep, attempt_side_by_side
from torch import nn

from viewdiff_nb.studies import benchmark
from viewdiff_nb.studies.adaptation import ADAPTATIONS
from viewdiff_nb.studies.benchmark import (
    TrainingStep,
    machine,
    side_by_side,
    speed_and_memory,
    speed_on_both,
)
from viewdiff_nb.training.config import TrainConfig

SMALL = TrainConfig(d_model=32, nhead=4, num_layers=1, dim_feedforward=48, voxel_resolution=4)


CONFIGS = {  # what a step may be made of
    "full": SMALL,
    "lora": replace(SMALL, use_lora_attention=True, rank=4),
    "projection": replace(SMALL, use_lora_attention=True, rank=4, use_projection_layer=True),
    "prior": replace(SMALL, use_lora_attention=True, rank=4, use_prior_preservation=True, base_model_path="built here"),
}


@pytest.fixture
def product():
    """The step of a Linear(3, 2) on 5 rows, bytes of its weight, and of what backward needs."""
    step = CountedStep(SMALL, people(8), 5, amp=None)
    step.model = nn.Linear(3, 2, bias=False)
    step.optimizer = torch.optim.AdamW(step.model.parameters(), fused=True)
    step.trainable = list(step.model.parameters())
    x = torch.randn(5, 3)
    step.loss = lambda prior_rows: step.model(x).square().sum()
    return step, 3 * 2 * 4, (5 * 3 + 5 * 2) * 4  # the input of the product, and of the square


def test_memory_of_a_step_counted_by_hand(product):
    """Weights, gradients and two Adam moments each, plus what backward needs."""
    step, weight, kept = product
    states = 2 * weight + 4  # the two moments, and the step count
    assert step.memory() == weight + weight + states + kept


def test_traffic_and_operations_counted_by_hand(product):
    step, weight, kept = product
    assert step.traffic() == 2 * weight + 2 * kept + 5 * weight + 6 * weight
    assert step.operations() == 2 * (2 * 5 * 3 * 2)  # y = x W, and the gradient of W; x needs none
    step.model.requires_grad_(False)
    step.trainable = []
    frozen_bias = nn.Parameter(torch.zeros(2))
    loss = step.loss
    step.loss = lambda prior_rows: loss(prior_rows) + (frozen_bias**2).sum()
    step.optimizer = torch.optim.AdamW([frozen_bias])
    assert step.traffic() < 3 * weight + 2 * kept  # frozen: read twice at most, neither gradient nor moments


def test_frozen_weights_need_no_gradient_and_no_state():
    faces = people(8)
    full = TrainingStep(SMALL, faces, 16, amp=False).memory()
    lora = TrainingStep(replace(SMALL, use_lora_attention=True), faces, 16, amp=False).memory()
    assert lora < full


def test_rows_and_ratios(monkeypatch):
    monkeypatch.setattr(benchmark, "COMMON", replace(SMALL, batch_size=8))
    table = speed_and_memory(people(8), batch_sizes=(8,), rounds=2)
    assert (
        len(table) == 2 * len(ADAPTATIONS) and (table["ms"] > 0).all() and (table["ms_low"] <= table["ms_high"]).all()
    )
    first = table[table["name"] == "full fine-tuning"]
    assert (first["speed"] == 1).all() and (first["memory"] == 1).all()
    row = table[(table["name"] == "LoRA r=8") & ~table["amp"]].iloc[0]
    assert row["speed"] == pytest.approx(first[~first["amp"]]["ms"].iloc[0] / row["ms"])


def test_steps_take_turns():
    order: list[str] = []

    class Step(TrainingStep):
        def __init__(self, name):
            self.name, self.device = name, torch.device("cpu")

        def __call__(self):
            order.append(self.name)

        def memory(self):
            return 7

    found = side_by_side({name: partial(Step, name) for name in "ab"}, rounds=2, steps=3)
    assert "".join(order) == "aaabbbaaabbb"
    assert all(timing.memory == 7 and len(timing.seconds) == 2 for timing in found.values())


def test_a_step_that_fails_is_an_error_and_the_others_go_on():
    def too_large():
        raise MemoryError("no room for 16384 samples\nand more")

    faces = people(8)
    makers = {"too large": too_large, "fits": lambda: TrainingStep(SMALL, faces, 8, amp=False)}
    found = attempt_side_by_side(makers, rounds=4)
    assert found["too large"].row() == {"error": "MemoryError: no room for 16384 samples"}
    assert len(found["fits"].seconds) == 4 and found["fits"].row()["ms"] > 0
    assert len(attempt_side_by_side(makers, rounds=9, seconds=0)["fits"].seconds) == 3


def test_float16_comes_with_a_gradient_scaler_and_still_learns():
    step = CountedStep(SMALL, people(8), 8, amp=torch.float16)
    first = step.loss(None).item()
    for _ in range(20):
        step()
    assert step.scaler.is_enabled() and step.scaler.get_scale() > 1
    assert step.loss(None).item() < first
    assert not TrainingStep(SMALL, people(8), 8, amp=True).scaler.is_enabled()


WAYS = {  # ways to do the same step, and the configurations that are done so
    "cpu": {"compiled": ["full", "lora", "projection"]},
    "cuda": {"captured": list(CONFIGS), "compiled": ["projection"], "compiled, captured": ["projection"]},
}
CASES = [(device, way, name) for device in DEVICES for way, names in WAYS[device].items() for name in names]


def other_way(step, way):
    """The same step done in another way, three times already, so that a capture may warm up."""
    if "compiled" in way:
        step.compile(backend="aot_eager" if step.device.type == "cpu" else "inductor")
    if "captured" in way:
        return CapturedStep(step, warmup=3)
    for _ in range(3):
        step()
    return step


@pytest.mark.parametrize(("device", "way", "name"), CASES)
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["full precision", "mixed precision"])
def test_the_same_weights_as_by_eager_steps(device, way, name, amp):
    """Within 2 % (mixed: 10 %) of the distance that five steps went: AdamW makes much of gradients near zero."""
    config = replace(CONFIGS[name], dropout=0.0, lr=1e-3, lora_lr=1e-3)
    faces = people(40).to(device)
    eager, other = (CountedStep(config, faces, 16, amp) for _ in range(2))
    start = [p.detach().clone() for p in eager.trainable]
    assert all(torch.equal(a, b) for a, b in zip(start, other.trainable, strict=True))
    run = other_way(other, way)
    for _ in range(5):
        eager()
    for _ in range(2):
        run()
    went = torch.cat([(a - b).flatten() for a, b in zip(eager.trainable, start, strict=True)]).norm()
    apart = torch.cat([(a - b).flatten() for a, b in zip(eager.trainable, other.trainable, strict=True)]).norm()
    assert went > 0 and apart / went < (0.1 if amp else 0.02)


@pytest.mark.parametrize("device", [device for device in DEVICES if device == "cuda"] or ["cpu"])
def test_a_step_takes_the_next_batch_and_learning_rate(device):
    """Copied into what lies on the device already, as a captured step needs it."""
    config = replace(CONFIGS["prior"], dropout=0.0)
    faces = people(40).to(device)
    step = TrainingStep(config, faces, 16, amp=False)
    run = CapturedStep(step, warmup=1) if device == "cuda" else step
    before = [p.detach().clone() for p in step.trainable]
    rates = [group["lr"] for group in step.optimizer.param_groups]
    for group in step.optimizer.param_groups:
        group["lr"] = group["lr"].zero_() if torch.is_tensor(group["lr"]) else 0.0
    run()
    assert all(torch.equal(a, b) for a, b in zip(before, step.trainable, strict=True))
    for group, rate in zip(step.optimizer.param_groups, rates, strict=True):
        group["lr"] = group["lr"].fill_(1e-2) if torch.is_tensor(rate) else 1e-2
    step.batch.src.copy_(faces.src[-16:])
    run()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.trainable, strict=True))
    assert not torch.equal(step.draw_prior(), step.draw_prior())  # prior samples are drawn anew every time


def test_the_machine_is_named():
    assert "torch" in machine("cpu") and "cores" in machine("cpu")


@pytest.fixture
def stored(tmp_path):
    """Results of a GPU: steps of three configurations."""
    rows = [
        ("bf16", "eager", "full", 20.0),
        ("bf16", "graph", "full", 2.0),
        ("bf16", "eager", "LoRA", 25.0),
        ("bf16", "graph", "LoRA", 1.6),
        ("fp16", "eager", "LoRA", 99.0),
        ("bf16", "compiled", "16³", 99.0),
    ]
    table = pd.DataFrame(rows, columns=["precision", "mode", "name", "ms"])
    table.assign(batch_size=32, machine="some GPU").to_csv(tmp_path / "speed.csv", index=False)
    return tmp_path


def test_steps_stand_side_by_side(stored):
    measured = pd.DataFrame(
        {
            "batch_size": [32, 32, 32, 32, 128],
            "amp": [True, True, True, False, True],
            "name": ["full", "LoRA", "16³", "LoRA", "LoRA"],
            "ms": [40.0, 32.0, 50.0, 1.0, 1.0],
        }
    )
    table = speed_on_both(measured, 32, stored)
    assert list(table.index) == ["full", "LoRA"]
    assert table.loc["LoRA"].tolist() == ["32", "1.25x", "25", "0.80x", "1.6", "1.25x"]


def test_the_shipped_results_can_be_read():
    measured = pd.DataFrame(
        {"batch_size": 128, "amp": True, "name": ["full fine-tuning", "LoRA r=8"], "ms": [2.0, 1.0]}
    )
    assert speed_on_both(measured, 128).loc["LoRA r=8", "here, speed"] == "2.00x"
    assert torch.tensor([float(v) for v in speed_on_both(measured, 128)["GPU, graph, ms"]]).gt(0).all()
