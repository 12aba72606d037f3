"""How profiles should be cropped, chosen inside CFP's training folds:  python benchmarks/cfp_crops.py CFP OUT

OUT is the set that `python -m viewdiff_nb.faces.cfp` makes (made here, if it is not there); beside it, profiles are
embedded once by every alignment and scale, and a candidate sums one or several. Nothing is trained. In every fold a
candidate is chosen on the frontal-profile pairs of the other nine: the one with the fewest crops whose AUC is within
one standard error (over those folds) of the best, and of several such the best. The table says what the choice is
worth on the folds where it was not made, and what a face costs.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from viewdiff_nb import metrics
from viewdiff_nb.faces.cfp import CfpOptions, embed_cfp, read_landmarks, read_pictures
from viewdiff_nb.faces.crops import ALIGNMENTS, CROP_SIZE, PROFILE_CROPS, crop_transforms, cut_crops
from viewdiff_nb.faces.recogniser import embed_crops, make_recogniser
from viewdiff_nb.faces.views import load_rows
from viewdiff_nb.files import FIGURES, write_atomically
from viewdiff_nb.plots import save_table
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.real_benchmark import Benchmark, load_benchmark

SCALES = ("1", "1.06", "1.12", "1.2")
SCALE_SETS = (*((scale,) for scale in SCALES), ("1", "1.12"), ("1", "1.06", "1.12"), ("1", "1.12", "1.2"))


def candidates() -> dict[str, tuple[str, ...]]:
    """{name: its crops}: one alignment at one scale, and both alignments at one or several."""
    one = [(f"{alignment}@{scale}",) for alignment, scale in product(ALIGNMENTS, SCALES)]
    both = [tuple(f"{a}@{s}" for s in scales for a in ALIGNMENTS) for scales in SCALE_SETS]
    return {" + ".join(crops): crops for crops in (*one, *both)}


def embed_profiles(cfp: Path, out: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """{crop: (P, D) embeddings of length 1 of CFP's profiles}, kept in out."""
    missing = [name for name in names if not (out / f"profiles_{name}.npy").is_file()]
    if missing:
        pictures = read_pictures(cfp)
        landmarks, recogniser = read_landmarks(cfp, pictures), make_recogniser("mobilefacenet")
        cut: dict[str, list[np.ndarray]] = {name: [] for name in missing}
        for row, picture in enumerate(tqdm(pictures, "crops")):
            if picture.profile:
                points, yaw = landmarks.keypoints[row, :, :2], landmarks.poses[row, 1]
                with Image.open(cfp / "Data" / "Images" / picture.path) as image:
                    crops = cut_crops(np.asarray(image.convert("RGB")), crop_transforms(points, yaw, missing))
                for name, crop in zip(missing, crops, strict=True):
                    cut[name].append(crop[None])
        for name in tqdm(missing, "embeddings"):
            found = embed_crops(recogniser, cut[name])
            write_atomically(out / f"profiles_{name}.npy", lambda file, found=found: np.save(file, found))
    return {name: load_rows(out / f"profiles_{name}.npy", (None, None))[:] for name in names}


def summed(benchmark: Benchmark, profiles: dict[str, torch.Tensor], crops: tuple[str, ...]) -> torch.Tensor:
    """(M, D) of length 1: frontal pictures as they are, of profiles the sums of the embeddings of several crops."""
    found = F.normalize(benchmark.faces.src, dim=1)
    side = F.normalize(sum((profiles[name] for name in crops), torch.zeros(())), dim=1)
    return torch.cat((found[: len(found) - len(side)], side))


def similarity(embeddings: torch.Tensor, benchmark: Benchmark) -> torch.Tensor:
    """(N,) cosines of the frontal-profile pairs."""
    pairs = benchmark.pairs["FP"]
    return (embeddings[pairs.first] * embeddings[pairs.second]).sum(1)


def auc_by_fold(cosines: torch.Tensor, benchmark: Benchmark) -> torch.Tensor:
    pairs = benchmark.pairs["FP"]
    return metrics.roc_auc(*metrics.pair_counts(cosines, pairs.same, F.one_hot(pairs.fold, benchmark.folds)))


def choose(auc: dict[str, torch.Tensor], crops: dict[str, tuple[str, ...]], folds: torch.Tensor) -> str:
    """The candidate chosen on some folds; see the top of this file."""
    means = {name: values[folds].mean().item() for name, values in auc.items()}
    best = max(means, key=means.__getitem__)
    near = means[best] - auc[best][folds].std().item() / len(folds) ** 0.5
    good = [name for name in means if means[name] >= near]
    fewest = min(len(crops[name]) for name in good)
    return max((name for name in good if len(crops[name]) == fewest), key=means.__getitem__)


def milliseconds_a_crop(faces: int = 100) -> float:
    """Of one crop and its mirror image, on one core."""
    recogniser = make_recogniser("mobilefacenet")
    crops = np.random.default_rng(0).integers(0, 256, (faces, 1, CROP_SIZE, CROP_SIZE, 3), np.uint8)
    embed_crops(recogniser, crops[:4])
    started = time.perf_counter()
    embed_crops(recogniser, crops)
    return 1e3 * (time.perf_counter() - started) / faces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cfp", type=Path)
    parser.add_argument("out", type=Path, help="folder of the face set, e.g. runs/cfp")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    crops = candidates()
    if not (arguments.out / "pairs_FP.csv").is_file():
        try:
            embed_cfp(arguments.cfp, arguments.out, CfpOptions(workers=arguments.workers))
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            sys.exit(f"error: {error}")
    benchmark = load_benchmark(arguments.out)
    if not benchmark.seen_by.startswith(make_recogniser("mobilefacenet").name + ";"):
        sys.exit(f"error: {arguments.out} was seen by {benchmark.seen_by}; give a folder for mobilefacenet")
    one_by_one = dict.fromkeys(crop for names in crops.values() for crop in names)
    profiles = embed_profiles(arguments.cfp, arguments.out, one_by_one)
    pairs = benchmark.pairs["FP"]
    cosines = {name: similarity(summed(benchmark, profiles, names), benchmark) for name, names in crops.items()}
    auc = {name: auc_by_fold(found, benchmark) for name, found in cosines.items()}
    folds = torch.arange(benchmark.folds)
    chosen = [choose(auc, crops, folds[folds != fold]) for fold in folds]
    cost, rows = milliseconds_a_crop(), {}
    nested = torch.stack([cosines[chosen[fold]][i] for i, fold in enumerate(pairs.fold.tolist())])
    for name, found in {**cosines, "chosen in the other nine folds": nested}.items():
        hits = metrics.fold_hits(found, pairs.same, pairs.fold)
        accuracy = torch.stack([hits[pairs.fold == fold].mean() for fold in folds])
        counts = [len(crops[used]) for used in ([name] if name in crops else chosen)]
        count = sum(counts) / len(counts)
        rows[name] = {
            "crops": f"{count:g}",
            "ms a profile": f"{count * cost:.0f}",
            "FP acc %": f"{100 * accuracy.mean():.2f} ± {100 * accuracy.std():.2f}",
            "AUC %": f"{100 * auc_by_fold(found, benchmark).mean():.2f}",
            "chosen in folds": chosen.count(name) if name in crops else "–",
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("crops of profiles, embeddings summed")
    note = f"CFP frontal-profile, MobileFaceNet, nothing trained; mean ± standard deviation over ten folds; {machine()}"
    plt.close(save_table(table, "cfp_crops", arguments.figures, "How profiles are cropped", note))
    print(f"{note}\n{table.to_string()}\nthe kit's default: {' + '.join(PROFILE_CROPS)}")


if __name__ == "__main__":
    main()
