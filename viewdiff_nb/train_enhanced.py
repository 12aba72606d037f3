"""Train from the shell:  python -m viewdiff_nb.train_enhanced --data_dir data/heads --use_lora_attention ..."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from itertools import count
from typing import Any

import tyro

from viewdiff_nb.faces.splits import load_split_file, split_by_person
from viewdiff_nb.faces.views import load_face_views
from viewdiff_nb.training import devices
from viewdiff_nb.training.checkpoint import BEST_WEIGHTS, find_checkpoint, load_train_config
from viewdiff_nb.training.config import Adaptation, Architecture, Data, Files, Optimisation, TrainConfig
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.result import TrainingAdvice, TrainingInterrupted, TrainResult

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


@dataclass
class Flags:
    """`TrainConfig`, in groups."""

    data: Data
    model: Architecture
    adaptation: Adaptation
    training: Optimisation
    files: Files


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Flags to config; with --resume, what is not given comes from the checkpoint's own config."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume")
    first.add_argument("--save_dir")
    known, _ = first.parse_known_args(arguments)
    default = TrainConfig()
    if path := find_checkpoint(known.resume, known.save_dir):
        default = replace(load_train_config(path), save_dir=str(path.parent))  # where it lies now
    groups: list[Any] = [field.type for field in fields(Flags)]
    given = [group(**{field.name: getattr(default, field.name) for field in fields(group)}) for group in groups]
    flags = tyro.cli(
        Flags,
        args=arguments,
        default=Flags(*given),
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )
    return TrainConfig(**{name: value for group in vars(flags).values() for name, value in vars(group).items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags of `TrainConfig`, load and check the data, train, and print the last epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingAdvice)  # said at the end
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)  # no line of this program
        try:
            config = parse(arguments)
            faces = load_face_views(config.data_dir)
            if config.split_file:
                split = load_split_file(config.split_file, faces)
            else:
                split = split_by_person(faces, config.val_people, config.test_people, config.split_seed)
            if config.devices > 1 and not devices.started_by_torchrun():
                devices.relaunch(sys.argv[1:] if arguments is None else arguments, config.devices)
            if not config.save_dir:
                config = replace(config, save_dir=_new_folder())
            sizes = [len(part.names) for part in (split.train, split.val, split.test)]
            people = "{} people train, {} validate, {} are kept for a test (val_people, test_people)".format(*sizes)
            _say(f"{people}; everything is kept in {config.save_dir}")
            result = train(config, split.train, split.val)
        except TrainingInterrupted as interrupted:
            result = interrupted.result
        except KeyboardInterrupt:
            print("interrupted before the training began", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
            sys.exit(f"error: {error}")
    if devices.is_first():
        _report(config, result)
    if result.stopped == "interrupted":
        sys.exit(INTERRUPTED)


def _new_folder() -> str:
    """For a run that was given none: runs/ and the time, here."""
    folder = datetime.now().strftime("runs/%Y-%m-%d_%H-%M-%S")
    names = (f"{folder}-{n}" if n > 1 else folder for n in count(1))
    return next(name for name in names if not os.path.exists(name))


def _report(config: TrainConfig, result: TrainResult) -> None:
    """The last epoch, what it suggests, and where things are."""
    if len(result.history):
        _say("\n".join(f"{name:18s} {value:.4g}" for name, value in result.history.iloc[-1].items()))
    for sentence in result.advice:
        _say(f"advice: {sentence}")
    if result.stopped == "interrupted":
        print(f"interrupted; go on with --resume {result.checkpoint}", file=sys.stderr)
        return
    if result.stopped == "early":
        _say(f"stopped early: {config.monitor} did not get better in {config.patience} validations")
        _say("go on with a larger --patience and --resume")
    best = f"{config.save_dir}/{BEST_WEIGHTS}"
    if os.path.exists(best):  # unless somebody took it away
        _say(f"the best model by {config.monitor}: {best}")


def _say(text: str) -> None:
    """Print, in the first process; where that fails (a closed pipe, a full disk), end with a line, no traceback."""
    try:
        if devices.is_first():
            print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again when it ends
        sys.exit(f"error: cannot write to standard output: {error.strerror}")


if __name__ == "__main__":
    main()
