"""The guide's questions Q1 to Q5: each situation is provoked, and the run says what helps."""

import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import CONFIG, people, run, sets
from torch import nn

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.training import loop
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.result import (
    MUCH_PRIOR_LOSS,
    TrainingAdvice,
    TrainingDiverged,
    advice,
    memory_advice,
    predict,
)

ADAPTED = replace(CONFIG, use_lora_attention=True)


def test_q1_lora_worse_than_its_base(tmp_path):
    """A base that has learned to take away what yaw adds to an embedding, and steps of LoRA that are far too large."""
    drift = 2 * torch.nn.functional.normalize(torch.ones(32), dim=0)
    faces = [replace(f, src=f.src + f.angles[:, 1:2].abs() * drift) for f in sets()]
    base = train(replace(CONFIG, epochs=10, lr=3e-3), *faces, progress=False).model
    torch.save(base.state_dict(), tmp_path / "base.pth")
    config = replace(ADAPTED, base_model_path=str(tmp_path / "base.pth"), lora_lr=1.0)
    with pytest.warns(
        TrainingAdvice,
        match=r"after LoRA training rank-1 is \S+ on validation people, below the base "
        r"model's \S+; raise rank from 4 to 8 or 16; raise lora_alpha from 1 to the rank, 4; lower "
        r"lora_lr from 1 to 1e-2 or less; train for more than 2 epochs",
    ) as caught:
        result = train(config, *faces, progress=False)
    assert caught[0].filename == __file__  # where train() was called
    assert result.history["epoch"].tolist() == [0, 1, 2]
    assert result.history["val_rank1"].iloc[-1] < 0.9 * result.history["val_rank1"].iloc[0]


def test_q1_says_what_is_left_to_try(base_path):
    history = pd.DataFrame([{"epoch": 0, "val_rank1": 0.8}, {"epoch": 1, "train_loss": 1.0, "val_rank1": 0.7}])
    config = replace(ADAPTED, base_model_path=base_path, rank=8, lora_alpha=1.0, lora_lr=1e-5, loss="mse")
    assert advice(history, config) == [
        "after LoRA training rank-1 is 0.700 on validation people, below the base model's 0.800; raise lora_alpha "
        "from 1 to the rank, 8; raise lora_lr from 1e-05 to 1e-3 or more; a loss that tells people apart instead of mse, "
        "e.g. two-way; train for more than 2 epochs"
    ]
    assert not advice(history.assign(val_rank1=0.8), config)


def test_q2_the_projection_does_not_fit_in_memory():
    config = replace(CONFIG, use_projection_layer=True, voxel_resolution=8192)  # a grid of 11 TB
    with pytest.raises(
        MemoryError,
        match="does not fit in memory; try voxel_resolution 4096 instead of 8192, or "
        "batch_size 8 with gradient_accumulation_steps 2, which is the same to the optimiser, or "
        "use_amp",
    ):
        run(config)


def test_q2_on_a_gpu(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.Objective, "__call__", full)
    with pytest.raises(MemoryError, match=r"try batch_size 8 .*CUDA out of memory"):
        run(replace(CONFIG, use_amp=True))
    graph = replace(CONFIG, use_cuda_graph=True)
    with pytest.raises(MemoryError, match="accumulation_steps 2 and --no-use_cuda_graph"), memory_advice(graph):
        full()


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def wrong(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(loop.Objective, "__call__", wrong)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run()


def test_q3_the_prior_holds_the_model_at_its_base(base_path):
    config = replace(
        ADAPTED,
        base_model_path=base_path,
        min_yaw=45.0,
        use_prior_preservation=True,
        lora_lr=1e-3,
        lambda_prior=1e4,
        epochs=2,
    )
    with pytest.warns(
        TrainingAdvice,
        match=r"the task loss did not fall .*lambda_prior=10000 holds the model at its "
        r"base, lower it to 0.05-0.1.*base_model_path is the model you mean",
    ):
        run(config)


def test_q3_the_prior_loss_is_seen_and_explained(base_path):
    config = replace(
        ADAPTED,
        base_model_path=base_path,
        min_yaw=45.0,
        use_prior_preservation=True,
        lora_lr=1e-1,
        rank=8,
        lora_alpha=32.0,
        lambda_prior=1e-3,
        epochs=12,
    )
    with pytest.warns(
        TrainingAdvice, match=r"the prior loss rose from \S+ to \S+: it starts near 0.*raise lambda_prior"
    ):
        history = run(config).history
    assert history["prior_loss"].iloc[-1] > MUCH_PRIOR_LOSS and history["prior_loss"].iloc[0] != 0


def test_q4_the_batch_is_no_multiple_of_n_views():
    with pytest.raises(
        ValueError, match="batch_size must be a multiple of n_views=5 .*批次大小必须是n_views的倍数.*got 32"
    ):
        TrainConfig(use_cross_view=True, n_views=5, batch_size=32)
    model = build_model(replace(CONFIG, use_cross_view=True, n_views=5, batch_size=15), 32)
    faces = people(2)
    with pytest.raises(ValueError, match="use 10 or 15, and drop_last=True in a DataLoader"):
        model(faces.src, **faces.conditions())


def test_q5_too_large_a_learning_rate():
    with pytest.raises(
        TrainingDiverged,
        match=r"batch \d+ of epoch \d has loss .*: .*Try: lower lr \(1e\+30\), or "
        r"clip_norm",
    ) as caught:
        run(replace(CONFIG, lr=1e30, warmup=0.0, clip_norm=1e30, loss="mse"))
    assert "lora_lr" not in str(caught.value) and caught.value.result.stopped == "diverged"


def broken(faces: FaceViews, row: int) -> FaceViews:
    faces.src[row] = float("nan")
    return faces


def test_q5_data_that_is_not_finite():
    with pytest.raises(TrainingDiverged, match=r"its data: src is not finite in 1 of 16 samples, e.g. sample \d+"):
        train(CONFIG, broken(people(40), 7), sets()[1], progress=False)


class Overflowing(nn.Module):
    """A model that is fine for some batches, and then is not."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.left, self.scale, self.deep = good, nn.Linear(32, 32), nn.Identity()
        self.deep.register_forward_hook(lambda module, inputs, output: output * (1.0 if self.left >= 0 else 1e38) ** 2)

    def forward(self, src, return_residual=True, **conditions):
        self.left -= self.training
        return self.deep(self.scale(src))


@pytest.mark.parametrize("good", [4, 15 + 4, 30 + 14])
def test_q5_the_module_is_named_and_the_last_good_state_kept(good, tmp_path):
    config, model = replace(CONFIG, epochs=4, use_amp=True, save_dir=str(tmp_path), save_every=1), Overflowing(good)
    with pytest.raises(
        TrainingDiverged,
        match="the output of deep is the first that is not finite; no finite gradient "
        "in 2 of 2 parameters: scale.weight, scale.bias.*switch use_amp off",
    ) as caught:
        run(config, model=model)
    epochs = good // 15
    assert f"batch {good % 15} of epoch {epochs + 1}" in str(caught.value)
    assert f"what it was after epoch {epochs}" in str(caught.value)
    result = caught.value.result
    assert len(result.history) == epochs and all(p.isfinite().all() for p in result.model.parameters())
    if epochs:
        saved = tmp_path / f"checkpoint_epoch_{epochs}_enhanced.pth"
        assert result.checkpoint == saved and str(saved) in str(caught.value)
        for name, value in torch.load(saved, weights_only=True)["model"].items():
            assert torch.equal(model.state_dict()[name], value)


class FailingWhenAsked(nn.Module):
    """A model that trains well and whose predictions are infinite from the second validation on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.validations = nn.Linear(32, 32), 0

    def train(self, mode: bool = True):
        self.validations += not mode
        return super().train(mode)

    def forward(self, src, return_residual=True, **conditions):
        lost = not self.training and self.validations > 1
        return self.scale(src) * (float("inf") if lost else 1.0)


def test_q5_validation_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    model = FailingWhenAsked()
    with pytest.raises(
        TrainingDiverged,
        match=r"after epoch 2 the validation people's predictions are not finite.*Try: "
        r"lower lr.*after epoch 1; .*checkpoint_epoch_1_enhanced\.pth is the last",
    ) as caught:
        run(replace(CONFIG, save_dir=str(tmp_path), save_every=1), model=model)
    saved = torch.load(tmp_path / "checkpoint_epoch_1_enhanced.pth", weights_only=True)["model"]
    assert len(caught.value.result.history) == 1
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())


def test_a_gradient_that_is_not_finite_changes_no_weight():
    """Not even within the second before anybody looks at it."""
    model = Overflowing(3)
    seen = []
    original = loop._Run._update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_update", lambda run: (original(run), seen.append(model.scale.weight.clone()))[0])
        patch.setattr(loop, "CHECK_EVERY", 1e9)
        with pytest.raises(TrainingDiverged, match="batch 3 of epoch 1"):
            run(model=model)
    assert len(seen) == 15 and not torch.equal(seen[1], seen[2])
    assert all(torch.equal(seen[2], later) for later in seen[3:])


def test_a_run_that_went_well_gives_no_advice(base_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(replace(ADAPTED, rank=8, lora_alpha=8.0, base_model_path=base_path, lora_lr=1e-2, epochs=6))
    assert result.history["val_rank1"].iloc[-1] >= result.history["val_rank1"].iloc[0]
    assert predict(result.model, sets()[1]).isfinite().all()
