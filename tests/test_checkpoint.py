import os
import resource
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, run, sets
from safetensors.torch import load_file, save_file

from viewdiff_nb.training import checkpoint
from viewdiff_nb.training.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    load_base_weights,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from viewdiff_nb.training.evaluation import predict
from viewdiff_nb.training.prepare import find_checkpoint, load_model

CONTENT = {"model": {"w": torch.arange(5000.0)}, "epoch": 4, "history": [{"epoch": 1, "train_loss": 0.5}], "order": None}


def test_checkpoints_are_checked_when_read(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, CONTENT)
    found = load_checkpoint(path)
    assert torch.equal(found["model"]["w"], CONTENT["model"]["w"]) and found["history"] == CONTENT["history"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"a\.pth is truncated, damaged or no checkpoint"):
        load_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="was not written by this version of the kit"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "b.pth")


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path):
    """Refused, or (in the padding of the archive) without influence; never other numbers."""
    path = tmp_path / "a.pth"
    save_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(whole), (200,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(found["model"]["w"], CONTENT["model"]["w"]) and found["epoch"] == 4, place
    assert refused > 150


def test_nothing_but_tensors_and_plain_values_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": checkpoint.FORMAT, "model": Trap()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="truncated, damaged or no checkpoint"):
        load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_checkpoint(path, {"epoch": lambda: 2})  # cannot be pickled
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # the disk that ends in the middle of a file
        with pytest.raises(OSError, match=r"cannot write .*a\.pth: File too large; older files are whole"):
            save_checkpoint(path, CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_full_disk_is_found_before_training(tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    with pytest.raises(OSError, match="0.00 GB free, and the checkpoints of this run need about .* raise save_every"):
        run(replace(CONFIG, save_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_newest_usable_checkpoint_of_a_folder(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for number in (1, 2, 3):
        save_checkpoint(tmp_path / f"{number}.pth", CONTENT)
        os.utime(tmp_path / f"{number}.pth", (number, number))
    assert newest_checkpoint(tmp_path) == tmp_path / "3.pth"
    (tmp_path / "3.pth").write_bytes(b"PK")
    with pytest.warns(DamagedCheckpoint, match=r"passed over .*3\.pth is truncated"):
        assert newest_checkpoint(tmp_path) == tmp_path / "2.pth"
    with (
        pytest.warns(DamagedCheckpoint),
        pytest.raises(CheckpointError, match=r"3\.pth is truncated.*; .*2\.pth can be"),
    ):
        find_checkpoint(str(tmp_path / "3.pth"), None)
    for number in (1, 2):
        torch.save({"model": {}}, tmp_path / f"{number}.pth")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used: .*not written by.*truncated"):
        newest_checkpoint(tmp_path)


def test_what_a_run_leaves_behind(tmp_path):
    config = replace(CONFIG, use_lora_attention=True, lora_targets=("attention", "feed_forward"), save_every=1,
                     save_dir=str(tmp_path))  # fmt: skip
    (tmp_path / f"{checkpoint.LAST}.77{checkpoint.PART}").write_bytes(b"a run that was killed")
    result = run(config)
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock", checkpoint.BEST, checkpoint.BEST_WEIGHTS, "checkpoint_epoch_1_enhanced.pth", "checkpoint_epoch_2_enhanced.pth"
    }  # fmt: skip
    assert result.checkpoint == tmp_path / "checkpoint_epoch_2_enhanced.pth"
    _, val = sets()
    last = load_model(result.checkpoint)
    assert not last.training
    assert torch.equal(predict(last, val), predict(result.model, val))
    best = load_model(tmp_path / checkpoint.BEST_WEIGHTS)
    assert torch.equal(predict(best, val), predict(load_model(tmp_path / checkpoint.BEST), val))
    assert load_file(tmp_path / checkpoint.BEST_WEIGHTS).keys() == result.model.state_dict().keys()


def test_weights_of_a_base_in_every_format(tmp_path):
    weights = {"w": torch.ones(3)}
    save_checkpoint(tmp_path / "a.pth", {"model": weights})
    torch.save(weights, tmp_path / "b.pth")
    save_file(weights, tmp_path / "c.safetensors")
    torch.save(weights, tmp_path / "d.pth", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        assert torch.equal(load_base_weights(path)["w"], weights["w"])
    (tmp_path / "c.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_base_weights(tmp_path / "c.safetensors")
    save_file(weights, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="not written by this version"):
        load_model(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        torch.save([1], tmp_path / "b.pth")
        load_base_weights(tmp_path / "b.pth")
