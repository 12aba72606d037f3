from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import CONFIG, run, sets

from viewdiff_nb.training.loop import train
from viewdiff_nb.training.losses import warmup_cosine


def test_tensorboard_has_the_guides_names(tmp_path, base_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(
        CONFIG,
        use_lora_attention=True,
        base_model_path=base_path,
        use_prior_preservation=True,
        epochs=3,
        gradient_accumulation_steps=2,
        log_dir=str(tmp_path / "logs"),
    )
    result = run(config)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "Train/Loss",
        "Train/LearningRate",
        "Epoch/TrainLoss",
        "Epoch/PriorLoss",
        "Epoch/ValLoss",
        "Epoch/ValCosineSim",
        "Epoch/ValRank1",
        "Epoch/ValTAR",
    }
    assert [e.step for e in events.Scalars("Train/Loss")] == list(range(45))
    mean = sum(e.value for e in events.Scalars("Train/Loss")[15:30]) / 15
    assert mean == pytest.approx(result.history["train_loss"][2], rel=1e-5)
    assert [e.step for e in events.Scalars("Epoch/ValRank1")] == [0, 1, 2, 3]
    schedule = warmup_cosine(0.05, 3 * 8)
    wanted = [config.lora_lr * schedule(epoch * 8 + i // 2) for epoch in range(3) for i in range(15)]
    assert [e.value for e in events.Scalars("Train/LearningRate")] == pytest.approx(wanted)


def test_the_bar_shows_epoch_loss_and_rate(capsys):
    train(replace(CONFIG, epochs=1), *sets())
    shown = capsys.readouterr().err
    assert "epoch 1/1" in shown and "15/15" in shown and "batch/s" in shown and "train_loss=" in shown


def test_the_history_is_told_after_every_epoch():
    told: list[pd.DataFrame] = []
    result = run(replace(CONFIG, epochs=3, val_every=2), on_epoch=told.append)
    assert [len(history) for history in told] == [1, 2, 3]
    pd.testing.assert_frame_equal(told[-1], result.history)
    assert result.history["val_rank1"].notna().tolist() == [False, True, True]


def test_early_stopping_waits_for_patience_and_keeps_the_best(tmp_path):
    config = replace(CONFIG, epochs=50, lr=3e-2, patience=3, monitor="val_tar", save_dir=str(tmp_path), save_every=50)
    result = run(config)
    values = result.history["val_tar"]
    assert result.stopped == "early" and len(values) < 50
    assert len(values) - 1 - values.idxmax() == 3
    best = torch.load(tmp_path / "best_model_enhanced.pth", weights_only=True)
    assert best["history"][-1]["val_tar"] == values.max() and best["epoch"] == values.idxmax() + 1
