"""From faces to tensors: data sets on disk, geometry, your own photos."""

from viewdiff_nb.faces.geometry import KEYPOINT_NAMES, YAW_BINS
from viewdiff_nb.faces.splits import Split, load_split_file, save_split, split_by_person
from viewdiff_nb.faces.views import FaceDataError, FaceViews, load_face_views

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
