"""One table of cases, one set of expectations: every module, dtype, device, mode and kind of input."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from viewdiff_nb import (
    CrossViewAttention,
    EnhancedTransformerDecoderOnly3D,
    LightweightFaceProjectionLayer,
    LoRALinearLayer,
    PoseConditionedLoRAAttention,
)
from viewdiff_nb.modules.baselines import DREAM, MLP, MeanFace, RawEmbedding

WIDTH, BATCH = 32, 6
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
TF32 = 1e-3  # cuDNN's convolutions round float32 inputs to TF32 by default


def features(*shape):
    return torch.randn(BATCH, *shape)


def face():
    angles = torch.rand(BATCH, 3) - 0.5
    return {"angles": angles, "keypoints_3d": 30 * torch.randn(BATCH, 5, 3), "pose": angles}


def model(**options):
    sizes = {"d_model": WIDTH, "nhead": 4, "num_layers": 2, "dim_feedforward": 48, "voxel_resolution": 8, "n_views": 3}
    flags = {"use_lora_attention": False, "use_projection_layer": False}
    return EnhancedTransformerDecoderOnly3D(**sizes | flags | options)


def sample(**extra):
    return lambda: {"src": features(WIDTH), **face(), **extra}


ALL = {"use_lora_attention": True, "use_projection_layer": True}
POSE = {"pose": torch.rand(BATCH, 3)}
POINTS = {
    "keypoints_3d": torch.randn(BATCH, 5, 3),
    "target_pose": torch.rand(BATCH, 3),
    "source_pose": torch.rand(BATCH, 3),
}
CASES = {  # name: (module, inputs)
    "lora (B, D)": (lambda: LoRALinearLayer(WIDTH, 24, 4), lambda: {"x": features(WIDTH)}),
    "lora (B, T, D)": (lambda: LoRALinearLayer(WIDTH, 24, 4), lambda: {"x": features(7, WIDTH)}),
    "lora with pose": (lambda: LoRALinearLayer(WIDTH, 24, 4, pose_dim=3), lambda: {"x": features(WIDTH)} | POSE),
    "attention (B, D)": (
        lambda: PoseConditionedLoRAAttention(WIDTH, num_heads=4),
        lambda: {"features": features(WIDTH), "memory": features(6, WIDTH)} | POSE,
    ),
    "attention (B, T, D)": (
        lambda: PoseConditionedLoRAAttention(WIDTH, num_heads=4),
        lambda: {"features": features(7, WIDTH)} | POSE,
    ),
    "plain attention": (
        lambda: PoseConditionedLoRAAttention(WIDTH, num_heads=4, rank=0),
        lambda: {"features": features(WIDTH), "memory": features(6, WIDTH)},
    ),
    "projection (B, C)": (
        lambda: LightweightFaceProjectionLayer(WIDTH, voxel_resolution=8),
        lambda: {"features": features(WIDTH)} | POINTS,
    ),
    "projection (B, C, H, W)": (
        lambda: LightweightFaceProjectionLayer(WIDTH, voxel_resolution=8),
        lambda: {"features": features(WIDTH, 5, 5)} | POINTS,
    ),
    "cross-view (BV, D)": (lambda: CrossViewAttention(WIDTH, 4, 3), lambda: {"features": features(WIDTH)}),
    "cross-view (BV, T, D)": (lambda: CrossViewAttention(WIDTH, 4, 3), lambda: {"features": features(2, WIDTH)}),
    "cross-view, missing": (
        lambda: CrossViewAttention(WIDTH, 4, 3),
        lambda: {"features": features(WIDTH), "mask": torch.tensor([True, True, False] * 2)},
    ),
    "base": (model, sample()),
    "enhanced": (lambda: model(**ALL), sample()),
    "enhanced, all": (lambda: model(**ALL, use_cross_view=True, lora_targets=("attention", "feed_forward")), sample()),
    "MLP": (lambda: MLP(WIDTH, 48), sample()),
    "DREAM": (lambda: DREAM(WIDTH), sample()),
    "mean face": (lambda: MeanFace(torch.randn(4, WIDTH)), sample()),
    "raw": (RawEmbedding, sample()),
}
FIRST = {"x", "features", "src"}


def prepare(case, device="cpu", dtype=torch.float32):
    make, inputs = CASES[case]
    torch.manual_seed(1)
    module, given = make(), inputs()
    for parameter in module.parameters():  # trained, so that nothing is hidden behind a zero
        nn.init.normal_(parameter, std=0.2)

    def move(value):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    return module.to(device, dtype), {name: move(value) for name, value in given.items()}


def first(inputs):
    return next(value for name, value in inputs.items() if name in FIRST)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_shape_dtype_device_gradients_and_agreement_with_double_precision(case, dtype, device):
    reference, exact = prepare(case, dtype=torch.float64)
    wanted = reference.eval()(**exact)
    module, inputs = prepare(case, device, dtype)
    for training in (False, True):
        output = module.train(training)(**inputs)
        assert output.shape == wanted.shape and output.dtype == dtype and output.device.type == device
        assert output.isfinite().all()
        trainable = [p for p in module.parameters() if p.requires_grad]
        if trainable:
            module.zero_grad()
            output.float().square().sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
            assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    output = module.eval()(**inputs)
    assert torch.equal(output, module(**inputs))  # no randomness in evaluation
    scale = max(wanted.norm(), first(exact).norm())  # a residual may be the small difference of large numbers
    tolerance = TF32 if (device, dtype) == ("cuda", torch.float32) else TOLERANCE[dtype]
    assert (output.double().cpu() - wanted).norm() / scale < tolerance


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("cross-view") and c != "enhanced, all"])
def test_samples_do_not_influence_each_other(case):
    module, inputs = prepare(case, dtype=torch.float64)
    alone = module.eval()(**{name: value[2:3] for name, value in inputs.items()})
    torch.testing.assert_close(module(**inputs)[2:3], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_autocast_agrees_with_full_precision(case, device):
    module, inputs = prepare(case, device)
    wanted = module.eval()(**inputs)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype):
            output = module(**inputs)
        error = (output.float() - wanted).norm() / max(wanted.norm(), first(inputs).norm())
        assert error < (0.1 if dtype is torch.bfloat16 else 0.02), dtype


@pytest.mark.parametrize("case", ["enhanced", "enhanced, all", "projection (B, C, H, W)"])
def test_captured_whole_as_a_graph(case):
    module, inputs = prepare(case)
    compiled = torch.compile(module.eval(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), module(**inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_code_agrees(device):
    """Needs a C++ compiler on a CPU."""
    module, inputs = prepare("enhanced", device)
    compiled = torch.compile(module.eval())
    torch.testing.assert_close(compiled(**inputs), module(**inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap has no rule for CPU flash attention
def test_functional_transforms_agree_with_autograd():
    """Gradients of each sample by vmap(grad), summed, are the gradient of the batch."""
    module, inputs = prepare("enhanced", dtype=torch.float64)
    module.eval()
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def loss(parameters, one):
        output = functional_call(module, parameters, kwargs={name: value[None] for name, value in one.items()})
        return output.square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
    module(**inputs).square().sum().backward()
    for name, gradient in each.items():
        torch.testing.assert_close(gradient.sum(0), module.get_parameter(name).grad, rtol=1e-7, atol=1e-9)
