"""InsightFace's FaceAnalysis, whose faces then have a frontal embedding, too.

    app = FrontalFaceAnalysis(FaceAnalysis("buffalo_l"), load_drop_in("mine.safetensors")[0])
    app.prepare(ctx_id=-1)
    for face in app.get(picture):
        face.frontal_embedding            # beside face.embedding, of the same length

The model must have been trained on embeddings of that recogniser, of InsightFace's own crops: `viewdiff_nb.faces.embed`
with --crops five@1. What the kit ships reads another recogniser.
"""

from typing import Any

import numpy as np
from torch import nn

from viewdiff_nb.faces.photo_reader import FIVE_OF_68
from viewdiff_nb.predict import frontal_embeddings, width_of


class FrontalFaceAnalysis:
    """Everything of an app; `get` also runs a model.

    Args:
        app: an `insightface.app.FaceAnalysis` with a recogniser and 3-D landmarks, which tell pose and keypoints.
        model: of `load_drop_in`, `load_pretrained`, `load_model` or `drop_in`.

    Raises:
        ValueError: if the app lacks one of the two.
    """

    def __init__(self, app: Any, model: nn.Module) -> None:
        if missing := [task for task in ("landmark_3d_68", "recognition") if task not in app.models]:
            raise ValueError(f"the app has no {' and no '.join(missing)}; load it with the modules that tell them")
        self.app, self.model = app, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.app, name)

    def get(self, picture: np.ndarray, *args: Any, **options: Any) -> list:
        """The faces of a (H, W, 3) uint8 BGR picture, each with `frontal_embedding` (D,), as long as its embedding.

        Raises:
            ValueError: if the model reads embeddings of another width.
        """
        faces = self.app.get(picture, *args, **options)
        if not faces:
            return faces
        embeddings = np.stack([face.embedding for face in faces]).astype(np.float32)
        if (wanted := width_of(self.model, embeddings.shape[1])) != embeddings.shape[1]:
            raise ValueError(
                f"this app's embeddings have {embeddings.shape[1]} numbers, the model reads {wanted}: it was trained "
                "on another recogniser's"
            )
        points = np.stack([[face.landmark_3d_68[list(rows)].mean(0) for rows in FIVE_OF_68] for face in faces])
        poses = np.stack([face.pose for face in faces])
        found = frontal_embeddings(self.model, embeddings, poses, points)
        length = np.linalg.norm(embeddings, axis=1) / np.linalg.norm(found, axis=1)
        for face, frontal in zip(faces, found * length[:, None], strict=True):
            face["frontal_embedding"] = frontal
        return faces
