"""Look into the voxel grid of the 3-D projection."""

import ipywidgets as widgets
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from ..faces.geometry import KEYPOINT_NAMES, rotation_matrix
from ..faces.turntable import load_turntable
from ..modules.modes import evaluation_mode
from ..modules.projection import FaceVolume
from ..modules.transformer import EnhancedTransformerDecoderOnly3D
from ..modules.volume import rotate
from .cubes import draw_cubes
from .drawings import PLANES, Rendering, Slice, colour_scale
from .explorer import DPI, SLIDER, STYLE, Explorer, choice, on_drag, pose_sliders, side_by_side, slider
from .live_figure import LiveFigure, png_bytes
from .pose import People
from .stage import Stage


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

    def __init__(self, model: EnhancedTransformerDecoderOnly3D, people: People | None = None, person: str | None = None,
                 yaw: float = 45.0, resolution: int | None = None) -> None:  # fmt: skip
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
        self.cubes = Stage(width=380, turnable=True, label="the voxel grid",
                           caption="drag to look from elsewhere, or use the arrow keys")  # fmt: skip
        self.pictures = Stage(width=620, label="a slice of the grid, and the rendering")
        self._live = self._make_pictures()
        left = [self.person, self.yaw, self.target_yaw, self.target_pitch, self.target_roll]
        right = [self.resolution, self.quantity, self.threshold, self.plane, self.layer, self.cut]
        super().__init__([side_by_side(widgets.VBox(left), widgets.VBox(right)),
                          side_by_side(self.cubes, self.pictures)])  # fmt: skip
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
        return {"shown": shown, "colours": colours, "azimuth": right - 30, "elevation": min(90, max(-90, 20 + down)),
                "points": self.volume().keypoints[0].double().numpy()}  # fmt: skip

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
        self.pictures.grids = [{"box": self._live.box(self._slice.ax), "rows": resolution, "columns": resolution,
                                "texts": self._slice.texts()}]  # fmt: skip

    def figure(self) -> Figure:
        fig = Figure((10.5, 4.6), 110, layout="constrained")
        left, right = fig.subfigures(1, 2, width_ratios=(1, 1.25))
        ax = left.subplots()
        ax.imshow(draw_cubes(**self._scene(), size=700, names=KEYPOINT_NAMES))
        ax.axis("off")
        left.suptitle(f"{self.quantity.value}, {self.resolution.value}³ voxels", fontsize=9)
        axes = right.subplots(2, 2)
        self._show_pictures(Slice(axes[0, 0]), Rendering(axes[0, 1], "rendered features"),
                            Rendering(axes[1, 0], "light stopped, 0 to 1"))  # fmt: skip
        about = (f"{self.person.value}\nsource: yaw {self.yaw.value:.0f}°\ntarget: yaw {self.target_yaw.value:.0f}°, "
                 f"pitch {self.target_pitch.value:.0f}°, roll {self.target_roll.value:.0f}°\n"
                 f"drawn: from {self.threshold.value:.0%} of the range")  # fmt: skip
        axes[1, 1].text(0, 0.9, about, va="top", fontsize=9)
        axes[1, 1].axis("off")
        for ax in axes.flat:
            ax.set_anchor("W")
        return fig
