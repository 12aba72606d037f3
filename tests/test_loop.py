"""Training: what it learns, what it refuses, and the same in the cells of a notebook."""

import re
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, people, run, sets, write_set
from jupyter_client.manager import start_new_kernel
from torch import nn

from viewdiff_nb.faces import FaceViews, load_face_views
from viewdiff_nb.modules.baselines import MLP
from viewdiff_nb.training.checkpoint import build_model, load_checkpoint, save_checkpoint
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.losses import LOSSES, build_optimizer, warmup_cosine
from viewdiff_nb.training.result import predict


@pytest.mark.parametrize("loss", LOSSES)
def test_learns_with_every_loss(loss):
    result = run(replace(CONFIG, loss=loss, epochs=6, lr=3e-3, paired_views="pairs" in loss))
    losses = result.history["train_loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    assert len(result.history) == 6 and result.steps == 6 * 15
    rates = ("loss", "mse", "cosine", "centred_cosine", "rank1", "rank5", "tar", "auc", "eer", "accuracy")
    assert {"epoch", "train_loss", "lr", "grad_norm", "seconds", *(f"val_{r}" for r in rates)} == set(result.history)
    assert result.stopped == "finished" and result.checkpoint is None


def test_learns_from_mixtures_of_people():
    plain, mixed = (run(replace(CONFIG, mixup=mixup, epochs=6, lr=3e-3)).history for mixup in (False, True))
    assert mixed["train_loss"].iloc[-1] < mixed["train_loss"].iloc[0]
    assert mixed["train_loss"].iloc[-1] > plain["train_loss"].iloc[-1]  # mixtures cannot be told for sure


def test_a_set_on_disk_trains_to_the_same_weights(tmp_path):
    for name, faces in zip(("train", "val"), sets(), strict=True):
        write_set(tmp_path / name, faces)
    config = replace(CONFIG, mixup=True, epochs=1)
    weights = []
    for mmap in (False, True):
        faces = [load_face_views(tmp_path / name, mmap=mmap) for name in ("train", "val")]
        result = train(config, *faces, progress=False)
        weights.append(result.model.output.weight)
        assert faces[0].on_disk == mmap
    assert torch.equal(*weights)


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    config = replace(CONFIG, use_lora_attention=True, use_projection_layer=True)
    first, again, other = run(config), run(config), run(replace(config, seed=1))
    for (name, a), b in zip(first.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.model.output.weight, other.model.output.weight)


def test_adapting_a_base_leaves_its_weights_alone(base_path):
    config = replace(
        CONFIG, use_lora_attention=True, use_projection_layer=True, base_model_path=base_path, min_yaw=45.0
    )
    model = run(config).model
    state = load_checkpoint(base_path)["model"]
    for name, role in model.parameter_roles().items():
        if role == "base":
            assert torch.equal(dict(model.named_parameters())[name], state[name]), name
    assert model.blocks[0].attention.query.lora_up.abs().sum() > 0
    assert model.projection.expand.weight.abs().sum() > 0


def test_prior_preservation_keeps_predictions_near_the_base(base_path):
    config = replace(
        CONFIG,
        use_lora_attention=True,
        rank=8,
        lora_alpha=8.0,
        base_model_path=base_path,
        min_yaw=45.0,
        epochs=8,
        lora_lr=1e-2,
        prior_fraction=1.0,
    )
    _, val = sets()
    near = val.where(val.abs_yaw < 45)
    base = build_model(config, 32, base=True)
    base.load_state_dict(load_checkpoint(base_path)["model"])
    moved = {}
    for use_prior in (False, True):
        model = run(replace(config, use_prior_preservation=use_prior, lambda_prior=3.0)).model
        moved[use_prior] = (predict(model, near) - predict(base, near)).norm(dim=1).mean()
    assert moved[True] < 0.7 * moved[False]


def test_layered_learning_rates():
    model = build_model(replace(CONFIG, use_lora_attention=True, use_projection_layer=True), 32)
    groups = {g["role"]: g for g in build_optimizer(model, replace(CONFIG, lr=1e-4, lora_lr=1e-3)).param_groups}
    assert groups["base"]["lr"] == 1e-4 and groups["lora"]["lr"] == groups["projection"]["lr"] == 1e-3
    assert sum(len(g["params"]) for g in groups.values()) == sum(p.requires_grad for p in model.parameters())


def test_schedule_rises_then_falls_along_a_cosine():
    factor = warmup_cosine(0.1, 100)
    assert factor(0) == pytest.approx(0.1) and factor(9) == pytest.approx(1.0) and factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.505, abs=1e-6) and factor(100) == pytest.approx(0.01)


def test_accumulated_gradients_equal_one_large_batch():
    """4 batches of 15 in windows of 4 are one batch of 60 (mean losses, no dropout)."""
    train_faces, val_faces = people(10), people(30, first=1000)
    config = replace(CONFIG, dropout=0.0, loss="cosine", epochs=1, warmup=0.0, clip_norm=1e9)
    small = train(replace(config, batch_size=15, gradient_accumulation_steps=4), train_faces, val_faces, progress=False)
    large = train(replace(config, batch_size=60), train_faces, val_faces, progress=False)
    assert small.steps == large.steps == 1
    assert small.history["train_loss"][0] == pytest.approx(large.history["train_loss"][0], rel=1e-5)
    torch.testing.assert_close(small.model.output.weight, large.model.output.weight, rtol=1e-3, atol=1e-5)


def test_the_last_partial_window_is_flushed():
    result = run(replace(CONFIG, gradient_accumulation_steps=4, epochs=1))
    assert result.steps == 4  # 15 batches: 4 + 4 + 4 + 3


def test_clipping_bounds_the_gradient(monkeypatch):
    norms = []
    original = nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        norm = original(parameters, max_norm)
        norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    run(replace(CONFIG, epochs=1, clip_norm=0.01))
    assert len(norms) == 15 and max(norms) <= 0.01 * 1.001


def test_mixed_precision_trains_to_about_the_same():
    single, mixed = run(replace(CONFIG, epochs=4)), run(replace(CONFIG, epochs=4, use_amp=True))
    assert next(mixed.model.parameters()).dtype == torch.float32
    assert mixed.history["train_loss"].iloc[-1] == pytest.approx(single.history["train_loss"].iloc[-1], rel=0.005)


def test_cross_view_trains():
    result = run(replace(CONFIG, use_cross_view=True, n_views=3, batch_size=15, lr=3e-3, epochs=6))
    losses = result.history["train_loss"]  # of fused predictions
    assert losses.iloc[-1] < losses.iloc[0]
    assert result.model.cross_view["0"].out.weight.abs().sum() > 0


def test_predictions_of_views_seen_together_never_mix_people():
    """6 views in groups of 4: the second group is filled up, and the filling has no influence."""
    model = build_model(replace(CONFIG, use_cross_view=True, n_views=4, batch_size=16), 32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    faces = people(5)
    predicted = predict(model, faces, batch_size=8)
    changed = FaceViews(faces.names, faces.front, faces.src.clone(), faces.keypoints_3d, faces.angles, faces.person)
    changed.src[6:12] = changed.src[6:12].flip(1)  # another second person
    after = predict(model, changed, batch_size=8)
    same = torch.ones(30, dtype=torch.bool)
    same[6:12] = False
    torch.testing.assert_close(after[same], predicted[same])
    assert (after[~same] - predicted[~same]).abs().max() > 1e-2


def test_only_what_is_added_to_an_adapted_base_trains(tmp_path):
    lora = replace(CONFIG, use_lora_attention=True, epochs=1)
    save_checkpoint(tmp_path / "adapted.pth", {"model": run(lora).model.state_dict()})
    config = replace(lora, use_cross_view=True, n_views=3, batch_size=15, base_model_path=str(tmp_path / "adapted.pth"))
    model = run(config).model
    state = load_checkpoint(tmp_path / "adapted.pth")["model"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("cross_view.") for name in trained)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in state.items())


def test_lora_without_a_base_trains_everything():
    """There is no pretrained W to keep, and a random one must not stay frozen."""
    model = run(replace(CONFIG, use_lora_attention=True, epochs=1)).model
    assert all(p.requires_grad for p in model.parameters())


def test_a_base_that_is_adapted_already_has_no_plain_teacher(tmp_path):
    lora = replace(CONFIG, use_lora_attention=True, epochs=1)
    path = tmp_path / "adapted.pth"
    save_checkpoint(path, {"model": run(lora).model.state_dict()})
    with pytest.raises(ValueError, match="needs a plain base; .*adapted.pth is adapted already"):
        run(replace(lora, use_prior_preservation=True, base_model_path=str(path)))


def test_too_few_validation_people_for_what_is_monitored_are_found_before_training():
    with pytest.raises(
        ValueError, match="5 validation people with 30 predictions make 120 impostor pairs.*raise val_people"
    ):
        train(replace(CONFIG, monitor="val_tar"), people(40), people(5, first=1000), progress=False)


def test_few_validation_people_have_the_rates_that_can_be_told():
    history = train(CONFIG, people(40), people(5, first=1000), progress=False).history
    assert history["val_tar"].isna().all()
    assert history[["val_loss", "val_rank1", "val_cosine", "val_auc"]].notna().all(axis=None)


def test_a_given_model_is_not_combined_with_a_base(base_path):
    with pytest.raises(ValueError, match="trained as it is"):
        run(replace(CONFIG, base_model_path=base_path), model=MLP(32))


def test_baselines_train_in_the_same_loop():
    assert len(run(model=MLP(32)).history) == 2


def test_people_may_not_be_in_training_and_validation():
    train_faces, _ = sets()
    with pytest.raises(ValueError, match="40 people are in both training and validation, e.g. 'person_0000'"):
        train(CONFIG, train_faces, train_faces, progress=False)


def test_an_unwritable_folder_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to"):
        run(replace(CONFIG, save_dir=str(tmp_path / "file" / "checkpoints")))


def test_no_view_in_range():
    with pytest.raises(ValueError, match="no training view has 89"):
        run(replace(CONFIG, min_yaw=89.0, max_yaw=89.5))


SETUP = f"""
import sys
sys.path[:] = {sys.path!r}
from dataclasses import replace
from conftest import CONFIG, sets
from viewdiff_nb.plots import LiveCurves
from viewdiff_nb.training.loop import train
"""


class Kernel:
    """A kernel as a notebook has it: runs cells, and gathers what they show."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel()

    def start(self, code: str) -> str:
        return self.client.execute(code)

    def shown(self, cell: str, until=lambda messages: False) -> list[dict]:
        """The messages of a cell until it is done, or until enough are there."""
        messages: list[dict] = []
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != cell:
                continue
            messages.append(message)
            assert message["msg_type"] != "error", "\n".join(message["content"]["traceback"])
            if message["content"].get("execution_state") == "idle" or until(messages):
                return messages

    def run(self, code: str) -> list[dict]:
        return self.shown(self.start(code))

    def text(self, code: str) -> str:
        return "".join(m["content"]["text"] for m in self.run(code) if m["msg_type"] == "stream")


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    kernel.run(SETUP)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def test_the_live_figure_is_one_picture_updated_in_place(kernel):
    messages = kernel.run("result = train(replace(CONFIG, epochs=3), *sets(), on_epoch=LiveCurves(), progress=False)")
    pictures = [m for m in messages if "image/png" in m["content"].get("data", {})]
    assert [m["msg_type"] for m in pictures] == ["display_data", "update_display_data", "update_display_data"]
    assert len({m["content"]["transient"]["display_id"] for m in pictures}) == 1
    assert len({m["content"]["data"]["image/png"] for m in pictures}) == 3


def test_the_stop_button_stops_cleanly_and_the_notebook_goes_on(kernel, tmp_path):
    kernel.run(
        f"config = replace(CONFIG, epochs=100_000, save_every=10**6, val_every=10**6, save_dir={str(tmp_path)!r})"
    )
    cell = kernel.start("stopped = train(config, *sets())")
    kernel.shown(cell, until=lambda messages: len(messages) > 5)  # the bar moves
    time.sleep(0.3)
    kernel.manager.interrupt_kernel()
    kernel.shown(cell)
    assert re.fullmatch(r"interrupted .*last_enhanced.pth\n", kernel.text("print(stopped.stopped, stopped.checkpoint)"))
    onward = """
epochs = len(stopped.history) + 2
result = train(replace(config, epochs=epochs, resume="auto", save_every=1, val_every=1), *sets(), progress=False)
print(result.stopped, len(result.history) == epochs, result.steps == 15 * epochs)
"""
    said = kernel.text(onward)
    assert "finished True True\n" in said and "goes on from" in said and "epochs " in said
