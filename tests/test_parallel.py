"""Two processes (gloo, on the CPU) against one."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import CONFIG, people, run, sets, write_set

from viewdiff_nb.training.batches import FaceBatch
from viewdiff_nb.training.checkpoint import load_checkpoint, newest_checkpoint, prepare_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import OneProcess, SeveralProcesses, connect
from viewdiff_nb.training.losses import Objective

EXACT = replace(CONFIG, dropout=0.0, use_lora_attention=True, use_projection_layer=True)
CASES = {
    "two-way, mix-up": replace(EXACT, mixup=True),
    "pairs of views": replace(EXACT, loss="two-way+pairs", paired_views=True),
    "an odd batch": replace(EXACT, batch_size=15),
    "cross-view": replace(EXACT, use_cross_view=True, n_views=3, batch_size=15),
}


def gradients(machines, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Of the first batch, by parameter."""
    faces, _ = sets()
    model, _ = prepare_model(config, faces.feature_dim)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    objective = Objective(config, machines.share(model, config.views_together), faces.front, torch.device("cpu"))
    index = torch.arange((2 if config.mixup else 1) * config.batch_size)
    batch = FaceBatch(faces.src[index], faces.angles[index], faces.keypoints_3d[index], faces.person[index])
    objective(batch, torch.rand(config.batch_size, generator=generator) if config.mixup else None).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def all_gradients(machines) -> list[dict[str, torch.Tensor]]:
    return [gradients(machines, config) for config in CASES.values()]


def test_gradients_of_two_processes_are_those_of_one_with_both_halves_of_the_batch():
    two = SeveralProcesses(replace(CONFIG, devices=2)).launch(all_gradients)
    for name, ours, theirs in zip(CASES, two, all_gradients(OneProcess(torch.device("cpu"))), strict=True):
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for parameter in ours:
            torch.testing.assert_close(
                ours[parameter], theirs[parameter], rtol=1e-4, atol=1e-6, msg=f"{name} {parameter}"
            )


def test_two_processes_train_and_resume_to_the_model_of_one(tmp_path, base_path):
    config = replace(
        EXACT,
        base_model_path=base_path,
        use_prior_preservation=True,
        gradient_accumulation_steps=2,
        min_yaw=45.0,
        epochs=2,
        save_every=1,
    )
    one = run(config)
    two = run(replace(config, devices=2, save_dir=str(tmp_path / "two")))
    assert two.stopped == "finished" and two.steps == one.steps
    for (name, a), b in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    assert two.history["val_rank1"].tolist() == pytest.approx(one.history["val_rank1"].tolist(), abs=0.02)
    first = str(tmp_path / "two/checkpoint_epoch_1_enhanced.pth")
    again = run(replace(config, devices=2, dropout=0.0, resume=first))
    for (name, a), b in zip(two.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_what_a_process_raises_is_raised_here(tmp_path, base_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to .*file"):
        run(replace(CONFIG, devices=2, save_dir=str(tmp_path / "file")))
    with pytest.raises(ValueError, match="no training view has 89"):
        run(replace(CONFIG, devices=2, min_yaw=89.0, max_yaw=89.5))


def test_what_the_folder_lacks_all_processes_know(tmp_path):
    """Without its best model a run looks for it anew; patience then ends all processes at the same epoch."""
    config = replace(CONFIG, devices=2, lr=1e-30, patience=2, save_every=1)
    run(replace(config, epochs=2, save_dir=str(tmp_path / "first")))
    (tmp_path / "first/best_model_enhanced.pth").unlink()
    path = str(tmp_path / "first/checkpoint_epoch_2_enhanced.pth")
    onward = run(replace(config, epochs=9, save_dir=str(tmp_path / "second"), resume=path))
    assert onward.stopped == "early" and len(onward.history) == 5  # the third is the best, then two that are not


def children(pid: int) -> list[psutil.Process]:
    """The processes that train, of a command with --devices 2."""
    return [c for c in psutil.Process(pid).children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]


@pytest.fixture
def two_processes(tmp_path):
    """A command that trains on two devices and has finished an epoch; and its workers."""
    write_set(tmp_path / "faces", people(60, width=64))
    command = [
        sys.executable,
        "-m",
        "viewdiff_nb.train_enhanced",
        "--data_dir",
        str(tmp_path / "faces"),
        "--d_model",
        "64",
        "--device",
        "cpu",
        "--devices",
        "2",
        "--epochs",
        "1000",
        "--save_every",
        "1",
        "--val_every",
        "1000",
        "--save_dir",
        str(tmp_path / "runs"),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not list(tmp_path.glob("runs/checkpoint_epoch_*.pth")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    workers = children(process.pid)
    assert len(workers) >= 2
    yield process, workers
    process.kill()
    for worker in workers:
        if worker.is_running():
            worker.kill()


def test_workers_end_with_their_parent(two_processes):
    process, workers = two_processes
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_a_signal_to_the_program_stops_its_workers_with_a_checkpoint(two_processes):
    process, workers = two_processes
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"interrupted; go on with --resume .*_enhanced\.pth", errors)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_torchrun_starts_the_same_command(tmp_path):
    write_set(tmp_path / "faces", people(60, width=64))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29611",
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
        "2",
        "--device",
        "cpu",
        "--save_dir",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val_rank1") == 1  # one of them speaks
    assert load_checkpoint(newest_checkpoint(tmp_path / "runs"))["epoch"] == 2


def test_one_device_needs_no_fabric(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert isinstance(connect(CONFIG), OneProcess)
    with pytest.raises(ImportError, match=r'pip install "\.\[multi-gpu\]"'):
        connect(replace(CONFIG, devices=2))
