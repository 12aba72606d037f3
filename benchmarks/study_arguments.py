"""What the studies beside the notebooks share: their command line, and what those on real faces start from."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from viewdiff_nb.files import FIGURES, HEADS, RUNS
from viewdiff_nb.studies.adaptation import FULL_PROFILE, Profile, load_split
from viewdiff_nb.studies.real_benchmark import Benchmark, load_benchmark, seen_by
from viewdiff_nb.studies.real_models import synthetic_base


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


def benchmark_and_bases(folder: Path, seeds: int) -> tuple[Benchmark, Profile, list[Path]]:
    """A benchmark of real faces, the profile with so many seeds, and for each the weights of a transformer trained on
    synthetic people; ends the program if another recogniser saw those."""
    benchmark, split = load_benchmark(folder), load_split(FULL_PROFILE)
    if benchmark.seen_by != seen_by(HEADS):
        sys.exit(f"error: {folder} was seen by {benchmark.seen_by}, the synthetic people by {seen_by(HEADS)}")
    profile = replace(FULL_PROFILE, real_seeds=seeds)
    return benchmark, profile, [synthetic_base(profile, split, seed) for seed in range(seeds)]
