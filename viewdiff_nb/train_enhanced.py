"""Train from the shell:  python -m viewdiff_nb.train_enhanced --data_dir data/heads --use_lora_attention ..."""

import argparse
import sys
import warnings
from collections.abc import Sequence

import tyro

from .faces.splits import load_split_file, split_by_person
from .faces.views import load_face_views
from .training.config import TrainConfig
from .training.diagnosis import TrainingAdvice
from .training.interrupt import TrainingInterrupted
from .training.parallel import is_first
from .training.prepare import find_checkpoint, load_train_config
from .training.trainer import train

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Flags to config; with --resume, what is not given comes from the checkpoint's own config."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume")
    first.add_argument("--save_dir")
    given = first.parse_known_args(arguments)[0]
    default = TrainConfig()
    if path := find_checkpoint(given.resume, given.save_dir):
        default = load_train_config(path)
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrainingAdvice)  # said below, without a line of this program
            result = train(config, split.train, split.val)
    except TrainingInterrupted as interrupted:
        result = interrupted.result
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        sys.exit(f"error: {error}")
    if not is_first():
        return
    if len(result.history):
        for name, value in result.history.iloc[-1].items():
            print(f"{name:18s} {value:.4g}")
    for sentence in result.advice:
        print(f"advice: {sentence}")
    if result.stopped == "interrupted":
        onward = f"go on with --resume {result.checkpoint}" if result.checkpoint else "nothing was kept: no --save_dir"
        print(f"interrupted; {onward}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if result.stopped == "early":
        print(f"stopped early: {config.monitor} did not get better in {config.patience} validations")


if __name__ == "__main__":
    main()
