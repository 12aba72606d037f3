"""What a run refuses before anything is lost, and what it says then."""

import errno
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, run, sets

from viewdiff_nb.training.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.loop import train


@pytest.fixture
def finished(tmp_path):
    """A folder with a run of two epochs."""
    run(replace(CONFIG, save_dir=str(tmp_path / "run"), save_every=1))
    return tmp_path / "run"


def test_a_log_dir_that_cannot_be_used_is_found_before_earlier_files_move(finished, tmp_path):
    (tmp_path / "log").write_text("a file")
    before = sorted(path.name for path in finished.iterdir())
    with pytest.raises(OSError, match="log"):
        run(replace(CONFIG, save_dir=str(finished), log_dir=str(tmp_path / "log")))
    assert sorted(path.name for path in finished.iterdir()) == before


def test_a_folder_that_looks_like_a_checkpoint_is_passed_over(finished):
    (finished / "zzz.pth").mkdir()
    with pytest.warns(UserWarning, match=r"zzz\.pth, which is no file"):
        assert newest_checkpoint(finished).name == "checkpoint_epoch_2_enhanced.pth"


def test_more_epochs_are_asked_for_than_are_behind_it(finished):
    with pytest.raises(ValueError, match=r"has 2 epochs behind it; ask for more, not for 1"):
        run(replace(CONFIG, resume=str(finished), epochs=1))


def test_weights_alone_are_refused_at_once_and_a_run_beside_them_is_named(finished):
    with pytest.raises(CheckpointError, match=r"safetensors holds weights.*checkpoint_epoch_2.*can be resumed"):
        run(replace(CONFIG, resume=str(finished / "best_model_enhanced.safetensors"), epochs=3))


@pytest.mark.parametrize("batch", [-3, 10**6])
def test_a_batch_that_the_epoch_does_not_have_is_refused(finished, tmp_path, batch):
    content = load_checkpoint(finished / "checkpoint_epoch_1_enhanced.pth")
    content |= {"batch": batch, "order": torch.Generator().get_state()}
    save_checkpoint(tmp_path / "odd.pth", {name: value for name, value in content.items() if name != "format"})
    with pytest.raises(CheckpointError, match=rf"odd\.pth is damaged: it was saved after batch {batch} of"):
        run(replace(CONFIG, resume=str(tmp_path / "odd.pth")))


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_checkpoint_without_weights_or_moments_does_not_go_on_with_fresh_ones(finished, tmp_path, part):
    content = load_checkpoint(finished / "checkpoint_epoch_1_enhanced.pth") | {part: {}}
    save_checkpoint(tmp_path / "odd.pth", {name: value for name, value in content.items() if name != "format"})
    with pytest.raises(CheckpointError, match=r"odd\.pth does not fit"):
        run(replace(CONFIG, resume=str(tmp_path / "odd.pth")))


def test_a_full_disk_is_told_by_its_number_too(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="GB free") as caught:
        run(replace(CONFIG, save_dir=str(tmp_path / "run")))
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path / "run") in ([".lock"], [])


def test_a_front_that_is_not_finite_is_found_before_the_first_step():
    train_faces, val_faces = sets()
    front = val_faces.front.clone()
    front[3] = torch.nan
    with pytest.raises(ValueError, match=rf"frontal embedding of '{val_faces.names[3]}' is not finite"):
        train(CONFIG, train_faces, replace(val_faces, front=front), progress=False)


def test_flags_that_contradict_each_other_are_refused_before_processes_start():
    with pytest.raises(ValueError, match="use_compile is for one process, and devices is 2"):
        TrainConfig(use_compile=True, devices=2)


def test_a_config_is_given_by_names():
    with pytest.raises(TypeError):
        TrainConfig("data/heads")
