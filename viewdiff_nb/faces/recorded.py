"""People of a face set as the explorers want them: the recorded view nearest to a pose, without pictures."""

import torch

from .views import FaceViews


class RecordedPeople:
    """What `turntable.Turntable` offers, for any face set, your own too.

    Args:
        faces: the side views; views per person may differ.
    """

    pitches = yaws = None  # no grid: any pose may have been recorded

    def __init__(self, faces: FaceViews) -> None:
        self.faces, self.names = faces.to("cpu"), faces.names

    def row(self, person: int, pitch: float = 0.0, roll: float = 0.0) -> FaceViews:
        """All views of a person, by rising yaw; pitch and roll are as recorded."""
        own = (self.faces.person == person).nonzero()[:, 0]
        if not len(own):
            raise ValueError(f"{self.names[person]} has no side view")
        return self.faces.where(own[self.faces.angles[own, 1].argsort()])

    def closest(self, person: int, pitch: float, yaw: float, roll: float = 0.0) -> int:
        """Which view of `row` is closest to a pose in degrees."""
        wanted = torch.tensor([pitch, yaw, roll]).deg2rad()
        return int((self.row(person).angles - wanted).norm(dim=1).argmin())

    def picture(self, person: int, pitch: float, yaw: float, roll: float = 0.0) -> None:
        """There is none."""
