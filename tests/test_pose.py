"""The pose explorer without a browser: what it computes, draws and refuses."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import people
from explorers import load_gallery, make_model, pixels

from viewdiff_nb.faces.turntable import RecordedPeople, load_turntable
from viewdiff_nb.metrics import similarity_scores
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.widgets import PoseExplorer
from viewdiff_nb.widgets.pose import search


def numbers(explorer: PoseExplorer) -> list[str]:
    return re.findall(r"<td[^>]*>([^<]*)</td>", explorer.readout.value)


def test_a_search_agrees_with_the_metrics():
    gallery, model = load_gallery(), make_model()
    row, own = load_turntable().row(3), gallery.names.index(load_turntable().names[3])
    found = search(model, row, gallery.front, own)
    assert found.own.shape == (2, 37)
    model.eval()
    with torch.no_grad():
        predicted = model(row.src, row.angles, row.keypoints_3d, return_residual=False)
    for i, embeddings in enumerate((row.src, predicted)):
        scores = similarity_scores(embeddings, gallery.front, torch.full((37,), own))
        np.testing.assert_allclose(found.own[i], scores.genuine, atol=1e-6)
        np.testing.assert_array_equal(found.rank[i], scores.rank)
        assert (found.other[i] != own).all()
        cosine = torch.cosine_similarity(embeddings[:, None], gallery.front[found.other[i]][:, None], dim=-1)
        np.testing.assert_allclose(found.best[i], cosine[:, 0], atol=1e-6)


def test_names_are_text_and_no_markup():
    """A face set may come from anybody, and a notebook runs what its HTML says."""
    trap = "<img src=x onerror=alert(1)> & 李雷"
    faces = people(2, width=64)
    faces = replace(faces, names=(faces.names[0], trap))
    explorer = PoseExplorer(RawEmbedding(), faces, RecordedPeople(faces), person=faces.names[0])
    cells = ElementTree.fromstring(explorer.readout.value)
    assert not list(cells.iter("img")) and [cell.text for cell in cells.iter("td")][2].endswith(f", {trap}")


def test_the_pose_explorer_shows_the_pose_it_says():
    gallery, model = load_gallery(), make_model()
    explorer, turntable = PoseExplorer(model, gallery, yaw=60), load_turntable()
    assert explorer.pose == (0.0, 60.0, 0.0)
    explorer.set(yaw=-45, pitch=10, roll=12, person=turntable.names[2])
    assert explorer.pose == (10.0, -45.0, 12.0)
    np.testing.assert_array_equal(pixels(explorer.head.picture), np.asarray(turntable.picture(2, 10, -45, 12)))
    np.testing.assert_array_equal(pixels(explorer.side.picture), np.asarray(turntable.crop(2, 10, -45, 12)))
    assert explorer.head.label == "the head at pitch 10°, yaw -45°, roll 12°"
    own = gallery.names.index(turntable.names[2])
    cosine = torch.cosine_similarity(turntable.row(2, 10).src[turntable.closest(2, 10, -45)], gallery.front)
    assert numbers(explorer)[0] == f"{cosine[own]:.3f}"
    assert numbers(explorer)[1].startswith(f"{int((cosine >= cosine[own]).sum())} (")


def test_recorded_people_are_shown_by_their_keypoints():
    model = make_model()
    faces = people(30, views=6, width=384)
    explorer = PoseExplorer(model, faces)
    assert isinstance(explorer.people, RecordedPeople)
    before = explorer.head.picture
    explorer.yaw.value = -80.0
    assert abs(explorer.pose[1] + 85) < 1 and explorer.head.picture != before
    assert len(explorer.figure().get_axes()) == 3


def test_people_outside_the_gallery_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="6 people are not in the gallery, e.g. 'person_0040'"):
        PoseExplorer(model, people(30, width=384), load_turntable())  # which has person_0000 .. person_0029


def test_people_of_the_same_names_are_not_taken_for_those_of_the_turntable():
    gallery, model = load_gallery(), make_model()
    assert PoseExplorer(model, gallery).people.pitches
    strangers = replace(gallery, front=gallery.front.roll(1, 0), person=(gallery.person + 1) % len(gallery.names))
    assert isinstance(PoseExplorer(model, strangers).people, RecordedPeople)
    with pytest.raises(ValueError, match="the gallery's embeddings have 32 numbers, those of the people 384"):
        PoseExplorer(model, people(30), load_turntable())


def test_raw_embeddings_are_not_changed_by_a_model_that_returns_them():
    gallery = load_gallery()
    explorer = PoseExplorer(RawEmbedding(), gallery)
    cells = numbers(explorer)
    assert cells[:3] == cells[3:]
