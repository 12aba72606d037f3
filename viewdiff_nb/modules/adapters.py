"""Adapters of a whole model on disk: safetensors plus json, and PEFT's format where PEFT can express them.

A folder holds adapter_model.safetensors, everything that was added to the base (LoRA, projection, cross-view attention)
with the config in its header, so that both change at once; and adapter_config.json, the config again, for readers and
for PEFT. What does not fit or is damaged is an AdapterError before anything is changed, a missing file a
FileNotFoundError.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn

from viewdiff_nb.files import parse_json, read_json, read_safetensors, shorten, write_safetensors, write_text
from viewdiff_nb.modules.lora import lora_layers

FORMAT = "viewdiff_nb adapter 1"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_NAMES = {"lora_A": "lora_down", "lora_B": "lora_up"}
PEFT_DEFAULTS: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
PEFT_TYPES = {"r": int, "lora_alpha": int | float, "rank_pattern": dict, "alpha_pattern": dict, "use_rslora": bool}


class AdapterError(ValueError):
    """An adapter that does not fit the model, cannot be saved, or is damaged."""


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that are not the base's: those in LoRA layers, and added modules of the kit's model."""
    roles = getattr(model, "parameter_roles", None)
    added = _factors(model) if roles is None else {name for name, role in roles().items() if role != "base"}
    return {name: parameter for name, parameter in model.named_parameters() if name in added}


def _factors(model: nn.Module) -> set[str]:
    return {f"{name}.{factor}" for name in lora_layers(model) for factor in PEFT_NAMES.values()}


def base_fingerprint(model: nn.Module) -> str:
    """A hash of names, types, shapes and values of the base's parameters, the same with and without adapters."""
    added = adapter_parameters(model)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in added:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())  # 0-dim, too
    return digest.hexdigest()


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of a model; those that are there are replaced only once the new ones are complete."""
    parameters = adapter_parameters(model)
    if not parameters:
        raise AdapterError("the model has no adapter to save")
    _write(Path(folder), parameters, _describe(model))


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Load adapters into a model with the same adapted layers on the same base."""
    weights, config = _read(Path(folder))
    if config.get("format") != FORMAT:
        raise AdapterError(f"{folder} is not an adapter of this kit; for PEFT's format use load_peft_adapter")
    _check_types(folder, config, {"layers": dict, "settings": dict, "base_fingerprint": str})
    model_config = _describe(model)
    _compare(folder, "adapted layers", model_config["layers"], config["layers"])
    _compare(folder, "module settings", model_config["settings"], config["settings"])
    if config["base_fingerprint"] != model_config["base_fingerprint"]:
        raise AdapterError(f"the adapter in {folder} belongs to another base model; load its base first")
    _copy(model, adapter_parameters(model), weights, folder)


def save_peft_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the LoRA layers so that `peft.PeftModel.from_pretrained(base, folder)` reads them."""
    layers = lora_layers(model)
    if not layers:
        raise AdapterError("the model has no LoRA layer to save")
    first = next(iter(layers.values()))
    for name, layer in layers.items():
        if layer.pose_dim:
            raise AdapterError(f"PEFT has no pose-conditioned LoRA: {name} has pose_dim={layer.pose_dim}")
        if layer.rslora != first.rslora:
            raise AdapterError(f"PEFT has one rslora setting for all layers, and that of {name} is {layer.rslora}")
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "bias": "none",
        "target_modules": list(layers),
        "fan_in_fan_out": False,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
    }
    weights = {}
    for name, layer in layers.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = layer.lora_down
        weights[f"base_model.model.{name}.lora_B.weight"] = layer.lora_up
    _write(Path(folder), weights, config)


def load_peft_adapter(model: nn.Module, folder: str | Path) -> None:
    """Load an adapter that PEFT saved into the model's LoRA layers of the same names, ranks and alphas."""
    weights, config = _read(Path(folder))
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} holds no LoRA adapter of PEFT (peft_type is {shorten(config.get('peft_type'))})")
    config = PEFT_DEFAULTS | {key: value for key, value in config.items() if value is not None}
    _check_types(folder, config, PEFT_TYPES)
    ranks, alphas, rslora = config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]
    layers = {}
    for name in lora_layers(model):
        rank, alpha = ranks.get(name, config["r"]), alphas.get(name, config["lora_alpha"])
        layers[name] = {"rank": rank, "alpha": alpha, "rslora": rslora, "pose_dim": 0}
    _compare(folder, "adapted layers", _layers(model), layers)
    renamed = {}
    for key, value in weights.items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.weight)?", key)
        if not found:
            raise AdapterError(f"{folder} holds {shorten(key)}: only plain LoRA (lora_A, lora_B) can be loaded")
        renamed[f"{found[1]}.{PEFT_NAMES[found[2]]}"] = value
    _copy(model, {name: model.get_parameter(name) for name in _factors(model)}, renamed, folder)


def _layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    names = ("rank", "alpha", "rslora", "pose_dim")
    return {name: {n: getattr(layer, n) for n in names} for name, layer in lora_layers(model).items()}


def _describe(model: nn.Module) -> dict[str, Any]:
    """The config of the kit's format; settings are what decides the numbers and shows in no weight's shape."""
    return {
        "format": FORMAT,
        "layers": _layers(model),
        "settings": {
            f"{name}.{setting}": getattr(module, setting)
            for name, module in model.named_modules()
            for setting in ("num_heads", "voxel_resolution")
            if hasattr(module, setting)
        },
        "base_fingerprint": base_fingerprint(model),
    }


def _check_types(folder: str | Path, config: dict[str, Any], wanted: Mapping[str, type | UnionType]) -> None:
    for key, kind in wanted.items():
        if not isinstance(config.get(key), kind):
            raise AdapterError(f"the config in {folder} is damaged: {key} is {shorten(config.get(key))}")


def _compare(folder: str | Path, what: str, model: dict[str, Any], saved: dict[str, Any]) -> None:
    both = model.keys() & saved.keys()
    if differing := sorted(n for n in model.keys() | saved.keys() if n not in both or model[n] != saved[n]):
        first = differing[0]
        raise AdapterError(
            f"{len(differing)} {what} differ, e.g. {shorten(first)}: {shorten(saved.get(first))} in {folder} and "
            f"{model.get(first)} in the model; build the model as the adapter's was"
        )


def _copy(
    model: nn.Module, parameters: dict[str, nn.Parameter], weights: dict[str, Tensor], folder: str | Path
) -> None:
    """Load the weights if they are those of all the parameters."""
    missing, foreign = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or foreign:
        raise AdapterError(
            f"{folder} lacks {missing[:3] or 'nothing'} and holds {foreign[:3] or 'nothing'} beyond what the model has"
        )
    for name, value in weights.items():
        if value.shape != parameters[name].shape:
            found, wanted = tuple(value.shape), tuple(parameters[name].shape)
            raise AdapterError(f"{name} is {found} in {folder} and {wanted} in the model")
        if not (value.is_floating_point() and value.isfinite().all()):
            raise AdapterError(f"{name} in {folder} holds values that are no finite floats")
    model.load_state_dict(weights, strict=False)


def _write(folder: Path, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Whenever this ends early, the folder holds the old adapter or the new one, and no config beside other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{WEIGHTS}.new"
    write_safetensors(new, weights, {"format": "pt", CONFIG: json.dumps(config)})
    (folder / CONFIG).unlink(missing_ok=True)
    new.replace(folder / WEIGHTS)
    write_text(folder / CONFIG, json.dumps(config, indent=1))


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config; adapters of PEFT, and those of the kit's first versions, have a config only beside them."""
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    weights, header = ({}, {}) if WEIGHTS in missing else read_safetensors(folder / WEIGHTS, AdapterError)
    if missing and CONFIG not in header:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}")
    config = None if missing else read_json(folder / CONFIG, AdapterError)
    if CONFIG in header:
        beside, config = config, parse_json(header[CONFIG], f"the header of {folder / WEIGHTS}", AdapterError)
        if not missing and beside != config:
            raise AdapterError(f"{folder / CONFIG} is not that of {WEIGHTS}; take both files from one adapter")
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} must hold an object, got {shorten(config)}")
    return weights, config
