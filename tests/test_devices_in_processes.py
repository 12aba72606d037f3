"""Two processes (gloo, on the CPU), started by torchrun, against one."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from conftest import CONFIG, people, run, sets, write_set
from torch import Tensor, nn

from viewdiff_nb.training.batches import FaceBatch
from viewdiff_nb.training.checkpoint import load_checkpoint, newest_checkpoint, prepare_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import (
    Processes,
    connect,
)
from viewdiff_nb.training.losses import Objective

CPU = torch.device("cpu")

EXACT = replace(CONFIG, dropout=0.0, use_lora_attention=True, use_projection_layer=True)


CASES = {
    "two-way, mix-up": replace(EXACT, mixup=True),
    "pairs of views": replace(EXACT, loss="two-way+pairs", paired_views=True),
    "an odd batch": replace(EXACT, batch_size=15),
    "cross-view": replace(EXACT, use_cross_view=True, n_views=3, batch_size=15),
}


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


COMMAND = ("-m", "viewdiff_nb.train_enhanced", "--d_model", "64", "--device", "cpu")


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def all_gradients(processes: Processes) -> list[dict[str, Tensor]]:
    return [gradients(processes, config) for config in CASES.values()]


def gradients(processes: Processes, config: TrainConfig) -> dict[str, Tensor]:
    """Of the first batch, by parameter."""
    faces, _ = sets()
    model, _ = prepare_model(config, faces.feature_dim)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    objective = Objective(config, processes.share(model, config.views_together), faces.front, CPU)
    index = torch.arange((2 if config.mixup else 1) * config.batch_size)
    batch = FaceBatch(faces.src[index], faces.angles[index], faces.keypoints_3d[index], faces.person[index])
    objective(batch, torch.rand(config.batch_size, generator=generator) if config.mixup else None).loss.backward()
    processes.add_up(model.parameters())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def to_train(folder: Path) -> TrainConfig:
    """The run that one process and two are to train alike."""
    return replace(
        EXACT,
        base_model_path=str(folder / "base.pth"),
        use_prior_preservation=True,
        gradient_accumulation_steps=2,
        min_yaw=45.0,
        epochs=2,
        save_every=1,
    )


def in_two_processes(folder: Path) -> None:
    """What each of two processes does; the first leaves what was found in a file."""
    processes = connect(replace(CONFIG, devices=2))
    config = replace(to_train(folder), devices=2)
    two = run(replace(config, save_dir=str(folder / "two")))
    again = run(replace(config, resume=str(folder / "two/checkpoint_epoch_1_enhanced.pth")))

    impatient = replace(CONFIG, devices=2, lr=1e-30, patience=2, save_every=1)
    run(replace(impatient, epochs=2, save_dir=str(folder / "first")))
    processes.wait()
    (folder / "first/best_model_enhanced.pth").unlink(missing_ok=True)
    path = str(folder / "first/checkpoint_epoch_2_enhanced.pth")
    onward = run(replace(impatient, epochs=9, save_dir=str(folder / "second"), resume=path))

    found = {"gradients": all_gradients(processes), "two": two, "again": again, "onward": onward}
    if processes.rank == 0:
        torch.save(found, folder / "found")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("two")
    torch.save(run(replace(CONFIG, max_yaw=45.0)).model.state_dict(), folder / "base.pth")
    command = [*TORCHRUN, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return folder, torch.load(folder / "found", weights_only=False)


def test_gradients_of_two_processes_are_those_of_one_with_both_halves_of_the_batch(two_processes):
    _, found = two_processes
    for name, ours, theirs in zip(CASES, found["gradients"], all_gradients(Processes(CPU)), strict=True):
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for parameter in ours:
            torch.testing.assert_close(
                ours[parameter], theirs[parameter], rtol=1e-4, atol=1e-6, msg=f"{name} {parameter}"
            )


def test_two_processes_train_and_resume_to_the_model_of_one(two_processes):
    folder, found = two_processes
    one, two = run(to_train(folder)), found["two"]
    assert two.stopped == "finished" and two.steps == one.steps
    for (name, a), b in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    assert two.history["val_rank1"].tolist() == pytest.approx(one.history["val_rank1"].tolist(), abs=0.02)
    for (name, a), b in zip(two.model.state_dict().items(), found["again"].model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_what_the_folder_lacks_all_processes_know(two_processes):
    """Without its best model a run looks for it anew; patience then ends all processes at the same epoch."""
    onward = two_processes[1]["onward"]
    assert onward.stopped == "early" and len(onward.history) == 5  # the third is the best, then two that are not


@pytest.fixture
def command(tmp_path) -> list[str]:
    """One that trains on a small set."""
    write_set(tmp_path / "faces", people(60, width=64))
    return [*COMMAND, "--data_dir", str(tmp_path / "faces"), "--save_dir", str(tmp_path / "runs")]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--save_dir", __file__], "cannot write to .*test_devices"),
        (["--min_yaw", "89", "--max_yaw", "89.5"], "no training view has 89"),
    ],
)
def test_the_command_fails_as_its_processes_do(command, flags, error):
    full = [sys.executable, *command, "--devices", "2", *flags]
    done = subprocess.run(full, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 1 and re.search(f"error: {error}", done.stderr), done.stderr


def test_torchrun_starts_the_same_command(command, tmp_path):
    full = [*TORCHRUN, *command, "--val_people", "20", "--test_people", "20", "--epochs", "2"]
    done = subprocess.run(full, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val_rank1") == 1  # one of them speaks
    assert load_checkpoint(newest_checkpoint(tmp_path / "runs"))["epoch"] == 2


@pytest.fixture
def under_way(command, tmp_path):
    """A command that trains in two processes and has finished an epoch; and these."""
    full = [sys.executable, *command, "--devices", "2", "--epochs", "1000", "--save_every", "1", "--val_every", "1000"]
    process = subprocess.Popen(
        full, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT, start_new_session=True
    )
    while not list(tmp_path.glob("runs/checkpoint_epoch_*.pth")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    yield process, workers
    process.kill()
    for worker in workers:
        if worker.is_running():
            worker.kill()


def test_workers_end_with_their_parent(under_way):
    process, workers = under_way
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_program_stops_its_workers_with_a_checkpoint(under_way, number):
    process, workers = under_way
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"interrupted; go on with --resume .*_enhanced\.pth", errors)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


if __name__ == "__main__":
    in_two_processes(Path(sys.argv[1]))
