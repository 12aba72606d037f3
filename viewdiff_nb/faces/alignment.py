"""Alignment of a face to where a recogniser expects its keypoints."""

import numpy as np


def check_numbers(name, values, shape, low=-np.inf, high=np.inf):
    """`values` as a finite float64 array of `shape` (None: any length) within low..high, or a ValueError."""
    array = np.asarray(values, np.float64)
    fits = array.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a value that is not finite: {array.tolist()}")
    if array.size and (array.min() < low or array.max() > high):
        raise ValueError(f"{name} must lie within {low}..{high}, got {array.min():g}..{array.max():g}")
    return array


def fit_similarity(source, target):
    """The similarity transform that moves points closest to others (Umeyama 1991), without mirroring.

    Args:
        source: (N, 2) points, not all in one place.
        target: (N, 2) where they should go.

    Returns:
        (2, 3) matrix A; a point p goes to A[:, :2] p + A[:, 2].
    """
    source = check_numbers("source points", source, (None, 2))
    target = check_numbers("target points", target, source.shape)
    source_mean, target_mean = source.mean(0), target.mean(0)
    from_source, from_target = source - source_mean, target - target_mean
    variance = (from_source**2).sum() / len(source)
    if variance < 1e-12:
        raise ValueError(f"the source points must not all coincide, they lie at {source_mean.tolist()}")
    left, strength, right = np.linalg.svd(from_target.T @ from_source / len(source))
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])  # -1 would mirror
    rotation = left @ np.diag(signs) @ right
    scale = (strength * signs).sum() / variance
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])
