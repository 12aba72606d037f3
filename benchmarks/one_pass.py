"""Adapters trained in one pass against the same trained one by one:  python benchmarks/one_pass.py [--adapters 1 8]

Both train for real on the shipped set, from the same frozen (untrained) base, in turns within one process; what is
printed is the median ratio over rounds. Beside it stands the roofline: the multiplications that the frozen base asks
for, forward and backward through activations, at the rate of a large matrix product on the same machine in the same
run. No way of batching can make the base cheaper than that.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from viewdiff_nb.studies.adaptation import FULL_PROFILE, LORA_8, PROJECTION, load_split
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import choose_device
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.one_pass import train_together

CASES = {"LoRA r=8": LORA_8, "LoRA r=8 + projection 8³": LORA_8 | PROJECTION}


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    size, count = (8192, 10) if device.type == "cuda" else (1024, 20)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count * 2 * size**3 / (time.perf_counter() - started)


def frozen_operations(config: TrainConfig, feature_dim: int) -> float:
    """Floating-point operations of the frozen matrices for one sample: forward, and backward through activations."""
    model = build_model(config, feature_dim, base=True)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "encoder" not in name}
    return 2 * 2 * sum(m.weight.numel() for m in linear.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", type=int, default=8, help="runs trained one by one, to know the price of one")
    parser.add_argument("--use_amp", action="store_true")
    parser.add_argument("--use_cuda_graph", action="store_true", help="both ways; with many --batches")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    split, device = load_split(FULL_PROFILE), choose_device()
    side = (split.train.abs_yaw >= 45).nonzero()[:, 0]
    few = split.val.select(torch.arange(20))  # validated once a run, outside the time
    faces = split.train.where(side[: arguments.batch_size * arguments.batches])
    dtype = torch.bfloat16 if arguments.use_amp else torch.float32
    rate = product_rate(device, dtype)
    print(f"{machine()}; a large {str(dtype)[6:]} product runs at {rate / 1e9:.0f} GFLOP/s", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = f"{folder}/base.pth"
        torch.save(build_model(TrainConfig(), faces.feature_dim, base=True).state_dict(), base)
        for name, options in CASES.items():
            config = TrainConfig(
                epochs=1,
                batch_size=arguments.batch_size,
                val_every=10**6,
                dropout=0.2,
                mixup=True,
                base_model_path=base,
                use_amp=arguments.use_amp,
                use_cuda_graph=arguments.use_cuda_graph,
            )
            config = replace(config, **options)
            for count in arguments.adapters:
                configs = [replace(config, seed=seed, rank=(4, 8, 16)[seed % 3]) for seed in range(count)]
                alone, together = [], []
                for _ in range(arguments.rounds + 1):  # the first warms up
                    spent = [train(c, faces, few, progress=False).train_seconds for c in configs[: arguments.alone]]
                    alone.append(sum(spent) / len(spent) * count)
                    together.append(sum(r.train_seconds for r in train_together(configs, faces, few)))
                ratio = torch.tensor([t / a for t, a in zip(together[1:], alone[1:], strict=True)]).quantile(0.5).item()
                samples = count * arguments.batch_size * arguments.batches
                floor = samples * frozen_operations(config, faces.feature_dim) / rate
                spent = torch.tensor(together[1:]).quantile(0.5).item()
                rows.append(
                    {
                        "case": name,
                        "adapters": count,
                        "ratio": ratio,
                        "seconds": spent,
                        "roofline_seconds": floor,
                        "cell_steps_per_second": count * arguments.batches / spent,
                        "machine": machine(),
                    }
                )
                if arguments.out:
                    arguments.out.parent.mkdir(parents=True, exist_ok=True)
                    pd.DataFrame(rows).to_csv(arguments.out, index=False)
                print(
                    f"{name}, {count} adapters, batch {arguments.batch_size}: {ratio:.2f} times the time of separate "
                    f"runs; {spent:.2f} s, of which the frozen products need {floor:.2f} s at least",
                    flush=True,
                )


if __name__ == "__main__":
    main()
