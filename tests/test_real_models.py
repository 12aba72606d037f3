from dataclasses import replace

import torch
from conftest import people
from studies_fixture import TINY

from viewdiff_nb.faces import split_by_person
from viewdiff_nb.studies import real_models
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
