"""Procedural skins: the colour texture of a synthetic person.

Everything is painted as a function of canonical positions (where a texel lies on the average head),
so brows, lips and moles follow each person's own shape. Positions are in centimetres from the middle
between the eyes: across (to the image's right), up, forward. Colours are stored RGB in 0..1.
"""

import numpy as np

from .hair import (
    MOUTH_UP,
    hair_margin,
    lattice_noise,
    random_lattice,
    soft_step,
    strand_shade,
)
from .heads import EYE_BOXES, INNER_BOX
from .meshes import nearest_painted, read_mask, surface_hollows
from .raster import bake_attributes

TEXTURE_SIZE = 512
SEAM_MARGIN = 6  # texels painted beyond the edge of each part, so that no seam shows the empty texture
EYE_ACROSS = 3.1  # centimetres from the nose's plane to each eye
# Skin from light to dark.
SKIN_TONES = np.array(
    [(0.96, 0.80, 0.70), (0.87, 0.67, 0.53), (0.70, 0.49, 0.36), (0.44, 0.29, 0.21), (0.27, 0.17, 0.13)]
)
# Hair: black, brown, light brown, blond, red, grey.
HAIR_COLOURS = np.array(
    [
        (0.08, 0.06, 0.05),
        (0.22, 0.13, 0.08),
        (0.38, 0.24, 0.13),
        (0.68, 0.52, 0.30),
        (0.45, 0.18, 0.08),
        (0.62, 0.60, 0.58),
    ]
)
IRIS_COLOURS = np.array(
    [(0.13, 0.07, 0.04), (0.25, 0.14, 0.06), (0.22, 0.30, 0.16), (0.25, 0.40, 0.55), (0.40, 0.42, 0.42)]
)
SCLERA = np.array([0.76, 0.72, 0.70])
MASKS = ("face", "lips", "eyelids", "ears")


def bump(value, width):
    """A Gaussian bump around zero."""
    return np.exp(-0.5 * (value / width) ** 2)


def mix(colour, weight, other):
    """Blend (N, 3) colours toward another colour by (N,) weights in 0..1."""
    weight = np.clip(weight, 0, 1)[:, None]
    return colour + weight * (other - colour)


class SkinPainter:
    """Paints the textures of people of one `HeadModel`.

    Args:
        model: the `HeadModel`.
        size: side of the textures in texels.
    """

    def __init__(self, model, size=TEXTURE_SIZE):
        if size < 64:
            raise ValueError(f"a skin texture needs a size of 64 texels or more, got {size}")
        self.size = size
        centimetres = model.canonical_centimetres()
        hollow = surface_hollows(model.canonical, model.faces)
        attributes = np.column_stack([centimetres, hollow])[model.corner_position]
        attributes = np.column_stack([attributes, model.mask_uv])
        values, owner = bake_attributes(model.corner_uv, attributes, model.corner_faces, size)
        self._rows, self._columns = np.nonzero(owner >= 0)
        texels = values[self._rows, self._columns]
        self._points = texels[:, :3].astype(np.float32)
        self._hollow = np.where(texels[:, 1] > MOUTH_UP - 2.5, texels[:, 3], 0)  # not at the neck's many seams
        self._part = model.part[model.faces[owner[self._rows, self._columns], 0]]
        head = self._part < 3
        self._masks = {
            name: np.where(head, smooth_mask(read_mask(model.mask_folder, name, texels[:, 4:])), 0) for name in MASKS
        }
        self._place = np.column_stack([self._columns + 0.5, self._rows + 0.5]) / size
        left, top, right, bottom = INNER_BOX
        self._inner = ((self._place > (left, top)) & (self._place < (right, bottom))).all(1)
        self._fill = nearest_painted(owner >= 0, SEAM_MARGIN)

    def paint(self, person):
        """(size, size, 3) uint8 stored RGB of a `Person`; equal people give equal textures."""
        rng = np.random.default_rng(person.skin_seed)
        ancestry = np.array([person.phenotype[name] for name in ("african", "asian", "caucasian")])
        dark = float(np.clip(ancestry @ (0.85, 0.3, 0.15) + rng.normal(0, 0.1), 0, 1))
        tone = sample_tone(rng, dark)
        hair_colour = sample_hair_colour(rng, dark, person.phenotype["age"])
        colour = self._skin(rng, tone)
        colour = self._spots(rng, colour)
        colour = self._wrinkles(rng, colour, person.phenotype["age"])
        colour = self._lips(rng, colour, tone, person.male)
        colour = self._brows(rng, colour, hair_colour, person.male)
        if person.male and rng.random() < 0.55:
            colour = self._beard(rng, colour, hair_colour)
        colour *= 1 - 0.75 * np.clip(self._hollow, 0, 1)[:, None] * (0.75, 1.0, 1.0)
        colour = self._clothes(rng, colour)
        colour = self._hair(rng, colour, hair_colour, person.hair)
        colour[self._inner] = tone * (0.45, 0.25, 0.25)
        self._eyes(rng, colour, dark)
        image = np.zeros((self.size, self.size, 3), np.uint8)
        image[self._rows, self._columns] = np.rint(np.clip(colour, 0, 1) * 255).astype(np.uint8)
        empty, source = self._fill
        image.reshape(-1, 3)[empty] = image.reshape(-1, 3)[source]
        return image

    def _noise(self, rng, frequency):
        """(N,) smooth noise of unit size with about `frequency` cells a centimetre."""
        return lattice_noise(self._points, frequency, random_lattice(rng))

    def _skin(self, rng, tone):
        """Uneven base colour, red cheeks and nose, shaded lids and bags under the eyes."""
        across, up, forward = self._points.T
        blotches = 1 + 0.04 * self._noise(rng, 0.3) + 0.025 * self._noise(rng, 1.5) + 0.02 * self._noise(rng, 5.0)
        redness = 0.025 * self._noise(rng, 0.5) + rng.normal(0, 0.012)
        cheeks = bump(abs(across) - 1.15 * EYE_ACROSS, 1.4) * bump(up - MOUTH_UP / 2 + 0.5, 1.4) * (forward > -8)
        nose = bump(across, 0.9) * bump(up + 4.2, 1.0) * (forward > 0)
        redness = redness + rng.uniform(0, 0.13) * cheeks + rng.uniform(0, 0.1) * nose
        redness = redness + rng.uniform(0, 0.1) * self._masks["ears"]
        colour = tone * blotches[:, None] * (1 + redness[:, None] * (0.8, -0.55, -0.55))
        lids = rng.uniform(0.05, 0.3) * self._masks["eyelids"]
        bags = rng.uniform(0, 0.2) * bump(abs(across) - EYE_ACROSS, 1.2) * bump(up + 1.6, 0.5) * (forward > -6)
        return colour * (1 - (lids + bags)[:, None] * (0.8, 1.0, 1.0))

    def _spots(self, rng, colour):
        """A few moles anywhere, and freckles for some."""
        front = np.flatnonzero((self._points[:, 2] > -8) & (self._part == 0))
        for _ in range(rng.integers(2, 16)):
            centre, radius = self._points[rng.choice(front)], rng.uniform(0.06, 0.16)
            near = np.flatnonzero(abs(self._points - centre).max(1) < 4 * radius)
            distance = np.linalg.norm(self._points[near] - centre, axis=1)
            colour[near] *= 1 - rng.uniform(0.2, 0.6) * bump(distance, radius)[:, None]
        if rng.random() < 0.2:
            strength = rng.uniform(0.1, 0.35) * bump(self._points[:, 1] + 3, 3.0) * (self._points[:, 2] > -5)
            specks = np.clip(self._noise(rng, 4.0) - 0.5, 0, 1)
            colour *= 1 - (strength * specks)[:, None] * (0.6, 1.0, 1.2)
        return colour

    def _wrinkles(self, rng, colour, age):
        """Lines on the forehead, beside the mouth and at the eyes, from middle age on."""
        depth = max(0.0, age - 0.72)
        if depth == 0:
            return colour
        across, up, forward = self._points.T
        wobble = 0.15 * self._noise(rng, 0.7)
        lines = np.zeros(len(up))
        for row in range(3):
            height = up + wobble - (4.0 + 0.75 * row) + 0.02 * across**2
            lines += 0.6 * bump(height, 0.11) * (abs(across) < 3.5) * (forward > -4)
        beside_mouth = abs(across) - (2.0 + 0.45 * (MOUTH_UP + 2.2 - up)) + wobble
        lines += 0.9 * bump(beside_mouth, 0.16) * (up < MOUTH_UP + 2.4) * (up > MOUTH_UP - 0.5) * (forward > -4)
        crow_feet = bump(abs(across) - 5.2, 0.7) * np.clip(np.sin(9 * (up + wobble)), 0, 1) * (abs(up) < 1.3)
        lines += 0.4 * crow_feet * (forward > -6)
        lines += (
            0.4
            * bump(up + 1.9 + wobble - 0.08 * (abs(across) - EYE_ACROSS) ** 2, 0.13)
            * (abs(across) < 5)
            * (forward > -6)
        )
        return colour * (1 - np.clip(depth * rng.uniform(0.8, 1.6) * lines, 0, 0.6)[:, None] * (0.8, 1.0, 1.0))

    def _lips(self, rng, colour, tone, male):
        """Lips in the person's own colour, or painted."""
        natural = male or rng.random() < 0.6
        if natural:
            lip = tone * (1.0, 0.64, 0.62) * rng.uniform(0.78, 1.08)
        else:
            lip = np.array([0.62, 0.17, 0.21]) * rng.uniform(0.7, 1.2)
        return mix(colour, self._masks["lips"] * rng.uniform(0.45, 0.9), lip)

    def _brows(self, rng, colour, hair_colour, male):
        """Brows of varied height, thickness, slope, length and bow."""
        across, up, forward = self._points.T
        height, thickness = rng.uniform(1.6, 2.2), rng.uniform(0.2, 0.42) + 0.1 * male
        slope, length, bow = rng.uniform(-0.05, 0.22), rng.uniform(1.6, 2.2), rng.uniform(0, 0.1)
        along = abs(across) - EYE_ACROSS * rng.uniform(0.92, 1.05)
        line = height + slope * along - bow * np.maximum(along, 0) ** 2 * 1.6
        taper = thickness * np.clip(1 - 0.3 * along / length, 0.35, 1.4)
        inside = np.exp(-(((up - line) / taper) ** 4)) * soft_step(length - abs(along), 0.5) * (forward > -6)
        hairs = 0.72 + 0.28 * np.clip(self._noise(rng, 5.0), -1, 1)
        return mix(colour, inside * hairs * rng.uniform(0.6, 1), hair_colour * 0.85)

    def _beard(self, rng, colour, hair_colour):
        """Stubble to full beard, with bare skin under the lower lip."""
        across, up, forward = self._points.T
        edge = MOUTH_UP + 0.9 + 0.4 * np.maximum(abs(across) - 2.6, 0) ** 1.25 + 0.3 * self._noise(rng, 0.8)
        jaw = soft_step(edge - up, 0.9) * soft_step(up + 14.0, 1.5) * soft_step(forward + 9.0, 1.5)
        philtrum = soft_step(MOUTH_UP + 2.0 - up, 0.5)
        bare = bump(across, 1.0) * bump(up - MOUTH_UP + 1.6, 0.45)
        weight = jaw * philtrum * (1 - 0.8 * bare) * (1 - self._masks["lips"]) * rng.uniform(0.12, 0.85)
        hairs = 0.7 + 0.3 * np.clip(self._noise(rng, 4.0), -1, 1)
        return mix(colour, weight * hairs, hair_colour * 0.8)

    def _clothes(self, rng, colour):
        """A plain garment with a round or a pointed neckline."""
        across, up, forward = self._points.T
        neckline = rng.uniform(-16.5, -14.0) - rng.uniform(0, 3.0) * bump(across, 3.0) * (forward > -9)
        garment = np.clip(rng.uniform(0.08, 0.85) + rng.normal(0, 0.12, 3), 0.03, 0.95)
        weave = 1 + 0.05 * self._noise(rng, 2.0)
        return mix(colour, (self._part == 3) * soft_step(neckline - up, 0.4), garment * weave[:, None])

    def _hair(self, rng, colour, hair_colour, style):
        """Colour where hair grows, streaked along its strands."""
        weight = soft_step(hair_margin(style, self._points), 0.7 if style.name in ("bald", "cropped") else 0.4)
        weight *= 1 - self._masks["ears"]
        if style.name in ("bald", "cropped"):  # skin shines through
            weight *= 0.55 + 0.9 * style.thickness + 0.08 * np.clip(self._noise(rng, 5.0), -1, 1)
        shade = strand_shade(style, self._points, rng)
        return mix(colour, weight, hair_colour * shade[:, None])

    def _eyes(self, rng, colour, dark):
        """Whites shaded by the upper lid, a ringed iris and a pupil, in place."""
        chances = np.array([3 * dark + 0.5, 1, 0.5 * (1 - dark), 0.9 * (1 - dark) ** 2, 0.2 * (1 - dark)])
        iris = IRIS_COLOURS[rng.choice(len(IRIS_COLOURS), p=chances / chances.sum())]
        for eye, (left, top, right, bottom) in enumerate(EYE_BOXES):
            mine = np.flatnonzero(self._part == eye + 1)
            across = (self._place[mine, 0] - left) / (right - left) * 2 - 1
            down = (self._place[mine, 1] - top) / (bottom - top) * 2 - 1
            radius = np.hypot(across, down)
            painted = SCLERA * (1 - 0.4 * np.clip(-2 * down, 0, 1))[:, None]
            fibres = 1 + 0.2 * np.cos(17 * np.arctan2(down, across)) * (radius > 0.2)
            painted = mix(painted, soft_step(0.49 - radius, 0.03), iris * 0.55)
            painted = mix(painted, soft_step(0.44 - radius, 0.06), iris * fibres[:, None])
            painted = mix(painted, soft_step(0.19 - radius, 0.03), np.full(3, 0.02))
            painted = mix(painted, bump(np.hypot(across + 0.17, down + 0.2), 0.05), np.full(3, 0.9))
            colour[mine] = painted


def sample_tone(rng, dark):
    """(3,) skin colour for a darkness in 0..1, with a little chance."""
    place = dark * (len(SKIN_TONES) - 1)
    low = min(int(place), len(SKIN_TONES) - 2)
    return (SKIN_TONES[low] + (place - low) * (SKIN_TONES[low + 1] - SKIN_TONES[low])) * np.exp(rng.normal(0, 0.05, 3))


def sample_hair_colour(rng, dark, age):
    """(3,) hair colour; dark skin goes with dark hair, age with grey."""
    grey = 0.05 + max(0.0, age - 0.78) * 12
    chances = np.array([4 * dark + 0.8, 1.5, 1 - dark, 1.1 * (1 - dark) ** 3, 0.6 * (1 - dark) ** 3, grey])
    return HAIR_COLOURS[rng.choice(len(HAIR_COLOURS), p=chances / chances.sum())] * np.exp(rng.normal(0, 0.15))


def smooth_mask(mask):
    """Clean the compression noise of a JPEG mask: 0 below a quarter, 1 above three quarters."""
    return np.clip(2 * mask - 0.5, 0, 1)
