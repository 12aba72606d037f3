import contextlib
import json
import os
import resource
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
    with pytest.raises(AdapterError, match=r"settings differ, e.g. .projection.*: None in .* and 8 in the model"):
        load_adapter(adapted(base, rank=2, projection=True), tmp_path)
    with pytest.raises(
        AdapterError, match=r"settings differ, e.g. 'blocks.0.attention.num_heads': 4 in .* and 2 in the model"
    ):
        load_adapter(adapted(base, rank=2, nhead=2), tmp_path)


def test_fingerprint_is_that_of_the_base_alone():
    base = trained_base()
    model = train_a_bit(adapted(base, projection=True))
    assert base_fingerprint(model) == base_fingerprint(base)
    for layer in lora_layers(model).values():
        if not layer.pose_dim:
            layer.merge()
    assert base_fingerprint(model) == base_fingerprint(base)  # merged or not, W is the base's
    with torch.no_grad():
        base.norm.bias[0] += 1e-6
    assert base_fingerprint(model) != base_fingerprint(base)


def test_a_merged_adapter_is_saved_as_it_is_trained_and_replaced_by_what_is_loaded(tmp_path):
    base = trained_base()
    first, second = (train_a_bit(adapted(base)) for _ in range(2))
    with torch.no_grad():
        for layer in lora_layers(second).values():
            layer.lora_up.mul_(-3.0)
    merged_layers = [name for name, layer in lora_layers(first).items() if not layer.pose_dim]
    save_adapter(first, tmp_path / "apart")
    for name in merged_layers:
        first.get_submodule(name).merge()
    save_adapter(first, tmp_path / "merged")
    apart, merged = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("apart", "merged"))
    assert all(torch.equal(merged[name], value) for name, value in apart.items())
    save_adapter(second, tmp_path / "second")
    load_adapter(first, tmp_path / "second")
    layer, other = (model.get_submodule(merged_layers[0]) for model in (first, second))
    x = torch.randn(5, layer.in_features)
    assert not layer.is_merged
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)


def test_parameters_without_dimensions_count(tmp_path):
    """A learned temperature, say."""
    base = trained_base()
    base.temperature = nn.Parameter(torch.tensor(0.07))
    before = base_fingerprint(base)
    with torch.no_grad():
        base.temperature += 1e-3
    assert base_fingerprint(base) != before


def test_peft_cannot_express_a_pose(tmp_path):
    with pytest.raises(AdapterError, match="no pose-conditioned LoRA"):
        save_peft_adapter(adapted(trained_base()), tmp_path)
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    pass


def killed_before_step(monkeypatch, number):
    """Let the number-th change of a file in the folder, counted from 0, and all later ones, end the process."""
    done = []
    for name in ("replace", "unlink"):

        def step(*args, real=getattr(os, name)):  # noqa: B008
            if len(done) == number:
                raise Killed
            done.append(1)
            return real(*args)

        monkeypatch.setattr(os, name, step)


def save_over_another(save, base, folder, monkeypatch, number):
    """Save one adapter, and over it another that is killed at a step; the two models, by their alphas."""
    models = {alpha: train_a_bit(adapted(base, pose_dim=0, rank=3, lora_alpha=alpha)) for alpha in (3.0, 30.0)}
    save(models[3.0], folder)
    with monkeypatch.context() as patch:
        killed_before_step(patch, number)
        with contextlib.suppress(Killed):
            save(models[30.0], folder)
    return models


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("save,load", [(save_adapter, load_adapter), (save_peft_adapter, load_peft_adapter)])
def test_a_killed_save_leaves_one_adapter_or_the_other(tmp_path, monkeypatch, save, load, number):
    base, x = trained_base().eval(), inputs()
    models = save_over_another(save, base, tmp_path, monkeypatch, number)
    found = []
    for alpha, model in models.items():
        fresh = adapted(base, pose_dim=0, rank=3, lora_alpha=alpha)
        try:
            load(fresh, tmp_path)
        except AdapterError:
            continue
        assert torch.equal(fresh(**x), model(**x))
        found.append(alpha)
    assert len(found) == 1 and found[0] == (3.0 if number < 3 else 30.0)


def test_a_full_disk_leaves_the_old_adapter(tmp_path):
    base = trained_base()
    save_adapter(adapted(base, rank=2), tmp_path)
    before, limit = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            save_adapter(adapted(base, rank=4), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_adapters_whose_config_is_only_beside_them_load(tmp_path):
    """As the kit's first versions, and PEFT, save them."""
    base, x = trained_base(), inputs()
    model, other = train_a_bit(adapted(base)), adapted(base)
    save_adapter(model, tmp_path)
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    load_adapter(other, tmp_path)
    assert torch.equal(other(**x), model(**x))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_config\.json"):
        load_adapter(other, tmp_path)


def edited(change):
    def damage(folder):
        weights, path = load_file(folder / "adapter_model.safetensors"), folder / "adapter_config.json"
        save_file(weights, folder / "adapter_model.safetensors")  # without the header's config, as PEFT does
        path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))))

    return damage


def without_header(text):
    return lambda folder: (edited(dict)(folder), (folder / "adapter_config.json").write_text(text))


def cut(length):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:length])

    return damage


def header_longer_than_the_file(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def no_weights(folder):
    save_file({}, folder / "adapter_model.safetensors")


BAD = {
    "empty": cut(0),
    "seven bytes": cut(7),
    "eight bytes": cut(8),
    "half a header": cut(200),
    "half the weights": cut(-999),
    "one byte less": cut(-1),
    "endless header": header_longer_than_the_file,
    "no weights": no_weights,
    "a text": edited(lambda c: "config"),
    "a list": edited(lambda c: [c]),
    "nothing": edited(lambda c: None),
    "nested": without_header("[" * 100_000),
    "no JSON": without_header("{"),
    "digits": without_header("9" * 5000),
}
OURS = {
    "no layers": edited(lambda c: {k: v for k, v in c.items() if k != "layers"}),
    "no base": edited(lambda c: {k: v for k, v in c.items() if k != "base_fingerprint"}),
    "layers in a list": edited(lambda c: c | {"layers": [1]}),
    "settings in a text": edited(lambda c: c | {"settings": "x"}),
    "a long layer": edited(lambda c: c | {"layers": dict.fromkeys(c["layers"], "x" * 5000)}),
}
THEIRS = {
    "no rank": edited(lambda c: {k: v for k, v in c.items() if k != "r"}),
    "a pattern in a list": edited(lambda c: c | {"rank_pattern": [1]}),
    "alpha in words": edited(lambda c: c | {"lora_alpha": "x" * 5000}),
    "a rank in words": edited(lambda c: c | {"rank_pattern": dict.fromkeys(c["target_modules"], "x" * 5000)}),
    "a name without parts": lambda folder: save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors"),
}


@pytest.mark.parametrize(
    "change", [lambda v: v * float("nan"), lambda v: v.int(), lambda v: v > 0], ids=["NaN", "int", "bool"]
)
def test_weights_that_are_no_finite_floats_are_refused(tmp_path, change):
    model = train_a_bit(adapted(trained_base()))
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    weights = load_file(path)
    first = sorted(weights)[0]
    save_file(weights | {first: change(weights[first])}, path, header)
    with pytest.raises(AdapterError, match=f"{first} in .* no finite floats"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("peft", "case"), [*((False, case) for case in BAD | OURS), *((True, case) for case in BAD | THEIRS)]
)
def test_a_damaged_adapter_is_one_clear_error_and_changes_nothing(tmp_path, peft, case):
    model = train_a_bit(adapted(trained_base(), pose_dim=0))
    save, load = (save_peft_adapter, load_peft_adapter) if peft else (save_adapter, load_adapter)
    save(model, tmp_path)
    load(model, tmp_path)
    (BAD | (THEIRS if peft else OURS))[case](tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        load(model, tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 600 + len(str(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_of_two_adapters_are_refused(tmp_path):
    base = trained_base()
    for rank in (2, 4):
        save_adapter(adapted(base, rank=rank), tmp_path / str(rank))
    (tmp_path / "2/adapter_config.json").replace(tmp_path / "4/adapter_config.json")
    with pytest.raises(AdapterError, match=r"adapter_config\.json is not that of .*; take both files from one adapter"):
        load_adapter(adapted(base, rank=4), tmp_path / "4")


def test_nothing_to_save_or_to_load(tmp_path):
    with pytest.raises(AdapterError, match="no adapter"):
        save_adapter(trained_base(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model.safetensors and adapter_config.json"):
        load_adapter(adapted(trained_base()), tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["layers", "settings"])
def test_a_config_that_names_more_is_refused_whatever_it_says(tmp_path, part):
    model = adapted(trained_base())
    save_adapter(model, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    config[part]["more"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        weights, tmp_path / "adapter_model.safetensors", {"format": "pt", "adapter_config.json": json.dumps(config)}
    )
    with pytest.raises(AdapterError, match="more"):
        load_adapter(adapted(trained_base()), tmp_path)
