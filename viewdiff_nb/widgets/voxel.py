"""Look into the voxel grid of the 3-D projection."""

from functools import lru_cache
from pathlib import Path

import ipywidgets as widgets
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from viewdiff_nb.faces.geometry import KEYPOINT_NAMES, rotation_matrix
from viewdiff_nb.faces.turntable import load_turntable
from viewdiff_nb.modules.lora import evaluation_mode
from viewdiff_nb.modules.projection import FaceVolume, rotate, voxel_centres
from viewdiff_nb.modules.transformer import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.widgets.explorer import (
    DPI,
    SLIDER,
    STYLE,
    Explorer,
    LiveFigure,
    Stage,
    choice,
    on_drag,
    png_bytes,
    pose_sliders,
    side_by_side,
    slider,
)
from viewdiff_nb.widgets.pose import People

PLANES = {  # axis of a volume that a slice is taken across: index of the axis, then the slice's two axes (x, y)
    "depth": (0, "x, image right", "y, down"),
    "height": (1, "x, image right", "z, away from the camera"),
    "width": (2, "y, down", "z, away from the camera"),
}


class Slice:
    """One layer of a voxel grid."""

    def __init__(self, ax: Axes) -> None:
        self.ax = ax
        self.image = ax.imshow(np.zeros((4, 4)), extent=(-1, 1, 1, -1), cmap="viridis", interpolation="nearest")
        self.text = ax.set_title("quantity, plane\nfrom to", fontsize=8)
        self.xlabel, self.ylabel = ax.set_xlabel("x, image right", fontsize=8), ax.set_ylabel("y, down", fontsize=8)
        ax.set_xticks((-1, 0, 1))
        ax.set_yticks((-1, 0, 1))
        ax.tick_params(labelsize=7)
        self.moving = [self.image, self.text, self.xlabel, self.ylabel]

    def show(self, volume: np.ndarray, plane: str, index: int, name: str) -> None:
        """
        Args:
            volume: (R, R, R) over (depth, y, x), drawn by `colour_scale`; or (R, R, R, 3) RGB in 0..1.
            plane: a name of `PLANES`; index: which layer.
            name: of what the volume holds.
        """
        axis, xlabel, ylabel = PLANES[plane]
        self.image.set_data(np.take(volume, index, axis))
        if volume.ndim == 3:
            cmap, low, high = colour_scale(volume)
            self.image.set(cmap=cmap, clim=(low, high))
        self.text.set_text(f"{name}, {plane} {index + 1} of {len(volume)}\n{volume.min():.3g} to {volume.max():.3g}")
        self.xlabel.set_text(xlabel)
        self.ylabel.set_text(ylabel)

    def texts(self) -> list[str]:
        """What each voxel of the layer says, row by row."""
        values = np.asarray(self.image.get_array())
        if values.ndim == 2:
            return [f"{value:.3g}" for value in values.ravel()]
        return [", ".join(f"{v:.2f}" for v in rgb) for rgb in values.reshape(-1, 3)]


def colour_scale(values: np.ndarray) -> tuple[str, float, float]:
    """Colour map and limits: from the least to the largest value, or about zero where there are negative ones."""
    low, high = float(values.min()), float(values.max())
    if low < 0:
        high = max(-low, high)
        return "RdBu_r", -high, high
    return "viridis", low, max(high, low + 1e-12)


class Rendering:
    """A rendered image: features as colours, or opacity."""

    def __init__(self, ax: Axes, title: str) -> None:
        self.image = ax.imshow(np.zeros((4, 4, 3)), extent=(-1, 1, 1, -1), interpolation="nearest")
        ax.set_title(title, fontsize=9)
        ax.set(xticks=(), yticks=())
        self.moving = [self.image]

    def show(self, image: np.ndarray) -> None:
        """image: (R, R, 3) RGB in 0..1."""
        self.image.set_data(image)


class VoxelExplorer(Explorer):
    """Look into the voxel grid of the 3-D projection, and at what is rendered from it.

    Args:
        model: with a projection layer.
        people: where views come from; the shipped turntable by default.
        resolution: voxels along an edge of the grid; by default the model's.

    Raises:
        ValueError: if the model has no projection layer.
    """

    DENSITY, WEIGHT, OCCUPANCY = "density, per unit of length", "weight in its ray", "occupancy, what goes in"
    FEATURES = "features, 3 principal components"
    FIRST = ("resolution",)
    SHARES = tuple(f"share of {name}" for name in KEYPOINT_NAMES)

    def __init__(
        self,
        model: EnhancedTransformerDecoderOnly3D,
        people: People | None = None,
        person: str | None = None,
        yaw: float = 45.0,
        resolution: int | None = None,
    ) -> None:
        if model.projection is None:
            raise ValueError("this model has no projection layer; build it with use_projection_layer=True")
        self.model, self.people = model, people or load_turntable()
        own = model.projection.voxel_resolution
        self.person = choice("person", list(self.people.names), person)
        _, self.yaw, _ = pose_sliders(self.people.pitches, self.people.yaws, (0, yaw, 0), "source ")
        self.target_pitch, self.target_yaw, self.target_roll = pose_sliders(None, None, (0, 0, 0), "target ")
        sizes = sorted({4, 8, 16, 32, own, resolution or own})
        self.resolution = choice("voxels per edge", [(f"{n}³", n) for n in sizes], resolution or own)
        self.quantity = choice("quantity", [self.DENSITY, self.WEIGHT, self.FEATURES, self.OCCUPANCY, *self.SHARES])
        self.threshold = slider("threshold (0–1)", 0, 1, 0.05, 0.35, ".2f")
        self.threshold.tooltip = "voxels below this share of the way from the least to the largest value are not drawn"
        self.plane = choice("slice across", list(PLANES))
        self.cut = widgets.Checkbox(True, description="cut open at the slice", layout=SLIDER, style=STYLE)
        self.layer = widgets.IntSlider(own // 2, 1, own, description="slice (number)", layout=SLIDER, style=STYLE)
        self.cubes = Stage(
            width=380,
            turnable=True,
            label="the voxel grid",
            caption="drag to look from elsewhere, or use the arrow keys",
        )
        self.pictures = Stage(width=620, label="a slice of the grid, and the rendering")
        self._live = self._make_pictures()
        left = [self.person, self.yaw, self.target_yaw, self.target_pitch, self.target_roll]
        right = [self.resolution, self.quantity, self.threshold, self.plane, self.layer, self.cut]
        super().__init__(
            [side_by_side(widgets.VBox(left), widgets.VBox(right)), side_by_side(self.cubes, self.pictures)]
        )
        self.resolution.observe(self._fit_layer, "value")
        self.follow(*left, *right[1:])  # the resolution also moves the slice, see _fit_layer
        on_drag(self.cubes, self._draw_cubes)
        self._known: tuple = (None, None)
        self._fit_layer()

    def _make_pictures(self) -> LiveFigure:
        fig = Figure((6.6, 2.9), DPI, layout="constrained")
        axes = fig.subplots(1, 3)
        self._slice = Slice(axes[0])
        self._features = Rendering(axes[1], "rendered features")
        self._opacity = Rendering(axes[2], "light stopped, 0 to 1")
        return LiveFigure(fig, [*self._slice.moving, *self._features.moving, *self._opacity.moving])

    def _fit_layer(self, _: dict | None = None) -> None:
        """The middle layer, when the resolution changes."""
        with self.together():
            self.layer.max = max(self.layer.max, self.resolution.value)
            self.layer.value = self.resolution.value // 2
            self.layer.max = self.resolution.value

    def volume(self) -> FaceVolume:
        """The grid as the controls say, of one view; on the CPU."""
        target = self._target()
        key = self.person.value, self.yaw.value, tuple(target[0].tolist()), self.resolution.value
        if self._known[0] != key:
            person = self.people.names.index(self.person.value)
            row, device = self.people.row(person), self.model.input.weight.device
            at = [self.people.closest(person, 0, self.yaw.value)]
            src, angles, points = (v[at].to(device) for v in (row.src, row.angles, row.keypoints_3d))
            with evaluation_mode(self.model):
                found = self.model.face_volume(src, angles, points, target.to(device), self.resolution.value)
            self._known = key, FaceVolume(**{name: value.cpu() for name, value in vars(found).items()})
        return self._known[1]

    def _target(self) -> torch.Tensor:
        """(1, 3) the pose to render at, in radians."""
        return torch.tensor([[self.target_pitch.value, self.target_yaw.value, self.target_roll.value]]).deg2rad()

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """What is drawn: (R, R, R) or RGB (R, R, R, 3), and the (R, R, R) values that the threshold cuts."""
        found, name = self.volume(), self.quantity.value
        density = found.density[0, 0].numpy()
        if name == self.FEATURES:
            return self._colours(found.features[0]), density
        if name in self.SHARES:
            shares = found.shares[0, self.SHARES.index(name)].numpy()
            return shares, np.abs(shares)
        if name == self.OCCUPANCY:  # of the face's own frame, turned like everything else here
            occupancy = rotate(found.occupancy.amax(1, keepdim=True), rotation_matrix(self._target()))[0, 0].numpy()
            return occupancy, occupancy
        values = density if name == self.DENSITY else found.weights[0, 0].numpy()
        return values, values

    def _colours(self, features: torch.Tensor) -> np.ndarray:
        """(C, ...) features to (..., 3) RGB: principal components of what the grid holds, each scaled to its range."""
        grid = self.volume().features[0].flatten(1)  # (C, R^3)
        basis = torch.linalg.eigh(grid @ grid.T).eigenvectors[:, -3:].flip(1)  # (C, 3), the largest first
        basis = torch.where(basis.sum(0) < 0, -basis, basis)  # a principal component has no sign of its own
        parts = torch.tensordot(basis, features, ([0], [0]))
        scale = parts.flatten(1).abs().amax(1).clamp_min(1e-12).view(3, *[1] * (parts.dim() - 1))
        return (0.5 + 0.5 * parts / scale).movedim(0, -1).numpy()

    def _scene(self) -> dict:
        values, cut = self.values()
        shown = cut >= cut.min() + self.threshold.value * np.ptp(cut)
        if self.cut.value:
            axis, at = PLANES[self.plane.value][0], self.layer.value - 1
            kept = slice(None, at + 1) if self.plane.value == "width" else slice(at, None)  # away from the first camera
            behind = np.zeros_like(shown)
            behind[(slice(None),) * axis + (kept,)] = True
            shown &= behind
        if values.ndim == 4:
            colours = values
        else:
            name, low, high = colour_scale(values)
            colours = matplotlib.colormaps[name]((values - low) / (high - low))[..., :3]
        right, down = self.cubes.turned
        return {
            "shown": shown,
            "colours": colours,
            "azimuth": right - 30,
            "elevation": min(90, max(-90, 20 + down)),
            "points": self.volume().keypoints[0].double().numpy(),
        }

    def _draw_cubes(self) -> None:
        self.cubes.picture = png_bytes(draw_cubes(**self._scene(), size=600, names=KEYPOINT_NAMES))

    def _show_pictures(self, sliced: Slice, features: Rendering, opacity: Rendering) -> None:
        found, values = self.volume(), self.values()[0]
        name = self.quantity.value.split(",")[0]
        sliced.show(values, self.plane.value, self.layer.value - 1, name)
        features.show(self._colours(found.image[0]))
        stopped = found.weights[0, 0].sum(0).clamp(0, 1).numpy()
        opacity.show(np.repeat(stopped[..., None], 3, -1))

    def _draw(self) -> None:
        self._draw_cubes()
        self._show_pictures(self._slice, self._features, self._opacity)
        self.pictures.picture = self._live.png()
        resolution = self.resolution.value
        self.pictures.grids = [
            {
                "box": self._live.box(self._slice.ax),
                "rows": resolution,
                "columns": resolution,
                "texts": self._slice.texts(),
            }
        ]

    def figure(self) -> Figure:
        fig = Figure((10.5, 4.6), 110, layout="constrained")
        left, right = fig.subfigures(1, 2, width_ratios=(1, 1.25))
        ax = left.subplots()
        ax.imshow(draw_cubes(**self._scene(), size=700, names=KEYPOINT_NAMES))
        ax.axis("off")
        left.suptitle(f"{self.quantity.value}, {self.resolution.value}³ voxels", fontsize=9)
        axes = right.subplots(2, 2)
        self._show_pictures(
            Slice(axes[0, 0]),
            Rendering(axes[0, 1], "rendered features"),
            Rendering(axes[1, 0], "light stopped, 0 to 1"),
        )
        about = (
            f"{self.person.value}\nsource: yaw {self.yaw.value:.0f}°\ntarget: yaw {self.target_yaw.value:.0f}°, "
            f"pitch {self.target_pitch.value:.0f}°, roll {self.target_roll.value:.0f}°\n"
            f"drawn: from {self.threshold.value:.0%} of the range"
        )
        axes[1, 1].text(0, 0.9, about, va="top", fontsize=9)
        axes[1, 1].axis("off")
        for ax in axes.flat:
            ax.set_anchor("W")
        return fig


INK, PAPER, FRAME = (40, 40, 40), (255, 255, 255), (170, 170, 170)


FIELD = 1.9  # half of what the picture shows, in grid units: the cube's corner, seen from anywhere


STEPS = np.vstack([np.eye(3), -np.eye(3)])  # the six directions of a cube's sides, as points


def draw_cubes(
    shown: np.ndarray,
    colours: np.ndarray,
    azimuth: float = -30.0,
    elevation: float = 20.0,
    size: int = 640,
    points: np.ndarray | None = None,
    names: tuple[str, ...] = (),
) -> Image.Image:
    """Draw some voxels of a grid.

    Args:
        shown: (R, R, R) bool, the voxels to draw.
        colours: (R, R, R, 3) RGB in 0..1.
        azimuth: degrees that the grid is turned about the vertical, as yaw turns a head.
        elevation: degrees from which the camera looks down on it.
        size: of the square picture, pixels.
        points: (K, 3) marks over the cubes, e.g. keypoints; names: theirs.
    """
    about_y, about_x = rotation_matrix(torch.tensor([[0.0, azimuth, 0.0], [-elevation, 0.0, 0.0]]).deg2rad()).numpy()
    turn = about_x @ about_y
    scale = size / 2 / FIELD
    picture = Image.new("RGB", (size, size), PAPER)
    draw = ImageDraw.Draw(picture)
    _draw_frame(draw, turn, scale, size)
    corners, depth, paint = _faces(shown, colours, turn)
    order = depth.argsort()  # far ones first
    xy = (corners[order] @ turn[:2].T) * scale + size / 2
    for polygon, fill in zip(xy.reshape(len(xy), 8).tolist(), paint[order].tolist(), strict=True):
        draw.polygon(polygon, fill=tuple(fill))
    _name_axes(draw, turn, scale, size)
    if points is not None:
        _draw_points(draw, points @ turn.T * scale + size / 2, names, size)
    return picture


def _faces(shown: np.ndarray, colours: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sides that face the camera and are not covered by a neighbour: corners (N, 4, 3), depth (N,), RGB (N, 3)."""
    resolution = len(shown)
    centres, half = _centres(resolution), 1 / resolution
    padded = np.pad(shown, 1)
    corners, paints, middles = [], [], []
    for step in STEPS[STEPS @ turn[2] > 1e-6]:
        x, y, z = step.astype(int)
        at = np.roll(padded, (z, -y, -x), (0, 1, 2))[1:-1, 1:-1, 1:-1]  # depth runs against z
        bare = shown & ~at
        across = half * np.roll(step, 1)
        along = half * np.roll(step, 2)
        square = np.stack([across + along, across - along, -across - along, along - across])
        middle = centres[bare] + half * step
        corners.append(middle[:, None] + square)
        middles.append(middle @ turn[2])
        light = 0.62 + 0.38 * max(0.0, float(turn @ step @ (-0.35, -0.6, 0.72)))
        paints.append((colours[bare] * light * 255).clip(0, 255).astype(np.uint8))
    if not corners:
        return np.zeros((0, 4, 3)), np.zeros(0), np.zeros((0, 3), np.uint8)
    return np.concatenate(corners), np.concatenate(middles), np.concatenate(paints)


def _draw_frame(draw: ImageDraw.ImageDraw, turn: np.ndarray, scale: float, size: int) -> None:
    """The grid's edges behind the cubes."""
    ends = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    near = (ends @ turn[2]).argmax()
    xy = ends @ turn[:2].T * scale + size / 2
    for i in range(8):
        for j in range(i + 1, 8):
            if (ends[i] != ends[j]).sum() == 1 and near not in (i, j):
                draw.line([*xy[i], *xy[j]], fill=FRAME, width=max(1, size // 400))


def _name_axes(draw: ImageDraw.ImageDraw, turn: np.ndarray, scale: float, size: int) -> None:
    """The names of the axes beside edges that are seen."""
    side, front = (1 if turn[2, axis] >= 0 else -1 for axis in (0, 2))  # of x and z, the faces that are seen
    labels = (
        ("x, image right", (0, 1.12, front), "mt"),
        ("z, to camera", (side, 1.12, 0), "mt"),
        ("y, down", (-side * 1.04, 0, front), "rm" if side * front > 0 else "lm"),
    )
    for name, place, anchor in labels:
        at = np.array(place) @ turn[:2].T * scale + size / 2
        draw.text(tuple(at), name, INK, _font(size // 32), anchor=anchor)


def _draw_points(draw: ImageDraw.ImageDraw, xyz: np.ndarray, names: tuple[str, ...], size: int) -> None:
    radius, font = size / 90, _font(size // 32)
    for i in xyz[:, 2].argsort():
        x, y = xyz[i, :2]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(214, 39, 40), outline=PAPER)
        if names:
            draw.text((x + 1.5 * radius, y), names[i], INK, font, anchor="lm", stroke_width=2, stroke_fill=PAPER)


@lru_cache(maxsize=4)
def _centres(resolution: int) -> np.ndarray:
    return voxel_centres(resolution).double().numpy()


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings, so that pictures look alike everywhere."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
