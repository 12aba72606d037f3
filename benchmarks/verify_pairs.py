"""Verification on a list of pairs:  python benchmarks/verify_pairs.py SOURCE [--images FOLDER] [--recogniser NAME]

SOURCE is one of
  a .bin file of InsightFace (lfw.bin, cplfw.bin, cfp_fp.bin, ...): encoded crops and which pairs are the same person;
  a text as CPLFW's pairs_CPLFW.txt: two lines a pair, a picture's name and 1 or 0; --images has the aligned crops;
  a folder with first.npy and second.npy (N, D), embeddings of the pairs' pictures, and same.npy (N,), 1 or 0.

Ten folds in the given order, in each the threshold with the best accuracy on the other nine. Embeddings are compared as
they are: such lists tell neither poses nor who is in the training folds, so nothing is trained on them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from viewdiff_nb import metrics
from viewdiff_nb.faces.pairs import Pairs, open_crop, pairs_in_order, read_insightface_bin, read_picture_pairs
from viewdiff_nb.faces.recogniser import NAMES, make_recogniser
from viewdiff_nb.faces.views import FaceDataError, load_rows

FARS = (1e-2, 1e-3)


def read_source(source: Path, images: Path | None, recogniser: str) -> tuple[torch.Tensor, Pairs]:
    """(2 N, D) embeddings of the pictures, and the pairs of them."""
    if source.is_dir():
        paths = [source / f"{name}.npy" for name in ("first", "second")]
        first, second = (load_rows(path, (None, None), embeddings=True)[:] for path in paths)
        same = torch.from_numpy(np.load(source / "same.npy", allow_pickle=False).astype(np.float64))
        shapes = tuple(first.shape), tuple(second.shape), tuple(same.shape)
        if shapes[0] != shapes[1] or shapes[2] != shapes[0][:1] or not torch.isin(same, torch.tensor((0, 1))).all():
            wanted = "needs a row of first and of second and a number of same a pair, which is 1 or 0"
            raise FaceDataError(f"{source}: {wanted}; got shapes {shapes}")
        return torch.stack((first, second), 1).flatten(0, 1), pairs_in_order(same.bool())
    if source.suffix == ".bin":
        crops, pairs = read_insightface_bin(source)
    else:
        paths, pairs = read_picture_pairs(source, images or source.parent)
        crops = np.stack([open_crop(path, str(path)) for path in paths])
    return torch.from_numpy(make_recogniser(recogniser).embed(crops)), pairs


def rates(embeddings: torch.Tensor, pairs: Pairs) -> dict[str, str]:
    """Accuracy, EER, AUC and TAR, in percent."""
    unit = F.normalize(embeddings, dim=1)
    cosine = (unit[pairs.first] * unit[pairs.second]).sum(1)
    hits = metrics.fold_hits(cosine, pairs.same, pairs.fold)
    accuracy = torch.stack([hits[pairs.fold == fold].mean() for fold in pairs.fold.unique()])
    counts = [count[0] for count in metrics.pair_counts(cosine, pairs.same)]
    found = {
        "pairs": str(len(pairs)),
        "accuracy": f"{100 * accuracy.mean():.2f} ± {100 * accuracy.std():.2f} (over ten folds)",
        "EER": f"{100 * metrics.equal_error_rate(*counts):.2f}",
        "AUC": f"{100 * metrics.roc_auc(*counts):.2f}",
    }
    for far in FARS:
        tar = metrics.tar_at_far(*counts, far=far)
        found[f"TAR at FAR {far:g}"] = "too few pairs" if tar.isnan() else f"{100 * tar:.2f}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--images", type=Path, help="folder of the pictures that a text names; by default the text's")
    parser.add_argument("--recogniser", default="mobilefacenet", help=NAMES)
    arguments = parser.parse_args()
    try:
        found = rates(*read_source(arguments.source, arguments.images, arguments.recogniser))
    except (ValueError, OSError, EOFError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    for name, value in found.items():
        print(f"{name:18} {value}")


if __name__ == "__main__":
    main()
