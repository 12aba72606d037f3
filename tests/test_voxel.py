"""The voxel explorer without a browser, and the cubes that it draws."""

import numpy as np
import pytest
from explorers import make_model

from viewdiff_nb import EnhancedTransformerDecoderOnly3D
from viewdiff_nb.widgets import VoxelExplorer
from viewdiff_nb.widgets.voxel import FIELD, draw_cubes


def test_voxels_of_every_quantity():
    model = make_model()
    explorer = VoxelExplorer(model, resolution=8)
    volume = explorer.volume()
    for quantity in explorer.quantity.options:
        explorer.quantity.value = quantity
        values, cut = explorer.values()
        assert cut.shape == (8, 8, 8) and values.shape[:3] == (8, 8, 8)
    explorer.quantity.value = explorer.SHARES[2]
    np.testing.assert_array_equal(explorer.values()[0], volume.shares[0, 2])
    explorer.quantity.value = explorer.OCCUPANCY  # at yaw 0 it is not turned
    np.testing.assert_allclose(explorer.values()[0], volume.occupancy[0].amax(0), atol=1e-5)


def test_threshold_and_cut_take_voxels_away():
    model = make_model()
    explorer = VoxelExplorer(model, resolution=8)
    explorer.set(quantity=explorer.DENSITY, threshold=0, cut=False)
    assert explorer.scene()[0].all()
    explorer.set(threshold=1)
    density = explorer.volume().density[0, 0].numpy()
    assert explorer.scene()[0].sum() == (density == density.max()).sum()
    explorer.set(threshold=0, cut=True, plane="depth", layer=4)
    shown = explorer.scene()[0]
    assert shown[3:].all() and not shown[:3].any()  # layers 1 to 3 lie in front of the slice
    explorer.set(plane="width")
    shown = explorer.scene()[0]
    assert shown[:, :, :4].all() and not shown[:, :, 4:].any()


def test_the_resolution_is_that_of_the_grid_and_the_model_keeps_its_own():
    model = make_model()
    explorer = VoxelExplorer(model)
    for resolution in (32, 4, 16):
        explorer.resolution.value = resolution
        assert explorer.volume().density.shape[2:] == (resolution,) * 3
        assert explorer.layer.max == resolution and explorer.layer.value == resolution // 2
        assert len(explorer.pictures.grids[0]["texts"]) == resolution**2
    assert model.projection.voxel_resolution == 8


def test_it_says_which_states_the_model_was_not_trained_in():
    explorer = VoxelExplorer(make_model())
    own = explorer.model.projection.voxel_resolution
    assert explorer.pictures.caption == "As the model uses it."
    explorer.set(target_yaw=30)
    assert "frontal pose only" in explorer.pictures.caption and "grid" not in explorer.pictures.caption
    explorer.set(target_yaw=0, resolution=4 if own != 4 else 8)
    assert explorer.pictures.caption == f"Not what the model was trained in: its grid has {own}³ voxels."
    explorer.set(resolution=own)
    assert explorer.pictures.caption == "As the model uses it."


def test_looking_from_elsewhere_leaves_the_grid():
    model = make_model()
    explorer = VoxelExplorer(model)
    grid, slices = explorer.cubes.picture, explorer.pictures.picture
    explorer.cubes.turned = [40.0, 0.0]
    assert explorer.cubes.picture != grid and explorer.pictures.picture == slices


def test_a_model_without_a_projection_has_no_voxels():
    bare = EnhancedTransformerDecoderOnly3D(d_model=32, nhead=4, num_layers=1, use_projection_layer=False)
    with pytest.raises(ValueError, match="no projection layer; build it with use_projection_layer=True"):
        VoxelExplorer(bare)


SIZE = 400
RED = np.array([1.0, 0.0, 0.0])


def grid(*voxels: tuple[int, int, int], resolution: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A grid with some red voxels (depth, y, x)."""
    shown = np.zeros((resolution,) * 3, bool)
    for voxel in voxels:
        shown[voxel] = True
    return shown, np.broadcast_to(RED, (*shown.shape, 3))


def red(picture) -> np.ndarray:
    pixels = np.asarray(picture).astype(int)
    return (pixels[..., 0] > 100) & (pixels[..., 1] < 60)


def centre(picture) -> np.ndarray:
    """Middle of the red pixels in grid units: (x right, y down)."""
    return (np.argwhere(red(picture)).mean(0)[::-1] + 0.5 - SIZE / 2) * FIELD / (SIZE / 2)


@pytest.mark.parametrize("voxel", [(0, 0, 3), (2, 1, 0), (3, 3, 3)])
def test_from_the_front_a_voxel_is_a_square_at_its_x_and_y(voxel):
    picture = draw_cubes(*grid(voxel), azimuth=0, elevation=0, size=SIZE)
    _, y, x = voxel
    np.testing.assert_allclose(centre(picture), ((2 * x + 1) / 4 - 1, (2 * y + 1) / 4 - 1), atol=0.02)
    side = 2 / 4 * SIZE / 2 / FIELD
    assert red(picture).sum() == pytest.approx(side**2, rel=0.06)


def test_the_nearer_cube_hides_the_farther_one():
    shown, _ = grid((0, 1, 1), (3, 1, 1))
    colours = np.zeros((4, 4, 4, 3))
    colours[0, ..., 0], colours[3, ..., 2] = 1, 1  # near ones red, far ones blue
    pixels = np.asarray(draw_cubes(shown, colours, azimuth=0, elevation=0, size=SIZE)).astype(int)
    behind = np.asarray(draw_cubes(shown, colours, azimuth=180, elevation=0, size=SIZE)).astype(int)

    def blue(pixels):
        return (pixels[..., 2] > 100) & (pixels[..., 0] < 60)

    # an edge that two squares share may round to the next pixel
    assert red(pixels).sum() > 2000 and blue(pixels).sum() < 100
    assert blue(behind).sum() > 2000 and red(behind).sum() < 100


def test_azimuth_turns_as_yaw_does_and_elevation_looks_down():
    near, size = grid((0, 1, 1), (0, 2, 1), (0, 1, 2), (0, 2, 2)), SIZE  # the middle of the near side
    right = centre(draw_cubes(*near, azimuth=45, elevation=0, size=size))
    left = centre(draw_cubes(*near, azimuth=-45, elevation=0, size=size))
    assert right[0] > 0.3 and left[0] < -0.3
    np.testing.assert_allclose(right, left * (-1, 1), atol=0.02)
    assert centre(draw_cubes(*near, azimuth=0, elevation=40, size=size))[1] > 0.3  # seen from above it sinks


def test_points_lie_where_their_coordinates_say():
    picture = draw_cubes(*grid(), azimuth=0, elevation=0, size=SIZE, points=np.array([[0.5, -0.25, 0.9]]))
    np.testing.assert_allclose(centre(picture), (0.5, -0.25), atol=0.03)


def test_an_empty_grid_is_a_frame():
    assert red(draw_cubes(*grid(), azimuth=-30, elevation=20, size=SIZE)).sum() == 0
