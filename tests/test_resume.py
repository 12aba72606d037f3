"""A run that is interrupted, at whatever moment and however roughly, ends with the weights of one that was not."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import CONFIG, DEVICES, people, run, sets, write_set

from viewdiff_nb.faces import load_face_views
from viewdiff_nb.training import checkpoint, loop
from viewdiff_nb.training.checkpoint import CheckpointError, DamagedCheckpoint, load_checkpoint, save_checkpoint
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.losses import warmup_cosine
from viewdiff_nb.training.result import TrainingInterrupted

FULL = replace(
    CONFIG,
    use_lora_attention=True,
    use_projection_layer=True,
    mixup=True,
    epochs=4,
    batch_size=8,
    gradient_accumulation_steps=3,
)
COLUMNS = ["epoch", "train_loss", "lr", "grad_norm", "val_loss", "val_rank1", "val_tar"]


def assert_equal_runs(one, other):
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    pd.testing.assert_frame_equal(one.history[COLUMNS], other.history[COLUMNS])
    assert one.steps == other.steps


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_cross_view": True, "n_views": 2, "mixup": False},
        {"use_amp": True},
        {"loss": "two-way+pairs", "paired_views": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_resumed_training_equals_uninterrupted(tmp_path, changes, device):
    config = replace(FULL, save_every=1, device=device, **changes)
    whole = run(replace(config, save_dir=str(tmp_path / "whole")))
    again = run(replace(config, resume=str(tmp_path / "whole/checkpoint_epoch_2_enhanced.pth")))
    if device == "cpu":
        assert_equal_runs(whole, again)
        return
    losses = (result.history["train_loss"].tolist() for result in (whole, again))
    assert next(losses) == pytest.approx(next(losses), rel=1e-3)  # sums on a GPU have no fixed order


if "cuda" in DEVICES:  # the gradient scaler is for float16, which CPUs do not train in

    def test_float16_with_a_scaler_trains_and_resumes(tmp_path, monkeypatch):
        monkeypatch.setattr("viewdiff_nb.training.losses.amp_dtype_for", lambda device: torch.float16)
        config = replace(FULL, device="cuda", use_amp=True, save_every=1, save_dir=str(tmp_path))
        whole = run(config)
        state = load_checkpoint(tmp_path / "checkpoint_epoch_2_enhanced.pth")
        assert (
            state["scaler"]["scale"] > 0 and whole.history["train_loss"].iloc[-1] < whole.history["train_loss"].iloc[0]
        )
        again = run(replace(config, resume=str(tmp_path / "checkpoint_epoch_2_enhanced.pth"), save_dir=None))
        assert again.history["train_loss"].tolist() == pytest.approx(whole.history["train_loss"].tolist(), rel=1e-2)


def test_with_prior_preservation_too(tmp_path, base_path):
    config = replace(FULL, base_model_path=base_path, use_prior_preservation=True, min_yaw=45.0, save_every=1)
    whole = run(replace(config, save_dir=str(tmp_path / "whole")))
    assert whole.history["epoch"].tolist() == [0, 1, 2, 3, 4]
    assert_equal_runs(whole, run(replace(config, resume=str(tmp_path / "whole/checkpoint_epoch_1_enhanced.pth"))))


@pytest.fixture(autouse=True)
def heeded(signals_heeded):
    """In every test of this file."""


class After:
    """Sends a signal to this process at the n-th batch."""

    def __init__(self, monkeypatch, batch: int, number: int = signal.SIGINT) -> None:
        self.left, self.number, original = batch, number, loop._Run._update
        monkeypatch.setattr(loop._Run, "_update", lambda run: self.count() or original(run))

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", [1, 4, 10, 13])  # 10 steps an epoch
def test_an_interrupt_stops_between_steps_and_the_run_goes_on(tmp_path, monkeypatch, step, number):
    whole = run(FULL)
    config = replace(FULL, save_dir=str(tmp_path), resume="auto")
    with monkeypatch.context() as patch:
        After(patch, step, number)
        with pytest.raises(TrainingInterrupted, match="the last checkpoint is .*last_enhanced.pth") as caught:
            run(config)
    stopped = caught.value.result
    assert stopped.stopped == "interrupted" and stopped.steps == step
    assert stopped.checkpoint == tmp_path / checkpoint.LAST
    state = load_checkpoint(stopped.checkpoint)
    assert (state["epoch"], state["batch"]) == (step // 10, step % 10 * 3)
    onward = run(config)
    assert onward.stopped == "finished"
    assert_equal_runs(whole, onward)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_ignored_stays_ignored(tmp_path, monkeypatch):
    """As for a program that nohup started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    After(monkeypatch, 4)
    assert run(replace(FULL, save_dir=str(tmp_path))).stopped == "finished"


def test_a_second_interrupt_does_not_wait(monkeypatch):
    after = After(monkeypatch, 2)
    original = After.count

    def twice(self):
        original(self)
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(After, "count", twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(FULL)
    assert not isinstance(caught.value, TrainingInterrupted)
    assert after.left == 0


def test_a_thread_can_train(tmp_path):
    """Signals are the main thread's; elsewhere the run is just not interruptible."""
    found = []
    thread = threading.Thread(target=lambda: found.append(run(replace(CONFIG, epochs=1))))
    thread.start()
    thread.join()
    assert found[0].stopped == "finished"


KILLED = {
    "LoRA, projection, mix-up, accumulation": FULL,
    "plain": replace(CONFIG, epochs=4, batch_size=4),
    "mixed precision": replace(FULL, use_amp=True),
    "cross-view": replace(FULL, use_cross_view=True, n_views=2, mixup=False),
    "pairs of views": replace(FULL, loss="two-way+pairs", paired_views=True),
}


def _train_folder(folder: str, name: str, epochs: int) -> None:
    torch.set_num_threads(1)
    faces = [load_face_views(f"{folder}/{part}") for part in ("train", "val")]
    config = replace(
        KILLED[name], epochs=epochs, save_dir=f"{folder}/runs", resume="auto", save_minutes=0.0, save_every=2
    )
    train(config, *faces, progress=False)


def killed_and_resumed(tmp_path, name: str, kills: int, epochs: int) -> None:
    """SIGKILL, which no program can catch, while it computes, validates, or writes; with a write after every step."""
    for part, faces in zip(("train", "val"), sets(), strict=True):
        write_set(tmp_path / part, faces)
    context = multiprocessing.get_context("forkserver")
    # all that is slow to import: what conftest needs, and what torch's first optimiser does
    context.set_forkserver_preload(["viewdiff_nb.training", "pytest", "torch._dynamo"])
    moments, last = random.Random(name), tmp_path / "runs" / checkpoint.LAST

    def written() -> int:
        try:
            return last.stat().st_mtime_ns
        except FileNotFoundError:  # as between two writes
            return 0

    for kill in range(kills + 1):
        before = written()
        process = context.Process(target=_train_folder, args=(str(tmp_path), name, epochs))
        process.start()
        while kill > 1 and process.is_alive() and written() in (0, before):  # the first ones die before any write
            time.sleep(1e-3)
        if kill < kills:
            process.join(moments.uniform(0.0, 0.06))
            assert process.exitcode is None, "it was to be killed, and has finished; make the run longer"
            process.kill()
        process.join()
    assert process.exitcode == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = train(
        replace(KILLED[name], epochs=epochs),
        *[load_face_views(tmp_path / part) for part in ("train", "val")],
        progress=False,
    )
    torch.set_num_threads(threads)
    state = load_checkpoint(tmp_path / f"runs/checkpoint_epoch_{epochs}_enhanced.pth")
    for parameter, value in whole.model.state_dict().items():
        assert torch.equal(state["model"][parameter], value), parameter
    assert [row["val_rank1"] for row in state["history"]] == whole.history["val_rank1"].tolist()
    best = load_checkpoint(tmp_path / "runs" / checkpoint.BEST)
    assert best["best"] == whole.history["val_loss"].min() and best["epoch"] == whole.history["val_loss"].idxmin() + 1
    assert not list((tmp_path / "runs").glob("*.part")) and not list((tmp_path / "runs").glob("earlier*"))


def test_killed_at_many_moments_and_resumed_ends_with_the_same_weights(tmp_path):
    killed_and_resumed(tmp_path, "LoRA, projection, mix-up, accumulation", kills=12, epochs=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_far_more_often(tmp_path, name):
    killed_and_resumed(tmp_path, name, kills=32, epochs=16)


def test_the_previous_checkpoint_is_used_where_the_last_is_truncated(tmp_path):
    config = replace(FULL, save_dir=str(tmp_path), save_minutes=0.0, save_every=100)
    whole = run(replace(config, epochs=4))
    (tmp_path / "checkpoint_epoch_4_enhanced.pth").unlink()
    (tmp_path / checkpoint.BEST).unlink()
    last = tmp_path / checkpoint.LAST
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.warns(DamagedCheckpoint, match=f"passed over .*{checkpoint.LAST}"):
        assert_equal_runs(whole, run(replace(config, save_dir=None, resume=str(tmp_path))))


def test_what_cannot_be_resumed(tmp_path, base_path):
    with pytest.raises(CheckpointError, match="holds weights, but no training run to go on with"):
        run(replace(CONFIG, resume=base_path))
    run(replace(CONFIG, save_dir=str(tmp_path / "r")))
    path = str(tmp_path / "r/checkpoint_epoch_2_enhanced.pth")
    with pytest.raises(ValueError, match="has 2 epochs behind it; ask for more"):
        run(replace(CONFIG, resume=path))
    more = replace(CONFIG, resume=path, epochs=3)
    with pytest.raises(CheckpointError, match="another model: num_layers is 2 in it and 3 here"):
        run(replace(more, num_layers=3))
    with pytest.raises(CheckpointError, match="was trained on other people or views"):
        train(more, people(41, noise=0.6), sets()[1], progress=False)
    with pytest.raises(CheckpointError, match="was trained on other people or views"):
        run(replace(more, min_yaw=45.0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*empty"):
        run(replace(more, resume=str(tmp_path / "empty")))
    assert run(more).history["epoch"].tolist() == [1, 2, 3]


@pytest.fixture
def halfway(tmp_path):
    """The checkpoint in the middle of a run of 4 epochs with 15 batches each."""
    run(replace(CONFIG, epochs=4, save_dir=str(tmp_path / "first"), save_every=2))
    return str(tmp_path / "first/checkpoint_epoch_2_enhanced.pth")


def rates_of(monkeypatch, config: TrainConfig) -> list[float]:
    """The learning rate of every step that a run makes."""
    seen, original = [], loop._Run._update
    with monkeypatch.context() as patch:
        patch.setattr(
            loop._Run, "_update", lambda run: seen.append(run.state.optimizer.param_groups[0]["lr"]) or original(run)
        )
        run(config)
    return seen


def test_another_learning_rate_and_weight_decay_act(monkeypatch, halfway, caplog):
    config = replace(CONFIG, epochs=4, resume=halfway)
    before, after = (rates_of(monkeypatch, replace(config, lr=lr)) for lr in (1e-3, 5e-4))
    assert after == pytest.approx([rate / 2 for rate in before]) and len(after) == 30
    assert "goes on from" in caplog.text and "lr 0.0005 instead of 0.001" in caplog.text
    weights = [run(replace(config, weight_decay=decay)).model.output.weight for decay in (0.01, 0.5)]
    assert weights[1].norm() < weights[0].norm()
    assert "weight_decay 0.5 instead of 0.01" in caplog.text


def test_another_lora_rate_acts_on_lora_alone(tmp_path, base_path):
    config = replace(CONFIG, epochs=2, use_lora_attention=True, base_model_path=base_path, freeze_base=False)
    run(replace(config, save_dir=str(tmp_path / "r"), save_every=1))
    path = str(tmp_path / "r/checkpoint_epoch_1_enhanced.pth")
    still = run(replace(config, resume=path, lora_lr=1e-30, weight_decay=0.0)).model
    state = load_checkpoint(path)["model"]
    roles = still.parameter_roles()
    moved = {roles[name] for name, value in still.named_parameters() if not torch.equal(value, state[name])}
    assert moved == {"base"}


@pytest.mark.parametrize("changes,batches", [({"batch_size": 32}, 8), ({"gradient_accumulation_steps": 5}, 3)], ids=str)
def test_another_batch_size_goes_on_at_the_same_point_of_the_schedule(monkeypatch, halfway, changes, batches):
    """Half of the epochs are done, so the cosine is where it is half-way through a run with these batches."""
    rates = rates_of(monkeypatch, replace(CONFIG, epochs=4, resume=halfway, **changes))
    schedule = warmup_cosine(CONFIG.warmup, 4 * batches)
    assert rates == pytest.approx([1e-3 * schedule(2 * batches + i) for i in range(2 * batches)])
    assert rates[0] > 4e-4  # not the schedule's floor


def test_another_seed_draws_other_batches(halfway, caplog):
    config = replace(CONFIG, epochs=4, resume=halfway)
    same, again, other = run(config), run(config), run(replace(config, seed=7))
    assert torch.equal(same.model.output.weight, again.model.output.weight)
    assert not torch.equal(same.model.output.weight, other.model.output.weight)
    assert "seed 7 instead of 0" in caplog.text


@pytest.mark.parametrize("changes", [{"monitor": "val_rank1"}, {"loss": "mse"}, {"val": "others"}], ids=str)
def test_another_goal_looks_for_the_best_model_anew(tmp_path, halfway, caplog, changes):
    """A rank-1 rate is not less than a loss, and a squared error not less than a cross-entropy, because it is better."""
    train_faces, val_faces = sets()
    if changes.pop("val", None):
        val_faces = people(30, noise=0.2, first=5000)
    config = replace(CONFIG, epochs=4, resume=halfway, save_dir=str(tmp_path / "second"), save_every=100, **changes)
    result = train(config, train_faces, val_faces, progress=False)
    best = load_checkpoint(tmp_path / "second" / checkpoint.BEST)
    new = result.history[config.monitor].iloc[2:]
    assert best["best"] == (new.min() if config.monitor == "val_loss" else new.max())
    assert best["epoch"] > 2 and "the best model is looked for anew" in caplog.text


def test_the_best_model_so_far_goes_along(tmp_path, halfway):
    """With a rate of zero nothing gets better, and the best model is still in the new folder."""
    config = replace(CONFIG, epochs=4, resume=halfway, lr=1e-30, save_dir=str(tmp_path / "second"))
    result = run(config)
    best = load_checkpoint(tmp_path / "second" / checkpoint.BEST)
    assert best["epoch"] <= 2 and best["best"] == result.history["val_loss"].iloc[:2].min()
    assert (tmp_path / "second" / checkpoint.BEST_WEIGHTS).exists()


def test_another_base_model_is_refused(tmp_path, base_path):
    config = replace(CONFIG, epochs=1, use_lora_attention=True, base_model_path=base_path, save_dir=str(tmp_path / "r"))
    run(config)
    other = tmp_path / "other.pth"
    save_checkpoint(other, {"model": run(replace(CONFIG, max_yaw=45.0, seed=1)).model.state_dict()})
    onward = replace(config, epochs=2, resume="auto")
    with pytest.raises(CheckpointError, match=r"another base model than base_model_path, .*other\.pth"):
        run(replace(onward, base_model_path=str(other)))
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(base_path).read_bytes())
    assert run(replace(onward, base_model_path=str(moved))).stopped == "finished"


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 2}, {"seed": 3}, {"mixup": True}], ids=str)
def test_within_an_epoch_its_batches_stay(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    After(monkeypatch, 3)
    stopped = run(replace(CONFIG, save_dir=str(tmp_path)))
    [name] = changes
    with pytest.raises(CheckpointError, match=f"within an epoch, and {name} was"):
        run(replace(CONFIG, resume=str(stopped.checkpoint), **changes))


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path, halfway):
    """They held the scheduler's state, which follows from the epoch, and one fingerprint."""
    content = load_checkpoint(halfway)
    old = content | {"data": content["data"]["train"], "scheduler": {"last_epoch": 30, "base_lrs": [1e-3]}}
    save_checkpoint(tmp_path / "old.pth", old)
    one, other = (run(replace(CONFIG, epochs=4, resume=path)) for path in (halfway, str(tmp_path / "old.pth")))
    assert_equal_runs(one, other)


@pytest.mark.parametrize(
    "damage",
    [
        {"optimizer": {"state": {0: None}, "param_groups": [{"params": [0]}]}},
        {"optimizer": {"state": 5, "param_groups": []}},
        {"generator": torch.zeros(3)},
        {"torch_rng": torch.zeros(5, dtype=torch.uint8)},
        {"model": {"norm.weight": "x"}},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_a_state_that_no_run_wrote_is_refused(tmp_path, halfway, damage):
    save_checkpoint(tmp_path / "damaged.pth", load_checkpoint(halfway) | damage)
    with pytest.raises(CheckpointError, match=r"damaged\.pth does not fit the model"):
        run(replace(CONFIG, epochs=4, resume=str(tmp_path / "damaged.pth")))


@pytest.mark.parametrize("lost", ["data", "config", "trace", "generator"])
def test_a_checkpoint_that_lacks_something_is_passed_over(tmp_path, halfway, lost):
    content = load_checkpoint(halfway)
    save_checkpoint(tmp_path / "r/checkpoint_epoch_2_enhanced.pth", content)
    save_checkpoint(
        tmp_path / "r/checkpoint_epoch_3_enhanced.pth", {k: v for k, v in content.items() if k != lost} | {"epoch": 3}
    )
    with pytest.raises(CheckpointError, match=f"no training run to go on with .no {lost}"):
        run(replace(CONFIG, epochs=4, resume=str(tmp_path / "r/checkpoint_epoch_3_enhanced.pth")))
    with pytest.warns(DamagedCheckpoint, match="epoch_3"):
        onward = run(replace(CONFIG, epochs=4, resume=str(tmp_path / "r")))
    assert onward.history["epoch"].tolist() == [1, 2, 3, 4]


def test_an_early_stop_can_be_gone_on_from(tmp_path):
    config = replace(CONFIG, epochs=50, lr=1e-30, patience=2, save_dir=str(tmp_path), save_every=100, save_minutes=1e9)
    stopped = run(config)
    assert stopped.stopped == "early"
    epochs = len(stopped.history)
    assert stopped.checkpoint == tmp_path / f"checkpoint_epoch_{epochs}_enhanced.pth"
    onward = run(replace(config, patience=4, resume="auto"))
    assert onward.history["epoch"].tolist() == list(range(1, epochs + 3))


def test_another_batch_size_cannot_go_on_within_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)  # at a prompt the result is returned
    After(monkeypatch, 2)
    stopped = run(replace(CONFIG, save_dir=str(tmp_path)))
    assert stopped.stopped == "interrupted"
    with pytest.raises(CheckpointError, match="within an epoch of 15 batches, and here it has 8"):
        run(replace(CONFIG, resume=str(stopped.checkpoint), batch_size=32))


def test_the_shell_is_told_how_to_go_on(tmp_path):
    write_set(tmp_path / "faces", people(60, width=64))
    command = [
        sys.executable,
        "-m",
        "viewdiff_nb.train_enhanced",
        "--data_dir",
        str(tmp_path / "faces"),
        "--val_people",
        "20",
        "--test_people",
        "20",
        "--d_model",
        "64",
        "--epochs",
        "100000",
        "--save_dir",
        str(tmp_path / "runs"),
        "--val_every",
        "100000",
        "--save_every",
        "100000",
    ]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "epoch 1/" not in (line := process.stderr.readline(400)):  # the bar moves: it trains
        assert line or process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"interrupted; go on with --resume .*last_enhanced\.pth", errors)
    assert TrainConfig(**load_checkpoint(tmp_path / "runs" / checkpoint.LAST)["config"]).epochs == 100000
