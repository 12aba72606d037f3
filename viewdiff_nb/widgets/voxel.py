"""Look into the voxel grid of the 3-D projection."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations, product
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
from viewdiff_nb.widgets.explorer import DPI, LOOK, Explorer, LiveFigure, Stage, png, pose_sliders
from viewdiff_nb.widgets.pose import People

PLANES = {  # what a slice is taken across: the axis of a volume, and what runs along the slice's x and y
    "depth": (0, "x, image right", "y, down"),
    "height": (1, "x, image right", "z, away from the camera"),
    "width": (2, "y, down", "z, away from the camera"),
}


def colour_scale(values: np.ndarray) -> tuple[str, float, float]:
    """Colour map and limits: from the least to the largest value, or about zero where there are negative ones."""
    low, high = float(values.min()), float(values.max())
    if low < 0:
        high = max(-low, high)
        return "RdBu_r", -high, high
    return "viridis", low, max(high, low + 1e-12)


def draw_image(ax: Axes, values: np.ndarray) -> None:
    """(R, R) numbers or (R, R, 3) RGB in 0..1; drawn again, only the data are replaced."""
    if ax.images:
        ax.images[0].set_data(values)
    else:
        ax.imshow(values, extent=(-1, 1, 1, -1), interpolation="nearest")


def draw_slice(ax: Axes, volume: np.ndarray, plane: str, index: int, name: str) -> None:
    """Layer `index` of a grid: (R, R, R) over (depth, y, x), drawn by `colour_scale`; or (R, R, R, 3) RGB in 0..1."""
    axis, xlabel, ylabel = PLANES[plane]
    draw_image(ax, np.take(volume, index, axis))
    if volume.ndim == 3:
        cmap, low, high = colour_scale(volume)
        ax.images[0].set(cmap=cmap, clim=(low, high))
    title = f"{name}, {plane} {index + 1} of {len(volume)}\n{volume.min():.3g} to {volume.max():.3g}"
    for label, text in ((ax.title, title), (ax.xaxis.label, xlabel), (ax.yaxis.label, ylabel)):
        label.set(text=text, fontsize=8)
    ax.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    ax.tick_params(labelsize=7)


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
    SHARES = tuple(f"share of {name}" for name in KEYPOINT_NAMES)
    FIRST = ("resolution",)
    HINT = (
        "Raise the threshold or move the slice to look inside; drag the grid to look from elsewhere.",
        "The red dots are the keypoints: if the layer had learnt a face, density would gather around them.",
    )

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
        names = self.people.names
        self.person = widgets.Dropdown(options=names, value=person or names[0], description="person", **LOOK)
        _, self.yaw, _ = pose_sliders(self.people.pitches, self.people.yaws, (0, yaw, 0), "source ")
        self.target_pitch, self.target_yaw, self.target_roll = pose_sliders(None, None, (0, 0, 0), "target ")
        sizes = sorted({4, 8, 16, 32, own, resolution or own})
        self.resolution = widgets.Dropdown(
            options=[(f"{n}³", n) for n in sizes], value=resolution or own, description="voxels per edge", **LOOK
        )
        quantities = [self.DENSITY, self.WEIGHT, self.FEATURES, self.OCCUPANCY, *self.SHARES]
        self.quantity = widgets.Dropdown(options=quantities, description="quantity", **LOOK)
        self.threshold = widgets.FloatSlider(0.35, min=0, max=1, step=0.05, description="threshold (0–1)", **LOOK)
        self.threshold.tooltip = "voxels below this share of the way from the least to the largest value are not drawn"
        self.plane = widgets.Dropdown(options=list(PLANES), description="slice across", **LOOK)
        self.cut = widgets.Checkbox(True, description="cut open at the slice", **LOOK)
        self.layer = widgets.IntSlider(own // 2, 1, own, description="slice (number)", **LOOK)
        self.cubes = Stage(width=380, turnable=True, label="the voxel grid")
        self.cubes.caption = "drag to look from elsewhere, or use the arrow keys"
        self.pictures = Stage(width=620, label="a slice of the grid, and the rendering")
        self._last_volume = lru_cache(maxsize=1)(self._volume)
        self._axes = Figure((6.6, 2.9), DPI, layout="constrained").subplots(1, 3)
        left = [self.person, self.yaw, self.target_yaw, self.target_pitch, self.target_roll]
        right = [self.resolution, self.quantity, self.threshold, self.plane, self.layer, self.cut]
        # a new resolution is drawn by _fit_layer
        super().__init__([[widgets.VBox(left), widgets.VBox(right)], [self.cubes, self.pictures]], left + right[1:])
        self.resolution.observe(self._fit_layer, "value")
        self.cubes.observe(lambda _: self._draw_cubes(), "turned")
        with self.together():
            self._fit_layer()
            self._draw_slices(self._axes)
            labels = [self._axes[0].title, self._axes[0].xaxis.label, self._axes[0].yaxis.label]
            self._live = LiveFigure([*labels, *(ax.images[0] for ax in self._axes)])

    def _fit_layer(self, _: dict | None = None) -> None:
        """The middle layer, when the resolution changes."""
        with self.together():
            self.layer.max = self.resolution.value
            self.layer.value = self.resolution.value // 2

    def _target(self) -> tuple[float, float, float]:
        """Pitch, yaw and roll to render at, degrees."""
        return self.target_pitch.value, self.target_yaw.value, self.target_roll.value

    def state(self) -> str:
        """Whether the model was trained in what is shown, in words."""
        own = self.model.projection.voxel_resolution  # type: ignore[union-attr]  # there is one
        odd = ["it renders the frontal pose only"] if any(self._target()) else []
        odd += [f"its grid has {own}³ voxels"] if self.resolution.value != own else []
        return f"Not what the model was trained in: {', and '.join(odd)}." if odd else "As the model uses it."

    def volume(self) -> FaceVolume:
        """The grid as the controls say, of one view; on the CPU."""
        return self._last_volume(self.person.index, self.yaw.value, self._target(), self.resolution.value)

    def _volume(self, person: int, yaw: float, target: tuple[float, float, float], resolution: int) -> FaceVolume:
        device, row, at = self.model.input.weight.device, self.people.row(person), self.people.closest(person, 0, yaw)
        src, angles, points = (v[at][None].to(device) for v in (row.src, row.angles, row.keypoints_3d))
        pose = torch.tensor([target], device=device).deg2rad()
        with evaluation_mode(self.model):
            found = self.model.face_volume(src, angles, points, pose, resolution)
        return FaceVolume(**{name: value.cpu() for name, value in vars(found).items()})

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
            turn = rotation_matrix(torch.tensor([self._target()]).deg2rad())
            values = rotate(found.occupancy.amax(1, keepdim=True), turn)[0, 0].numpy()
        else:
            values = density if name == self.DENSITY else found.weights[0, 0].numpy()
        return values, values

    def scene(self) -> tuple[np.ndarray, np.ndarray]:
        """(R, R, R) bool: voxels over the threshold, behind the slice if it cuts the grid; (R, R, R, 3) their RGB."""
        colours, strength = self.values()
        shown = strength >= strength.min() + self.threshold.value * np.ptp(strength)
        if self.cut.value:
            layer, at = np.indices(shown.shape)[PLANES[self.plane.value][0]], self.layer.value - 1
            shown &= layer <= at if self.plane.value == "width" else layer >= at  # what is away from the first camera
        if colours.ndim == 3:
            name, low, high = colour_scale(colours)
            colours = matplotlib.colormaps[name]((colours - low) / (high - low))[..., :3]
        return shown, colours

    def _colours(self, features: torch.Tensor) -> np.ndarray:
        """(C, ...) features to (..., 3) RGB: principal components of what the grid holds, each scaled to its range."""
        grid = self.volume().features[0].flatten(1)  # (C, R^3)
        basis = torch.linalg.eigh(grid @ grid.T).eigenvectors[:, -3:].flip(1)  # (C, 3), the largest first
        basis = torch.where(basis.sum(0) < 0, -basis, basis)  # a principal component has no sign of its own
        parts = torch.tensordot(basis, features, ([0], [0]))
        scale = parts.flatten(1).abs().amax(1).clamp_min(1e-12).view(3, *[1] * (parts.dim() - 1))
        return (0.5 + 0.5 * parts / scale).movedim(0, -1).numpy()

    def _cubes(self, shown: np.ndarray, colours: np.ndarray, size: int) -> Image.Image:
        right, down = self.cubes.turned
        points = self.volume().keypoints[0].double().numpy()
        return draw_cubes(shown, colours, right - 30, min(90, max(-90, 20 + down)), size, points)

    def _draw_cubes(self) -> None:
        shown, colours = self.scene()
        self.cubes.label = f"the voxel grid, {self.quantity.value}: {shown.sum()} of {shown.size} voxels drawn"
        self.cubes.picture = png(self._cubes(shown, colours, 600))

    def _draw_slices(self, axes: Sequence[Axes]) -> None:
        """A slice, the rendered features and the light stopped on three axes."""
        found, name = self.volume(), self.quantity.value.split(",")[0]
        draw_slice(axes[0], self.values()[0], self.plane.value, self.layer.value - 1, name)
        draw_image(axes[1], self._colours(found.image[0]))
        stopped = found.weights[0, 0].sum(0).clamp(0, 1).numpy()
        draw_image(axes[2], np.repeat(stopped[..., None], 3, -1))
        for ax, title in zip(axes[1:], ("rendered features", "light stopped, 0 to 1"), strict=True):
            ax.set_title(title, fontsize=9)
            ax.set(xticks=(), yticks=())

    def _draw(self) -> None:
        self._draw_cubes()
        self._draw_slices(self._axes)
        self.pictures.picture, self.pictures.caption = self._live.png(), self.state()
        where = f"{self.plane.value} {self.layer.value} of {self.resolution.value}"
        self.pictures.label = f"a slice of the grid, {where}, and the rendering"
        [image] = self._axes[0].images
        cells = np.asarray(image.get_array())
        if cells.ndim == 2:
            texts = [f"{value:.3g}" for value in cells.ravel()]
        else:
            texts = [", ".join(f"{v:.2f}" for v in rgb) for rgb in cells.reshape(-1, 3)]
        self.pictures.grids = [self._live.grid(image, texts)]

    def figure(self) -> Figure:
        fig = Figure((10.5, 4.6), DPI, layout="constrained")
        left, right = fig.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.25)).flat
        ax = left.subplots()
        ax.imshow(self._cubes(*self.scene(), 700))
        ax.axis("off")
        left.suptitle(f"{self.quantity.value}, {self.resolution.value}³ voxels", fontsize=9)
        axes = right.subplots(2, 2).flatten()
        self._draw_slices(axes[:3])
        pitch, yaw, roll = self._target()
        words = self.state().replace(": ", ":\n").replace(", and ", ",\nand ")
        about = (
            f"{self.person.value}\nsource: yaw {self.yaw.value:.0f}°\ntarget: yaw {yaw:.0f}°, "
            f"pitch {pitch:.0f}°, roll {roll:.0f}°\ndrawn: from {self.threshold.value:.0%} of the range\n"
            f"{words}"
        )
        axes[3].text(0, 0.9, about, va="top", fontsize=9)
        axes[3].axis("off")
        for ax in axes:
            ax.set_anchor("W")
        return fig


INK, PAPER, FRAME, RED = (40, 40, 40), (255, 255, 255), (170, 170, 170), (214, 39, 40)
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # so that pictures look alike everywhere
FIELD = 1.9  # half of what the picture shows, in grid units: the cube's corner, seen from anywhere


def draw_cubes(
    shown: np.ndarray,
    colours: np.ndarray,
    azimuth: float,
    elevation: float,
    size: int,
    points: Iterable = (),
) -> Image.Image:
    """Draw some voxels of a grid.

    Args:
        shown: (R, R, R) bool, the voxels to draw.
        colours: (R, R, R, 3) RGB in 0..1.
        azimuth: degrees that the grid is turned about the vertical, as yaw turns a head.
        elevation: degrees from which the camera looks down on it.
        size: of the square picture, pixels.
        points: (K, 3) keypoints to mark over the cubes, with their names.
    """
    about_y, about_x = rotation_matrix(torch.tensor([[0.0, azimuth, 0.0], [-elevation, 0.0, 0.0]]).deg2rad()).numpy()
    turn = about_x @ about_y

    def project(xyz: np.ndarray) -> np.ndarray:
        """(..., 3) grid coordinates to (..., 2) pixels."""
        return xyz @ turn[:2].T * (size / 2 / FIELD) + size / 2

    picture = Image.new("RGB", (size, size), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.truetype(FONT, size // 32)
    ends = np.array(list(product((-1.0, 1.0), repeat=3)))
    nearest = ends[(ends @ turn[2]).argmax()]
    for a, b in combinations(ends, 2):  # the edges behind the cubes
        if (a != b).sum() == 1 and not (a == nearest).all() and not (b == nearest).all():
            draw.line([*project(a), *project(b)], fill=FRAME, width=max(1, size // 400))

    corners, depth, paint = _visible_sides(shown, colours, turn)
    order = depth.argsort()  # far ones first
    for polygon, fill in zip(project(corners[order]).reshape(-1, 8).tolist(), paint[order].tolist(), strict=True):
        draw.polygon(polygon, fill=tuple(fill))

    side, front = (1 if turn[2, axis] >= 0 else -1 for axis in (0, 2))  # of x and z, the faces that are seen
    for name, at, anchor in (
        ("x, image right", (0, 1.12, front), "mt"),
        ("z, to camera", (side, 1.12, 0), "mt"),
        ("y, down", (-side * 1.04, 0, front), "rm" if side * front > 0 else "lm"),
    ):
        draw.text(tuple(project(np.array(at))), name, INK, font, anchor=anchor)

    radius = size / 90
    for name, point in sorted(zip(KEYPOINT_NAMES, points, strict=False), key=lambda named: named[1] @ turn[2]):
        x, y = project(point)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=RED, outline=PAPER)
        draw.text((x + 1.5 * radius, y), name, INK, font, anchor="lm", stroke_width=2, stroke_fill=PAPER)
    return picture


def _visible_sides(
    shown: np.ndarray, colours: np.ndarray, turn: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sides that face the camera and are not covered by a neighbour: corners (N, 4, 3), depth (N,), RGB (N, 3)."""
    centres, half, padded = voxel_centres(len(shown)).double().numpy(), 1 / len(shown), np.pad(shown, 1)
    corners, depths, paints = [], [], []
    normals = np.vstack([np.eye(3), -np.eye(3)])
    for normal in normals[normals @ turn[2] > 1e-6]:
        x, y, z = normal.astype(int)
        covered = np.roll(padded, (z, -y, -x), (0, 1, 2))[1:-1, 1:-1, 1:-1]  # depth runs against z
        bare = shown & ~covered
        across, along = half * np.roll(normal, 1), half * np.roll(normal, 2)
        middle = centres[bare] + half * normal
        corners.append(middle[:, None] + [across + along, across - along, -across - along, along - across])
        depths.append(middle @ turn[2])
        light = 0.62 + 0.38 * max(0.0, float(turn @ normal @ (-0.35, -0.6, 0.72)))
        paints.append((colours[bare] * light * 255).clip(0, 255).astype(np.uint8))
    return np.concatenate(corners), np.concatenate(depths), np.concatenate(paints)
