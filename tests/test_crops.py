"""Where crops are cut, against a least-squares fit by numpy and pictures whose content is known."""

import numpy as np
import pytest
from PIL import Image

from viewdiff_nb.faces.crops import (
    CENTRE,
    CROP_SIZE,
    FRONT_CROPS,
    PROFILE,
    PROFILE_CROPS,
    crop_transforms,
    crops_of,
    cut_crops,
    parse_crop,
)
from viewdiff_nb.faces.geometry import ARCFACE_TEMPLATE, KEYPOINT_NAMES, fit_similarity

TEMPLATE = np.array(ARCFACE_TEMPLATE)
POINTS = np.array([(70.0, 90.0), (121.0, 101.0), (90.0, 118.0), (66.0, 140.0), (104.0, 151.0)])  # of a turned head
RIGHT_SIDE, LEFT_SIDE = [1, 2, 4], [0, 2, 3]  # of the image: eye, nose, mouth corner


def moved(transform, points):
    return points @ transform[:, :2].T + transform[:, 2]


def least_squares(source, target):
    """The similarity (a, -b; b, a), (c, d) that numpy's own solver finds."""
    rows = [row for x, y in source for row in ((x, -y, 1, 0), (y, x, 0, 1))]
    (a, b, c, d), *_ = np.linalg.lstsq(np.array(rows), target.ravel(), rcond=None)
    return np.array([(a, -b, c), (b, a, d)])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("five@1", ("five", 1.0)),
        ("three@1.12", ("three", 1.12)),
        ("five@0.5", ("five", 0.5)),
        ("three@2", ("three", 2)),
    ],
)
def test_a_name_is_alignment_and_scale(name, wanted):
    assert parse_crop(name) == wanted


@pytest.mark.parametrize(
    "name", ["", "five", "five@", "@1", "four@1", "five@x", "five@nan", "five@0.49", "five@2.01", "five@-1", "five@1@1"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"a scale from 0.5 to 2, as in five@1; got {name!r}"):
        parse_crop(name)


def test_profiles_get_crops_of_their_own():
    assert [crops_of(yaw) for yaw in (0, 44.9, -44.9)] == [FRONT_CROPS] * 3
    assert [crops_of(yaw) for yaw in (PROFILE, -PROFILE, 90)] == [PROFILE_CROPS] * 3
    assert crops_of(60, ("three@1",)) == ("three@1",) and crops_of(30, ("three@1",)) == FRONT_CROPS


def test_five_at_1_is_the_usual_alignment():
    (found,) = crop_transforms(POINTS, 20, ["five@1"])
    np.testing.assert_allclose(found, fit_similarity(POINTS, TEMPLATE), atol=1e-12)
    np.testing.assert_allclose(found, least_squares(POINTS, TEMPLATE), atol=1e-9)


@pytest.mark.parametrize(("yaw", "rows"), [(-60, RIGHT_SIDE), (-0.01, RIGHT_SIDE), (60, LEFT_SIDE), (0.01, LEFT_SIDE)])
def test_three_brings_the_points_of_the_seen_side_as_close_as_a_similarity_can(yaw, rows):
    """A nose that points to the image's right leaves the left of the image's eyes to be seen."""
    (found,) = crop_transforms(POINTS, yaw, ["three@1"])
    np.testing.assert_allclose(found, least_squares(POINTS[rows], TEMPLATE[rows]), atol=1e-9)
    side = {KEYPOINT_NAMES[row] for row in rows} - {"nose"}
    assert side == ({"right eye", "mouth right"} if yaw < 0 else {"left eye", "mouth left"})


@pytest.mark.parametrize("yaw", [-80, 80])
def test_three_points_that_can_fit_do(yaw):
    rows = RIGHT_SIDE if yaw < 0 else LEFT_SIDE
    points = np.full((5, 2), 1e4)  # what is hidden does not matter
    points[rows] = TEMPLATE[rows] @ np.array([(0.0, 3.0), (-3.0, 0.0)]) + (400, 20)
    (found,) = crop_transforms(points, yaw, ["three@1"])
    np.testing.assert_allclose(moved(found, points[rows]), TEMPLATE[rows], atol=1e-9)


@pytest.mark.parametrize("alignment", ["five", "three"])
@pytest.mark.parametrize("scale", [0.5, 1.12, 2])
def test_scale_enlarges_about_the_centre(alignment, scale):
    usual, scaled = crop_transforms(POINTS, 70, [f"{alignment}@1", f"{alignment}@{scale}"])
    np.testing.assert_allclose(moved(scaled, POINTS) - CENTRE, scale * (moved(usual, POINTS) - CENTRE), atol=1e-9)


def test_a_larger_crop_shows_the_same():
    names = ["five@1", "three@1.3"]
    np.testing.assert_allclose(crop_transforms(POINTS, 70, names, 224), 2 * crop_transforms(POINTS, 70, names))


def dot(x, y, size=200):
    """A bright square of 7 x 7 pixels about (x, y), of three colours."""
    picture = np.zeros((size, size, 3), np.uint8)
    picture[y - 3 : y + 4, x - 3 : x + 4] = (255, 128, 64)
    return picture


def bright_place(crop):
    """(x, y) mean place of the light, pixel centres at halves, as PIL has them."""
    light = crop[..., 0].astype(float)
    places = np.arange(len(crop)) + 0.5
    return (light.sum(0) @ places) / light.sum(), (light.sum(1) @ places) / light.sum()


@pytest.mark.parametrize("name", ["five@1", "three@1.12", "three@0.8"])
@pytest.mark.parametrize("as_image", [False, True])
def test_what_is_at_a_point_goes_where_the_transform_says(name, as_image):
    transforms = crop_transforms(POINTS, 70, ["five@0.7", name])
    x, y = POINTS[2].astype(int)
    picture = Image.fromarray(dot(x, y)) if as_image else dot(x, y)
    crops = cut_crops(picture, transforms)
    assert crops.shape == (2, CROP_SIZE, CROP_SIZE, 3) and crops.dtype == np.uint8
    for crop, transform in zip(crops, transforms, strict=True):
        wanted = moved(transform, np.array([(x + 0.5, y + 0.5)]))[0]
        np.testing.assert_allclose(bright_place(crop), wanted, atol=0.1)
    brightest = crops[1].reshape(-1, 3)[crops[1][..., 0].argmax()]
    assert (np.diff(brightest.astype(int)) < -40).all()  # red, green, blue in their order


def test_the_crop_of_a_crop_is_itself():
    picture = np.random.default_rng(0).integers(0, 256, (CROP_SIZE, CROP_SIZE, 3), np.uint8)
    np.testing.assert_array_equal(cut_crops(picture, np.array([[(1.0, 0, 0), (0, 1, 0)]]))[0], picture)


def test_outside_of_the_picture_is_black():
    white = np.full((60, 60, 3), 255, np.uint8)
    (crop,) = cut_crops(white, np.array([[(1.0, 0, 40), (0, 1, 20)]]))
    assert (crop[20:80, 40:100] == 255).all()
    crop[20:80, 40:100] = 0
    assert not crop.any()


def test_another_size_is_cut():
    transforms = crop_transforms(POINTS, 70, ["five@1"], 56)
    assert cut_crops(dot(90, 118), transforms, 56).shape == (1, 56, 56, 3)


def test_points_in_one_place_are_refused():
    with pytest.raises(ValueError, match="must not all coincide"):
        crop_transforms(np.ones((5, 2)), 0, ["five@1"])
