"""Where the training loop spends its time:  python benchmarks/loop_profile.py [--epochs 2] [--batch_size 32 128]

Trains on the shipped set, without validation, and prints the shares of forward (with the loss), backward, clipping
and optimiser; the rest is what the loop itself costs: drawing batches, indexing, bookkeeping. On a GPU the
operations are waited for, one by one, while they are timed, so that shares are those of the device's work; the line
"without the stopwatch" is the same run without waiting.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from viewdiff_nb.studies.adaptation import FULL_PROFILE, LORA_8, PROJECTION, load_split
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.losses import Objective

CONFIGS = {"full": {}, "LoRA r=8": LORA_8, "LoRA r=8 + projection 8³": LORA_8 | PROJECTION}
PARTS = {
    "forward": (Objective, "__call__"),
    "backward": (torch.Tensor, "backward"),
    "clipping": (nn.utils, "clip_grad_norm_"),
    "optimiser": (torch.optim.AdamW, "step"),
}


def timed(spent: Counter, part: str, function: Callable) -> Callable:
    def call(*arguments, **options):
        _wait()
        started = time.perf_counter()
        result = function(*arguments, **options)
        _wait()
        spent[part] += time.perf_counter() - started
        return result

    return call


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[32, 128])
    arguments = parser.parse_args()
    split = load_split(FULL_PROFILE)
    print(machine())
    folder = tempfile.TemporaryDirectory()
    base = f"{folder.name}/base.pth"  # untrained; a step costs the same
    torch.save(build_model(TrainConfig(), split.train.feature_dim, base=True).state_dict(), base)
    for batch_size in arguments.batch_size:
        for name, options in CONFIGS.items():
            config = TrainConfig(epochs=arguments.epochs, batch_size=batch_size, val_every=10**6, mixup=True)
            config = replace(config, **options, base_model_path=base if options else None)
            spent: Counter = Counter()
            before = {part: getattr(*where) for part, where in PARTS.items()}
            plain = train(config, split.train, split.val, progress=False).train_seconds
            try:
                for part, (owner, attribute) in PARTS.items():
                    setattr(owner, attribute, timed(spent, part, before[part]))
                whole = train(config, split.train, split.val, progress=False).train_seconds
            finally:
                for part, (owner, attribute) in PARTS.items():
                    setattr(owner, attribute, before[part])
            shares = ", ".join(f"{part} {spent[part] / whole:.1%}" for part in PARTS)
            print(
                f"batch {batch_size}, {name}: {shares}; together {sum(spent.values()) / whole:.1%} of {whole:.1f} s; "
                f"without the stopwatch {plain:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
