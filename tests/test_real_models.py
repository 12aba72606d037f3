from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import people
from studies_fixture import TINY

from viewdiff_nb.faces import split_by_person
from viewdiff_nb.modules.adjusted import InSpace, Summed
from viewdiff_nb.modules.baselines import RawEmbedding, enrolled
from viewdiff_nb.studies import real_models
from viewdiff_nb.studies.candidates import CLOSED_FORMS, common_candidates, held_out_best, whitening_candidates
from viewdiff_nb.studies.store import Store
from viewdiff_nb.training.checkpoint import load_base_weights

PROFILE = replace(TINY, real_epochs=4)


def test_only_wanted_lengths_are_trained(monkeypatch):
    faces, epochs = people(12, views=8), []
    train_pass = real_models.train_pass

    def count(configs, split, model=None):
        epochs.append(configs[0].epochs)
        assert not set(split.train.names) & set(split.val.names)
        return train_pass(configs, split, model)

    monkeypatch.setattr(real_models, "train_pass", count)
    family = real_models.families(PROFILE, [])["MLP"]
    assert len(family.candidates(faces, 0, None)) == 18 and epochs == [1, 2, 4]
    epochs.clear()
    found = family.candidates(faces, 0, [(0.5, 1.0, "none"), real_models.WHOLE])
    assert epochs == [2, 4] and {share for share, *_ in found} == {0.5, 1.0}


def test_what_is_not_adapted_is_the_base_and_what_is_starts_from_it(tmp_path):
    split = split_by_person(people(40, views=8), val=8, test=8)
    base = real_models.synthetic_base(PROFILE, split, 0, Store(split, tmp_path))
    every = real_models.families(PROFILE, [base])
    weights = load_base_weights(str(base))
    still = every["pretrained transformer, not adapted"].candidates(split.test, 0, None)[real_models.WHOLE]
    torch.testing.assert_close(still.model.state_dict(), weights)
    lora = every["pretrained, LoRA r=8"].candidates(split.test, 0, [real_models.WHOLE])[real_models.WHOLE].model
    frozen = {name: value for name, value in lora.state_dict().items() if name in weights}
    torch.testing.assert_close(frozen, weights)
    assert any(name.endswith("lora_up") and value.abs().sum() > 0 for name, value in lora.state_dict().items())
    tuned = every["pretrained, fine-tuned"].candidates(split.test, 0, [real_models.WHOLE])[real_models.WHOLE].model
    moved = (tuned.state_dict()["output.weight"] - weights["output.weight"]).norm() / weights["output.weight"].norm()
    assert 0 < moved < 1


def test_the_base_s_step_may_be_a_quarter(tmp_path):
    """Rows of its family that choose nothing; their models go a quarter of the way from x to what the base says."""
    split = split_by_person(people(40, views=8), val=8, test=8)
    base = real_models.synthetic_base(PROFILE, split, 0, Store(split, tmp_path))
    family = real_models.families(PROFILE, [base])["pretrained transformer, not adapted"]
    rows = dict(family.rows)
    still = "pretrained transformer, not adapted"
    assert rows.pop(f"{still}, settings chosen") is real_models.any_setting
    assert rows == {
        still: real_models.WHOLE,
        f"{still}, a quarter of the step": (1.0, 0.25, "none"),
        f"{still}, a quarter of the step, centred": (1.0, 0.25, "even"),
    }
    faces = split.test
    found = family.candidates(faces, 0, None)
    assert set(rows.values()) <= found.keys() and {share for share, *_ in found} == {1.0}
    model = found[real_models.WHOLE].model.eval()
    x = F.normalize(faces.src, dim=1)
    f = F.normalize(model(x, **faces.conditions(), return_residual=False), dim=1)
    moved = found[1.0, 0.25, "none"](x, **faces.conditions(), return_residual=False)
    torch.testing.assert_close(moved, F.normalize(x + 0.25 * (f - x), dim=1))


def test_every_row_has_its_name_once():
    """And closed forms, which have nothing random in them, choose among all of their settings."""
    without, with_bases = real_models.families(PROFILE, []), real_models.families(PROFILE, ["0", "1"])
    rows = [row for family in with_bases.values() for row in family.rows]
    assert len(rows) == len(set(rows)) and set(without) < set(with_bases)
    assert not any(row.startswith("pretrained") for family in without.values() for row in family.rows)
    for name in CLOSED_FORMS:
        assert without[name].rows == {name: real_models.any_setting} and not without[name].random


@pytest.fixture(scope="module")
def whitened():
    """Faces, and all candidates of the whitened transformer with their lengths of training."""
    faces, epochs, sets = people(24, views=8, noise=0.6), [], []
    train_pass = real_models.train_pass

    def count(configs, split, model=None):
        epochs.append(configs[0].epochs)
        sets.append(split)
        return train_pass(configs, split, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_models, "train_pass", count)
        family = real_models.families(PROFILE, [])["whitened transformer"]
        found = family.candidates(faces, 0, None)
        assert epochs == [1, 2, 4]
        family.candidates(faces, 0, [(0.5, 1.0, 0.0)])
        assert epochs == [1, 2, 4, 2]
    return faces, found, sets


def test_the_whitened_transformer_s_rows_share_its_settings(whitened):
    """Alone: three lengths of training, three steps. Summed: two weights, too."""
    _, found, _ = whitened
    family = real_models.families(PROFILE, [])["whitened transformer"]
    one, both = (family.rows[f"whitened transformer{rest}"] for rest in ("", " + canonical correlation"))
    assert len(found) == 27 and len(list(filter(one, found))) == 9 and len(list(filter(both, found))) == 18
    for setting, model in found.items():
        assert one(setting) != both(setting) and isinstance(model, InSpace if one(setting) else Summed)


def test_the_whitened_transformer_is_trained_on_whitened_embeddings(whitened):
    """Of the space that its training people choose among themselves; settings are what their names say."""
    faces, found, sets = whitened

    def whiten(some):
        return whitening_candidates(some, (0.6, 0.8, 0.9), ("even",))

    def correlate(some):
        return common_candidates(some, (0.1, 0.3, 0.5), (1.0,))

    def seen(model):
        return F.normalize(model(faces.src, **faces.conditions(), return_residual=False), dim=1)

    space, common = (make(faces)[held_out_best(make, faces)] for make in (whiten, correlate))
    z, fronts = seen(space), F.normalize(enrolled(space, faces.front), dim=1)
    train = sets[0].train  # all but two people, who are for the loop's own validation
    assert train.names == faces.names[:-2]
    torch.testing.assert_close(train.src, z[faces.person < 22])
    torch.testing.assert_close(train.front, fronts[:22])
    for step in (0.25, 0.5, 1.0):
        alone = found[0.5, step, 0.0]
        f = F.normalize(alone.model.eval()(z, **faces.conditions(), return_residual=False), dim=1)
        torch.testing.assert_close(seen(alone), F.normalize(z + step * (f - z), dim=1), atol=1e-5, rtol=0)
        torch.testing.assert_close(enrolled(alone, faces.front), fronts)
        for weight in (0.3, 0.5):
            both = found[0.5, step, weight]
            cosines = (1 - weight) * seen(alone) @ fronts.T
            cosines += weight * seen(common) @ F.normalize(enrolled(common, faces.front), dim=1).T
            torch.testing.assert_close(seen(both) @ enrolled(both, faces.front).T, cosines, atol=1e-5, rtol=0)


def test_closed_candidates_need_neither_seed_nor_wish():
    faces = people(12, views=8)
    found = real_models.closed_candidates(lambda some: {("x",): RawEmbedding(), (len(some),): RawEmbedding()}, faces, 5)
    assert list(found) == [("x",), (96,)] and list(real_models.raw_candidates(faces, 0)) == [("raw",)]
