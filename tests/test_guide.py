"""Every snippet of the guide runs with only the import line, or the path of the program, changed."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import people, write_set

from viewdiff_nb import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.train_enhanced import main, parse
from viewdiff_nb.training.checkpoint import FORMAT
from viewdiff_nb.training.config import TrainConfig

TEXT = (Path(__file__).parent / "guide_snippets.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
PROGRAM = "python train_transformer3D/viewdiff/train_enhanced.py"


def arguments(command: str) -> list[str]:
    """The flags of a guide command."""
    assert PROGRAM in command
    return shlex.split(command.replace("\\\n", " "), comments=True)[2:]


@pytest.mark.parametrize("snippet", PYTHON, ids=lambda s: re.search(r"import (\w+)|(optimizer)|\((\n)", s)[0][:40])
def test_python_snippet(snippet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = EnhancedTransformerDecoderOnly3D(use_lora_attention=False, use_projection_layer=False)
    torch.save(base.state_dict(), "base_model.pth")
    layer = torch.nn.Linear(2, 2)
    # what earlier snippets of the guide, or its reader, have in scope
    scope = {
        "torch": torch,
        "F": F,
        "src": torch.randn(8, 512),
        "angles": torch.randn(8, 3),
        "keypoints_3d": torch.randn(8, 5, 3),
        "pose": torch.randn(8, 3),
        "targets": torch.randn(8, 512),
        "base_params": [layer.weight],
        "lora_params": [layer.bias],
        "optimizer": torch.optim.AdamW(layer.parameters()),
    }
    exec(snippet.replace("from train_transformer3D.viewdiff import", "from viewdiff_nb import"), scope)
    printed = capsys.readouterr().out
    shapes = {
        "LoRALinearLayer(": "可训练参数数量: 4096",
        "PoseConditionedLoRAAttention(": "[8, 512]",
        "LightweightFaceProjectionLayer(": "[8, 512, 1, 1]",
        "CrossViewAttention(": "[40, 512]",
        "return_residual=True": "输出形状: torch.Size([8, 512])",
        "EnhancedTransformerWithPrior(": "总损失",
    }
    for marker, wanted in shapes.items():
        if marker in snippet:
            assert wanted in printed
    for value in scope.values():
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all()


def test_the_guide_was_found_whole():
    assert len(PYTHON) == 8 and len(SHELL) == 5


@pytest.fixture
def guide_folder(tmp_path, monkeypatch):
    """The folders that the guide's commands name, with a small face set and a base model."""
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "train/datas/file", people(60, width=512))
    (tmp_path / "train_transformer3D/checkpoints").mkdir(parents=True)
    base = EnhancedTransformerDecoderOnly3D(use_lora_attention=False, use_projection_layer=False)
    torch.save(base.state_dict(), "train_transformer3D/checkpoints/best_model.pth")
    return tmp_path


def test_training_commands_train_log_save_and_resume(guide_folder, capsys):
    """As written, but for one epoch instead of 100 and fewer held-out people (the set here is small)."""
    small = ["--val_people", "20", "--test_people", "20", "--epochs", "1"]
    for command in SHELL[:4]:
        assert parse(arguments(command)).epochs == 100
        main(arguments(command) + small)
        assert "val_rank1" in capsys.readouterr().out
    saved = guide_folder / "train_transformer3D/checkpoints_enhanced"
    assert {"best_model_enhanced.pth", "checkpoint_epoch_1_enhanced.pth"} <= {p.name for p in saved.iterdir()}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(guide_folder / "train_transformer3D/logs_enhanced")).Reload()
    wanted = {"Train/Loss", "Train/LearningRate", "Epoch/TrainLoss", "Epoch/ValLoss", "Epoch/ValCosineSim"}
    assert wanted <= set(events.Tags()["scalars"])

    (saved / "checkpoint_epoch_1_enhanced.pth").rename(saved / "checkpoint_epoch_50_enhanced.pth")
    resumed = parse(arguments(SHELL[4]))
    assert resumed.use_lora_attention and resumed.use_projection_layer and resumed.val_people == 20
    main([*arguments(SHELL[4]), "--epochs", "2"])
    assert re.search(r"epoch +2\b", capsys.readouterr().out)


def test_a_bad_command_says_why_before_any_work(guide_folder, capsys):
    with pytest.raises(SystemExit, match="lacks .*front_feature.npy"):
        main(["--data_dir", "nowhere"])
    with pytest.raises(SystemExit, match="there is no base model missing.pth"):
        main(
            [
                "--data_dir",
                "train/datas/file",
                "--val_people",
                "20",
                "--test_people",
                "20",
                "--use_lora_attention",
                "--base_model_path",
                "missing.pth",
            ]
        )
    for flags, message in (
        (["--use_prior_preservation"], "base_model_path"),
        (["--rnak", "3"], "--rank"),
        (["--use_cross_view", "--n_views", "5", "--batch_size", "32"], "multiple of n_views"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(flags)
        captured = capsys.readouterr()
        assert message in " ".join(f"{captured.out} {captured.err} {ended.value.code}".replace("│", " ").split())
    torch.save({"format": FORMAT, "model": {}}, "weights.pth")
    with pytest.raises(SystemExit, match="weights.pth holds weights without the config of a training run"):
        main(["--resume", "weights.pth"])
    assert not (guide_folder / "runs").exists()


def test_flags_on_resume_are_read_against_the_checkpoint(guide_folder):
    """--use_cross_view alone: n_views and batch_size are the checkpoint's, not the defaults."""
    config = TrainConfig(n_views=4, batch_size=16, val_people=20)
    torch.save({"format": FORMAT, "config": config.to_dict()}, "c.pth")
    resumed = parse(["--resume", "c.pth", "--use_cross_view"])
    assert (resumed.use_cross_view, resumed.n_views, resumed.batch_size, resumed.val_people) == (True, 4, 16, 20)
