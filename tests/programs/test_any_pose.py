"""The control of the target pose."""

import any_pose
import torch

from viewdiff_nb.modules.projection import LightweightFaceProjectionLayer


def test_the_plain_layer_is_as_large_as_the_projection_and_reads_the_target():
    projection = LightweightFaceProjectionLayer(64, 5, 8)
    plain = any_pose.PlainProjectionToAnyPose(projection)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (plain, projection)]
    assert 0.98 * sizes[1] <= sizes[0] <= sizes[1]
    torch.nn.init.normal_(plain.expand.weight)
    given = torch.randn(4, 64), torch.randn(4, 5, 3)
    pose = torch.randn(4, 3)
    frontal = plain(*given, source_pose=pose)
    torch.testing.assert_close(plain(*given, torch.zeros(4, 3), pose), frontal)
    assert not torch.allclose(plain(*given, pose, pose), frontal)
