"""Synthetic people: anatomy, hair and skins."""

import builtins

import numpy as np
import pytest
from people.hair import (
    HairStyle,
    hair_margin,
    hair_offset,
    lattice_noise,
    random_lattice,
    sample_hair,
)
from people.heads import SKIN_BOX, HeadModel, load_anny_model
from people.meshes import connected_labels, nearest_painted, vertex_normals
from people.raster import bake_attributes
from people.render import HeadRenderer
from people.scenes import Background, Light
from people.skins import SkinPainter

LEFT_EYE, RIGHT_EYE, NOSE, MOUTH_LEFT, MOUTH_RIGHT = range(5)


@pytest.fixture(scope="module")
def model():
    return HeadModel()


@pytest.fixture(scope="module")
def painter(model):
    return SkinPainter(model, size=256)


def person_of(model, seed):
    return model.sample_person(np.random.default_rng(seed))


def hair(**changes):
    base = {
        "name": "short",
        "thickness": 1.0,
        "hairline": 6.0,
        "recession": 0.0,
        "parting": 2.0,
        "temple": -6.0,
        "nape": -7.0,
        "curl": 0.0,
        "noise_seed": 1,
    }
    return HairStyle(**(base | changes))


@pytest.mark.parametrize("seed", range(6))
def test_keypoints_lie_where_a_face_has_them(model, seed):
    points = model.keypoints(model.vertices(person_of(model, seed)))
    assert points.shape == (5, 3)
    assert points[LEFT_EYE, 0] < points[NOSE, 0] < points[RIGHT_EYE, 0]
    assert points[MOUTH_LEFT, 0] < points[NOSE, 0] < points[MOUTH_RIGHT, 0]
    assert points[:2, 1].max() < points[NOSE, 1] < points[3:, 1].min()  # y points down
    assert points[NOSE, 2] == points[:, 2].max()  # the nose is nearest to the camera
    assert 0.05 < points[RIGHT_EYE, 0] - points[LEFT_EYE, 0] < 0.08  # metres, adults have 0.054 to 0.074
    assert abs(points[LEFT_EYE, 1] - points[RIGHT_EYE, 1]) < 0.004


def test_the_pivot_is_the_origin_and_lies_behind_the_keypoints(model):
    points = model.keypoints(model.vertices(person_of(model, 0)))
    np.testing.assert_allclose(points.mean(0), (0, 0, 0.07), atol=1e-6)


def test_equal_seeds_give_equal_people_and_others_differ(model, painter):
    first, again, other = person_of(model, 5), person_of(model, 5), person_of(model, 6)
    assert first == again != other
    assert (model.vertices(first) == model.vertices(again)).all()
    assert (painter.paint(first) == painter.paint(again)).all()
    assert abs(model.vertices(first) - model.vertices(other)).max() > 0.003
    assert (painter.paint(first) != painter.paint(other)).any()


def test_normals_point_outward(model):
    mesh = model.mesh(model.canonical)
    skull = mesh.vertices[:, 1] < -0.06  # above the eye sockets, a head bulges everywhere
    assert skull.sum() > 200 and (mesh.normals * mesh.vertices).sum(1)[skull].min() > 0
    nose = np.linalg.norm(mesh.vertices - model.keypoints(model.canonical)[NOSE], axis=1).argmin()
    assert mesh.normals[nose, 2] > 0.8


def test_the_mesh_is_closed_down_to_the_shoulders(model):
    faces = model.faces
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
    edges, uses = np.unique(edges, axis=0, return_counts=True)
    rim = np.unique(edges[uses == 1])
    rim = rim[np.isin(model.part[rim], (0, 3))]  # eyeballs are open behind
    assert len(rim) and model.canonical_centimetres()[rim, 1].max() < -30


def test_the_skins_part_of_the_texture_does_not_overlap(model):
    """Baking the faces in the opposite order leaves every texel of the skin to the same face."""
    nothing = np.zeros((len(model.corner_uv), 1))
    _, owner = bake_attributes(model.corner_uv, nothing, model.corner_faces, 256)
    _, from_last = bake_attributes(model.corner_uv, nothing, model.corner_faces[::-1].copy(), 256)
    same = owner == len(model.corner_faces) - 1 - from_last
    skin = np.zeros((256, 256), bool)
    skin[:, : int(SKIN_BOX[2] * 256)] = True
    covered = skin & (owner >= 0)
    assert covered.mean() > 0.4 and same[covered].mean() > 0.999


def test_hair_changes_the_scalp_and_leaves_the_face(model):
    points = model.canonical_centimetres()
    normals = np.zeros_like(points)
    normals[:, 1] = 1
    moved = np.linalg.norm(hair_offset(hair(), points, normals), axis=1)
    face = (points[:, 1] < 3) & (points[:, 2] > -3)
    crown = points[:, 1] > 9
    assert moved[face].max() < 0.02 and moved[crown].min() > 0.4


def test_a_higher_hairline_shows_more_forehead():
    forehead = np.array([(0.0, 6.2, -1.0)])
    assert hair_margin(hair(hairline=4.4), forehead) > 0.5
    assert hair_margin(hair(hairline=8.0), forehead) < -0.5


def test_a_bald_head_without_wreath_grows_no_hair():
    points = np.random.default_rng(0).uniform(-15, 15, (200, 3))
    style = hair(name="bald", thickness=0.0)
    assert hair_margin(style, points).max() < 0
    assert abs(hair_offset(style, points, np.ones((200, 3)))).max() < 1e-6


def test_long_hair_reaches_below_the_mouth_behind_the_ears_only():
    behind, before = np.array([(5.0, -12.0, -13.0)]), np.array([(3.0, -8.0, -1.0)])
    long_hair, short_hair = hair(name="long", nape=-20.0), hair()
    assert hair_margin(long_hair, behind) > 0.5 > 0 > hair_margin(short_hair, behind)
    assert hair_margin(long_hair, before) < 0


def test_styles_are_varied():
    rng = np.random.default_rng(0)
    assert {sample_hair(rng, male).name for male in (True, False) for _ in range(100)} == {
        "bald",
        "cropped",
        "short",
        "full",
        "tied",
        "long",
    }


def test_noise_is_continuous_periodic_and_exact_at_the_lattice():
    lattice = random_lattice(np.random.default_rng(0))
    corner = np.array([(3.0, 5.0, 7.0)])
    assert lattice_noise(corner, 1.0, lattice)[0] == lattice[3, 5, 7]
    np.testing.assert_allclose(lattice_noise(corner + 16, 1.0, lattice), lattice[3, 5, 7], rtol=1e-6)
    near = lattice_noise(corner - 1e-4, 1.0, lattice)[0]
    assert abs(near - lattice[3, 5, 7]) < 1e-3


def test_lips_are_redder_than_cheeks_and_pupils_are_dark(model, painter):
    person = person_of(model, 1)
    vertices = model.vertices(person)
    renderer = HeadRenderer(model.mesh(vertices), painter.paint(person), model.keypoints(vertices))
    flat = Light(direction=(0, 0, 1), ambient=1.0, gloss=0.0)
    picture, keypoints = renderer.picture((0, 0, 0), flat, Background((0, 1, 0)), size=512)

    def colour_at(point, reach=3):
        x, y = np.rint(point[:2]).astype(int)
        return picture[y - reach : y + reach, x - reach : x + reach].reshape(-1, 3).mean(0)

    lips = colour_at((keypoints[MOUTH_LEFT] + keypoints[MOUTH_RIGHT]) / 2 + (0, 4, 0))
    cheek = colour_at((keypoints[LEFT_EYE] + keypoints[MOUTH_LEFT]) / 2 - (8, 0, 0))
    assert lips[0] / lips[1] > 1.15 * cheek[0] / cheek[1]
    for eye in (LEFT_EYE, RIGHT_EYE):
        assert colour_at(keypoints[eye], 2).mean() < 0.6 * cheek.mean()


@pytest.mark.parametrize("yaw", [-1.57, 0.0, 1.57, 3.1])
def test_no_hole_shows_the_background(model, painter, yaw):
    person = person_of(model, 3)
    vertices = model.vertices(person)
    renderer = HeadRenderer(model.mesh(vertices), painter.paint(person), model.keypoints(vertices))
    key = np.array((0, 255, 0))
    picture, _ = renderer.picture((0, yaw, 0), Light(ambient=0.9), Background((0.0, 1.0, 0.0)), size=256)
    background = (picture == key).all(-1)
    assert background[0].all() and not background[-1].all()
    reached = np.zeros_like(background)  # flood the background from the edges: what stays dry is a hole
    reached[0] = reached[:, 0] = reached[:, -1] = True
    reached &= background
    for _ in range(600):
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= background
        if (grown == reached).all():
            break
        reached = grown
    assert (background & ~reached).sum() == 0


def test_connected_labels_follow_triangles():
    faces = np.array([(0, 1, 2), (2, 3, 4), (6, 7, 8)])
    assert connected_labels(faces, 9).tolist() == [0, 0, 0, 0, 0, 5, 6, 6, 6]


def test_normals_of_a_square_are_its_axis():
    corners = np.array([(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0.0)])
    normals = vertex_normals(corners, np.array([(0, 1, 2), (0, 2, 3)]))
    np.testing.assert_allclose(normals, np.tile((0, 0, 1.0), (4, 1)), atol=1e-9)


def test_the_margin_of_a_part_takes_its_colour():
    painted = np.zeros((7, 7), bool)
    painted[3, 3] = True
    empty, source = nearest_painted(painted, 1)
    assert set(source) == {24} and 23 in empty and 0 not in empty


def test_a_missing_anny_names_the_extra(monkeypatch):
    import_module = builtins.__import__

    def without_anny(name, *arguments, **options):
        if name == "anny":
            raise ImportError("no anny")
        return import_module(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_anny)
    with pytest.raises(ImportError, match=r'pip install "\.\[heads\]"'):
        load_anny_model()


def test_a_tiny_texture_is_refused(model):
    with pytest.raises(ValueError, match="64 texels or more, got 16"):
        SkinPainter(model, size=16)
