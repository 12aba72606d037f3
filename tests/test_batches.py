from dataclasses import replace
from itertools import groupby

import pytest
import torch
from conftest import people

from viewdiff_nb.faces import load_face_views
from viewdiff_nb.faces.geometry import normalise_keypoints
from viewdiff_nb.training import batches as batching
from viewdiff_nb.training.batches import (
    REACH,
    Mixup,
    count_batches,
    draw_batches,
    feed,
    mix,
    move_if_it_fits,
    padded_groups,
    view_groups,
    views_to_train,
)
from viewdiff_nb.training.config import TrainConfig

CPU = torch.device("cpu")


def test_an_epoch_sees_every_view_once():
    faces, config = people(7), TrainConfig(batch_size=16)
    batches = draw_batches(faces, config, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(42)) and len(batches) == count_batches(faces, config) == 3
    again = draw_batches(faces, config, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_views_within_the_yaw_range_are_trained():
    faces = people(2, views=7)
    degrees = torch.tensor([-180.0, -90.0, 0.0, 45.0, 90.0, 179.0, 180.0]).repeat(2)
    faces = replace(faces, angles=torch.stack((0 * degrees, degrees.deg2rad(), 0 * degrees), 1))

    def kept(**options):
        return views_to_train(faces, TrainConfig(**options)).angles[:, 1].rad2deg().round().unique().tolist()

    assert kept() == [-180, -90, 0, 45, 90, 179, 180]  # the default leaves nobody's view out
    assert kept(min_yaw=45.0, max_yaw=179.5) == [-90, 45, 90, 179]
    with pytest.raises(ValueError, match="no training view"):
        kept(min_yaw=100.0, max_yaw=120.0)


@pytest.mark.parametrize("factor,told", [(1e-15, "1e-15"), (1e25, "inf")])
@pytest.mark.parametrize("name", ["front", "src"])
def test_lengths_that_float32_cannot_calculate_with_are_refused(name, factor, told):
    faces = people(3)
    faces = replace(faces, **{name: getattr(faces, name) * factor})
    with pytest.raises(ValueError, match=f"{name}: an embedding has length {told}; .* Scale all embeddings alike"):
        views_to_train(faces, TrainConfig())


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
    with pytest.raises(ValueError, match="7 groups of n_views=4 views of a person do not fill a batch of 64"):
        count_batches(faces, TrainConfig(use_cross_view=True, n_views=4, batch_size=64))


def test_padded_groups_hold_every_view_once_and_fill_up_with_the_same_person():
    person = people(5).person
    groups, mask = padded_groups(person, 4, torch.Generator().manual_seed(0))
    assert groups.shape == (10, 4) and sorted(groups[mask].tolist()) == list(range(30))
    assert (person[groups] == person[groups[:, :1]]).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cross_view", [False, True])
def test_batches_from_disk_are_those_from_memory(face_set, cross_view, workers):
    loaded, mapped = load_face_views(face_set), load_face_views(face_set, mmap=True)
    config = TrainConfig(batch_size=8, n_views=2, use_cross_view=cross_view)
    before, fed = torch.get_rng_state(), {}
    for name, faces in (("memory", loaded), ("disk", mapped)):
        faces = faces.where(faces.abs_yaw > 20)
        index = draw_batches(faces, config, torch.Generator().manual_seed(0))
        fed[name] = list(feed(faces, index, CPU, num_workers=workers))
        assert len(fed[name]) == count_batches(faces, config) == 4
        for batch, rows in zip(fed[name], index, strict=True):  # in the order asked for
            assert torch.equal(batch.src, faces.src[rows]) and torch.equal(batch.person, faces.person[rows])
            for key, value in faces.conditions(rows).items():
                assert torch.equal(batch.conditions()[key], value), key
    for a, b in zip(fed["memory"], fed["disk"], strict=True):
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # dropout is the same in both ways


def test_batches_in_memory_need_no_loader(face_set, monkeypatch):
    monkeypatch.setattr(batching, "DataLoader", None)
    faces = load_face_views(face_set)
    assert len(next(feed(faces, [torch.arange(5)], CPU, num_workers=4)).src) == 5
    with pytest.raises(TypeError):  # from disk they do
        next(feed(load_face_views(face_set, mmap=True), [torch.arange(5)], CPU))


def test_what_lies_elsewhere_is_brought_to_the_device(face_set):
    meta, index = torch.device("meta"), [torch.arange(5), torch.arange(2)]
    for mmap in (False, True):
        fed = list(feed(load_face_views(face_set, mmap=mmap), index, meta))
        assert [batch.src.shape for batch in fed] == [(5, 32), (2, 32)]
        assert all(values.device == meta for batch in fed for values in batch[:4])


def test_a_failing_read_is_raised(face_set):
    faces = load_face_views(face_set, mmap=True)
    with pytest.raises(IndexError):
        list(feed(faces, [torch.tensor([len(faces)])], CPU))


def test_a_set_moves_to_the_device_only_if_it_fits(face_set, monkeypatch):
    loaded, mapped = load_face_views(face_set), load_face_views(face_set, mmap=True)
    assert move_if_it_fits(mapped, CPU).on_disk and not move_if_it_fits(loaded, CPU).on_disk
    gpu, moved = torch.device("cuda"), []
    monkeypatch.setattr(type(loaded), "to", lambda faces, device: moved.append(device) or faces)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * loaded.nbytes, 10**12))
    move_if_it_fits(mapped, gpu), move_if_it_fits(loaded, gpu)
    assert moved == [gpu, gpu]
    move_if_it_fits(loaded, gpu, share=0.49)
    assert len(moved) == 2


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
