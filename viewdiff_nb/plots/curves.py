"""The usual pictures of recognition: ROC and DET, CMC, similarities of right people and impostors, views on a map.

All take embeddings and say whose they are; bands are 95 % over people drawn again. Curves differ in colour and in
dashes, so that they are told apart in grey.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from viewdiff_nb import metrics
from viewdiff_nb.plots import COLOURS, LEGEND, LINES, MARKERS, model_style, panels
from viewdiff_nb.studies.significance import resampled_people

RESAMPLES = 200
POINTS = 200  # of a curve


def roc_and_det(models: Mapping[str, Tensor], gallery: Tensor, person: Tensor, title: str = "") -> Figure:
    """True accepts, and false rejects, over false accepts, from the lowest rate that the impostor pairs can state.

    Args:
        models: {name: (M, D) predictions}, all of the same probes.
        gallery: (P, D) enrolled, person: (M,) row of it.

    >>> front = torch.eye(8)
    >>> figure = roc_and_det({"raw": front + 0.2}, front, torch.arange(8))
    >>> [ax.get_xlabel() for ax in figure.axes]
    ['false accept rate', 'false accept rate']
    """
    weights = resampled_people(len(gallery), RESAMPLES)
    fars = np.geomspace(1 / (len(person) * (len(gallery) - 1)), 0.999, POINTS)
    fig, (roc, det) = panels(1, 2, figsize=(9.6, 4.0))
    det.set_ylim(0.5 / len(person), 1.1)  # a logarithmic axis that is empty cannot scale itself
    for i, (name, predicted) in enumerate(models.items()):
        tar, low, high = _tar_over_far(predicted, gallery, person, weights, fars)
        _band(roc, i, fars, tar, low, high, name)
        _band(det, i, fars, 1 - tar, 1 - high, 1 - low, name)
    roc.set(xscale="log", xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.01))
    det.set(xscale="log", yscale="log", xlabel="false accept rate", ylabel="false reject rate")
    roc.legend(**LEGEND, loc="lower right")
    return _titled(fig, title)


def _tar_over_far(
    predicted: Tensor, gallery: Tensor, person: Tensor, weights: Tensor, fars: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True accept rates at false accept rates, and the ends of their intervals; thresholds are those of all people."""
    scores = metrics.similarity_scores(predicted, gallery, person)
    lowest = torch.stack([metrics.lowest_threshold(scores.impostor_counts[0], far) for far in fars])
    above = torch.cat((scores.thresholds, scores.thresholds.new_full((1,), torch.inf)))
    accepted = (scores.genuine[:, None] >= above[lowest]).double()  # (M, POINTS)
    return _over_people(accepted, person, weights)


def _over_people(values: Tensor, person: Tensor, weights: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over probes of values (M, K), and the 2.5 and 97.5 % quantiles over resamples of people (B, P)."""
    people = weights.shape[1]
    total = torch.zeros(people, values.shape[1], dtype=torch.double).index_add_(0, person, values)
    views = torch.bincount(person, minlength=people).double()
    drawn = (weights @ total) / (weights @ views)[:, None]
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.double), 0).numpy()
    return values.mean(0).numpy(), low, high


def cmc(models: Mapping[str, Tensor], gallery: Tensor, person: Tensor, title: str = "", ranks: int = 20) -> Figure:
    """The share of probes whose right person is among the k most similar of the gallery (cumulative match curve).

    >>> front = torch.eye(8)
    >>> figure = cmc({"raw": front.roll(1, 0) + 0.9 * front}, front, torch.arange(8))  # everybody second
    >>> figure.axes[0].lines[0].get_ydata()[:3].tolist()
    [0.0, 1.0, 1.0]
    """
    weights, shown = resampled_people(len(gallery), RESAMPLES), torch.arange(1, min(ranks, len(gallery)) + 1)
    fig, ax = panels(figsize=(5.6, 4.0))
    for i, (name, predicted) in enumerate(models.items()):
        rank = metrics.similarity_scores(predicted, gallery, person).rank
        _band(ax, i, shown.numpy(), *_over_people((rank[:, None] <= shown).double(), person, weights), name)
    ax.set(xlabel=f"rank k among {len(gallery)} people", ylabel="right person among the first k", ylim=(0, 1.01))
    ax.legend(**LEGEND, loc="lower right")
    return _titled(fig, title)


def similarity_histograms(
    models: Mapping[str, Tensor],
    gallery: Tensor,
    person: Tensor,
    thresholds: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Cosines with the right person (filled) and with impostors (outlined), a panel a model.

    Args:
        thresholds: {words: cosine}, drawn into every panel.

    >>> front = torch.eye(8)
    >>> figure = similarity_histograms({"raw": front + 0.2, "model": front}, front, torch.arange(8), {"own": 0.5})
    >>> [ax.get_title(loc="left") for ax in figure.axes]
    ['raw', 'model']
    """
    size = 1.0 + 3.2 * len(models), 3.1
    fig, axes = panels(1, len(models), figsize=size, sharex=True, sharey=True, squeeze=False)
    own = F.one_hot(person, len(gallery)).bool()
    bins = np.linspace(-0.5, 1, 76)
    for ax, (name, predicted) in zip(axes[0], models.items(), strict=True):
        cosines = F.normalize(predicted, dim=1) @ F.normalize(gallery, dim=1).T
        ax.hist(cosines[own].numpy(), bins, density=True, color="0.6", label="right person")
        ax.hist(cosines[~own].numpy(), bins, density=True, histtype="step", color=COLOURS[3], label="impostors")
        for i, (words, level) in enumerate((thresholds or {}).items()):
            ax.axvline(level, color="0.1", linestyle=LINES[i % len(LINES)], linewidth=1, label=words)
        ax.set_title(name, loc="left", fontsize=10)
        ax.set_xlabel("cosine with an enrolled front")
    axes[0, 0].set_ylabel("density")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, **LEGEND)
    return _titled(fig, title)


def similarity_by_yaw(
    models: Mapping[str, Tensor], gallery: Tensor, person: Tensor, yaw: Tensor, title: str = "", width: float = 10.0
) -> Figure:
    """The median cosine with the own front, and with the most similar other one (thin), over yaw (M,) in degrees.

    >>> front = torch.eye(8)
    >>> figure = similarity_by_yaw({"raw": front + 0.2}, front, torch.arange(8), torch.linspace(-80, 80, 8))
    >>> figure.axes[0].get_xlabel()
    'yaw of the side view, degrees'
    """
    fig, ax = panels(figsize=(7.2, 4.0))
    number = (yaw / width).round()
    for i, (name, predicted) in enumerate(models.items()):
        cosines = F.normalize(predicted, dim=1) @ F.normalize(gallery, dim=1).T
        own = cosines.gather(1, person[:, None])[:, 0]
        other = cosines.scatter(1, person[:, None], -1.0).amax(1)
        middles = number.unique()
        for values, words, line in ((own, name, 1.8), (other, None, 0.8)):
            heights = [values[number == middle].median() for middle in middles]
            look = {"color": model_style(name, i)["color"], "linestyle": LINES[i % len(LINES)], "linewidth": line}
            ax.plot(middles * width, heights, label=words, **look)
    ax.set(xlabel="yaw of the side view, degrees", ylabel="cosine: own front; thin: the most similar other")
    ax.legend(**LEGEND)
    return _titled(fig, title)


def embedding_map(
    models: Mapping[str, Tensor], gallery: Tensor, person: Tensor, people: Sequence[int], title: str = ""
) -> Figure:
    """Views of some people (small) and their fronts (large) on the two principal components of the fronts.

    >>> front = torch.eye(8)
    >>> figure = embedding_map({"raw": front + 0.2}, front, torch.arange(8), [0, 1, 2])
    >>> len(figure.axes[0].collections)  # views and front of each
    6
    """
    fronts = F.normalize(gallery, dim=1)
    axes_of = torch.linalg.svd(fronts[list(people)] - fronts[list(people)].mean(0), full_matrices=False).Vh[:2].T
    size = 1.0 + 3.2 * len(models), 3.4
    fig, axes = panels(1, len(models), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, (name, predicted) in zip(axes[0], models.items(), strict=True):
        seen = F.normalize(predicted, dim=1) @ axes_of
        for i, one in enumerate(people):
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            ax.scatter(*seen[person == one].T.numpy(), s=16, alpha=0.7, linewidths=0, **look)
            ax.scatter(*(fronts[one] @ axes_of).numpy(), s=90, edgecolors="black", **look)
        ax.set_title(name, loc="left", fontsize=10)
        ax.set_xlabel("first principal component of the fronts")
    axes[0, 0].set_ylabel("second")
    return _titled(fig, title)


def _band(ax: Axes, i: int, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, name: str) -> None:
    look = model_style(name, i) | {"marker": ""}
    ax.plot(x, y, label=name, **look)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _titled(fig: Figure, title: str) -> Figure:
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    sns.despine(fig)
    return fig
