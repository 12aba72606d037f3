import pytest
import torch
from conftest import people

from viewdiff_nb.training.batches import count_batches, draw_batches, padded_groups, view_groups
from viewdiff_nb.training.config import TrainConfig


def test_an_epoch_sees_every_view_once():
    faces, config = people(7), TrainConfig(batch_size=16)
    batches = draw_batches(faces, config, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(42)) and len(batches) == count_batches(faces, config) == 3
    again = draw_batches(faces, config, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_cross_view_groups_are_views_of_one_person_and_no_view_comes_twice():
    person = people(7).person  # 6 views each
    groups = view_groups(person, 4, torch.Generator().manual_seed(0))
    assert groups.shape == (7, 4) and (person[groups] == person[groups[:, :1]]).all()
    pairs = view_groups(person, 2, torch.Generator().manual_seed(0))
    assert sorted(pairs.flatten().tolist()) == list(range(42))
    assert not torch.equal(pairs, view_groups(person, 2, torch.Generator().manual_seed(1)))
    assert len(view_groups(person[:-5], 3, torch.Generator())) == 12  # the last person has one view left


def test_multi_view_batches_hold_whole_groups():
    faces, config = people(7), TrainConfig(use_cross_view=True, n_views=3, batch_size=12)
    batches = draw_batches(faces, config, torch.Generator().manual_seed(0))
    assert len(batches) == count_batches(faces, config) == 3  # 14 groups of 3 views; 4 groups a batch
    for batch in batches:
        person = faces.person[batch].view(-1, 3)
        assert len(batch) == 12 and (person == person[:, :1]).all()
    with pytest.raises(ValueError, match="7 groups of n_views=4 views do not fill a batch of 64"):
        count_batches(faces, TrainConfig(use_cross_view=True, n_views=4, batch_size=64))


def test_padded_groups_hold_every_view_once_and_fill_up_with_the_same_person():
    person = people(5).person
    groups, mask = padded_groups(person, 4, torch.Generator().manual_seed(0))
    assert groups.shape == (10, 4) and sorted(groups[mask].tolist()) == list(range(30))
    assert (person[groups] == person[groups[:, :1]]).all()
