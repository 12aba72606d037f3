"""Turn a head, see who is recognised."""

import html
from dataclasses import dataclass

import ipywidgets as widgets
import matplotlib
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn

from viewdiff_nb.faces.geometry import normalise_keypoints
from viewdiff_nb.faces.turntable import RecordedPeople, Turntable, load_turntable
from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.files import TURNTABLE
from viewdiff_nb.training.evaluation import predict
from viewdiff_nb.widgets.explorer import (
    DPI,
    SLIDER,
    STYLE,
    Explorer,
    LiveFigure,
    Stage,
    choice,
    drag_moves,
    png_bytes,
    pose_sliders,
    side_by_side,
)

EDGES = ((0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4))  # of the face that five keypoints outline


RAW, PREDICTED = sns.color_palette("colorblind")[:2]


class YawCurves:
    """Cosine with the own front over yaw, raw and predicted, and the most similar other front."""

    def __init__(self, ax: Axes, people: int) -> None:
        self.at = ax.axvline(0, color="0.6", linewidth=1)
        self.lines = [
            ax.plot([], [], **style)[0]
            for style in (
                {"color": RAW, "linestyle": ":", "linewidth": 1.2, "label": "raw, most similar other person"},
                {"color": PREDICTED, "linestyle": ":", "linewidth": 1.2, "label": "predicted, most similar other"},
                {"color": RAW, "linewidth": 2, "label": "raw, right person"},
                {"color": PREDICTED, "linewidth": 2, "label": "predicted, right person"},
            )
        ]
        [self.dots] = ax.plot([], [], "o", color="0.15", markersize=6)
        self.moving = [self.at, *self.lines, self.dots]
        ax.set(xlim=(-92, 92), ylim=(-0.32, 1.02), xlabel="yaw, degrees", ylabel="cosine")
        ax.set_xticks(range(-90, 91, 30))
        ax.set_title(f"Similarity with {people} frontal embeddings", loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=7.5, loc="lower center", ncols=2)
        sns.despine(ax=ax)

    def show(self, yaws: np.ndarray, own: np.ndarray, others: np.ndarray, at: int) -> None:
        """
        Args:
            yaws: (Y,) degrees, rising.
            own, others: (2, Y) cosines of raw and predicted embeddings.
            at: the index of the yaw that is looked at.
        """
        self.at.set_xdata([yaws[at]] * 2)
        for line, values in zip(self.lines, (*others, *own), strict=True):
            line.set_data(yaws, values)
        self.dots.set_data([yaws[at]] * 2, own[:, at])


class KeypointFace:
    """Five keypoints as the camera sees them, joined to a face; the nearer one is, the larger its mark."""

    def __init__(self, ax: Axes) -> None:
        self.edges = [ax.plot([], [], color="0.6", linewidth=1.5)[0] for _ in EDGES]
        self.marks = ax.scatter([0] * 5, [0] * 5, s=60, color=sns.color_palette("colorblind", 5), zorder=3)
        self.moving = [*self.edges, self.marks]
        ax.set(xlim=(-1.8, 1.8), ylim=(1.8, -1.8), aspect="equal", xticks=[], yticks=[])

    def show(self, keypoints: np.ndarray) -> None:
        """keypoints: (5, 3), centred and of unit size."""
        for line, (a, b) in zip(self.edges, EDGES, strict=True):
            line.set_data(*keypoints[[a, b], :2].T)
        self.marks.set_offsets(keypoints[:, :2])
        self.marks.set_sizes(70 * np.exp(keypoints[:, 2]))


People = Turntable | RecordedPeople


@dataclass(frozen=True)
class Search:
    """A person's views searched in a gallery.

    own: (2, Y) cosine with the right person's front; raw, then predicted. place: (2, Y) how many others are at least as
    similar. best: (2, Y) cosine with the most similar other. other: (2, Y) its row in the gallery.
    """

    own: np.ndarray
    place: np.ndarray
    best: np.ndarray
    other: np.ndarray


def search(model: nn.Module, views: FaceViews, gallery: torch.Tensor, person: int) -> Search:
    """Raw and predicted embeddings of one person's views against a gallery.

    Args:
        views: Y views, on the CPU. gallery: (P, D) fronts. person: the right row.
    """
    probes = F.normalize(torch.stack((views.src, predict(model, views))), dim=-1)
    cosine = probes @ F.normalize(gallery.cpu(), dim=1).T  # (2, Y, P)
    own = cosine[..., person].clone()
    cosine[..., person] = -2
    best, other = cosine.max(-1)
    place = (cosine >= own[..., None]).sum(-1)
    return Search(*(values.numpy() for values in (own, place, best, other)))


class PoseExplorer(Explorer):
    """Turn a head and see at once who is recognised, before and after the model.

    Args:
        model: anything that `training.evaluation.predict` takes.
        gallery: the people to search among; its fronts are searched, and one of its people is looked at.
        people: where views come from. By default the shipped turntable if its people are in the gallery (every pose of
            a grid, with pictures), else the gallery's own recorded views.
        person: a name; the first by default. yaw, pitch, roll: degrees.

    Raises:
        ValueError: if the people are not in the gallery, or their embeddings have another width.
    """

    def __init__(
        self,
        model: nn.Module,
        gallery: FaceViews,
        people: People | None = None,
        person: str | None = None,
        yaw: float = 60.0,
        pitch: float = 0.0,
        roll: float = 0.0,
    ) -> None:
        self.model, self.gallery, self.people = model, gallery, people or people_of(gallery)
        if gallery.feature_dim != self.people.row(0).feature_dim:
            raise ValueError(
                f"the gallery's embeddings have {gallery.feature_dim} numbers, those of the people "
                f"{self.people.row(0).feature_dim}"
            )
        if missing := set(self.people.names) - set(gallery.names):
            raise ValueError(
                f"{len(missing)} people are not in the gallery, e.g. {min(missing)!r}; give a gallery "
                "that holds their fronts"
            )
        self.person = choice("person", list(self.people.names), person)
        self.pitch, self.yaw, self.roll = pose_sliders(self.people.pitches, self.people.yaws, (pitch, yaw, roll))
        self.keypoints = widgets.Checkbox(False, description="keypoints", layout=SLIDER, style=STYLE)
        self.head = Stage(width=250, turnable=True, label="the head", caption="drag the head, or use the arrow keys")
        self.side = Stage(width=150, label="the side view", caption="side view, as the recogniser sees it")
        self.front = Stage(width=150, label="the frontal view", caption="frontal view: its embedding is the target")
        self.curves = Stage(width=520, label="cosine with the own front over yaw")
        self.readout = widgets.HTML().add_class("vd-readout")
        fig = Figure((5.2, 2.7), DPI, layout="constrained")
        self._curves = YawCurves(fig.add_subplot(), len(gallery.names))
        self._live = LiveFigure(fig, self._curves.moving)
        face = Figure((2.5, 2.5), DPI, layout="constrained")
        self._face = KeypointFace(face.add_subplot())
        self._live_face = LiveFigure(face, self._face.moving)
        self._known: tuple = (None, None)
        self._front_of: int | None = None
        controls = widgets.VBox([self.person, self.yaw, self.pitch, self.roll, self.keypoints])
        # without pictures the keypoints are all there is to see
        shown = [self.head, self.side, self.front] if self.people.pitches else [self.head]
        super().__init__([side_by_side(controls, *shown), side_by_side(self.curves, self.readout)])
        self.follow(self.person, self.yaw, self.pitch, self.roll, self.keypoints)
        drag_moves(self.head, self.yaw, self.pitch, self)
        self.redraw()

    @property
    def pose(self) -> tuple[float, float, float]:
        """Pitch, yaw and roll of the view that is shown, in degrees."""
        person, pitch, yaw, roll = self._shown()
        row = self.people.row(person, pitch, roll)
        return tuple(row.angles[self.people.closest(person, pitch, yaw, roll)].rad2deg().round(decimals=2).tolist())

    def _row(self) -> tuple[FaceViews, Search, int]:
        """The person's views over yaw, what became of them, and which one is looked at."""
        person, pitch, roll = self.people.names.index(self.person.value), self.pitch.value, self.roll.value
        key = (person, pitch, roll) if self.people.pitches else person
        if self._known[0] != key:
            row = self.people.row(person, pitch, roll)
            found = search(self.model, row, self.gallery.front, self.gallery.names.index(self.person.value))
            self._known = key, (row, found)
        row, found = self._known[1]
        return row, found, self.people.closest(person, pitch, self.yaw.value, roll)

    def _draw(self) -> None:
        self._draw_head()  # at once; what the model makes of it takes longer
        row, found, at = self._row()
        self._curves.show(row.angles[:, 1].rad2deg().numpy(), found.own, found.best, at)
        self.curves.picture = self._live.png()
        self.readout.value = self._table(found, at)

    def _draw_head(self) -> None:
        shown = self._shown()
        picture = self._head()
        if picture is None:
            row, at = self.people.row(shown[0]), self.people.closest(*shown)
            self._face.show(normalise_keypoints(row.keypoints_3d[at]).numpy())
            self.head.picture = self._live_face.png()
        else:
            self.head.picture = png_bytes(picture)
            self.side.picture = png_bytes(self.people.crop(*shown))
            if self._front_of != shown[0]:
                self._front_of, self.front.picture = shown[0], png_bytes(self.people.crop(shown[0], 0, 0))
        pitch, yaw, roll = self.pose
        where = f"pitch {pitch:.0f}°, yaw {yaw:.0f}°, roll {roll:.0f}°"
        self.head.label, self.side.label = f"the head at {where}", f"the aligned crop at {where}"

    def _shown(self) -> tuple[int, float, float, float]:
        return self.people.names.index(self.person.value), self.pitch.value, self.yaw.value, self.roll.value

    def _head(self) -> Image.Image | None:
        """The picture of the head, with its keypoints if they are wanted; None if there are no pictures."""
        picture = self.people.picture(*self._shown())
        if picture is not None and self.keypoints.value:
            picture = picture.copy()
            mark_points(picture, self.people.picture_keypoints(*self._shown()))
        return picture

    def _table(self, found: Search, at: int) -> str:
        lines = []
        for i, name in enumerate(("raw side view", "predicted")):
            place, best = int(found.place[i, at]), html.escape(self.gallery.names[found.other[i, at]])
            word, style = ("right", "vd-right") if place == 0 else ("wrong", "vd-wrong")
            lines.append(
                f"<tr><td>{name}</td><td>{found.own[i, at]:.3f}</td><td class={style}>{place + 1} ({word})"
                f"</td><td>{found.best[i, at]:.3f}, {best}</td></tr>"
            )
        return (
            f"<table><tr><th></th><th>cosine with own front</th><th>rank among {len(self.gallery.names)}</th>"
            f"<th>most similar other</th></tr>{''.join(lines)}</table>"
        )

    def figure(self) -> Figure:
        row, found, at = self._row()
        fig = Figure((9.5, 5.4), 110, layout="constrained")
        top, bottom = fig.subfigures(2, height_ratios=(1, 1.15))
        pitch, yaw, roll = self.pose
        title = f"{self.person.value}: pitch {pitch:.0f}°, yaw {yaw:.0f}°, roll {roll:.0f}°"
        if self.people.pitches:
            shown = self._shown()
            pictures = self._head(), self.people.crop(*shown), self.people.crop(shown[0], 0, 0)
            names = (title, "side view, as the recogniser sees it", "frontal view: its embedding is the target")
            for ax, picture, name in zip(top.subplots(1, 3), pictures, names, strict=True):
                ax.imshow(picture)
                ax.set_title(name, fontsize=9, parse_math=False)
                ax.axis("off")
        else:
            face = KeypointFace(ax := top.subplots())
            face.show(normalise_keypoints(row.keypoints_3d[at]).numpy())
            ax.set_title(title, fontsize=9, parse_math=False)
        left, right = bottom.subplots(1, 2, width_ratios=(1.5, 1))
        YawCurves(left, len(self.gallery.names)).show(row.angles[:, 1].rad2deg().numpy(), found.own, found.best, at)
        right.axis("off")
        cells = [[f"{found.own[i, at]:.3f}", f"{found.place[i, at] + 1}", f"{found.best[i, at]:.3f}"] for i in (0, 1)]
        columns = ("cosine with\nown front", f"rank\namong {len(self.gallery.names)}", "most similar\nother")
        right.table(
            cells,
            rowLabels=("raw", "predicted"),
            colLabels=columns,
            cellLoc="center",
            edges="horizontal",
            bbox=(0.2, 0.3, 0.8, 0.5),
        ).set_fontsize(9)
        return fig


def people_of(gallery: FaceViews) -> People:
    """The shipped turntable if it is there and shows people of the gallery, else the gallery's recorded views."""
    if TURNTABLE.is_dir() and (turntable := load_turntable()).shows(gallery):
        return turntable
    return RecordedPeople(gallery)


def mark_points(picture: Image.Image, pixels: np.ndarray) -> None:
    """Draw (K, 2) points into a PIL picture."""
    draw, colours = ImageDraw.Draw(picture), matplotlib.colormaps["tab10"].colors
    for (x, y), colour in zip(pixels, colours, strict=False):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=tuple(int(255 * c) for c in colour), outline="white")
