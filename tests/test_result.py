"""How a run is stopped, and what it says of itself; the situations of the guide's questions are in test_faq.py."""

import pickle
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import CONFIG, people
from torch import nn

from viewdiff_nb.training.batches import FaceBatch, take
from viewdiff_nb.training.result import (
    MUCH_PRIOR_LOSS,
    StopRequest,
    TrainingDiverged,
    TrainingInterrupted,
    TrainResult,
    advice,
    diverged,
    find_cause,
)

RESULT = TrainResult(nn.Linear(2, 2), pd.DataFrame({"epoch": [1]}), 1.0, 15, "interrupted", None)


@pytest.mark.parametrize("error", [TrainingInterrupted(RESULT), TrainingDiverged("why", RESULT)], ids=type)
def test_its_exceptions_pass_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.result.steps == 15


@pytest.mark.parametrize(
    "number,typed,to_end",
    [(signal.SIGINT, True, False), (signal.SIGINT, False, True), (signal.SIGTERM, True, True)],
)
def test_who_asks_to_stop_ends_the_process_unless_somebody_types_its_code(
    monkeypatch, signals_heeded, number, typed, to_end
):
    monkeypatch.delattr(sys, "ps1", raising=False)
    if typed:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert (stop.asked, stop.to_end) == (True, to_end)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.root = nn.Linear(32, 1), nn.ReLU()

    def forward(self, batch: FaceBatch) -> torch.Tensor:
        return self.root(self.scale(batch.src))


@pytest.mark.parametrize(
    "loss,wanted",
    [
        (lambda x: x.mean(), "the largest gradient is .* in scale.(weight|bias)"),
        (
            lambda x: x.mean() / 0,
            "all modules' outputs are finite, the loss of them is not; no finite gradient in 2 of 2",
        ),
        (lambda x: (x - x).abs().sqrt().sum(), "no finite gradient in 2 of 2 parameters: scale.weight, scale.bias$"),
    ],
)
def test_the_cause_is_found_and_no_gradient_left(loss, wanted):
    model, batch = Model(), take(people(3), torch.arange(4))
    nn.init.constant_(model.scale.bias, 100.0)
    found = find_cause(model, batch, lambda b: loss(model(b)))
    assert re.search(wanted, found), found
    assert all(p.grad is None for p in model.parameters())


def test_several_bad_samples_are_counted():
    batch = take(people(3), torch.arange(4))
    batch.angles[1:3, 0] = float("inf")
    assert find_cause(Model(), batch, None) == "its data: angles is not finite in 2 of 4 samples, e.g. sample 1"


@pytest.mark.parametrize(
    "changes,wanted",
    [
        ({}, "lower lr (0.001), or clip_norm (1)"),
        (
            {"use_lora_attention": True, "use_amp": True},
            "lower lr (0.001), or lora_lr (0.001), or clip_norm (1), or switch use_amp off",
        ),
    ],
)
def test_what_to_try_after_a_divergence_is_what_the_run_has(changes, wanted):
    config = replace(CONFIG, **changes)
    error = diverged("the loss is inf", config, 3, replace(RESULT, checkpoint=Path("last.pth")))
    good = "The model is again what it was after epoch 3"
    assert str(error) == f"the loss is inf. Try: {wanted}. {good}; last.pth is the last checkpoint"
    assert str(diverged("x", config, 3, RESULT)).endswith(good) and error.result.steps == 15


@pytest.mark.parametrize(
    "task,prior,wanted",
    [
        ([2.0, 1.5, 1.0], [0.01, 0.02, 0.05], None),
        ([2.0, 2.5, 2.1], [0.01, 0.02, 0.05], "the task loss did not fall .2 to 2.1. beside a prior loss of 0.05"),
        ([2.0, 1.5, 1.0], [0.01, 0.02, 2 * MUCH_PRIOR_LOSS], "the prior loss rose from 0.01 to 0.2.*lambda_prior"),
        ([2.0, 1.5, 1.0], [0.3, 0.3, 0.25], None),
    ],
)
def test_advice_on_the_prior(task, prior, wanted):
    config = replace(CONFIG, use_prior_preservation=True, base_model_path="base.pth")
    total = [t + config.lambda_prior * p for t, p in zip(task, prior, strict=True)]
    history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": total, "prior_loss": prior})
    said = advice(history, config)
    assert len(said) == (wanted is not None)
    assert wanted is None or re.search(wanted, said[0]), said
