"""What limits every model on CFP:  python benchmarks/cfp_limits.py [SET]

SET is a benchmark that `python -m viewdiff_nb.faces.cfp` makes, runs/cfp by default. Frontal-profile accuracy and AUC,
and rank-1 among all people, of rows that no fair model could have, because they see the people that are tested:

- closed forms that are fitted to all people, those of the tested fold among them, beside the same by folds;
- an oracle that takes for every pair the best of the steps toward the ridge's prediction: the most similar one of a
  right pair, the least similar one of a wrong pair;
- front against front, the recogniser's own noise between two photographs of a person without any turn.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor, nn

from viewdiff_nb import metrics
from viewdiff_nb.faces import FaceViews
from viewdiff_nb.files import FIGURES, RUNS
from viewdiff_nb.modules.baselines import PoseRidge, RawEmbedding
from viewdiff_nb.plots import save_table
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.candidates import adjusted, whitened_and_common, whitening_candidates
from viewdiff_nb.studies.real_benchmark import Benchmark, load_benchmark
from viewdiff_nb.studies.real_faces import ranks, similarities

STEPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def whitening(faces: FaceViews) -> nn.Module:
    return whitening_candidates(faces, (0.9,), ("even",))[0.9, "even"]


def whitening_and_correlation(faces: FaceViews) -> nn.Module:
    return whitened_and_common(faces)[0.9, 0.3, 0.5, "summed"]


def by_folds(
    fit: Callable[[FaceViews], nn.Module], benchmark: Benchmark, everybody: bool, protocol: str = "FP"
) -> tuple[Tensor, Tensor]:
    """(N,) similarities of the pairs, and (M,) whether a profile has rank 1, of models fitted by folds or to all."""
    pairs = benchmark.pairs[protocol]
    found, hits = torch.empty(len(pairs)), []
    for fold in range(benchmark.folds):
        model = fit(benchmark.faces if everybody else benchmark.faces.select(benchmark.fold != fold))
        found[pairs.fold == fold] = similarities(model, benchmark, protocol, pairs.fold == fold)
        hits += [rank == 1 for rank in ranks(model, benchmark, fold)["rank1"]]
    return found, torch.tensor(hits)


def oracle(benchmark: Benchmark, centring: str) -> Tensor:
    """(N,) the best step of each frontal-profile pair."""
    every = []
    for step in STEPS:

        def fit(faces: FaceViews, step: float = step) -> nn.Module:
            ridge = PoseRidge(faces.src[:], faces.angles, faces.target, 300.0, residual=True)
            return adjusted(ridge, faces, step=step, centring=centring)

        every.append(by_folds(fit, benchmark, False)[0])
    steps = torch.stack(every)
    return torch.where(benchmark.pairs["FP"].same, steps.amax(0), steps.amin(0))


def cells(similarity: Tensor, benchmark: Benchmark, protocol: str = "FP") -> dict[str, str]:
    pairs = benchmark.pairs[protocol]
    auc = metrics.roc_auc(*metrics.pair_counts(similarity, pairs.same)).item()
    hits = metrics.fold_hits(similarity, pairs.same, pairs.fold).double()
    by_fold = torch.stack([hits[pairs.fold == fold].mean() for fold in range(benchmark.folds)])
    return {"accuracy %": f"{100 * by_fold.mean():.2f} ± {100 * by_fold.std():.2f}", "AUC %": f"{100 * auc:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, nargs="?", default=RUNS / "cfp")
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    benchmark = load_benchmark(arguments.set)
    rows = {}
    fits = {
        "raw": lambda faces: RawEmbedding(),
        "within-class whitening": whitening,
        "whitening + canonical correlation": whitening_and_correlation,
    }
    for name, fit in fits.items():
        for everybody in (False, True) if name != "raw" else (False,):
            found, hits = by_folds(fit, benchmark, everybody)
            words = f"{name}, fitted to the tested people, too" if everybody else name
            rows[words] = cells(found, benchmark) | {"rank-1 %": f"{100 * hits.double().mean():.1f}"}
    for centring, words in (("none", "as it is"), ("even", "centred")):
        name = f"ridge {words}, an oracle chooses the step of each pair"
        rows[name] = cells(oracle(benchmark, centring), benchmark) | {"rank-1 %": "–"}
    found, _ = by_folds(fits["raw"], benchmark, False, "FF")
    rows["raw, front against front (FF)"] = cells(found, benchmark, "FF") | {"rank-1 %": "–"}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("what no fair model has, beside what one has")
    note = f"{benchmark.name} frontal-profile unless it says FF; mean ± standard deviation over folds; {machine()}"
    plt.close(save_table(table, "cfp_limits", arguments.out, "What limits every model on CFP", note))
    print(f"{note}\n{table.to_string()}")


if __name__ == "__main__":
    main()
