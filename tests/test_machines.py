import pandas as pd
import pytest
import torch

from viewdiff_nb.studies.benchmark import gpu_note, recognition_on_both, speed_on_both


@pytest.fixture
def stored(tmp_path):
    """Results of a GPU: one model's rates, and steps of three configurations."""
    pd.DataFrame({"model": ["full", "raw"], "all": ["0.9 ± 0.1", "0.6"], "75-90": ["0.7 ± 0.2", "0.1"]}).to_csv(
        tmp_path / "table4_rank1.csv", index=False
    )
    rows = [
        ("bf16", "eager", "full", 20.0),
        ("bf16", "graph", "full", 2.0),
        ("bf16", "eager", "LoRA", 25.0),
        ("bf16", "graph", "LoRA", 1.6),
        ("fp16", "eager", "LoRA", 99.0),
        ("bf16", "compiled", "16³", 99.0),
    ]
    table = pd.DataFrame(rows, columns=["precision", "mode", "name", "ms"])
    table.assign(batch_size=32, machine="some GPU").to_csv(tmp_path / "speed.csv", index=False)
    return tmp_path


def test_rates_stand_side_by_side(stored, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    pd.DataFrame({"model": ["raw", "new"], "all": ["0.61", "0.95"], "75-90": ["0.05", "0.8"]}).to_csv(
        here / "table4_rank1.csv", index=False
    )
    table = recognition_on_both(here, "rank1", folder=stored)
    assert list(table) == ["all, here", "all, GPU", "75-90, here", "75-90, GPU"]
    assert table.loc["raw"].tolist() == ["0.61", "0.6", "0.05", "0.1"]
    assert table.loc["new"].tolist() == ["0.95", "–", "0.8", "–"]


def test_steps_stand_side_by_side(stored):
    measured = pd.DataFrame(
        {
            "batch_size": [32, 32, 32, 32, 128],
            "amp": [True, True, True, False, True],
            "name": ["full", "LoRA", "16³", "LoRA", "LoRA"],
            "ms": [40.0, 32.0, 50.0, 1.0, 1.0],
        }
    )
    table = speed_on_both(measured, 32, stored)
    assert list(table.index) == ["full", "LoRA"]
    assert table.loc["LoRA"].tolist() == ["32", "1.25x", "25", "0.80x", "1.6", "1.25x"]


def test_the_shipped_results_can_be_read():
    rates, _, steps = gpu_note().partition("; training steps: ")
    assert "20 seeds" in rates and "NVIDIA H100" in rates and "NVIDIA H200" in steps
    measured = pd.DataFrame(
        {"batch_size": 128, "amp": True, "name": ["full fine-tuning", "LoRA r=8"], "ms": [2.0, 1.0]}
    )
    assert speed_on_both(measured, 128).loc["LoRA r=8", "here, speed"] == "2.00x"
    assert torch.tensor([float(v) for v in speed_on_both(measured, 128)["GPU, graph, ms"]]).gt(0).all()
