"""Train from the shell:  python -m viewdiff_nb.train_enhanced --data_dir data/heads --use_lora_attention ..."""

import argparse
import sys
from collections.abc import Sequence

import tyro

from .faces.splits import load_split_file, split_by_person
from .faces.views import load_face_views
from .training.checkpoint import CheckpointError, load_checkpoint
from .training.config import TrainConfig
from .training.trainer import train


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Flags to config; with --resume, what is not given comes from the checkpoint's own config."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume")
    default = TrainConfig()
    if path := first.parse_known_args(arguments)[0].resume:
        try:
            default = TrainConfig(**load_checkpoint(path)["config"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} holds no training run of this version to go on with: {error}") from error
    return tyro.cli(TrainConfig, args=arguments, default=default, description=__doc__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags of `TrainConfig`, load and check the data, train, and print the last epoch."""
    try:
        config = parse(arguments)
        faces = load_face_views(config.data_dir)
        if config.split_file:
            split = load_split_file(config.split_file, faces)
        else:
            split = split_by_person(faces, config.val_people, config.test_people, config.split_seed)
        result = train(config, split.train, split.val)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    for name, value in result.history.iloc[-1].items():
        print(f"{name:12s} {value:.4g}")


if __name__ == "__main__":
    main()
