"""A model exported to ONNX gives the same numbers."""

import onnxruntime
import onnxscript  # noqa: F401  (torch.onnx.export needs it)
import pytest
import torch
from test_behaviour import BATCH, prepare
from torch import nn


class FixedPose(nn.Module):
    """The model for one camera: LoRA merged for that pose, which is no input any more."""

    def __init__(self, module, pose):
        super().__init__()
        self.module = module
        self.register_buffer("angles", pose)
        for block in module.blocks:
            block.attention.merge(pose)

    def forward(self, src, keypoints_3d):
        return self.module(src, self.angles.expand(src.shape[0], -1), keypoints_3d)


@pytest.mark.parametrize("kind", ["free pose", "fixed pose, merged"])
def test_onnx_gives_the_same_numbers(kind, tmp_path):
    module, inputs = prepare("enhanced")
    module.eval()
    if kind == "free pose":
        given = {name: inputs[name] for name in ("src", "angles", "keypoints_3d", "pose")}
    else:
        pose = inputs["pose"][0]
        inputs["angles"] = inputs["pose"] = pose.expand(BATCH, 3).contiguous()
        wanted = module(**inputs)
        module = FixedPose(module, pose).eval()
        given = {name: inputs[name] for name in ("src", "keypoints_3d")}
        torch.testing.assert_close(module(**given), wanted, rtol=1e-4, atol=1e-4)
    batch = torch.export.Dim("batch", min=2, max=512)
    path = tmp_path / "model.onnx"
    program = torch.onnx.export(
        module, (), kwargs=given, dynamo=True, verbose=False, dynamic_shapes={name: {0: batch} for name in given}
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (BATCH, 4):  # also with another batch size than it was exported with
        part = {name: value[:rows] for name, value in given.items()}
        output = session.run(None, {name: value.numpy() for name, value in part.items()})[0]
        torch.testing.assert_close(torch.from_numpy(output), module(**part), rtol=1e-4, atol=1e-4)
