"""Train from the shell:  python -m viewdiff_nb.train_enhanced --data_dir data/heads --use_lora_attention ..."""

import sys
from collections.abc import Sequence

import tyro

from .faces.views import load_face_views, split_by_person
from .training.checkpoint import load_checkpoint
from .training.config import TrainConfig
from .training.trainer import train


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Flags to config; with --resume, what is not given comes from the checkpoint's own config."""
    config = tyro.cli(TrainConfig, args=arguments, description=__doc__)
    if config.resume:
        saved = TrainConfig(**load_checkpoint(config.resume)["config"])
        config = tyro.cli(TrainConfig, args=arguments, default=saved)
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags of `TrainConfig`, load and check the data, train, and print the last epoch."""
    try:
        config = parse(arguments)
        split = split_by_person(load_face_views(config.data_dir), config.val_people, config.test_people,
                                config.split_seed)  # fmt: skip
        result = train(config, split.train, split.val)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    for name, value in result.history.iloc[-1].items():
        print(f"{name:12s} {value:.4g}")


if __name__ == "__main__":
    main()
