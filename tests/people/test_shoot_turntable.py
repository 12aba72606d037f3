"""A turntable of two people, shot with a stand-in for the recogniser."""

import numpy as np
import pytest
from people.build import Studio
from people.shoot_turntable import TurntableConfig, shoot_turntable
from test_build import Averages

from viewdiff_nb.faces.crops import PROFILE_CROPS
from viewdiff_nb.faces.recogniser import embed_crops
from viewdiff_nb.faces.turntable import load_turntable


@pytest.fixture(scope="module")
def shot(tmp_path_factory):
    """A small turntable, and the studio that made it."""
    folder, studio = tmp_path_factory.mktemp("turntable"), Studio()
    config = TurntableConfig(people=(0, 3), pitches=(-10, 10), yaws=(-60, 0, 60), picture_size=64)
    shoot_turntable(folder, studio, Averages(), config)
    return load_turntable(folder), studio


def test_a_turntable_is_what_the_studio_shows(shot):
    table, studio = shot
    renderer = studio.renderer(0, 3)
    angles = np.deg2rad([10.0, 60.0, 0.0])
    crops, keypoints = renderer.crops(angles, PROFILE_CROPS)
    assert len(crops) > 1
    row, at = table.row(1, 10), table.closest(1, 10, 60)
    np.testing.assert_allclose(row.keypoints_3d[at], keypoints, atol=1e-3)
    np.testing.assert_allclose(row.src[at], embed_crops(Averages(), [crops])[0], atol=1e-3)
    picture, in_picture = renderer.picture(angles, size=64, field=0.34)
    shown = np.asarray(table.picture(1, 10, 60)).astype(int)
    assert np.abs(shown - picture).mean() < 6  # the sheet is compressed
    np.testing.assert_allclose(table.picture_keypoints(1, 10, 60), in_picture[:, :2], atol=0.01)
    cut = np.asarray(table.crop(1, 10, 60)).astype(int)
    (crop,), _ = renderer.crops(angles)
    assert np.corrcoef(cut.ravel(), crop.ravel())[0, 1] > 0.9  # the same face at the same place


def test_profiles_are_embedded_by_their_crops_and_others_by_one(shot):
    table, studio = shot
    crops, _ = studio.renderer(0, 3).crops(np.deg2rad([-10.0, 0.0, 0.0]))
    wanted = Averages().embed(crops)[0]
    np.testing.assert_allclose(table.row(1, -10).src[table.closest(1, -10, 0)], wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"yaws": (0, 0)}, "yaws must rise"),
        ({"yaws": (-95, 0)}, "within ±90"),
        ({"pitches": ()}, "pitches must rise"),
        ({"people": ()}, "people must be indices"),
    ],
)
def test_senseless_grids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TurntableConfig(**options)
