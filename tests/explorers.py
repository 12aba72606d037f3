"""What the explorers' tests share."""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from viewdiff_nb import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.files import HEADS


@lru_cache(maxsize=1)
def load_gallery() -> FaceViews:
    """The shipped set's test people."""
    return split_by_person(load_face_views(HEADS), val=200, test=300).test


def make_model() -> EnhancedTransformerDecoderOnly3D:
    """Random weights that do something: an untrained model predicts its input."""
    torch.manual_seed(1)
    model = EnhancedTransformerDecoderOnly3D(
        d_model=64, nhead=4, num_layers=2, dim_feedforward=64, feature_dim=384, voxel_resolution=8
    )
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def pixels(png: bytes) -> np.ndarray:
    """(height, width, 3) of an encoded picture."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
