"""Pictures of tables, modules and grids: what they show is known by construction."""

import itertools
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import people

from viewdiff_nb import EnhancedTransformerDecoderOnly3D, LoRALinearLayer
from viewdiff_nb.plots import (
    BIN_NAMES,
    effective_rank,
    lora_spectra,
    model_style,
    projection_steps,
    recognition_curves,
    retention,
    save_table,
    spectra_figure,
    write_all,
)

MODEL = {"d_model": 32, "nhead": 4, "num_layers": 1, "dim_feedforward": 32, "voxel_resolution": 4}


def test_singular_values_are_those_of_the_update():
    layer = LoRALinearLayer(6, 5, rank=2, alpha=4.0)
    with torch.no_grad():  # s B A = 2 diag(3, 1): singular values 6 and 2
        layer.lora_down.copy_(torch.eye(6)[:2])
        layer.lora_up.copy_(torch.eye(5)[:, :2] * torch.tensor([3.0, 1.0]))
        layer.weight.copy_(torch.eye(5, 6))
    spectrum = lora_spectra(torch.nn.ModuleDict({"only": layer}))
    np.testing.assert_allclose(spectrum["update"], [6, 2, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(spectrum["frozen"], 1)
    np.testing.assert_allclose(spectrum["share"], [0.9, 0.1, 0, 0, 0], atol=1e-6)
    assert spectrum["relative"].iloc[0] == pytest.approx(np.sqrt(40 / 5))
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert effective_rank(spectrum)["only"] == pytest.approx(np.exp(entropy))


def test_equal_directions_count_as_many_as_they_are():
    layer = LoRALinearLayer(6, 6, rank=3)
    with torch.no_grad():
        layer.lora_down.copy_(torch.eye(6)[:3])
        layer.lora_up.copy_(torch.eye(6)[:, :3])
    assert effective_rank(lora_spectra(torch.nn.ModuleDict({"only": layer})))["only"] == pytest.approx(3, rel=1e-5)


def test_figures_show_every_layer_and_step():
    model = EnhancedTransformerDecoderOnly3D(**MODEL, rank=2)
    torch.nn.init.normal_(model.blocks[0].attention.query.lora_up)
    _, used, size = spectra_figure(lora_spectra(model), rank=2).axes
    assert [text.get_text() for text in used.get_yticklabels()] == [
        f"layer 1 attention {part}" for part in ("query", "value", "key", "out")
    ]
    assert used.patches[0].get_width() > 1 and used.patches[1].get_width() == 0  # only the query learned
    assert size.patches[0].get_width() > 0 and size.patches[1].get_width() == 0
    faces = people(2, views=2)
    fig = projection_steps(model, faces.where(torch.tensor([1])), yaws=(-30, 0, 30))
    panels = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    assert len(panels) == 15 and panels[10].get_ylabel() == "target yaw 30°"


def test_a_table_is_saved_as_csv_and_picture(tmp_path):
    table = pd.DataFrame({"rank-1": ["0.500 ± 0.028"], "guide: rank-1": ["–"]}, index=pd.Index(["base"], name="model"))
    save_table(table, "t", tmp_path / "new", "Title", "a note")
    assert pd.read_csv(tmp_path / "new/t.csv", index_col=0).loc["base", "rank-1"] == "0.500 ± 0.028"
    assert r"base & 0.500 $\pm$ 0.028 & -- \\" in (tmp_path / "new/t.tex").read_text(encoding="utf-8")
    assert (tmp_path / "new/t.png").read_bytes()[:4] == b"\x89PNG"
    plt.close("all")


def test_recognition_curves_name_every_model():
    rows = [(model, yaw, 0.5, 0.1) for model in ("full fine-tuning", "LoRA r=8") for yaw in BIN_NAMES]
    figure = recognition_curves(pd.DataFrame(rows, columns=["model", "yaw", "mean", "half"]), "rank-1", "title")
    words = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert words == ["full fine-tuning", "LoRA r=8"]
    lines = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [list(range(5))] * 2  # on the ticks
    assert lines[1].get_color() == model_style("LoRA", 0)["color"] == model_style("LoRA r=8", 5)["color"]
    plt.close(figure)


def made(rank_gain=(0.0, 0.05), noise=0.0, seeds=5, lambda_gain=0.0) -> pd.DataFrame:
    """A grid of ranks 4 and 8: TAR .9 + gains + a seed's own level + noise that differs between cells."""
    rows = []
    for (i, rank), (j, voxels), (k, weight), seed in itertools.product(
        enumerate((4, 8)), enumerate((4, 8)), enumerate((0.05, 0.1, 0.2)), range(seeds)
    ):
        tar = 0.9 + rank_gain[i] + 0.01 * seed + noise * ((7 * i + 5 * j + 3 * k + 11 * seed) % 5 - 2)
        row = {
            "rank": rank,
            "voxel_resolution": voxels,
            "lambda_prior": weight,
            "seed": seed,
            "trainable": 1000 * rank,
            "memory_mb": float(voxels**2),
            "train_loss": [5.0 - 0.1 * rank, 4.0 - 0.1 * rank],
            "val_tar": tar,
            "test_tar": tar,
            "test_tar_0-45": tar + lambda_gain * k,
            "test_tar_45-90": tar,
        }
        rows.append(row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seeds", [1, 5])
def test_every_picture_is_written_twice_and_says_what_it_shows(tmp_path, seeds):
    cells = made(noise=0.001, seeds=seeds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = write_all(cells, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    titles = {name: fig.axes[0].get_title("left") for name, fig in figures.items()}
    assert titles["ablation_heat_map"] == "Enough: rank 8 with 4³ voxels" or seeds == 1
    again = {p.name: p.read_bytes() for p in tmp_path.glob("*.svg")}
    write_all(cells, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.svg")} == again


def test_the_weight_of_the_prior_is_told_by_what_it_keeps():
    cells = made(lambda_gain=0.01)
    cells.loc[cells["lambda_prior"] == 0.2, "test_tar_0-45"] += 1e-6 * cells["seed"]  # a spread to judge by
    assert "Lambda 0.2 keeps +0.020" in retention(cells).axes[0].get_title("left")
    plt.close("all")
