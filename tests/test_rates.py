import matplotlib.pyplot as plt
import pandas as pd

from viewdiff_nb.plots.rates import rates_figure


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
