from itertools import groupby

import pytest
import torch
from conftest import people

from viewdiff_nb.faces.geometry import normalise_keypoints
from viewdiff_nb.training.batches import REACH, Mixup, feed, mix


def test_partners_have_almost_the_same_yaw_and_are_somebody_elses_view():
    faces = people(200, views=10)
    batches = torch.arange(2000).split(300)
    pairs, weights = Mixup(faces).pair(batches, torch.Generator().manual_seed(0))
    assert [len(pair) for pair in pairs] == [2 * len(batch) for batch in batches]
    own, partner = (torch.cat([pair.chunk(2)[i] for pair in pairs]) for i in (0, 1))
    assert torch.equal(own, torch.arange(2000)) and not (faces.person[own] == faces.person[partner]).any()
    rank = faces.angles[:, 1].argsort().argsort()
    distance = (rank[own] - rank[partner]).abs()
    longest = max(len(list(views)) for _, views in groupby(faces.person[rank.argsort()].tolist()))  # of one person
    assert distance.min() >= 1 and distance.max() <= REACH * 2000 + longest
    assert set(range(1, int(REACH * 2000) + 1)) <= set(distance.tolist())
    weight = torch.cat(weights)
    assert weight.min() >= 0 and weight.max() < 1 and abs(weight.mean() - 0.5) < 0.03
    assert abs(weight.var() - 1 / 12) < 0.01  # uniform


def test_equal_seeds_give_equal_partners():
    faces = people(20)
    drawn = [Mixup(faces).pair((torch.arange(60),), torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0][0][0], drawn[1][0][0]) and torch.equal(drawn[0][1][0], drawn[1][1][0])
    assert not torch.equal(drawn[0][1][0], drawn[2][1][0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixture_by_hand(share):
    faces = people(4)
    index = torch.tensor([0, 7, 13, 21])
    (batch,) = feed(faces, [index], faces.device)
    mixed, partner = mix(batch, torch.full((2,), share))
    first, second = index[:2], index[2:]
    torch.testing.assert_close(mixed.src, share * faces.src[first] + (1 - share) * faces.src[second])
    torch.testing.assert_close(mixed.angles, share * faces.angles[first] + (1 - share) * faces.angles[second])
    points = [normalise_keypoints(faces.keypoints_3d[rows]) for rows in (first, second)]
    torch.testing.assert_close(mixed.keypoints_3d, share * points[0] + (1 - share) * points[1])
    assert mixed.person.tolist() == [0, 1] and partner.tolist() == [2, 3]


def test_a_set_of_a_few_views_has_partners_too():
    faces = people(3, views=1)
    pairs, _ = Mixup(faces).pair((torch.arange(3),), torch.Generator().manual_seed(0))
    own, partner = pairs[0].chunk(2)
    assert not (own == partner).any()


@pytest.mark.parametrize("count", [2, 10])
def test_nobody_is_mixed_with_themselves(count):
    """Also where few people have many views with about the same yaw, in stretches of one person at both ends."""
    faces = people(count, views=30)
    faces.angles[:, 1] = torch.randn(len(faces)).sort().values  # by person
    shuffled = people(count, views=30)
    shuffled.angles[:, 1] = torch.randn(len(faces))
    for views in (faces, shuffled):
        index = torch.arange(len(views)).repeat(20)
        pairs, _ = Mixup(views).pair((index,), torch.Generator().manual_seed(0))
        own, partner = pairs[0].chunk(2)
        assert torch.equal(own, index)
        assert (views.person[own] != views.person[partner]).all()


def test_views_of_one_person_cannot_be_mixed():
    with pytest.raises(ValueError, match="mixup needs views of 2 people"):
        Mixup(people(1))
