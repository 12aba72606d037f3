"""Hair of synthetic people: styles, where hair grows, how far it stands off the head.

Hair is no strands: the scalp is moved outward, so that the silhouette shows hair, and painted.
Everything is a function of canonical positions ("where on the average head is this point"), in
centimetres from the middle between the eyes: across (to the image's right), up, forward.
"""

from dataclasses import dataclass

import numpy as np

from .raster import njit

LATTICE_SIZE = 16
# Centimetres on the average head, from the middle between the eyes.
CROWN_UP, CROWN_FORWARD = 10.0, -10.5
MOUTH_UP = -6.8
NECK_FORWARD = -10.5


@njit(cache=True)
def lattice_noise(points, frequency, lattice):
    """Smooth random field: trilinear interpolation of a periodic lattice of random numbers.

    Args:
        points: (N, 3) positions.
        frequency: lattice cells per unit of length.
        lattice: (L, L, L) random values.

    Returns:
        (N,) values of the field.
    """
    field = np.empty(points.shape[0], np.float32)
    cells = lattice.shape[0]
    low = np.empty(3, np.int64)
    part = np.empty(3)
    for index in range(points.shape[0]):
        for axis in range(3):
            position = points[index, axis] * frequency
            floor = np.floor(position)
            low[axis] = int(floor) % cells
            fraction = position - floor
            part[axis] = fraction * fraction * (3.0 - 2.0 * fraction)
        total = 0.0
        for corner in range(8):
            weight = 1.0
            i, j, k = low[0], low[1], low[2]
            if corner & 1:
                i, weight = (i + 1) % cells, weight * part[0]
            else:
                weight *= 1.0 - part[0]
            if corner & 2:
                j, weight = (j + 1) % cells, weight * part[1]
            else:
                weight *= 1.0 - part[1]
            if corner & 4:
                k, weight = (k + 1) % cells, weight * part[2]
            else:
                weight *= 1.0 - part[2]
            total += weight * lattice[i, j, k]
        field[index] = total
    return field


def random_lattice(rng):
    """(L, L, L) standard normal values for `lattice_noise`."""
    return rng.standard_normal((LATTICE_SIZE,) * 3).astype(np.float32)


def soft_step(value, width):
    """0 far below zero, 1 far above, rising over about `width`."""
    return 1.0 / (1.0 + np.exp(np.clip(-4.0 * value / width, -50.0, 50.0)))


def smooth_maximum(first, second, width):
    """The larger of two values, rounded where they cross."""
    return 0.5 * (first + second + np.sqrt((first - second) ** 2 + width**2) - width)


@dataclass(frozen=True)
class HairStyle:
    """One person's hair. Lengths in centimetres on the average head."""

    name: str  # bald, cropped, short, full, tied or long
    thickness: float  # how far the hair stands off the top of the head
    hairline: float  # height of the hairline above the eyes, in the middle
    recession: float  # how much the hairline retreats at the temples
    parting: float  # where a parting lies across the head
    temple: float  # how far behind the eyes the hair of the temples begins
    nape: float  # how far down the back hair grows, above (+) or below (-) the eyes
    curl: float  # 0 straight .. 1 curly
    noise_seed: int


# Chance of each style: (men, women).
STYLE_CHANCES = {
    "bald": (0.14, 0.01),
    "cropped": (0.26, 0.05),
    "short": (0.36, 0.16),
    "full": (0.16, 0.20),
    "tied": (0.02, 0.23),
    "long": (0.06, 0.35),
}
THICKNESS_RANGE = {
    "bald": (0.0, 0.05),
    "cropped": (0.15, 0.5),
    "short": (0.7, 1.6),
    "full": (1.4, 2.6),
    "tied": (0.5, 1.0),
    "long": (1.0, 2.0),
}
NAPE_RANGE = {
    "bald": (-6.0, -4.5),
    "cropped": (-7.0, -5.5),
    "short": (-8.0, -6.0),
    "full": (-10.0, -8.0),
    "tied": (-8.5, -7.0),
    "long": (-30.0, -17.0),
}


def sample_hair(rng, male):
    """A random `HairStyle`; `male` changes the chances of the styles and of receding hairlines."""
    names = list(STYLE_CHANCES)
    chances = np.array([STYLE_CHANCES[name][0 if male else 1] for name in names])
    name = names[rng.choice(len(names), p=chances / chances.sum())]
    fringe = name in ("short", "full", "long") and rng.random() < 0.25
    return HairStyle(
        name=name,
        thickness=float(rng.uniform(*THICKNESS_RANGE[name])),
        hairline=float(rng.uniform(3.4, 4.4) if fringe else rng.uniform(5.2, 7.0)),
        recession=float(abs(rng.normal(0, 1.3 if male else 0.4))),
        parting=float(rng.choice([-1, 1]) * rng.uniform(1.5, 4.0)),
        temple=float(rng.uniform(-7.6, -5.6)),
        nape=float(rng.uniform(*NAPE_RANGE[name])),
        curl=float(rng.uniform(0.5, 1.0) if rng.random() < 0.3 else rng.uniform(0.0, 0.35)),
        noise_seed=int(rng.integers(1 << 31)),
    )


def hair_margin(style, points):
    """How far inside the hair a canonical point lies, in centimetres; negative outside.

    Args:
        style: the person's `HairStyle`.
        points: (N, 3) across, up, forward.

    Returns:
        (N,) margin.
    """
    across, up, forward = points.T
    lattice = random_lattice(np.random.default_rng(style.noise_seed))
    wobble = 0.2 * lattice_noise(points, 0.4, lattice) + 0.12 * lattice_noise(points, 3.5, lattice)
    if style.name == "bald":  # a wreath of hair around the back, or nothing at all
        wreath = np.minimum(3.0 - up, style.temple - 1.5 - forward)
        wreath = np.minimum(wreath, up - style.nape)
        return wreath + wobble if style.thickness > 0.015 else np.full(len(points), -5.0)
    temples = style.recession * np.exp(-((np.abs(across) - 4.2) ** 2) / 2.5)
    drop = 0.06 * np.maximum(np.abs(across) - 1.0, 0) ** 2
    top = up - (style.hairline + temples - drop)
    sideburn = style.temple + 0.45 * np.clip(up, -2.0, 5.0) - forward  # the temple's hairline leans forward
    sides = np.minimum(sideburn, up - np.where(forward > -10.5, -1.5, style.nape))
    behind_ears = np.minimum(-10.2 - forward, up - style.nape)
    behind_ears = np.minimum(behind_ears, 7.5 + 0.8 * np.maximum(up + 11.0, 0) - np.abs(across))  # off the shoulders
    return smooth_maximum(smooth_maximum(top, sides, 2.0), behind_ears, 0.8) + wobble


def hair_offset(style, points, normals):
    """How hair moves the vertices of a head outward.

    Args:
        style: the person's `HairStyle`.
        points: (V, 3) canonical positions: across, up, forward, in centimetres.
        normals: (V, 3) outward unit normals: across, up, forward.

    Returns:
        (V, 3) displacement: across, up, forward, in centimetres.
    """
    across, up, forward = points.T
    inset = 0.4 + 1.6 * soft_step(-4.0 - up, 2.0)  # what stands off must be painted as hair, also between vertices
    cover = soft_step(hair_margin(style, points) - inset, 1.1)
    lattice = random_lattice(np.random.default_rng(style.noise_seed + 1))
    locks = 1.0 + (0.12 + 0.2 * style.curl) * lattice_noise(points, 0.35 + 0.35 * style.curl, lattice)
    height = 0.55 + 0.45 * soft_step(up - 4.0, 8.0)  # less at the sides than on top
    parting = 1.0 - 0.35 * np.exp(-((across - style.parting) ** 2) / 0.5) * soft_step(up - 6.0, 3.0)
    thickness = style.thickness * cover * height * np.clip(locks, 0.4, 1.6) * parting
    offset = thickness[:, None] * normals
    if style.name == "long":  # hair falls from the skull, so the hollow of the neck is filled
        hanging = cover * soft_step(MOUTH_UP + 4.5 - up, 5.0)
        outward = np.stack([across, np.zeros_like(up), np.minimum(forward - NECK_FORWARD + 3.0, 0)], 1)
        outward /= np.linalg.norm(outward, axis=1, keepdims=True) + 1e-9
        offset += (hanging * (1.6 + 0.6 * style.thickness))[:, None] * outward
    return offset


def strand_shade(style, points, rng):
    """Brightness of hair, streaked along the strands that run down from the crown.

    Args:
        style: the person's `HairStyle`.
        points: (N, 3) canonical positions: across, up, forward, in centimetres.
        rng: random generator for the streaks.

    Returns:
        (N,) factor around 1.
    """
    across, up, forward = points.T
    angle = np.arctan2(across, forward - CROWN_FORWARD)
    from_crown = np.sqrt(across**2 + (up - CROWN_UP) ** 2 + (forward - CROWN_FORWARD) ** 2)
    bend = 0.15 * style.curl * lattice_noise(points, 0.8, random_lattice(rng))
    along = np.stack([np.cos(angle) * 4.5 + bend, np.sin(angle) * 4.5 + bend, 0.06 * from_crown], 1)
    fine = lattice_noise(along, 6.0, random_lattice(rng))
    coarse = lattice_noise(along, 1.7, random_lattice(rng))
    return np.clip(1.0 + 0.22 * fine + 0.16 * coarse, 0.35, 1.8)
