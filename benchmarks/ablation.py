"""The whole grid of ranks, voxel resolutions and prior weights:

python benchmarks/ablation.py [--fast] [--out figures] [--workers 2] [--cells_per_pass 8]
"""

import argparse

from study_arguments import study_arguments
from tqdm.auto import tqdm

from viewdiff_nb.studies.ablation import FAST_GRID, Grid, run_grid
from viewdiff_nb.studies.adaptation import FAST_PROFILE, FULL_PROFILE, load_split


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="passes side by side, by default one per core or GPU")
    parser.add_argument("--cells_per_pass", type=int, help="at most, by default 8, on a GPU 32")


def main() -> None:
    arguments = study_arguments(__doc__, more=_flags)
    profile, grid = (FAST_PROFILE, FAST_GRID) if arguments.fast else (FULL_PROFILE, Grid())
    cells = run_grid(grid, load_split(profile), profile, arguments.workers, arguments.cells_per_pass, tqdm)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "ablation_cells.csv"
    cells.to_csv(path, index=False)
    print(f"{len(cells)} cells, {(cells['error'] != '').sum()} failed: {path}")


if __name__ == "__main__":
    main()
