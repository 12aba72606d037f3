"""What surrounds a rendered head: one light with ambient light, and a soft background."""

from dataclasses import dataclass

import numpy as np

GAMMA = 2.2  # pictures store light ** (1 / GAMMA)


def check_numbers(name, values, shape, low=-np.inf, high=np.inf):
    """`values` as a finite float64 array of `shape` (None: any length) within low..high, or a ValueError."""
    array = np.asarray(values, np.float64)
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a value that is not finite: {array.tolist()}")
    if array.size and (array.min() < low or array.max() > high):
        raise ValueError(f"{name} must lie within {low}..{high}, got {array.min():g}..{array.max():g}")
    return array


@dataclass(frozen=True)
class Light:
    """One distant light plus ambient light."""

    direction: tuple[float, float, float] = (
        0.2,
        -0.3,
        1.0,
    )  # toward the light: x right, y down, z to the camera
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)  # linear RGB, 0..2
    ambient: float = 0.45  # share of light from everywhere, 0..1
    gloss: float = 0.04  # strength of the skin's highlight, 0..1

    def __post_init__(self):
        direction = check_numbers("light direction", self.direction, (3,))
        if np.linalg.norm(direction) < 1e-6:
            raise ValueError(f"light direction must not be zero, got {self.direction}")
        check_numbers("light colour", self.colour, (3,), 0, 2)
        check_numbers("ambient light", self.ambient, (), 0, 1)
        check_numbers("gloss", self.gloss, (), 0, 1)


@dataclass(frozen=True)
class Background:
    """A colour, a linear gradient and soft blobs. Colours are stored RGB in 0..1."""

    colour: tuple[float, float, float] = (0.5, 0.5, 0.5)
    gradient: tuple = ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))  # change of colour from edge to edge: across, down
    blobs: tuple = ()  # each (x, y, radius, red, green, blue); x, y, radius in widths of the picture

    def __post_init__(self):
        check_numbers("background colour", self.colour, (3,), 0, 1)
        check_numbers("background gradient", self.gradient, (2, 3), -1, 1)
        for blob in self.blobs:
            check_numbers("background blob", blob, (6,))
            if blob[2] <= 0:
                raise ValueError(f"a background blob needs a radius above 0, got {blob[2]}")

    def paint(self, size):
        """(size, size, 3) float32 linear RGB."""
        place = (np.arange(size) + 0.5) / size
        across, down = place[None, :, None], place[:, None, None]
        slope_across, slope_down = np.asarray(self.gradient)
        picture = np.asarray(self.colour) + (across - 0.5) * slope_across + (down - 0.5) * slope_down
        for x, y, radius, *colour in self.blobs:
            column = np.exp(-0.5 * ((place - x) / radius) ** 2)
            row = np.exp(-0.5 * ((place - y) / radius) ** 2)
            weight = (row[:, None] * column[None, :])[..., None]
            picture = picture + weight * (np.asarray(colour) - picture)
        return (np.clip(picture, 0, 1) ** GAMMA).astype(np.float32)


def sample_light(rng):
    """A random `Light`: from the front half, dim or bright, warm or cold."""
    turn, lift = np.deg2rad(rng.uniform(-65, 65)), np.deg2rad(rng.uniform(-15, 60))
    warmth = rng.normal(0, 0.07)
    brightness = rng.uniform(0.75, 1.15)
    colour = np.clip(brightness * np.array([1 + warmth, 1.0, 1 - warmth]), 0, 2)
    return Light(
        direction=(
            float(np.sin(turn) * np.cos(lift)),
            float(-np.sin(lift)),
            float(np.cos(turn) * np.cos(lift)),
        ),
        colour=tuple(float(channel) for channel in colour),
        ambient=float(rng.uniform(0.3, 0.65)),
        gloss=float(rng.uniform(0.0, 0.08)),
    )


def sample_background(rng):
    """A random `Background`: plain, with a gradient, or with a few soft blobs."""
    colour = np.clip(rng.uniform(0.08, 0.92) + rng.normal(0, 0.09, 3), 0, 1)
    kind = rng.choice(["plain", "gradient", "blobs"], p=[0.25, 0.35, 0.4])
    gradient = rng.uniform(-0.3, 0.3, (2, 1)) + rng.normal(0, 0.05, (2, 3)) if kind != "plain" else np.zeros((2, 3))
    blobs = []
    for _ in range(rng.integers(3, 9) if kind == "blobs" else 0):
        blob_colour = np.clip(rng.uniform(0.05, 0.95) + rng.normal(0, 0.12, 3), 0, 1)
        blobs.append((*rng.uniform(-0.1, 1.1, 2), rng.uniform(0.05, 0.3), *blob_colour))
    return Background(tuple(colour), tuple(map(tuple, gradient)), tuple(blobs))
