"""Turn a head, see who is recognised."""

import html
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import ipywidgets as widgets
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
from viewdiff_nb.training.result import predict
from viewdiff_nb.widgets.explorer import DPI, LOOK, Explorer, LiveFigure, Stage, png, pose_sliders, pose_text

People = Turntable | RecordedPeople
RAW, PREDICTED = sns.color_palette("colorblind")[:2]
EDGES = ([0, 1], [0, 2], [1, 2], [2, 3], [2, 4], [3, 4])  # of the face that five keypoints outline


@dataclass(frozen=True)
class Search:
    """A person's Y views searched in a gallery; two rows: raw embeddings, and predicted ones."""

    yaw: np.ndarray  # (Y,) degrees, rising
    own: np.ndarray  # (2, Y) cosine with the right person's front
    rank: np.ndarray  # (2, Y) of the right person from 1; a tie counts as a miss
    best: np.ndarray  # (2, Y) cosine with the most similar other person
    other: np.ndarray  # (2, Y) that person's row in the gallery


def search(model: nn.Module, views: FaceViews, gallery: torch.Tensor, person: int) -> Search:
    """Raw and predicted embeddings of one person's views against a gallery.

    Args:
        views: Y views, on the CPU. gallery: (P, D) fronts. person: the right row.
    """
    probes = F.normalize(torch.stack((views.src[:], predict(model, views))), dim=-1)
    cosine = probes @ F.normalize(gallery.cpu(), dim=1).T  # (2, Y, P)
    own = cosine[..., person].clone()
    cosine[..., person] = -2
    best, other = cosine.max(-1)
    rank = 1 + (cosine >= own[..., None]).sum(-1)
    return Search(*(values.numpy() for values in (views.angles[:, 1].rad2deg(), own, rank, best, other)))


def draw_curves(ax: Axes, found: Search, at: int, people: int) -> None:
    """Cosine with the own front over yaw, and with the most similar other; drawn again, only the data are replaced.

    Args:
        at: the index of the yaw that is looked at. people: how many there are in the gallery.
    """
    if not ax.lines:
        ax.axvline(0, color="0.6", linewidth=1)
        for colour, style, width, label in (
            (RAW, ":", 1.2, "raw, most similar other person"),
            (PREDICTED, ":", 1.2, "predicted, most similar other"),
            (RAW, "-", 2, "raw, right person"),
            (PREDICTED, "-", 2, "predicted, right person"),
        ):
            ax.plot([], [], style, color=colour, linewidth=width, label=label)
        ax.plot([], [], "o", color="0.15", markersize=6)
        ax.set(xlim=(-92, 92), ylim=(-0.32, 1.02), xticks=range(-90, 91, 30), xlabel="yaw, degrees", ylabel="cosine")
        ax.set_title(f"Similarity with {people} frontal embeddings", loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=7.5, loc="lower center", ncols=2)
        sns.despine(ax=ax)
    looked_at, *curves, dots = ax.lines
    looked_at.set_xdata([found.yaw[at]] * 2)
    for curve, cosine in zip(curves, (*found.best, *found.own), strict=True):
        curve.set_data(found.yaw, cosine)
    dots.set_data([found.yaw[at]] * 2, found.own[:, at])


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

    HINT = (
        "Turn the head: drag it, or move yaw. The further it turns, the less its raw embedding resembles the front.",
        "A search finds the right person where the solid line is above the dotted one of its colour.",
    )

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
        wanted, width = gallery.feature_dim, self.people.row(0).feature_dim
        if width != wanted:
            raise ValueError(f"the gallery's embeddings have {wanted} numbers, those of the people {width}")
        if missing := sorted(set(self.people.names) - set(gallery.names)):
            raise ValueError(
                f"{len(missing)} people are not in the gallery, e.g. {missing[0]!r}; it must hold their fronts"
            )
        names = self.people.names
        self.person = widgets.Dropdown(options=names, value=person or names[0], description="person", **LOOK)
        self.pitch, self.yaw, self.roll = pose_sliders(self.people.pitches, self.people.yaws, (pitch, yaw, roll))
        self.keypoints = widgets.Checkbox(False, description="keypoints", **LOOK)
        self.head = Stage(width=250, turnable=True, label="the head", caption="drag the head, or use the arrow keys")
        self.side = Stage(width=150, label="the side view", caption="side view, as the recogniser sees it")
        self.front = Stage(width=150, label="the frontal view", caption="frontal view: its embedding is the target")
        self.curves = Stage(width=520, label="cosine with the own front over yaw")
        self.readout = widgets.HTML().add_class("vd-readout")
        self._last_search = lru_cache(maxsize=1)(self._search_row)
        self._axes = Figure((5.2, 2.7), DPI, layout="constrained").add_subplot()
        draw_curves(self._axes, *self._search(), len(gallery.names))
        self._live = LiveFigure(self._axes.lines)
        self._face = Figure((2.5, 2.5), DPI, layout="constrained").add_subplot()
        self._draw_face(self._face)
        self._live_face = LiveFigure([*self._face.lines, *self._face.collections])
        controls = [self.person, self.yaw, self.pitch, self.roll, self.keypoints]
        heads = [self.head, self.side, self.front] if self.people.pitches else [self.head]  # pictures lie on a grid
        super().__init__([[widgets.VBox(controls), *heads], [self.curves, self.readout]], controls)
        self.drag(self.head, self.yaw, self.pitch)
        self.redraw()

    @property
    def pose(self) -> tuple[float, float, float]:
        """Pitch, yaw and roll of the view that is shown, in degrees."""
        person, pitch, yaw, roll = self._view()
        angles = self.people.row(person, pitch, roll).angles[self.people.closest(person, pitch, yaw, roll)]
        return tuple(angles.rad2deg().round(decimals=2).tolist())

    def _view(self) -> tuple[int, float, float, float]:
        """The person's row, and pitch, yaw and roll as the sliders say."""
        return self.person.index, self.pitch.value, self.yaw.value, self.roll.value

    def _search(self) -> tuple[Search, int]:
        """The search of the person's views over yaw, and which of them is looked at."""
        person, pitch, yaw, roll = self._view()
        row = (person, pitch, roll) if self.people.pitches else (person, 0.0, 0.0)  # recorded views are all in one
        return self._last_search(*row), self.people.closest(person, pitch, yaw, roll)

    def _search_row(self, person: int, pitch: float, roll: float) -> Search:
        own = self.gallery.names.index(self.people.names[person])
        return search(self.model, self.people.row(person, pitch, roll), self.gallery.front, own)

    def _pictures(self) -> list[Image.Image]:
        """The head, with its keypoints if they are wanted, the side view and the frontal view."""
        people, view = cast(Turntable, self.people), self._view()
        head = people.picture(*view)
        if self.keypoints.value:
            draw, colours = ImageDraw.Draw(head), sns.color_palette("tab10").as_hex()
            for (x, y), colour in zip(people.picture_keypoints(*view), colours, strict=False):
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour, outline="white")
        return [head, people.crop(*view), people.crop(view[0], 0, 0)]

    def _draw_face(self, ax: Axes) -> None:
        """For people without pictures: the keypoints, joined to a face; the nearer one is, the larger its mark."""
        view = self._view()
        keypoints = self.people.row(view[0]).keypoints_3d[self.people.closest(*view)]
        x, y, z = normalise_keypoints(keypoints).T.numpy()
        if not ax.lines:
            ax.scatter(x, y, color=sns.color_palette("colorblind", 5), zorder=3)
            for _ in EDGES:
                ax.plot([], [], color="0.6", linewidth=1.5)
            ax.set(xlim=(-1.8, 1.8), ylim=(1.8, -1.8), aspect="equal", xticks=[], yticks=[])
        for line, edge in zip(ax.lines, EDGES, strict=True):
            line.set_data(x[edge], y[edge])
        ax.collections[0].set(offsets=np.column_stack((x, y)), sizes=70 * np.exp(z))

    def _draw(self) -> None:
        where = pose_text(*self.pose)
        self.head.label, self.side.label = f"the head at {where}", f"the aligned crop at {where}"
        if self.people.pitches:  # the head at once; what the model makes of it takes longer
            for stage, picture in zip((self.head, self.side, self.front), self._pictures(), strict=True):
                stage.picture = png(picture)
        else:
            self._draw_face(self._face)
            self.head.picture = self._live_face.png()
        found, at = self._search()
        draw_curves(self._axes, found, at, len(self.gallery.names))
        raw, predicted = found.own[:, at]
        self.curves.label = f"cosine with the own front over yaw; here {raw:.2f} raw, {predicted:.2f} predicted"
        self.curves.picture = self._live.png()
        self.readout.value = self._table()

    def _table(self) -> str:
        found, at = self._search()
        names = "", "cosine with own front", f"rank among {len(self.gallery.names)}", "most similar other"
        lines = ["".join(f"<th scope='col'>{name}</th>" for name in names)]
        for i, name in enumerate(("raw side view", "predicted")):
            rank, best = found.rank[i, at], html.escape(self.gallery.names[found.other[i, at]])
            word = "right" if rank == 1 else "wrong"
            lines.append(
                f"<th scope='row'>{name}</th><td>{found.own[i, at]:.3f}</td><td class='vd-{word}'>{rank} ({word})</td>"
                f"<td>{found.best[i, at]:.3f}, {best}</td>"
            )
        return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"

    def figure(self) -> Figure:
        found, at = self._search()
        fig = Figure((9.5, 5.4), DPI, layout="constrained")
        top, bottom = fig.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.15)).flat
        titles = f"{self.person.value}: {pose_text(*self.pose)}", self.side.caption, self.front.caption
        if self.people.pitches:
            for ax, picture in zip(top.subplots(1, 3), self._pictures(), strict=True):
                ax.imshow(picture)
                ax.axis("off")
        else:
            self._draw_face(top.subplots())
        for ax, title in zip(top.axes, titles, strict=False):
            ax.set_title(title, fontsize=9, parse_math=False)
        left, right = bottom.subplots(1, 2, width_ratios=(1.5, 1))
        draw_curves(left, found, at, len(self.gallery.names))
        right.axis("off")
        right.table(
            [[f"{found.own[i, at]:.3f}", f"{found.rank[i, at]}", f"{found.best[i, at]:.3f}"] for i in (0, 1)],
            rowLabels=("raw", "predicted"),
            colLabels=("cosine with\nown front", f"rank\namong {len(self.gallery.names)}", "most similar\nother"),
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
