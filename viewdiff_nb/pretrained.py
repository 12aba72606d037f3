"""Drop-ins in files, and the ones that the kit ships.

A file of a drop-in is safetensors: the weights of its network in half precision, its steps and what its centring
subtracts, and in the header what else it is made of. Nothing in it is code.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.faces.geometry import YAW_BINS
from viewdiff_nb.files import parse_json, read_safetensors, shorten, write_safetensors
from viewdiff_nb.modules.adjusted import TERMS
from viewdiff_nb.training.checkpoint import CheckpointError, build_trained, parse_config
from viewdiff_nb.training.config import TrainConfig

FORMAT = "viewdiff_nb drop-in 1"
FOLDER = Path(__file__).resolve().parent / "weights"
PRETRAINED = {"mobilefacenet": FOLDER / "mobilefacenet.safetensors"}
NETWORK = "network."  # before the names of its weights


def save_drop_in(path: str | Path, model: DropIn, config: TrainConfig, recogniser: str) -> None:
    """Write a drop-in whose network was trained with config on embeddings of recogniser.

    Raises:
        ValueError: if it has no network, and is no more than centring by pose.
        OSError: if the file cannot be written.
    """
    if model.model is None:
        raise ValueError("this drop-in never follows a network; there is nothing to take along but its shift")
    weights = {NETWORK + name: value.half() for name, value in model.model.state_dict().items()}
    header = {"config": json.dumps(config.to_dict()), "ways": json.dumps(model.ways), "recogniser": recogniser}
    write_safetensors(path, weights | {"shift": model.shift.float()}, {"format": FORMAT, **header})


def is_drop_in(path: str | Path) -> bool:
    """Whether a file says that it is a drop-in; what is no readable safetensors file does not."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return False
    try:
        return read_safetensors(path, CheckpointError)[1].get("format") == FORMAT
    except CheckpointError:
        return False


def load_drop_in(path: str | Path) -> tuple[DropIn, str]:
    """A drop-in on the CPU in evaluation mode, and the name of the recogniser whose embeddings it was trained on.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, damaged, or no drop-in.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no drop-in {path}; write one with save_drop_in, or correct the path")
    tensors, header = read_safetensors(path, CheckpointError)
    if header.get("format") != FORMAT or not {"config", "ways", "recogniser"} <= header.keys():
        raise CheckpointError(f"{path} is no drop-in of this version of the kit (no '{FORMAT}' in it)")
    config = parse_config(path, parse_json(header["config"], f"the config in {path}", CheckpointError))
    weights = {name.removeprefix(NETWORK): value.float() for name, value in tensors.items() if name != "shift"}
    if lost := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{path} holds weights that are not finite: {shorten(lost[0])}")
    network = build_trained(path, config, weights)
    try:
        ways = [_way(way) for way in parse_json(header["ways"], f"the ways in {path}", CheckpointError)]
        return DropIn(network, ways, _shift(tensors, network.feature_dim)).eval(), header["recogniser"]
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path} holds no drop-in: {str(error)[:300]}") from error


def _way(found: object) -> tuple[float, str]:
    if isinstance(found, list) and len(found) == 2 and found[1] in ("none", "even"):
        step = found[0]
        if isinstance(step, float) and 0 <= step <= 1:
            return step, found[1]
    raise ValueError(f"a way is a step from 0 to 1 and none or even, got {shorten(found)}")


def _shift(tensors: dict[str, Tensor], width: int) -> Tensor:
    shift = tensors["shift"]
    if shift.dtype != torch.float32 or shift.shape not in {(len(YAW_BINS), len(TERMS), n) for n in (1, width)}:
        raise ValueError(f"the shift is {shift.dtype} {tuple(shift.shape)}")
    if not shift.isfinite().all():
        raise ValueError("the shift is not finite")
    return shift


def load_pretrained(name: str = "mobilefacenet") -> DropIn:
    """A model that the kit ships, see weights/README.md: trained on synthetic people, in evaluation mode on the CPU.

    Below 45 degrees of |yaw| it answers with the raw embedding, beyond with a quarter of the step.

    Raises:
        ValueError: for a name that is not among `PRETRAINED`.
        FileNotFoundError, CheckpointError: if the installation is damaged.
    """
    if name not in PRETRAINED:
        raise ValueError(f"the kit ships {', '.join(PRETRAINED)}; got {name!r}")
    return load_drop_in(PRETRAINED[name])[0]
