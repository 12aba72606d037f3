"""The grids: rank and voxels; rank and the prior's weight; rank, learning rate and alpha; on three bases each.

python benchmarks/ablation.py [--fast] [--small] [--out figures] [--workers 2] [--bases 0] [--grids voxels]

Writes ablation_voxels.csv, ablation_prior.csv and ablation_rates.csv: 45, 45 and 360 cells, a quarter of an hour on
four GPUs. With --small they adapt the small transformer, for half as many epochs, and there are 12, 9 and 225 cells, an
hour on two CPU cores.
"""

import argparse
from dataclasses import replace

from study_arguments import study_arguments
from tqdm.auto import tqdm

from viewdiff_nb.studies.ablation import FAST_GRID, PRIOR_GRID, RATE_GRID, Grid, run_grid
from viewdiff_nb.studies.adaptation import FAST_PROFILE, load_split
from viewdiff_nb.studies.controls import FULL, SMALL_PROFILE

GRIDS = {"voxels": Grid(), "prior": PRIOR_GRID, "rates": RATE_GRID}
SMALL_GRIDS = {
    "voxels": Grid((8,), (0, 4, 8, 16)),
    "prior": Grid((8,), (8,), lambda_prior=(0.0, 0.1, 1.0)),
    "rates": replace(RATE_GRID, rank=(1, 4, 8, 16, 32), lora_alpha=("1", "rank", "rsLoRA")),
}
FAST_GRIDS = {
    "voxels": FAST_GRID,
    "prior": Grid((8,), (8,), lambda_prior=(0.0, 0.1), base=(0,)),
    "rates": replace(RATE_GRID, rank=(1, 8), lora_lr=(3e-3, 1e-2), base=(0,)),
}


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="passes side by side, by default one per core or GPU")
    parser.add_argument("--cells_per_pass", type=int, help="at most, by default 8, on a GPU 32")
    parser.add_argument("--bases", type=int, nargs="+", help="their seeds, by default 0 1 2")
    parser.add_argument("--small", action="store_true", help="two layers, 256 wide, instead of four, 512 wide")
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=GRIDS)


def main() -> None:
    arguments = study_arguments(__doc__, more=_flags)
    long = replace(FULL.profile, adapt_epochs=FULL.adapt_epochs)
    if arguments.small:
        long = replace(SMALL_PROFILE, adapt_epochs=FULL.adapt_epochs // 2)
    profile = FAST_PROFILE if arguments.fast else long
    grids = FAST_GRIDS if arguments.fast else SMALL_GRIDS if arguments.small else GRIDS
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.grids:
        grid = replace(grids[name], base=tuple(arguments.bases or grids[name].base))
        cells = run_grid(grid, load_split(profile), profile, arguments.workers, arguments.cells_per_pass, tqdm)
        path = arguments.out / f"ablation_{name}.csv"
        cells.to_csv(path, index=False)
        print(f"{len(cells)} cells, {(cells['error'] != '').sum()} failed: {path}")


if __name__ == "__main__":
    main()
