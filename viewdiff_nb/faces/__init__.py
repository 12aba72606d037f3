"""From faces to tensors: data sets on disk, geometry, synthetic people."""

from .geometry import KEYPOINT_NAMES
from .views import YAW_BINS, FaceDataError, FaceViews, Split, load_face_views, split_by_person

__all__ = ["KEYPOINT_NAMES", "YAW_BINS", "FaceDataError", "FaceViews", "Split", "load_face_views", "split_by_person"]
