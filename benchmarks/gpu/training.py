"""Whole trainings, eager against CUDA graphs:  python benchmarks/gpu/training.py OUT.csv [--batches 32 128 512]

Both train for real on the shipped set (mix-up, dropout, bfloat16 and TF32), in turns within one process. A run's time
is all that its steps took: drawing, indexing, bookkeeping, and with graphs the eager first steps and the recording.
eager_ms and graph_ms are that time over the steps, medians over rounds; pace_ms is the time of further steps, from
graph runs of two lengths, and start_s what the run took beyond steps at that pace.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=400, help="of a graph's run; an eager one has a quarter")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    short, long = arguments.steps // 4, arguments.steps
    split, rows = load_split(FULL_PROFILE), []
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
                    epochs=1,
                    use_amp=True,
                    base_model_path=base if options else None,
                    **options | {"min_yaw": 0.0},
                )
                spent: dict[tuple[bool, int], list[float]] = {}
                for _ in range(arguments.rounds + 1):  # the first warms up
                    for graph, steps in ((False, short), (True, short), (True, long)):
                        faces = split.train.where(torch.arange(batch_size * steps) % len(split.train))
                        run = train(replace(config, use_cuda_graph=graph), faces, few, progress=False)
                        spent.setdefault((graph, steps), []).append(run.train_seconds)
                seconds = {key: torch.tensor(values[1:]).quantile(0.5).item() for key, values in spent.items()}
                pace = (seconds[True, long] - seconds[True, short]) / (long - short)
                row = {
                    "batch_size": batch_size,
                    "name": name,
                    "eager_ms": 1e3 * seconds[False, short] / short,
                    "graph_ms": 1e3 * seconds[True, long] / long,
                    "pace_ms": 1e3 * pace,
                    "start_s": seconds[True, long] - long * pace,
                    "steps": long,
                    "machine": machine(),
                }
                rows.append(row)
                print(
                    f"batch {batch_size}, {name}: {row['eager_ms']:.2f} ms a step, graphs {row['graph_ms']:.2f} "
                    f"({row['pace_ms']:.2f} at pace, after {row['start_s']:.2f} s)",
                    flush=True,
                )
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows).to_csv(arguments.out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
