"""DoRA through PEFT starts as its base, and trains nothing else."""

import torch
from test_control_rows import base, built, faces  # noqa: F401  # fixtures


def test_dora_starts_as_its_base(faces, base):  # noqa: F811
    model = built("DoRA r=8 (PEFT)", faces, base[0]).eval()
    given = {"return_residual": False} | faces.conditions()
    with torch.no_grad():
        torch.testing.assert_close(model(faces.src, **given), base[1](faces.src, **given), atol=1e-5, rtol=1e-5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    assert any("magnitude" in name for name in trained)
