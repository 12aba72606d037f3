"""How many real people an adaptation needs:  python benchmarks/data_efficiency.py [SET] [--seeds 2]

SET is a benchmark that `python -m viewdiff_nb.faces.cfp` makes, runs/cfp by default. The transformer trained on the
shipped synthetic people is adapted with 10 to 450 of the people of each nine folds, by LoRA of several ranks, LoRA and
the 3-D projection, and full fine-tuning, beside training from scratch and closed forms; the tenth fold is scored. 1,450
fits: three minutes on a GPU, hours on two cores; what was done before is reused.
"""

import argparse
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from study_arguments import benchmark_and_bases
from tqdm.auto import tqdm

from viewdiff_nb.files import FIGURES, RUNS
from viewdiff_nb.plots import save_table
from viewdiff_nb.plots.rates import efficiency_figure
from viewdiff_nb.studies import data_efficiency, real_models, real_tables
from viewdiff_nb.studies.real_faces import run_real_faces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, nargs="?", default=RUNS / "cfp")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--people", type=int, nargs="+", default=data_efficiency.PEOPLE)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    benchmark, profile, bases = benchmark_and_bases(arguments.set, arguments.seeds)
    every = {"raw": real_models.families(profile, bases)["raw"]}
    for people in arguments.people:
        every |= data_efficiency.families(profile, bases, people)
    results = run_real_faces(benchmark, every, profile, partial(tqdm, desc="trainings"), arguments.workers)
    found = data_efficiency.efficiency_table(results)
    note = (
        f"{benchmark.name}, {benchmark.folds} folds, {arguments.seeds} seeds; bands: 95 % over people and seeds; "
        f"{real_tables.machines(results)}"
    )
    wide = data_efficiency.wide_table(found)
    plt.close(save_table(wide, "cfp_data_efficiency", arguments.out, "Rank-1 and AUC by real people", note))
    efficiency_figure(found, f"{benchmark.name}: what real people are worth", note).savefig(
        arguments.out / "cfp_data_efficiency_curves.png", dpi=150
    )
    print(f"{note}\n{wide.to_string()}\n{data_efficiency.findings(results)}")


if __name__ == "__main__":
    main()
