"""The attention explorer without a browser."""

import numpy as np
import torch
from explorers import make_model

from viewdiff_nb import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.faces.turntable import load_turntable
from viewdiff_nb.modules.transformer import MEMORY_TOKENS
from viewdiff_nb.widgets import AttentionExplorer
from viewdiff_nb.widgets.attention import scale


def test_attention_is_the_models_and_its_cells_say_so():
    model = make_model()
    explorer, turntable = AttentionExplorer(model, yaws=(0, 75)), load_turntable()
    a, b, difference = explorer.weights()
    row = turntable.row(0).where(torch.tensor([turntable.closest(0, 0, 75)]))
    with torch.no_grad():
        _, weights = model.eval()(row.src, row.angles, row.keypoints_3d, return_attention=True)
    np.testing.assert_allclose(b[1], weights[0, 1, :, 0], atol=1e-6)
    np.testing.assert_allclose(difference[0], b[0] - a[0], atol=1e-7)
    np.testing.assert_allclose([w.sum(-1) for w in (*a, *b)], 1, atol=1e-5)
    assert [len(grid["texts"]) for grid in explorer.maps.grids] == [4 * 7] * 6
    nose = 1 + MEMORY_TOKENS.index("nose")
    assert explorer.maps.grids[3]["texts"][2 * 7 + nose] == f"layer 2, head 3 → nose: {b[1][2, nose]:.3f}"


def test_other_views_are_tokens_of_cross_view_attention():
    torch.manual_seed(0)
    model = EnhancedTransformerDecoderOnly3D(
        d_model=32,
        nhead=4,
        num_layers=1,
        dim_feedforward=32,
        feature_dim=384,
        use_cross_view=True,
        n_views=3,
        use_projection_layer=False,
    )
    explorer = AttentionExplorer(model)
    a, _, _ = explorer.weights()
    assert [w.shape for w in a] == [(4, 7), (4, 3)]
    np.testing.assert_allclose(a[1].sum(-1), 1, atol=1e-5)
    assert explorer.maps.grids[1]["texts"][1].startswith("across views, after layer 0, head 1 → view 2: ")
    assert not model.cross_view["0"]._forward_pre_hooks


def test_the_largest_change_is_said():
    explorer = AttentionExplorer(make_model(), yaws=(0, 75))
    _, _, difference = explorer.weights()
    layer, head, token = np.unravel_index(np.abs(np.stack(difference)).argmax(), (2, *difference[0].shape))
    name = ("self", *MEMORY_TOKENS)[token]
    change = f"layer {layer + 1}, head {head + 1} → {name}, {difference[layer][head, token]:+.3f}"
    assert change in explorer.maps.caption
    explorer.set(yaw_b=0)
    assert explorer.maps.caption.startswith("Largest change from A to B: ") and "0.000." in explorer.maps.caption


def test_small_weights_can_be_told_apart():
    """Most weights lie about 1/7; a scale from 0 to 1 made them one colour."""
    shade = scale(0.0)
    assert shade(0.25) - shade(0.1) > 0.15 and (shade(0.0), shade(1.0)) == (0, 1)
    signed = scale(-1.0)
    assert signed(0.0) == 0.5 and signed(0.04) - signed(0.0) == signed(0.0) - signed(-0.04) > 0.09
