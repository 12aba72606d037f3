"""Adapters in PEFT's format, read and written by PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_adapters import adapted, save_over_another, train_a_bit
from test_transformer import inputs, trained_base

from viewdiff_nb.modules.adapters import AdapterError, load_adapter, load_peft_adapter, save_peft_adapter
from viewdiff_nb.modules.lora import lora_layers


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
    with pytest.raises(AdapterError, match=r"'rank': 3.* in .* and .*'rank': 4.* in the model"):
        load_peft_adapter(adapted(trained_base(), pose_dim=0, rank=4, lora_alpha=6.0), tmp_path)
    with pytest.raises(AdapterError, match="use load_peft_adapter"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("number", range(5))
def test_after_a_killed_save_peft_never_takes_the_weights_of_one_with_the_alpha_of_the_other(
    tmp_path, monkeypatch, number
):
    base, x = trained_base().eval(), inputs()
    models = save_over_another(save_peft_adapter, base, tmp_path, monkeypatch, number)
    wanted = models[3.0 if number < 3 else 30.0](**x)
    if (tmp_path / "adapter_config.json").exists():  # PEFT reads nothing else
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(theirs(**x), wanted, rtol=1e-5, atol=1e-5)
