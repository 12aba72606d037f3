import pytest
import torch
from conftest import people

from viewdiff_nb.modules.baselines import MLP, enrolled
from viewdiff_nb.studies.candidates import CLOSED_FORMS, adjusted, adjustments


@pytest.fixture(scope="module")
def faces():
    return people(20, views=8)


@pytest.mark.parametrize(
    ("name", "count"), [("centred by pose", 2), ("ridge, shrunk to identity", 18), ("within-class whitening", 18)]
)
def test_every_closed_form_has_its_number_of_trials(faces, name, count):
    candidates = CLOSED_FORMS[name](faces)
    assert len(candidates) == count
    for model in candidates.values():
        predicted = model(faces.src, **faces.conditions(), return_residual=False)
        assert predicted.shape == faces.src.shape and predicted.isfinite().all()
        assert enrolled(model, faces.front).shape == faces.front.shape
    first, *others = (model(faces.src, **faces.conditions()) for model in candidates.values())
    assert all(not torch.allclose(first, other) for other in others)


def test_adjustments_share_one_look_at_the_training_views(faces):
    """The residual is computed once, and gives what each would compute by itself."""
    model = MLP(faces.feature_dim)
    torch.nn.init.normal_(model.layers[-1].weight, std=0.02)
    found = adjustments(model, faces)
    assert len(found) == 6
    for (step, centring), one in found.items():
        alone = adjusted(model, faces, step=step, centring=centring)
        torch.testing.assert_close(one.weight, alone.weight)
