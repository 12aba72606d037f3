"""Training that is watched, stopped and continued from a notebook, without a browser."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, run, sets

from viewdiff_nb.training.result import TrainingDiverged
from viewdiff_nb.widgets import TrainingMonitor


def test_a_monitored_run_is_the_run(tmp_path):
    """Without CUDA graphs, which nobody could record here, or beside other threads that use the GPU."""
    monitor = TrainingMonitor(replace(CONFIG, use_cuda_graph=True), *sets())
    empty = monitor.curves.picture
    result = monitor.start().wait()
    assert result.stopped == "finished" and monitor.curves.picture != empty
    assert monitor.progress.value == CONFIG.epochs and "finished" in monitor.status.value
    for mine, theirs in zip(result.model.parameters(), run().model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_monitored_run_and_the_cells_beside_it_draw_nothing_of_each_other():
    """The model's start and its dropout are random, and so is what a cell draws meanwhile."""
    config, ended = replace(CONFIG, dropout=0.3, epochs=6), threading.Event()

    def hammer():
        while not ended.is_set():
            torch.rand(100)

    torch.manual_seed(0)
    wanted, state = torch.rand(3), torch.get_rng_state()
    alone = TrainingMonitor(config, *sets()).start().wait()
    assert torch.equal(torch.get_rng_state(), state)
    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        disturbed = TrainingMonitor(config, *sets()).start().wait()
    finally:
        ended.set()
        thread.join()
    for mine, theirs in zip(alone.model.parameters(), disturbed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    beside = TrainingMonitor(replace(config, epochs=1000, val_every=1000), *sets()).start()
    for _ in range(50):
        torch.manual_seed(0)
        time.sleep(0.01)
        assert torch.equal(torch.rand(3), wanted)
    beside.stop()
    assert beside.wait().steps > 0


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    config = replace(CONFIG, epochs=40, save_dir=str(tmp_path), save_every=100, val_every=20)
    whole = run(replace(config, save_dir=str(tmp_path / "whole")))
    monitor = TrainingMonitor(config, *sets()).start()
    end = time.monotonic() + 60
    while monitor.progress.value < 2 and time.monotonic() < end:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="still going on"):
        monitor.start()
    monitor.stop()
    result = monitor.wait()
    assert result.stopped == "interrupted" and monitor.start_button.description == "Go on"
    assert 2 <= monitor.progress.value < 40
    result = monitor.start().wait()
    assert result.stopped == "finished" and result.steps == whole.steps
    for mine, theirs in zip(result.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_stop_in_the_last_epoch_comes_too_late(tmp_path):
    config = replace(CONFIG, save_dir=str(tmp_path))
    monitor = TrainingMonitor(config, *sets())
    show = monitor.show

    def stop_at_the_end(history):
        show(history)
        if history["epoch"].iloc[-1] == config.epochs:
            monitor.stop()

    monitor.show = stop_at_the_end
    assert monitor.start().wait().stopped == "finished" and monitor.start_button.description == "Start"


def test_a_monitor_shows_a_run_that_was_started_elsewhere():
    monitor = TrainingMonitor(CONFIG, *sets())
    monitor.stop()  # there is nothing to stop
    assert monitor.status.value == "not started"
    run(on_epoch=monitor.show)
    assert monitor.status.value == f"epoch {CONFIG.epochs} of {CONFIG.epochs}"
    assert monitor.progress.value == CONFIG.epochs


def test_what_ends_a_run_is_shown_and_raised():
    monitor = TrainingMonitor(replace(CONFIG, lr=1e6, clip_norm=1e6), *sets()).start()
    with pytest.raises(TrainingDiverged):
        monitor.wait()
    assert "TrainingDiverged" in monitor.status.value and not monitor.start_button.disabled


def test_nothing_to_go_on_from_is_said_before_work_is_lost():
    monitor = TrainingMonitor(replace(CONFIG, epochs=10_000, val_every=10_000), *sets())
    with pytest.raises(RuntimeError, match="not started"):
        monitor.wait()
    monitor.start().stop()
    monitor.wait()
    with pytest.raises(RuntimeError, match="give TrainConfig a save_dir"):
        monitor.start()
