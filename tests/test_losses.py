import math
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, people

from viewdiff_nb.training import losses
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.losses import LOSSES, MARGIN, TEMPERATURE, mean_loss

PERSON = torch.tensor([0, 2, 2, 4])


@pytest.fixture
def batch():
    return torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)


def cosines(a, b):
    return [[float(torch.cosine_similarity(x, y, dim=0)) / TEMPERATURE for y in b] for x in a]


def log_share(row, chosen, allowed):
    return row[chosen] - math.log(sum(math.exp(row[j]) for j in allowed))


@pytest.mark.parametrize("person", [PERSON, torch.tensor([0, 2, 2, 4, 0, 0, 1]), torch.tensor([3] * 7)])
def test_two_way_by_hand(person):
    """With fewer samples than people, with more, and of one person only."""
    predicted, gallery = torch.randn(len(person), 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    scaled = cosines(predicted, gallery)
    for i, value in enumerate(losses.two_way(predicted, gallery, person).tolist()):
        there = -log_share(scaled[i], int(person[i]), range(5))
        column = [scaled[j][int(person[i])] for j in range(len(person))]
        others = [j for j in range(len(person)) if j == i or person[j] != person[i]]
        assert value == pytest.approx(there - log_share(column, i, others))
    predicted.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: losses.two_way(p, gallery, person), predicted)


def test_two_way_is_linear_in_a_batch_larger_than_the_gallery():
    """16,384 samples of 50 people would need a gigabyte for each square of the batch."""
    predicted, gallery = torch.randn(16_384, 8, requires_grad=True), torch.randn(50, 8)
    person = torch.randint(50, (16_384,))
    with torch.profiler.profile(profile_memory=True) as profile:
        losses.two_way(predicted, gallery, person).mean().backward()
    assert max(abs(event.cpu_memory_usage) for event in profile.events()) < 50 * 16_384 * 8 * 4


def test_pairs_by_hand(batch):
    predicted, gallery = batch
    scaled = cosines(predicted, predicted)
    extra = (losses.two_way_pairs(predicted, gallery, PERSON) - losses.two_way(predicted, gallery, PERSON)).tolist()
    assert extra[0] == extra[3] == 0  # nobody else of that person
    assert extra[1] == pytest.approx(-0.5 * log_share(scaled[1], 2, (0, 2, 3)))
    assert extra[2] == pytest.approx(-0.5 * log_share(scaled[2], 1, (0, 1, 3)))


def test_pairs_are_a_mean_over_all_partners():
    predicted, gallery, person = torch.randn(4, 6), torch.randn(2, 6), torch.tensor([0, 0, 0, 1])
    scaled = cosines(predicted, predicted)
    extra = (losses.two_way_pairs(predicted, gallery, person) - losses.two_way(predicted, gallery, person)).tolist()
    of_partners = [log_share(scaled[0], other, (1, 2, 3)) for other in (1, 2)]
    assert extra[0] == pytest.approx(-0.5 * sum(of_partners) / 2, rel=1e-4)


def test_the_margin_lowers_the_right_cosine_only(batch):
    predicted, gallery = batch
    row = cosines(predicted, gallery)[1]
    row[2] -= MARGIN / TEMPERATURE
    assert losses.identity_margin(predicted, gallery, PERSON)[1].item() == pytest.approx(-log_share(row, 2, range(5)))


def test_simple_losses_by_hand(batch):
    predicted, gallery = batch
    right = gallery[PERSON]
    assert losses.mse(predicted, gallery, PERSON)[3].item() == pytest.approx(
        sum((a - b) ** 2 for a, b in zip(predicted[3].tolist(), right[3].tolist(), strict=True)) / 6
    )
    cosine = float(torch.cosine_similarity(predicted[0], right[0], dim=0))
    assert losses.cosine(predicted, gallery, PERSON)[0].item() == pytest.approx(1 - cosine)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_value_and_a_right_gradient_per_sample(batch, name):
    predicted, gallery = batch
    assert LOSSES[name](predicted, gallery, PERSON).shape == (4,)
    predicted.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, gallery, PERSON), (predicted,))


def test_mixed_loss_is_weighted_by_sample(batch):
    predicted, gallery = batch
    partner, weight = torch.tensor([1, 1, 3, 0]), torch.tensor([1.0, 0.0, 0.25, 0.5])
    own, other = (losses.identity(predicted.float(), gallery.float(), who) for who in (PERSON, partner))
    mixed = mean_loss(losses.identity, gallery.float(), predicted, PERSON, partner, weight)
    torch.testing.assert_close(mixed, (weight * own + (1 - weight) * other).mean())
    torch.testing.assert_close(mean_loss(losses.identity, gallery.float(), predicted, PERSON), own.mean())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_within_autocast_the_gradient_is_that_of_float64(name, half):
    predicted, gallery = torch.randn(24, 64), torch.randn(40, 64)
    person, partner, weight = torch.randint(40, (24,)), torch.randint(40, (24,)), torch.rand(24)
    found, exact = predicted.clone().requires_grad_(), predicted.double().requires_grad_()
    with torch.autocast("cpu", half):
        loss = mean_loss(LOSSES[name], gallery, found, person, partner, weight)
    loss.backward()
    one, other = (LOSSES[name](exact, gallery.double(), who) for who in (person, partner))
    (weight * one + (1 - weight) * other).mean().backward()
    difference = (found.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert difference < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_by_itself_too(name):
    predicted, gallery, person = torch.randn(24, 64), torch.randn(40, 64), torch.randint(40, (24,))
    exact = LOSSES[name](predicted.double(), gallery.double(), person)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](predicted, gallery, person)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("people_there", [9, 5])
def test_within_vmap_and_autocast_too(people_there):
    """As many adapters at once are trained."""
    predicted, gallery = torch.randn(3, 8, 16), torch.randn(people_there, 16)
    person = torch.randint(people_there, (3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.vmap(lambda p, who: mean_loss(losses.two_way, gallery, p, who))(predicted, person)
    exact = [losses.two_way(p.double(), gallery.double(), who).mean() for p, who in zip(predicted, person, strict=True)]
    torch.testing.assert_close(found.double(), torch.stack(exact), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("terms", "weights"), [(("kl", "feature", "l2"), (1, 1, 1)), (("feature",), (0, 1, 0))])
def test_the_prior_is_held_by_the_terms_that_are_named(terms, weights):
    faces = people(4, views=3)
    config = replace(CONFIG, prior_terms=terms)
    model = torch.nn.Linear(2, 2)
    base = build_model(config, faces.feature_dim, base=True)
    objective = losses.Objective(config, model, faces.front, torch.device("cpu"), base, faces)
    assert objective.task.prior_loss.weights == weights


def test_identity_and_cosine_are_added_up(batch):
    """identity + 0.2 (1 - cos) of the right person, by hand."""
    predicted, gallery = batch
    found = losses.identity_cosine(predicted, gallery, PERSON)
    for value, row, person in zip(found, cosines(predicted, gallery), PERSON.tolist(), strict=True):
        assert value == pytest.approx(-log_share(row, person, range(5)) + 0.2 * (1 - TEMPERATURE * row[person]))
