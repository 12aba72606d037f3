"""The whole grid of ranks, voxel resolutions and prior weights:

python benchmarks/ablation.py [--fast] [--out figures] [--backend loky]
"""

import argparse

from study_arguments import study_arguments

from viewdiff_nb.studies.ablation import BACKENDS, FAST_GRID, Grid, run_grid
from viewdiff_nb.studies.adaptation import FAST_PROFILE, FULL_PROFILE, load_split


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="loky")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--together", type=int, help="cells of one pass at most")


def main() -> None:
    from tqdm.auto import tqdm

    arguments = study_arguments(__doc__, more=_flags)
    profile, grid, out = *((FAST_PROFILE, FAST_GRID) if arguments.fast else (FULL_PROFILE, Grid())), arguments.out
    cells = run_grid(grid, load_split(profile), profile, arguments.backend, arguments.workers, arguments.together, tqdm)
    out.mkdir(parents=True, exist_ok=True)
    cells.to_csv(out / "ablation_cells.csv", index=False)
    print(f"{len(cells)} cells, {(cells['error'] != '').sum()} failed: {out / 'ablation_cells.csv'}")


if __name__ == "__main__":
    main()
