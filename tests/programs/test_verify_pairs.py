import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import verify_pairs
from PIL import Image
from sklearn.metrics import roc_auc_score

from viewdiff_nb.faces.pairs import pairs_in_order
from viewdiff_nb.faces.views import FaceDataError

PROGRAM = Path(verify_pairs.__file__)


def embeddings(pairs=400, noise=0.8):
    rng = np.random.default_rng(0)
    first, same = rng.standard_normal((pairs, 16)), np.arange(pairs) % 2
    other = rng.standard_normal((pairs, 16))
    second = np.where(same[:, None] == 1, first, other) + noise * rng.standard_normal((pairs, 16))
    return first.astype(np.float32), second.astype(np.float32), same


def test_three_arrays_are_all_it_takes(tmp_path):
    for name, values in zip(("first", "second", "same"), embeddings(), strict=True):
        np.save(tmp_path / f"{name}.npy", values)
    run = subprocess.run([sys.executable, PROGRAM, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second, same = embeddings()
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    printed = dict(line.rsplit(maxsplit=1) for line in run.stdout.splitlines() if line.startswith(("AUC", "EER")))
    assert float(printed["AUC"]) == pytest.approx(100 * roc_auc_score(same, cosine), abs=0.01)
    assert "TAR at FAR 0.001   too few pairs" in run.stdout and "pairs              400" in run.stdout


def test_rates_are_those_of_the_pairs():
    """Perfect where the pairs are, by chance where pictures are shuffled."""
    first, second, same = embeddings(noise=0.01)
    pairs = pairs_in_order(torch.from_numpy(same).bool())
    stacked = torch.from_numpy(np.stack((first, second), 1).reshape(-1, 16))
    assert verify_pairs.rates(stacked, pairs)["AUC"] == "100.00"
    shuffled = stacked[torch.randperm(len(stacked))]
    assert float(verify_pairs.rates(shuffled, pairs)["AUC"]) == pytest.approx(50, abs=10)


def test_rows_that_do_not_fit_are_refused(tmp_path):
    first, second, same = embeddings()
    for name, values in zip(("first", "second", "same"), (first, second[:-1], same), strict=True):
        np.save(tmp_path / f"{name}.npy", values)
    with pytest.raises(FaceDataError, match=r"needs a row of first and of second .*\(400, 16\), \(399, 16\), \(400,\)"):
        verify_pairs.read_source(tmp_path, None, "mobilefacenet")


class Averages:
    name, feature_dim = "averages", 3

    def embed(self, crops):
        return crops.mean((1, 2)).astype(np.float32)


@pytest.fixture
def crops(tmp_path, monkeypatch):
    """Twenty pictures: both of a pair of one colour if they are the same person."""
    monkeypatch.setattr(verify_pairs, "make_recogniser", lambda name: Averages())
    rng, paths = np.random.default_rng(0), []
    for pair in range(10):
        for side in range(2):
            colour = rng.integers(0, 256, 3) if side == 0 or pair % 2 else colour  # noqa: F821
            path = tmp_path / f"{pair}_{side}.png"
            Image.fromarray(np.broadcast_to(colour, (112, 112, 3)).astype(np.uint8)).save(path)
            paths.append(path)
    return paths


def test_a_list_as_cplfw_s_and_a_bin_as_insightface_s_say_the_same(tmp_path, crops):
    marks = [int(pair % 2 == 0) for pair in range(10)]
    lines = [f"{path.name} {marks[i // 2]}" for i, path in enumerate(crops)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    encoded = [path.read_bytes() for path in crops]
    (tmp_path / "set.bin").write_bytes(pickle.dumps((encoded, [bool(mark) for mark in marks])))
    listed, pairs = verify_pairs.read_source(tmp_path / "pairs.txt", None, "any")
    binned, same_pairs = verify_pairs.read_source(tmp_path / "set.bin", None, "any")
    assert torch.equal(listed, binned) and torch.equal(pairs.same, same_pairs.same)
    assert Image.open(BytesIO(encoded[0])).size == (112, 112)
    assert verify_pairs.rates(listed, pairs)["AUC"] == "100.00"
