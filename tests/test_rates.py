import matplotlib.pyplot as plt
import pandas as pd
import pytest

from viewdiff_nb.plots.rates import efficiency_figure, rates_figure


def test_every_model_has_a_point_and_the_first_a_line():
    rows = [(m, r, 90.0 + i, 0.5) for r in ("FP acc %", "AUC %") for i, m in enumerate(("raw", "a", "b"))]
    figure = rates_figure(pd.DataFrame(rows, columns=["model", "rate", "mean", "half"]), "title", "note")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["raw", "a", "b"]
    for ax, words in ((left, "FP acc %"), (right, "AUC %")):
        points, _, _ = ax.containers[0]
        assert list(points.get_xdata()) == [90.0, 91.0, 92.0] and list(points.get_ydata()) == [0, 1, 2]
        assert ax.get_xlabel() == words and list(ax.lines[-1].get_xdata()) == [90.0, 90.0]
    assert left.yaxis_inverted()
    plt.close(figure)


def test_curves_over_people_and_a_line_for_raw():
    rows = [(way, n, "AUC %", 90.0 + n / 100, 0.5) for way in ("LoRA", "ridge") for n in (10, 100)]
    rows += [("deep", 10, "AUC %", 20.0, 0.5), ("deep", 100, "AUC %", 89.0, 0.5), ("raw", 0, "AUC %", 90.0, 0.5)]
    figure = efficiency_figure(pd.DataFrame(rows, columns=["way", "people", "rate", "mean", "half"]), "title", "note")
    (ax,) = figure.axes
    lora, ridge, deep, raw = ax.lines
    assert list(lora.get_xdata()) == [10, 100] and list(ridge.get_ydata()) == [90.1, 91.0] and len(ax.collections) == 3
    assert list(raw.get_ydata()) == [90.0, 90.0] and [text.get_text() for text in figure.legends[0].texts][-1] == "raw"
    low, high = ax.get_ylim()
    assert low == pytest.approx(90 - 2 * 1.5) and high > 91.5 and deep.get_ydata()[0] < low
    plt.close(figure)
