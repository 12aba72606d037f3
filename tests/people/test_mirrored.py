"""`mirror.mirrored` against a head that is mirrored itself."""

import numpy as np
import torch
from mirror import mirrored
from people.build import Studio
from people.render import HeadRenderer, Mesh, project
from people.scenes import Light

from viewdiff_nb.faces import FaceViews
from viewdiff_nb.faces.geometry import normalise_keypoints


def test_mirrored_views_are_those_of_the_mirrored_head():
    """A real head, its mirror image in three dimensions, and what both look like."""
    renderer = Studio().renderer(0, 3)
    flip = np.array([-1.0, 1.0, 1.0])
    mesh = Mesh(renderer.mesh.vertices * flip, renderer.mesh.normals * flip, renderer.mesh.uv, renderer.mesh.faces)
    texture = np.zeros((2, 2, 3), np.uint8)
    other = HeadRenderer(mesh, texture, (renderer.keypoints * flip)[[1, 0, 2, 4, 3]])
    other._texture = renderer._texture
    angles = torch.tensor([(0.1, 0.7, 0.2), (-0.2, -1.3, 0.1), (0.05, 0.0, -0.3)])
    embed = np.random.default_rng(0).standard_normal((64 * 64 * 3, 4))  # any network

    def look(renderer, angles, light):
        pictures, points = zip(*(renderer.picture(a.numpy(), Light(light), size=64) for a in angles), strict=True)
        flat = np.stack(pictures).reshape(len(angles), -1), np.stack(pictures)[:, :, ::-1].reshape(len(angles), -1)
        halves = [torch.nn.functional.normalize(torch.from_numpy(pixels / 255 @ embed), dim=1) for pixels in flat]
        return torch.cat(halves, 1).float() / 2**0.5, torch.from_numpy(np.stack(points)).float()

    src, points = look(renderer, angles, (0.3, -0.3, 1.0))
    faces = mirrored(FaceViews(("a",), src[:1], src, points, angles, torch.zeros(3, dtype=torch.long)))
    wanted, wanted_points = look(other, faces.angles, (-0.3, -0.3, 1.0))
    torch.testing.assert_close(
        normalise_keypoints(faces.keypoints_3d), normalise_keypoints(wanted_points), atol=1e-5, rtol=0
    )
    projected = np.stack([project(other.keypoints, a.numpy())[0] for a in faces.angles])
    torch.testing.assert_close(
        normalise_keypoints(faces.keypoints_3d),
        normalise_keypoints(torch.from_numpy(projected).float()),
        atol=1e-5,
        rtol=0,
    )
    assert (faces.src - wanted).norm(dim=1).max() < 1e-3 and (src - wanted).norm(dim=1).min() > 0.04
