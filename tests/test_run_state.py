"""A folder belongs to one run at a time, and nothing in it is lost; what is seen of a run has the guide's names."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import CONFIG, run, sets

from viewdiff_nb.files import PART
from viewdiff_nb.training import checkpoint
from viewdiff_nb.training.checkpoint import BEST, BEST_WEIGHTS, LAST, load_checkpoint, load_model
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.losses import warmup_cosine
from viewdiff_nb.training.result import StopRequest


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def _train_long(folder: str) -> None:
    torch.set_num_threads(1)
    train(replace(CONFIG, epochs=10**6, val_every=10**6, save_minutes=0.0, save_dir=folder), *sets(), progress=False)


@pytest.fixture
def other_run(tmp_path):
    """A run in another process that has begun to write; its process."""
    process = multiprocessing.get_context("spawn").Process(target=_train_long, args=(str(tmp_path),))
    process.start()
    while not (tmp_path / LAST).exists():
        assert process.is_alive()
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_two_runs_cannot_write_to_one_folder(tmp_path, other_run):
    with pytest.raises(OSError, match=f"another run is writing to {tmp_path}; .* choose another save_dir"):
        run(replace(CONFIG, save_dir=str(tmp_path)))
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.join()
    onward = run(
        replace(CONFIG, epochs=10**6, val_every=10**6, save_dir=str(tmp_path), resume="auto", max_yaw=180.0),
        stop=asked(),
    )
    assert onward.stopped == "interrupted" and onward.steps > 0


def asked():
    stop = StopRequest()
    stop.asked = True
    return stop


def test_the_folder_is_free_again_after_a_run_and_after_one_that_failed(tmp_path):
    config = replace(CONFIG, epochs=1, save_dir=str(tmp_path))
    run(config)
    with pytest.raises(RuntimeError, match="on purpose"):
        run(config, on_epoch=fail)
    run(config)


def fail(history) -> None:
    raise RuntimeError("on purpose")


def test_a_new_run_puts_the_earlier_one_aside(tmp_path, caplog):
    config = replace(CONFIG, epochs=1, save_dir=str(tmp_path))
    run(config)
    first = names(tmp_path)
    contents = {name: (tmp_path / name).read_bytes() for name in first}
    run(replace(config, seed=1))
    run(replace(config, seed=2))
    assert names(tmp_path) == first | {"earlier_run_1", "earlier_run_2"}
    assert {name: (tmp_path / "earlier_run_1" / name).read_bytes() for name in first} == contents
    assert load_checkpoint(tmp_path / "earlier_run_2" / BEST)["config"]["seed"] == 1
    assert f"{tmp_path} holds an earlier run; its files are in earlier_run_1" in caplog.text


def test_files_of_others_are_left_alone(tmp_path):
    foreign = [
        "download.part",
        "model.pth.part",
        "best_model_enhanced.pth.mine.part",
        "notes.txt",
        "mine.pth",
        "a.safetensors",
    ]
    for name in foreign:
        (tmp_path / name).write_text(name)
    killed = tmp_path / f"{BEST}.4711{PART}"
    killed.write_text("a run that was killed while it wrote")
    run(replace(CONFIG, epochs=1, save_dir=str(tmp_path)))
    assert all((tmp_path / name).read_text(encoding="utf-8") == name for name in foreign)
    assert not killed.exists() and not list(tmp_path.glob("earlier*"))


def test_going_on_where_the_run_stands_moves_nothing(tmp_path):
    config = replace(CONFIG, save_dir=str(tmp_path), save_every=1)
    run(replace(config, epochs=2))
    run(replace(config, epochs=3, resume="auto"))
    assert names(tmp_path) == {BEST, BEST_WEIGHTS, *(checkpoint.PERIODIC.format(i) for i in (1, 2, 3))}


def test_going_on_from_an_earlier_epoch_keeps_what_came_of_it_before(tmp_path):
    """With a rate that ruins the model: the later epochs, and the best model of all, are the first run's."""
    config = replace(CONFIG, save_dir=str(tmp_path), save_every=1, epochs=3, loss="mse")
    run(config)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 3
    path = tmp_path / checkpoint.PERIODIC.format(1)
    result = run(replace(config, resume=str(path), lr=0.3))
    assert {name: (tmp_path / "earlier_run_1" / name).read_bytes() for name in before} == before
    assert result.history["val_loss"].idxmin() == 0
    best = load_checkpoint(tmp_path / BEST)
    assert best["epoch"] == 1 and best["best"] == result.history["val_loss"].iloc[0]


@pytest.mark.parametrize("spelt", ["relative", "absolute"])
def test_the_best_model_goes_along_however_the_folder_is_spelt(tmp_path, monkeypatch, caplog, spelt):
    monkeypatch.chdir(tmp_path)
    run(replace(CONFIG, save_dir="m", save_every=1, epochs=3, loss="mse"))
    first = "m" if spelt == "relative" else tmp_path / "m"
    run(replace(CONFIG, save_dir="m", epochs=4, loss="mse", resume=f"{first}/{checkpoint.PERIODIC.format(2)}"))
    assert "looked for anew" not in caplog.text
    assert load_checkpoint("m/earlier_run_1/" + checkpoint.PERIODIC.format(3))["epoch"] == 3


def test_a_missing_half_of_the_best_model_is_written_again(tmp_path):
    config = replace(CONFIG, save_dir=str(tmp_path / "first"), save_every=1, epochs=2, loss="mse", lr=1e-2)
    run(config)
    (tmp_path / "first" / BEST_WEIGHTS).unlink()
    second = tmp_path / "second"
    run(replace(config, save_dir=str(second), epochs=3, lr=1e-30, resume=str(tmp_path / "first")))
    assert load_checkpoint(second / BEST)["best"] == load_checkpoint(tmp_path / "first" / BEST)["best"]
    model = load_model(second / BEST_WEIGHTS).state_dict()
    assert all(torch.equal(value, model[name]) for name, value in load_checkpoint(second / BEST)["model"].items())


def test_a_run_to_another_goal_that_is_killed_at_once_goes_on_all_the_same(tmp_path):
    """Its files are put aside before it has written any; what it goes on from is still found."""
    config = replace(CONFIG, save_dir=str(tmp_path), epochs=2)
    run(config)
    again = replace(config, epochs=4, monitor="val_rank1", resume="auto")

    def kill(history) -> None:
        raise KeyboardInterrupt  # after the first epoch of the two, before anything was written but the best model

    with pytest.raises(KeyboardInterrupt):
        run(replace(again, val_every=4), on_epoch=kill)
    assert names(tmp_path) == {checkpoint.PERIODIC.format(2), "earlier_run_1"}
    result = run(again)
    assert result.history["epoch"].tolist() == [1, 2, 3, 4]


def test_a_base_in_the_folder_is_not_written_over(tmp_path):
    config = replace(CONFIG, epochs=1, save_dir=str(tmp_path))
    run(config)
    before = (tmp_path / BEST).read_bytes()
    adapted = replace(config, use_lora_attention=True, base_model_path=str(tmp_path / BEST))
    with pytest.raises(ValueError, match=f"base_model_path .*{BEST} is a file that runs write in save_dir"):
        run(adapted)
    assert (tmp_path / BEST).read_bytes() == before
    run(replace(adapted, save_dir=str(tmp_path / "adapted")))


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
