"""From faces to tensors: data sets on disk, geometry, your own photos."""

from .geometry import KEYPOINT_NAMES
from .rows import FaceDataError
from .splits import Split, load_split_file, save_split, split_by_person
from .views import YAW_BINS, FaceViews, load_face_views

__all__ = [
    "KEYPOINT_NAMES",
    "YAW_BINS",
    "FaceDataError",
    "FaceViews",
    "Split",
    "load_face_views",
    "load_split_file",
    "save_split",
    "split_by_person",
]
