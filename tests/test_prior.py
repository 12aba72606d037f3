import math

import numpy as np
import pytest
import torch
from conftest import people
from scipy.special import log_softmax
from torch import nn
from torch.func import vmap

from viewdiff_nb import (
    EnhancedTransformerDecoderOnly3D,
    EnhancedTransformerWithPrior,
    PriorPreservationDataset,
    PriorPreservationLoss,
)
from viewdiff_nb.modules.prior import teacher_outputs

TERMS = ("kl_loss", "feature_loss", "l2_loss")


def small(**options):
    sizes = {"d_model": 32, "nhead": 4, "num_layers": 2, "dim_feedforward": 48, "voxel_resolution": 4}
    model = EnhancedTransformerDecoderOnly3D(**sizes | options)
    nn.init.normal_(model.output.weight, std=0.1)
    return model


def pair(**options):
    base = small(use_lora_attention=False, use_projection_layer=False)
    model = small(use_lora_attention=True, use_projection_layer=True, **options)
    model.load_base(base.state_dict())
    return model, base


@pytest.mark.parametrize("anchors", [None, torch.randn(7, 8)])
def test_zero_when_they_agree_and_positive_otherwise(anchors):
    loss = PriorPreservationLoss(anchors)
    teacher = torch.randn(5, 8)
    total, terms = loss(teacher.clone(), teacher)
    assert total.abs() < 1e-6 and all(terms[name].abs() < 1e-6 for name in TERMS)
    total, terms = loss(teacher + 1.5 * torch.randn(5, 8), teacher)
    assert all(terms[name] > 1e-4 for name in TERMS)
    torch.testing.assert_close(total, sum(terms.values()))


def test_hand_computed_terms():
    """Anchors e1, e2; teacher e1, student e2, T = 1: p = softmax(1, 0), q = softmax(0, 1)."""
    loss = PriorPreservationLoss(torch.eye(2), temperature=1.0)
    _, terms = loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
    high = math.e / (math.e + 1)
    kl = high * math.log(high / (1 - high)) + (1 - high) * math.log((1 - high) / high)
    assert terms["kl_loss"].item() == pytest.approx(kl, rel=1e-5)
    assert terms["feature_loss"].item() == pytest.approx(1.0)
    assert terms["l2_loss"].item() == pytest.approx(5.0)  # |(-1, 2)|^2 / 1


def test_kl_is_a_mean_over_samples_not_over_batch_statistics():
    loss = PriorPreservationLoss(torch.randn(6, 8))
    student, teacher = torch.randn(4, 8), torch.randn(4, 8)
    alone = [loss(student[i : i + 1], teacher[i : i + 1])[1]["kl_loss"] for i in range(4)]
    torch.testing.assert_close(loss(student, teacher)[1]["kl_loss"], torch.stack(alone).mean())


@pytest.mark.parametrize("vectorised", [False, True])
def test_autocast_leaves_the_terms_in_float32(vectorised):
    """Cosines of rounded vectors, divided by T = .05, would be off by several hundredths."""
    anchors, student, teacher = torch.randn(40, 32), torch.randn(24, 32), torch.randn(24, 32)
    loss, student = PriorPreservationLoss(anchors), student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        if vectorised:
            total, terms = vmap(loss)(student[None], teacher[None])
            total, terms = total[0], {name: value[0] for name, value in terms.items()}
        else:
            total, terms = loss(student, teacher)

    a, s, t = (x.detach().double().numpy() for x in (anchors, student, teacher))
    a, unit_s, unit_t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, s, t))
    log_q, log_p = log_softmax(unit_s @ a.T / 0.05, 1), log_softmax(unit_t @ a.T / 0.05, 1)
    wanted = {
        "kl_loss": (np.exp(log_p) * (log_p - log_q)).sum(1).mean(),
        "feature_loss": 1 - (unit_s * unit_t).sum(1).mean(),
        "l2_loss": (((s - t) ** 2).sum(1) / (t**2).sum(1)).mean(),
    }
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(wanted, rel=1e-5)
    (mixed,) = torch.autograd.grad(total, student)
    (plain,) = torch.autograd.grad(loss(student, teacher)[0], student)
    torch.testing.assert_close(mixed, plain, rtol=1e-4, atol=1e-6)


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    PriorPreservationLoss()(student, teacher)[0].backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def batch(faces, index):
    return faces.src[index], faces.conditions(index), faces.front[faces.person[index]]


def test_loss_is_task_plus_weighted_prior_from_one_forward():
    model, base = pair(dropout=0.0)
    nn.init.normal_(model.projection.expand.weight, std=0.1)
    faces = people(6)
    inputs, conditions, targets = batch(faces, slice(0, 8))
    together = EnhancedTransformerWithPrior(model, base, lambda_prior=0.3)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    prior = PriorPreservationDataset(base, faces.src, faces.conditions())[torch.arange(10, 14)]
    loss, parts = together.compute_loss(inputs, conditions, targets, nn.functional.mse_loss, prior)
    assert len(calls) == 1
    predicted = model(inputs, **conditions, return_residual=False)
    kept = model(prior["inputs"], **prior["conditions"], return_residual=False)
    torch.testing.assert_close(parts["original_loss"], nn.functional.mse_loss(predicted, targets))
    torch.testing.assert_close(parts["prior_loss"], PriorPreservationLoss()(kept, prior["outputs"])[0])
    torch.testing.assert_close(loss, parts["original_loss"] + 0.3 * parts["prior_loss"])
    assert parts["prior_loss"] > 0
    assert {"total_loss", "original_loss", "prior_loss", *TERMS} == set(parts)


def test_at_step_0_the_prior_loss_is_zero():
    model, base = pair(dropout=0.0)
    inputs, conditions, targets = batch(people(4), slice(0, 8))
    _, parts = EnhancedTransformerWithPrior(model, base).compute_loss(
        inputs, conditions, targets, nn.functional.mse_loss
    )
    assert parts["prior_loss"].abs() < 1e-5


def test_the_base_stays_frozen_and_in_evaluation_mode():
    model, base = pair()
    EnhancedTransformerWithPrior(model, base).train()
    assert model.training and not base.training
    assert not any(p.requires_grad for p in base.parameters())


def test_dataset_holds_the_base_outputs():
    _, base = pair()
    faces = people(6)
    prior = PriorPreservationDataset(base, faces.src, faces.conditions(), batch_size=7)
    base.eval()
    wanted = base(faces.src, **faces.conditions(), return_residual=False)
    torch.testing.assert_close(prior.outputs, wanted)
    assert len(prior) == 36
    generator = torch.Generator().manual_seed(1)
    drawn = prior[prior.draw(5, generator)]
    assert drawn["inputs"].shape == (5, 32) and set(drawn["conditions"]) == {"angles", "keypoints_3d", "pose"}
    row = (prior.src == drawn["inputs"][2]).all(1).nonzero().item()
    assert torch.equal(drawn["outputs"][2], prior.outputs[row])
    loader = torch.utils.data.DataLoader(prior, batch_size=4)
    assert next(iter(loader))["outputs"].shape == (4, 32)


def test_every_module_of_a_teacher_is_in_its_own_mode_again():
    class Teacher(nn.Sequential):
        def forward(self, src, return_residual=True):
            return super().forward(src)

    teacher = Teacher(nn.BatchNorm1d(3), nn.Linear(3, 3)).train()
    teacher[0].eval()
    assert not teacher_outputs(teacher, torch.randn(4, 3), {}).requires_grad
    assert [module.training for module in teacher] == [False, True]


def test_refuses_what_cannot_be():
    model, base = pair()
    with pytest.raises(ValueError, match="lambda_prior must not be negative, got -1"):
        EnhancedTransformerWithPrior(model, base, lambda_prior=-1)
    with pytest.raises(ValueError, match="temperature must be positive"):
        PriorPreservationLoss(temperature=0)
    with pytest.raises(ValueError, match="prior set is empty"):
        PriorPreservationDataset(base, torch.zeros(0, 32), {})
    with pytest.raises(ValueError, match="both be"):
        PriorPreservationLoss()(torch.zeros(2, 3), torch.zeros(3, 3))


def test_rows_are_the_generators():
    model, _ = pair()
    faces = people(8, width=32)
    prior = PriorPreservationDataset(model, faces.src, faces.conditions())
    one, again = (prior.draw(20, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.equal(again) and not one.equal(prior.draw(20, torch.Generator().manual_seed(4)))
    assert prior.draw(20).shape == (20,)


def test_a_distance_is_relative_to_the_teacher_however_short_it_is():
    """|s - t|^2 / |t|^2, of a teacher of length 0.01."""
    teacher = torch.tensor([[0.006, 0.008, 0.0], [0.0, 0.0, 0.01]])
    _, terms = PriorPreservationLoss()(1.5 * teacher, teacher)
    assert terms["l2_loss"].item() == pytest.approx(0.25)
