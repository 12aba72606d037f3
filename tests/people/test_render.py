"""The renderer against facts that need no renderer: rotations, symmetry, occlusion, known similarities."""

import math

import numpy as np
import pytest
import torch
from people.raster import bake_attributes
from people.render import (
    CAMERA_DISTANCE,
    PHOTO_FIELD,
    PHOTO_SIZE,
    HeadRenderer,
    Mesh,
    project,
)
from people.scenes import Background, Light, sample_background, sample_light

from viewdiff_nb.faces.crops import crop_transforms
from viewdiff_nb.faces.geometry import ARCFACE_TEMPLATE, fit_similarity, rotation_matrix

BLACK = Background((0.0, 0.0, 0.0))
FRONTAL_LIGHT = Light(direction=(0, 0, 1), ambient=0.5, gloss=0.0)
RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)
# A face 6 cm between the eyes, symmetric, the pivot 7 cm behind it.
KEYPOINTS = np.array(
    [(-0.03, -0.03, 0.06), (0.03, -0.03, 0.06), (0.0, 0.0, 0.09), (-0.025, 0.04, 0.065), (0.025, 0.04, 0.065)]
)


def square(centre, half, colour_index):
    """A square facing the camera: 4 vertices, normals toward the camera, the texture column of one colour."""
    x, y, z = centre
    corners = [
        (x - half, y - half, z),
        (x + half, y - half, z),
        (x + half, y + half, z),
        (x - half, y + half, z),
    ]
    uv = np.full((4, 2), ((colour_index + 0.5) / 3, 0.5))
    return np.array(corners), np.tile((0.0, 0.0, 1.0), (4, 1)), uv, np.array([(0, 1, 2), (0, 2, 3)])


def renderer_of(*squares):
    """A `HeadRenderer` of several squares, in colours red, green, blue by index."""
    parts, offset = [], 0
    for vertices, normals, uv, faces in squares:
        parts.append((vertices, normals, uv, faces + offset))
        offset += len(vertices)
    mesh = Mesh(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    texture = np.repeat(np.repeat(np.array([[RED, GREEN, BLUE]], np.uint8), 8, 1), 24, 0)
    return HeadRenderer(mesh, texture, KEYPOINTS)


def weight_centre(mask):
    """(x, y) mean position of the true pixels, pixel centres at +0.5."""
    rows, columns = np.nonzero(mask)
    return columns.mean() + 0.5, rows.mean() + 0.5


def coloured(picture, channel):
    """Where one channel dominates."""
    others = [index for index in range(3) if index != channel]
    return (picture[..., channel] > 60) & (picture[..., channel] > 2 * picture[..., others].max(-1))


@pytest.mark.parametrize(
    ("angles", "axis", "sign"),
    [((0, 0.5, 0), 0, 1), ((0, -0.5, 0), 0, -1), ((0.5, 0, 0), 1, -1), ((-0.5, 0, 0), 1, 1)],
)
def test_the_nose_moves_where_the_conventions_say(angles, axis, sign):
    renderer = renderer_of(square(KEYPOINTS[2], 0.012, 0))
    picture, keypoints = renderer.picture(angles, FRONTAL_LIGHT, BLACK)
    seen = weight_centre(coloured(picture, 0))
    assert np.sign(seen[axis] - PHOTO_SIZE / 2) == sign
    assert abs(seen[1 - axis] - PHOTO_SIZE / 2) < 1
    np.testing.assert_allclose(seen, keypoints[2, :2], atol=1.0)


def test_positive_roll_is_clockwise():
    renderer = renderer_of(square((0, -0.08, 0.0), 0.01, 0))  # above the pivot
    picture, _ = renderer.picture((0, 0, math.radians(30)), FRONTAL_LIGHT, BLACK)
    x, y = weight_centre(coloured(picture, 0))
    assert x > PHOTO_SIZE / 2 and y < PHOTO_SIZE / 2


def test_keypoints_are_rotated_face_points_times_the_perspective_scale():
    angles = np.array([0.2, -0.9, 0.1])
    seen, distance = project(KEYPOINTS, angles)
    turned = KEYPOINTS @ rotation_matrix(torch.tensor(angles)).numpy().T
    scale = (PHOTO_SIZE / PHOTO_FIELD) * CAMERA_DISTANCE / (CAMERA_DISTANCE - turned[:, 2])
    np.testing.assert_allclose(seen - (PHOTO_SIZE / 2, PHOTO_SIZE / 2, 0), turned * scale[:, None], rtol=1e-12)
    np.testing.assert_allclose(distance, CAMERA_DISTANCE - turned[:, 2])


def test_the_nearer_surface_hides_the_farther_one_in_either_order():
    near, far = square((0, 0, 0.05), 0.02, 0), square((0, 0, -0.05), 0.04, 1)
    for order in ((near, far), (far, near)):
        picture, _ = renderer_of(*order).picture((0, 0, 0), FRONTAL_LIGHT, BLACK)
        middle = PHOTO_SIZE // 2
        assert coloured(picture, 0)[middle, middle]
        assert coloured(picture, 1)[middle, middle + 18]  # 18 px = 28 mm: beyond the near square only
    behind, _ = renderer_of(near, far).picture((0, math.pi, 0), FRONTAL_LIGHT, BLACK)
    assert not coloured(behind, 0).any()


def test_a_square_covers_the_pixels_that_geometry_predicts():
    picture, _ = renderer_of(square((0, 0, 0), 0.05, 0)).picture((0, 0, 0), FRONTAL_LIGHT, BLACK)
    side = 0.10 / PHOTO_FIELD * PHOTO_SIZE
    assert abs(coloured(picture, 0).sum() - side**2) <= 2 * side


def test_mirrored_yaw_gives_a_mirrored_picture():
    squares = [square(KEYPOINTS[2], 0.01, 0), square((0, 0, 0.05), 0.05, 1)]  # symmetric about x = 0
    renderer = renderer_of(*squares)
    right, right_points = renderer.picture((0.1, 0.6, 0.05), FRONTAL_LIGHT, BLACK)
    left, left_points = renderer.picture((0.1, -0.6, -0.05), FRONTAL_LIGHT, BLACK)
    differs = (right[:, ::-1].astype(int) - left).astype(bool).any(-1)
    assert differs.mean() < 0.001  # pixels whose centre lies on an edge may fall to either side
    swapped = left_points[[1, 0, 2, 4, 3]] * (-1, 1, 1) + (PHOTO_SIZE, 0, 0)
    np.testing.assert_allclose(right_points, swapped, atol=1e-9)


def test_a_crop_puts_the_features_where_the_template_wants_them():
    marks = [square(point, 0.004, 0) for point in KEYPOINTS]
    (crop,), keypoints = renderer_of(*marks).crops((0, 0, 0.3), light=FRONTAL_LIGHT, background=BLACK)
    assert crop.shape == (112, 112, 3) and crop.dtype == np.uint8
    similarity = fit_similarity(keypoints[:, :2], np.array(ARCFACE_TEMPLATE))
    wanted = keypoints[:, :2] @ similarity[:, :2].T + similarity[:, 2]
    for x, y in wanted:
        assert coloured(crop, 0)[int(y), int(x)]
    assert abs(wanted - np.array(ARCFACE_TEMPLATE)).max() < 6  # roll is undone, proportions stay the face's own


def test_several_crops_show_one_scene_as_their_names_say():
    marks = [square(point, 0.004, 0) for point in KEYPOINTS]
    names, angles = ["five@1", "three@1", "five@1.3"], (0, 0.4, 0)
    crops, keypoints = renderer_of(*marks).crops(angles, names, FRONTAL_LIGHT, BLACK)
    assert crops.shape == (3, 112, 112, 3)
    transforms = crop_transforms(keypoints[:, :2], angles[1], names)
    for crop, transform in zip(crops, transforms, strict=True):
        for x, y in keypoints[:, :2] @ transform[:, :2].T + transform[:, 2]:
            assert coloured(crop, 0)[int(y), int(x)]
    (alone,), _ = renderer_of(*marks).crops(angles, names[1:2], FRONTAL_LIGHT, BLACK)
    np.testing.assert_array_equal(crops[1], alone)


def test_jitter_moves_alignment_and_keypoints():
    renderer = renderer_of(square((0, 0, 0.05), 0.05, 0))
    still, exact = renderer.crops((0, 0.2, 0))
    moved, shifted = renderer.crops((0, 0.2, 0), jitter=np.tile((3.0, -2.0, 1.0), (5, 1)))
    np.testing.assert_allclose(shifted - exact, np.tile((3.0, -2.0, 1.0), (5, 1)))
    assert (still != moved).any()


def test_light_comes_from_its_direction():
    ball_like = square((0, 0, 0), 0.05, 0)
    ball_like[1][:] = (0.6, 0.0, 0.8)  # a surface that faces right
    renderer = renderer_of(ball_like)
    middle = PHOTO_SIZE // 2
    lit, _ = renderer.picture((0, 0, 0), Light(direction=(1, 0, 0.3), ambient=0.2), BLACK)
    unlit, _ = renderer.picture((0, 0, 0), Light(direction=(-1, 0, 0.3), ambient=0.2), BLACK)
    assert lit[middle, middle, 0] > 1.5 * unlit[middle, middle, 0]


def test_equal_inputs_give_equal_bytes():
    scenes = [(sample_light(np.random.default_rng(3)), sample_background(np.random.default_rng(4))) for _ in range(2)]
    renderer = renderer_of(square((0, 0, 0.05), 0.05, 2))
    first, second = (renderer.crops((0.1, 0.2, 0.3), ["five@1", "three@1"], *scene)[0] for scene in scenes)
    assert (first == second).all()


def test_baking_interpolates_linearly_and_leaves_the_rest_empty():
    uv = np.array([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
    values, owner = bake_attributes(uv, uv.copy(), np.array([(0, 1, 2)]), 8)
    assert owner[0, 0] == 0 and owner[7, 7] == -1
    np.testing.assert_allclose(values[2, 3], (3.5 / 8, 2.5 / 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.crops((0, 0)), r"angles must have shape \(3,\), got \(2,\)"),
        (lambda r: r.crops((0, math.nan, 0)), "angles holds a value that is not finite"),
        (lambda r: r.crops((0, 90, 0)), r"angles must lie within -3\.14159.*got 0\.\.90"),
        (
            lambda r: r.crops((0, 0, 0), jitter=np.zeros((5, 2))),
            r"jitter must have shape \(5, 3\), got \(5, 2\)",
        ),
        (lambda r: r.crops((0, 0, 0), ["five"]), "a crop is named by five or three, .* got 'five'"),
        (lambda r: r.crops((0, 0, 0), size=4), "size must be a whole number of pixels from 8 to 2048, got 4"),
        (lambda r: r.picture((0, 0, 0), field=0), "field must lie within 0.05..5.0, got 0..0"),
        (
            lambda r: HeadRenderer(r.mesh, np.zeros((4, 5, 3), np.uint8), KEYPOINTS),
            r"square uint8 RGB.*\(4, 5, 3\)",
        ),
        (lambda r: Light(direction=(0, 0, 0)), "light direction must not be zero"),
        (lambda r: Background(colour=(0, 0, 2)), r"background colour must lie within 0\.\.1, got 0\.\.2"),
        (lambda r: fit_similarity(np.ones((3, 2)), np.ones((3, 2))), "source points must not all coincide"),
    ],
)
def test_errors_name_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(renderer_of(square((0, 0, 0), 0.05, 0)))
