"""The command line that the studies beside the notebooks share."""

import argparse
from pathlib import Path

from ..paths import FIGURES, RUNS


def study_arguments(description: str, seeds: int) -> argparse.Namespace:
    """--fast, --seeds (by default seeds) and --out (by default figures/, with --fast runs/fast/figures)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a smoke run")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path, help="by default figures/, with --fast runs/fast/figures")
    arguments = parser.parse_args()
    arguments.out = arguments.out or (RUNS / "fast" / "figures" if arguments.fast else FIGURES)
    return arguments
