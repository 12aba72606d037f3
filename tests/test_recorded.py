import pytest
import torch
from conftest import people

from viewdiff_nb.faces.turntable import RecordedPeople


def test_a_row_is_a_persons_views_by_yaw():
    faces = people(4, views=6)
    shuffled = faces.where(torch.randperm(len(faces)))
    row = RecordedPeople(shuffled).row(2)
    assert (row.person == 2).all() and len(row) == 6
    assert (row.angles[1:, 1] > row.angles[:-1, 1]).all()
    recorded = RecordedPeople(shuffled)
    wanted = row.angles[4].rad2deg().tolist()
    assert recorded.closest(2, wanted[0] + 1, wanted[1] - 1, wanted[2]) == 4
    assert recorded.picture(2, 0, 0) is None


def test_a_person_without_views_is_named():
    faces = people(3, views=2)
    recorded = RecordedPeople(faces.where(faces.person != 1))
    with pytest.raises(ValueError, match="person_0001 has no side view"):
        recorded.row(1)
