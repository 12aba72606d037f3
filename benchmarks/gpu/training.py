"""Whole trainings, eager, in CUDA graphs, compiled:  python benchmarks/gpu/training.py OUT.csv [--batches 32 128 512]

All train for real on the shipped set (mix-up, dropout, bfloat16 and TF32), in turns within one process, two epochs. A
mode's _ms is the time of a step of the second epoch, with drawing, indexing and bookkeeping; its _start_s what the
first one took beyond that: eager steps and the recording of a graph, or compilation, compile_s of the first run, and
less of later ones, which find it on the disk. Medians over rounds.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from viewdiff_nb.studies.adaptation import COMMON, FULL_PROFILE, LORA_8, PROJECTION, load_split
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.loop import train

CASES = {
    "full fine-tuning": {},
    "LoRA r=8": LORA_8,
    "LoRA r=8 + 3-D projection": LORA_8 | PROJECTION,
    "LoRA r=8 + prior": LORA_8 | {"use_prior_preservation": True},
}
MODES: dict[str, dict[str, bool]] = {
    "eager": {},
    "graph": {"use_cuda_graph": True},
    "compiled": {"use_cuda_graph": True, "use_compile": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=400, help="of a graph's epoch; an eager one has a quarter")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    split, rows, steps = load_split(FULL_PROFILE), [], arguments.steps
    torch.set_float32_matmul_precision("high")
    few = split.val.select(torch.arange(20))  # validated once a run, outside the time
    with tempfile.TemporaryDirectory() as folder:
        base = f"{folder}/base.pth"  # untrained; a step costs the same
        torch.save(build_model(TrainConfig(), split.train.feature_dim, base=True).state_dict(), base)
        for batch_size in arguments.batches:
            for name, options in CASES.items():
                config = replace(
                    COMMON,
                    batch_size=batch_size,
                    epochs=2,
                    use_amp=True,
                    base_model_path=base if options else None,
                    **options | {"min_yaw": 0.0},
                )
                row = {"batch_size": batch_size, "name": name, "steps": steps}
                spent: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
                for _ in range(arguments.rounds + 1):  # the first warms up
                    for mode, options in MODES.items():
                        count = steps if options else steps // 4
                        faces = split.train.where(torch.arange(batch_size * count) % len(split.train))
                        run = train(replace(config, **options), faces, few, progress=False)
                        first, both = run.history["seconds"]
                        spent[mode].append([1e3 * (both - first) / count, 2 * first - both])
                for mode, found in spent.items():
                    pace, start = torch.tensor(found[1:]).quantile(0.5, dim=0).tolist()
                    row |= {f"{mode}_ms": pace, f"{mode}_start_s": start}
                row |= {"compile_s": spent["compiled"][0][1], "machine": machine()}
                rows.append(row)
                print(
                    f"batch {batch_size}, {name}: {row['eager_ms']:.2f} ms a step, graphs {row['graph_ms']:.2f}, "
                    f"compiled {row['compiled_ms']:.2f} after {row['compile_s']:.1f} s",
                    flush=True,
                )
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows).to_csv(arguments.out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
