import numpy as np
import pytest
import torch
from conftest import people

from viewdiff_nb import EnhancedTransformerDecoderOnly3D, LoRALinearLayer
from viewdiff_nb.plots import effective_rank, lora_spectra, projection_steps, spectra_figure

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
    _, right = spectra_figure(lora_spectra(model), rank=2).axes
    assert [text.get_text() for text in right.get_yticklabels()] == [
        f"0 attention {part}" for part in ("query", "value", "key", "out")
    ]
    assert right.patches[0].get_width() > 1 and right.patches[1].get_width() == 0  # only the query learned
    faces = people(2, views=2)
    fig = projection_steps(model, faces.where(torch.tensor([1])), yaws=(-30, 0, 30))
    panels = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    assert len(panels) == 15 and panels[10].get_ylabel() == "target yaw 30°"
