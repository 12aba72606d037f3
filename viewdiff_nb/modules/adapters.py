"""Adapters of a whole model on disk: safetensors plus json, and PEFT's format where PEFT can express them.

A folder of the kit holds

    adapter_model.safetensors   everything that was added to the base: LoRA, projection, cross-view attention; and in
                                its header the config, so that both change at once
    adapter_config.json         the config again, for readers and for PEFT: rank, alpha, ... of every adapted layer,
                                and a fingerprint of the base
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from viewdiff_nb.files import parse_json, read_json, read_safetensors, shorten, write_safetensors, write_text
from viewdiff_nb.modules.lora import LoRALinearLayer, lora_layers

FORMAT = "viewdiff_nb adapter 1"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."


class AdapterError(ValueError):
    """An adapter that does not fit the model, or a folder that holds none."""


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that are not the base's: those in LoRA layers, and added modules of the kit's model."""
    parameters = dict(model.named_parameters())
    if hasattr(model, "parameter_roles"):
        return {name: parameters[name] for name, role in model.parameter_roles().items() if role != "base"}
    return {name: p for name, p in parameters.items() if name.endswith((".lora_down", ".lora_up"))}


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
    """Write the adapters of a model; those that are there are replaced only once the new ones are complete.

    Raises:
        AdapterError: if the model has none.
    """
    added = adapter_parameters(model)
    if not added:
        raise AdapterError("the model has no adapter to save")
    config = {
        "format": FORMAT,
        "layers": {name: _layer_config(layer) for name, layer in lora_layers(model).items()},
        "settings": _settings(model),
        "base_fingerprint": base_fingerprint(model),
    }
    _write(Path(folder), added, config)


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Load adapters into a model with the same adapted layers on the same base.

    Raises:
        FileNotFoundError: if a file is missing.
        AdapterError: if a file is damaged or not of this format, the layers differ, or the base is another one.
    """
    weights, config = _read(Path(folder))
    if config.get("format") != FORMAT:
        raise AdapterError(f"{folder} is not an adapter of this kit; for PEFT's format use load_peft_adapter")
    _check_types(folder, config, {"layers": dict, "settings": dict, "base_fingerprint": str})
    mine = {name: _layer_config(layer) for name, layer in lora_layers(model).items()}
    if mine != config["layers"]:
        differing = sorted(
            name for name in mine.keys() | config["layers"].keys() if mine.get(name) != config["layers"].get(name)
        )
        first = differing[0]
        raise AdapterError(
            f"{len(differing)} adapted layers differ, e.g. {first}: the adapter in {folder} has "
            f"{shorten(config['layers'].get(first))}, the model {mine.get(first)}"
        )
    if (mine := _settings(model)) != config["settings"]:
        differing = sorted(name for name in mine if mine[name] != config["settings"].get(name)) or ["other modules"]
        raise AdapterError(
            f"the model is built differently: {differing[0]} is {mine.get(differing[0])}, and "
            f"{shorten(config['settings'].get(differing[0]))} in {folder}"
        )
    if config["base_fingerprint"] != base_fingerprint(model):
        raise AdapterError(
            f"the adapter in {folder} belongs to another base model: its weights would be added to "
            "the wrong ones; load its base first"
        )
    _copy(model, adapter_parameters(model), weights, folder)


def save_peft_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the LoRA layers so that `peft.PeftModel.from_pretrained(base, folder)` reads them.

    Raises:
        AdapterError: for layers conditioned on a pose, which PEFT cannot express, or if there are none.
    """
    layers = lora_layers(model)
    if not layers:
        raise AdapterError("the model has no LoRA layer to save")
    if posed := [name for name, layer in layers.items() if layer.pose_dim]:
        raise AdapterError(f"PEFT has no pose-conditioned LoRA: {posed[0]} has pose_dim={layers[posed[0]].pose_dim}")
    first = next(iter(layers.values()))
    if any(layer.rslora != first.rslora for layer in layers.values()):
        raise AdapterError("PEFT has one rslora setting for all layers, and these differ")
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
        "rank_pattern": {n: layer.rank for n, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {n: layer.alpha for n, layer in layers.items() if layer.alpha != first.alpha},
    }
    weights = {}
    for name, layer in layers.items():
        weights[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_down
        weights[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_up
    _write(Path(folder), weights, config)


def load_peft_adapter(model: nn.Module, folder: str | Path) -> None:
    """Load an adapter that PEFT saved into the model's LoRA layers of the same names.

    Raises:
        FileNotFoundError: if a file is missing.
        AdapterError: if a file is damaged, or ranks, alphas, rslora or the set of layers differ.
    """
    weights, config = _read(Path(folder))
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} holds no LoRA adapter of PEFT (peft_type is {shorten(config.get('peft_type'))})")
    patterns = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config = patterns | {key: value for key, value in config.items() if value is not None}
    _check_types(
        folder,
        config,
        {"r": int, "lora_alpha": int | float, "rank_pattern": dict, "alpha_pattern": dict, "use_rslora": bool},
    )
    layers = lora_layers(model)
    for name, layer in layers.items():
        mine = layer.rank, layer.alpha, layer.rslora, layer.pose_dim
        rank = config["rank_pattern"].get(name, config["r"])
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        theirs = rank, alpha, config["use_rslora"], 0
        if mine != theirs:
            raise AdapterError(
                f"{name}: (rank, alpha, rslora, pose_dim) is {mine} in the model and {shorten(theirs)} in {folder}"
            )
    names = {"lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = {}
    for key, value in weights.items():
        name, part = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")[::2]
        if part not in names:
            raise AdapterError(f"{folder} holds {shorten(key)}: only plain LoRA (lora_A, lora_B) can be loaded")
        renamed[f"{name}.{names[part]}"] = value
    parameters = {f"{name}.{p}": getattr(layer, p) for name, layer in layers.items() for p in names.values()}
    _copy(model, parameters, renamed, folder)


def _layer_config(layer: LoRALinearLayer) -> dict:
    return {"rank": layer.rank, "alpha": layer.alpha, "rslora": layer.rslora, "pose_dim": layer.pose_dim}


def _settings(model: nn.Module) -> dict[str, int]:
    """What decides the numbers and shows in no weight's shape: attention heads and voxel resolutions."""
    return {
        f"{name}.{setting}": getattr(module, setting)
        for name, module in model.named_modules()
        for setting in ("num_heads", "voxel_resolution")
        if hasattr(module, setting)
    }


def _copy(
    model: nn.Module, parameters: dict[str, nn.Parameter], weights: dict[str, Tensor], folder: str | Path
) -> None:
    missing, foreign = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or foreign:
        raise AdapterError(
            f"{folder} lacks {missing[:3] or 'nothing'} and holds {foreign[:3] or 'nothing'} beyond what the model has"
        )
    if wrong := [name for name, p in parameters.items() if p.shape != weights[name].shape]:
        raise AdapterError(
            f"{wrong[0]} is {tuple(weights[wrong[0]].shape)} in {folder} and "
            f"{tuple(parameters[wrong[0]].shape)} in the model"
        )
    if lost := [n for n in parameters if not (weights[n].is_floating_point() and weights[n].isfinite().all())]:
        raise AdapterError(f"{lost[0]} in {folder} holds values that are no finite floats")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for layer in lora_layers(model).values():
        if layer.is_merged:  # with what has been replaced
            layer.unmerge()


def _check_types(folder: str | Path, config: dict, wanted: dict[str, type]) -> None:
    for key, kind in wanted.items():
        if not isinstance(config.get(key), kind):
            raise AdapterError(f"the config in {folder} is damaged: {key} is {shorten(config.get(key))}")


def _write(folder: Path, weights: dict[str, Tensor], config: dict) -> None:
    """Whenever this ends early, the folder holds the old adapter or the new one, and no config beside other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{WEIGHTS}.new"
    write_safetensors(new, weights, {"format": "pt", CONFIG: json.dumps(config)})
    (folder / CONFIG).unlink(missing_ok=True)
    new.replace(folder / WEIGHTS)
    write_text(folder / CONFIG, json.dumps(config, indent=1))


def _read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Weights and config; adapters of PEFT, and those of the kit's first versions, have a config only beside them."""
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if WEIGHTS in missing:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}")
    weights, header = read_safetensors(folder / WEIGHTS, AdapterError)
    if CONFIG in header:
        config = parse_json(header[CONFIG], f"the header of {folder / WEIGHTS}", AdapterError)
        if CONFIG not in missing and read_json(folder / CONFIG, AdapterError) != config:
            raise AdapterError(
                f"{folder / CONFIG} is not the config that {WEIGHTS} was saved with (its header has "
                "that); take both files from one adapter"
            )
    elif missing:
        raise FileNotFoundError(f"{folder} lacks {CONFIG}")
    else:
        config = read_json(folder / CONFIG, AdapterError)
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} must hold an object, got {shorten(config)}")
    return weights, config
