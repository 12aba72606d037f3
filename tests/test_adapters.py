import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_transformer import build, inputs, trained_base
from torch import nn

from viewdiff_nb.modules.adapters import (
    AdapterError,
    base_fingerprint,
    load_adapter,
    load_peft_adapter,
    save_adapter,
    save_peft_adapter,
)
from viewdiff_nb.modules.lora import lora_layers


def adapted(base, **options):
    model = build(lora=True, **options)
    model.load_base(base.state_dict())
    return model.eval()


def train_a_bit(model):
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_up, std=0.3)
    return model


def test_adapters_come_back_with_projection_and_pose(tmp_path):
    base, x = trained_base(), inputs()
    model = train_a_bit(adapted(base, projection=True))
    nn.init.normal_(model.projection.expand.weight)
    save_adapter(model, tmp_path / "a")
    other = adapted(base, projection=True)
    assert not torch.allclose(other(**x), model(**x))
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(**x), model(**x))
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    size = (tmp_path / "a/adapter_model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in base.parameters())


def test_another_base_is_refused(tmp_path):
    model = train_a_bit(adapted(trained_base()))
    save_adapter(model, tmp_path)
    stranger = adapted(trained_base())
    before = {name: value.clone() for name, value in stranger.state_dict().items()}
    with pytest.raises(AdapterError, match="belongs to another base model"):
        load_adapter(stranger, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in stranger.state_dict().items())


def test_other_layers_are_refused(tmp_path):
    base = trained_base()
    save_adapter(adapted(base, rank=2), tmp_path)
    with pytest.raises(AdapterError, match=r"8 adapted layers differ, .*'rank': 2.*'rank': 4"):
        load_adapter(adapted(base, rank=4), tmp_path)
    with pytest.raises(AdapterError, match="12 adapted layers differ"):
        load_adapter(adapted(base, rank=4, lora_targets=("attention", "feed_forward")), tmp_path)
    with pytest.raises(AdapterError, match="the model is built differently: projection"):
        load_adapter(adapted(base, rank=2, projection=True), tmp_path)
    with pytest.raises(AdapterError, match=r"built differently: blocks.0.attention.num_heads is 2, and 4 in"):
        load_adapter(adapted(base, rank=2, nhead=2), tmp_path)


def test_fingerprint_is_that_of_the_base_alone():
    base = trained_base()
    model = train_a_bit(adapted(base, projection=True))
    assert base_fingerprint(model) == base_fingerprint(base)
    with torch.no_grad():
        base.norm.bias[0] += 1e-6
    assert base_fingerprint(model) != base_fingerprint(base)
    for layer in lora_layers(model).values():
        if not layer.pose_dim:
            layer.merge()
    with pytest.raises(AdapterError, match="is merged"):
        base_fingerprint(model)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [("attention",), ("attention", "feed_forward")])
def test_peft_reads_what_we_save(tmp_path, rslora, targets):
    base, x = trained_base().eval(), inputs()
    model = train_a_bit(adapted(base, pose_dim=0, rank=3, lora_alpha=5.0, rslora=rslora, lora_targets=targets))
    save_peft_adapter(model, tmp_path)
    wanted, plain = model(**x), base(**x)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(**x), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 1e-2


def test_we_read_what_peft_saves(tmp_path):
    base, x = trained_base().eval(), inputs()
    model = adapted(base, pose_dim=0, rank=3, lora_alpha=6.0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(lora_layers(model)), init_lora_weights=False)
    theirs = get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    load_peft_adapter(model, tmp_path)
    torch.testing.assert_close(model(**x), theirs(**x), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match=r"is \(4, 6.0, False, 0\) in the model and \(3, 6.0"):
        load_peft_adapter(adapted(trained_base(), pose_dim=0, rank=4, lora_alpha=6.0), tmp_path)
    with pytest.raises(AdapterError, match="use load_peft_adapter"):
        load_adapter(model, tmp_path)


def test_peft_cannot_express_a_pose(tmp_path):
    with pytest.raises(AdapterError, match="no pose-conditioned LoRA"):
        save_peft_adapter(adapted(trained_base()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_to_save_or_to_load(tmp_path):
    with pytest.raises(AdapterError, match="no adapter"):
        save_adapter(trained_base(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model.safetensors and adapter_config.json"):
        load_adapter(adapted(trained_base()), tmp_path / "nowhere")
