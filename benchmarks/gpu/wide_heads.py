"""Attention of wide heads on a GPU, fused kernel against plain products:  python benchmarks/gpu/wide_heads.py OUT.csv

Both ways in one call, one after the other; see `modules.attention.weighted_tokens`.
"""

import sys
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from speed import OURS, build
from steps import attempt_side_by_side

from viewdiff_nb.modules import attention
from viewdiff_nb.studies.adaptation import FULL_PROFILE, load_split
from viewdiff_nb.studies.benchmark import machine

WAYS = {"fused": 10**9, "products": attention.FUSED_WIDTH}  # the width up to which the fused kernel is taken


def main() -> None:
    faces, rows = load_split(FULL_PROFILE).train.to("cuda"), []
    torch.set_float32_matmul_precision("high")
    for batch_size in (32, 2048, 8192):
        for precision in ("bf16", "tf32"):
            for mode in ("graph", "eager"):
                for way, width in WAYS.items():
                    attention.FUSED_WIDTH = width
                    makers = {name: partial(build, name, mode, faces, batch_size, precision) for name in OURS[:2]}
                    for name, timing in attempt_side_by_side(makers, rounds=5, seconds=2.0).items():
                        rows.append(
                            {
                                "batch_size": batch_size,
                                "precision": precision,
                                "mode": mode,
                                "attention": way,
                                "name": name,
                            }
                            | timing.row()
                        )
                    torch.cuda.empty_cache()
    table = pd.DataFrame(rows).assign(machine=machine())
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(sys.argv[1], index=False, float_format="%.6g")
    print(table.drop(columns="machine").to_string())


if __name__ == "__main__":
    main()
