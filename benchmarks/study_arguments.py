"""The command line that the studies beside the notebooks share."""

import argparse
from collections.abc import Callable
from pathlib import Path

from viewdiff_nb.files import FIGURES, RUNS


def study_arguments(
    description: str, seeds: int | None = None, more: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """--fast, --seeds (by default seeds) and --out (by default figures/, with --fast runs/fast/figures).

    Args:
        seeds: None to leave the flag out.
        more: adds a study's own flags.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a smoke run")
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path, help="by default figures/, with --fast runs/fast/figures")
    more(parser)
    arguments = parser.parse_args()
    arguments.out = arguments.out or (RUNS / "fast" / "figures" if arguments.fast else FIGURES)
    return arguments
