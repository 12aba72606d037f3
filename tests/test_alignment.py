import math

import numpy as np
import pytest

from viewdiff_nb.faces.geometry import fit_similarity


def test_similarity_recovers_a_known_transform():
    turn, scale, shift = 0.7, 2.5, np.array([3.0, -8.0])
    matrix = scale * np.array([(math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn))])
    source = np.array([(0, 0), (4, 1), (2, 5), (-3, 2.0)])
    found = fit_similarity(source, source @ matrix.T + shift)
    np.testing.assert_allclose(found, np.column_stack([matrix, shift]), atol=1e-12)


def test_similarity_never_mirrors():
    source = np.array([(0, 0), (4, 1), (2, 5), (-3, 2.0)])
    found = fit_similarity(source, source * (-1, 1))
    assert np.linalg.det(found[:, :2]) > 0


def test_points_in_one_place_are_refused():
    with pytest.raises(ValueError, match="source points must not all coincide"):
        fit_similarity(np.ones((3, 2)), np.ones((3, 2)))
