"""Static figures of what single modules do: the update that LoRA learned, and the projection step by step."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from .faces.geometry import KEYPOINT_NAMES
from .faces.views import FaceViews
from .modules.lora import lora_layers
from .modules.modes import evaluation_mode
from .modules.transformer import EnhancedTransformerDecoderOnly3D

FLAT = 1e-6  # singular values below this share of the largest are rounding


@torch.no_grad()
def lora_spectra(model: nn.Module) -> pd.DataFrame:
    """Singular values of the update s B A_x of every LoRA layer, beside those of its frozen W.

    Returns:
        one row per (layer, number): update and frozen, falling; share, the update's part of its squared norm; and
        relative, the update's Frobenius norm over that of W, the same in all rows of a layer.
    """
    rows = []
    for name, layer in lora_layers(model).items():
        update, frozen = (torch.linalg.svdvals(w.float()).cpu().numpy() for w in (layer.delta_weight(), layer.weight))
        relative = np.linalg.norm(update) / np.linalg.norm(frozen)
        energy = max((update**2).sum(), np.finfo(np.float32).tiny)
        rows += [{"layer": name, "number": i + 1, "update": update[i], "frozen": frozen[i],
                  "share": update[i] ** 2 / energy, "relative": relative} for i in range(len(update))]  # fmt: skip
    return pd.DataFrame(rows)


def effective_rank(spectrum: pd.DataFrame) -> pd.Series:
    """By layer, exp of the entropy of the update's shares: how many directions it truly uses, 0 to its rank."""
    share = spectrum["share"].where(spectrum["share"] > FLAT**2, np.nan)
    entropy = -(share * np.log(share)).groupby(spectrum["layer"], sort=False).sum()
    learned = spectrum.groupby("layer", sort=False)["update"].max() > 0
    return np.exp(entropy).where(learned, 0.0).rename("effective rank")


def spectra_figure(spectrum: pd.DataFrame, rank: int) -> Figure:
    """Singular values of update and frozen weight, and how many directions each layer's update uses."""
    fig = plt.figure(figsize=(10, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1.3, 1))
    colours = sns.color_palette("colorblind")
    shown = spectrum[spectrum["number"] <= 4 * rank]
    for i, (column, label) in enumerate((("frozen", "frozen W"), ("update", "update s B A"))):
        values = shown.groupby("number")[column]
        top = shown["frozen"].max()
        median, low, high = (np.maximum(v, top * FLAT) for v in (values.median(), values.min(), values.max()))
        left.plot(median.index, median, "os"[i] + "-", color=colours[i], label=label, markersize=4)
        left.fill_between(median.index, low, high, color=colours[i], alpha=0.2, linewidth=0)
    left.axvline(rank + 0.5, color="0.6", linestyle=":")
    left.annotate(f"rank {rank}", (rank + 0.7, left.get_ylim()[1]), fontsize=8, color="0.4", va="top")
    left.set(yscale="log", xlabel="number of the singular value", ylabel="singular value")
    left.set_title(f"median and range over {spectrum['layer'].nunique()} layers; below 1e-6 drawn there",
                   loc="left", fontsize=9)  # fmt: skip
    left.legend(frameon=False, fontsize=8.5)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    used, relative = effective_rank(spectrum), spectrum.groupby("layer", sort=False)["relative"].first()
    kinds = [name.split(".")[-1] for name in used.index]
    names = [name.removeprefix("blocks.").replace(".", " ") for name in used.index]
    palette = {kind: colours[2 + i] for i, kind in enumerate(dict.fromkeys(kinds))}
    right.barh(range(len(used)), used, color=[palette[kind] for kind in kinds])
    for i, (value, size) in enumerate(zip(used, relative, strict=True)):
        right.text(value + 0.1, i, f"{size:.1%}", va="center", fontsize=7)
    right.set_yticks(range(len(used)), names, fontsize=7)
    right.invert_yaxis()
    right.set(xlim=(0, rank + 1.2), xlabel="directions used, of the rank")
    right.set_title("by block and layer; beside it |update| / |W|", loc="left", fontsize=9)
    for ax in (left, right):
        sns.despine(ax=ax)
    plt.close(fig)  # it is returned, not shown a second time when the cell ends
    return fig


def projection_steps(model: EnhancedTransformerDecoderOnly3D, view: FaceViews, yaws: tuple[float, ...]) -> Figure:
    """The 3-D projection of one view, step by step, a row a target yaw.

    Args:
        view: one side view.
        yaws: degrees to render at.
    """
    fig = plt.figure(figsize=(11, 2.1 * len(yaws)), layout="compressed")
    axes = fig.subplots(len(yaws), 5, squeeze=False)
    titles = ("keypoints, turned", "occupancy from above, own frame", "density, middle slice", "ray weights from above",
              "light stopped")  # fmt: skip
    target = torch.tensor([[0.0, yaw, 0.0] for yaw in yaws]).deg2rad()
    each = [v.expand(len(yaws), *v.shape[1:]) for v in (view.src, view.angles, view.keypoints_3d)]
    with evaluation_mode(model):
        found = model.face_volume(*each, target)
    middle = found.density.shape[2] // 2
    colours = sns.color_palette("colorblind", len(KEYPOINT_NAMES))
    for i, row in enumerate(axes):
        points = found.keypoints[i].numpy()
        row[0].scatter(points[:, 0], points[:, 1], c=colours, s=30)
        row[0].set(xlim=(-1, 1), ylim=(1, -1), aspect="equal")
        row[0].set_ylabel(f"target yaw {yaws[i]:.0f}°", fontsize=9)
        shown = (found.occupancy[i].amax(0).amax(1), found.density[i, 0, middle], found.weights[i, 0].mean(1),
                 found.weights[i, 0].sum(0))  # fmt: skip
        for ax, values, limits in zip(row[1:], shown, (None, None, None, (0, 1)), strict=True):
            low, high = limits or (float(values.min()), float(values.max()))
            drawn = ax.imshow(values.numpy(), extent=(-1, 1, 1, -1), vmin=low, vmax=high)
            bar = fig.colorbar(drawn, ax=ax, shrink=0.75, pad=0.02)
            bar.ax.tick_params(labelsize=6)
        for ax, title in zip(row, titles, strict=True):
            ax.set(xticks=(), yticks=())
            if i == 0:
                ax.set_title(title, fontsize=9)
    plt.close(fig)
    return fig
