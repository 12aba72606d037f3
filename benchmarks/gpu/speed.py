"""Speed, memory and roofline of a training step:  python benchmarks/gpu/speed.py OUT.csv [--batches 32 128 ...]

Every batch size and precision is a group, whose configurations take turns. Modes: eager; graph, the whole step
captured as one CUDA graph, as the trainer does with use_cuda_graph; compiled, model and loss by torch.compile; and
both. Names: the kit's configurations, "PEFT LoRA r=8" (peft's LoRA on the same linear layers of the same base), and
"plain ..." (plain.py).

Rows are written as they come. A step that does not fit, or fails, is a row with its error; so is a group that the time
did not reach. tflops and gbytes_per_s are what a step achieves: its matrix products and convolutions, and the bytes
that it moves at least (`CountedStep.traffic`), over its time. OUT_ceilings.csv beside OUT.csv has the rates of a large
matrix product and of a large copy on the same machine.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from plain import PlainTransformer
from steps import CapturedStep, CountedStep, attempt_side_by_side
from torch import nn

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.studies.adaptation import COMMON, FULL_PROFILE, load_split
from viewdiff_nb.studies.benchmark import machine, step_config
from viewdiff_nb.training.checkpoint import build_model
from viewdiff_nb.training.devices import choose_device

AMP = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = (
    "full fine-tuning",
    "LoRA r=8",
    "LoRA r=8 + 3-D projection",
    "LoRA r=8 + 3-D projection 16³",
    "LoRA r=8 + prior",
)
AT_ONCE = ", at once"  # the voxels of a large batch rendered at once instead of in turns
ONE_BY_ONE = 16384  # from this batch on, modes are measured one after the other: a graph keeps its memory
FIRST_LARGE = 2048  # batches that are rendered in turns at both resolutions
PEFT = "PEFT LoRA r=8"
PLAIN = {
    "plain full": {},
    "plain LoRA r=8": {"rank": 8},
    "plain LoRA r=8 + projection": {"rank": 8, "voxel_resolution": 8},
}
NAMES = (*OURS[:3], OURS[2] + AT_ONCE, OURS[3], OURS[3] + AT_ONCE, OURS[4], PEFT, *PLAIN)
COLUMNS = [
    "batch_size",
    "precision",
    "mode",
    "name",
    "ms",
    "ms_low",
    "ms_high",
    "memory_mb",
    "tflops",
    "gbytes_per_s",
    "gflop",
    "gbyte",
    "built_s",
    "rounds",
    "machine",
    "error",
]
MODES = ("eager", "graph", "compiled", "compiled graph")


def build(name: str, mode: str, faces: FaceViews, batch_size: int, precision: str) -> CountedStep | CapturedStep:
    """The step of one cell; fails if there is not memory enough."""
    if name in PLAIN:
        torch.manual_seed(0)
        config = replace(COMMON, lr=1e-4)
        step = CountedStep(
            config, faces, batch_size, AMP[precision], PlainTransformer(**PLAIN[name], dropout=COMMON.dropout)
        )
    elif name == PEFT:
        step = CountedStep(COMMON, faces, batch_size, AMP[precision], peft_model(faces.feature_dim))
    else:
        step = CountedStep(step_config(name.removesuffix(AT_ONCE)), faces, batch_size, AMP[precision])
        if name.endswith(AT_ONCE):
            step.model.projection.in_turns = False
    if "compiled" in mode:
        step.compile()
        step()
    return CapturedStep(step) if "graph" in mode else step


def peft_model(feature_dim: int) -> nn.Module:
    """The base with peft's LoRA of rank 8 on the four linear layers of every attention."""
    torch.manual_seed(0)
    base = build_model(COMMON, feature_dim, base=True)
    nn.init.normal_(base.output.weight, std=0.02)
    targets = [
        f"blocks.{i}.attention.{part}" for i in range(len(base.blocks)) for part in ("query", "key", "value", "out")
    ]
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=targets))


def belongs(name: str, mode: str, batch_size: int, precision: str) -> bool:
    """Whether a cell is worth its time."""
    if "compiled" in mode:
        return name in OURS[:3]
    if precision == "fp32":  # what tf32 is to be compared with
        return name in (OURS[0], OURS[1])
    if name.endswith(AT_ONCE):
        return batch_size >= FIRST_LARGE
    if OURS[3] in name:  # in so many turns that a step takes seconds
        return batch_size <= FIRST_LARGE
    return name not in PLAIN or mode == "eager"


def counted(make: Callable[[], CountedStep]) -> dict[str, float]:
    """Operations and bytes of a step, counted on an eager one; empty if that does not fit."""
    try:
        step = make()
        return {"operations": step.operations(), "traffic": step.traffic()}
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"not counted: {str(error).splitlines()[0][:100]}", flush=True)
        return {}


def group(
    faces: FaceViews, batch_size: int, precision: str, names: list[str], modes: list[str], rounds: int, seconds: float
) -> list[dict]:
    """The rows of one batch size and precision."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch._dynamo.reset()
    cells = [(mode, name) for name in names for mode in modes if belongs(name, mode, batch_size, precision)]
    once = dict.fromkeys(name for _, name in cells)
    work = {name: counted(partial(build, name, "eager", faces, batch_size, precision)) for name in once}
    _release()
    built: dict[tuple[str, str], float] = {}

    def timed(mode: str, name: str) -> CountedStep | CapturedStep:
        started = time.perf_counter()
        step = build(name, mode, faces, batch_size, precision)
        built[mode, name] = time.perf_counter() - started
        return step

    found = {}
    for part in [modes] if batch_size < ONE_BY_ONE else [[mode] for mode in modes]:
        makers = {cell: partial(timed, *cell) for cell in cells if cell[0] in part}
        found |= attempt_side_by_side(makers, rounds, seconds=seconds)
        _release()
    rows = []
    for (mode, name), timing in found.items():
        row = {"batch_size": batch_size, "precision": precision, "mode": mode, "name": name} | timing.row()
        row |= {"built_s": built.get((mode, name)), "rounds": len(timing.seconds)}
        if not timing.error and work[name]:
            row["tflops"] = work[name]["operations"] / row["ms"] / 1e9
            row["gbytes_per_s"] = work[name]["traffic"] / row["ms"] / 1e6
            row |= {"gflop": work[name]["operations"] / 1e9, "gbyte": work[name]["traffic"] / 1e9}
        rows.append(row)
    return rows


def ceilings(device: torch.device) -> pd.DataFrame:
    """Rates of large matrix products and of a large copy (bytes read and written), medians of ten."""
    size, length = (8192, 2**31) if device.type == "cuda" else (512, 2**20)
    rows = []
    for precision, amp in AMP.items():
        dtype = amp or torch.float32
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rate = 2 * size**3 / _median(lambda a=a, b=b: a @ b)
        rows.append({"what": f"{precision} matrix product", "tflops": rate / 1e12})
    source, target = (torch.empty(length, dtype=torch.uint8, device=device).random_() for _ in range(2))
    rows.append({"what": "copy", "gbytes_per_s": 2 * length / _median(lambda: target.copy_(source)) / 1e9})
    return pd.DataFrame(rows)


def _median(action: Callable) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    spent = []
    for _ in range(13):
        wait()
        started = time.perf_counter()
        action()
        wait()
        spent.append(time.perf_counter() - started)
    return sorted(spent[3:])[5]


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 2048, 128, 16384, 512, 8192])
    parser.add_argument("--precisions", nargs="+", choices=AMP, default=["bf16", "tf32", "fp16", "fp32"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager", "graph"])
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rounds", type=int, default=9, help="at most")
    parser.add_argument("--round-seconds", type=float, default=8, help="of a group; no further round begins after that")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further group begins after that")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    started, device, rows = time.perf_counter(), choose_device(arguments.device), []
    faces = load_split(FULL_PROFILE).train.to(device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    limits = ceilings(device)
    limits["machine"] = machine(arguments.device)
    limits.to_csv(arguments.out.with_name(f"{arguments.out.stem}_ceilings.csv"), index=False)
    print(limits.drop(columns="machine").round(1).to_string(), flush=True)
    _release()
    for mode in set(arguments.modes) & {"eager", "graph"}:  # what is set up once should stand in no row
        attempt_side_by_side({mode: partial(build, OURS[0], mode, faces, 32, "bf16")}, rounds=1)
    for batch_size in arguments.batches:
        for precision in arguments.precisions:
            spent = time.perf_counter() - started
            if spent > arguments.seconds:
                new = [
                    {
                        "batch_size": batch_size,
                        "precision": precision,
                        "mode": mode,
                        "name": name,
                        "error": "not run: the time was over",
                    }
                    for name in arguments.names
                    for mode in arguments.modes
                    if belongs(name, mode, batch_size, precision)
                ]
            else:
                new = group(
                    faces,
                    batch_size,
                    precision,
                    arguments.names,
                    arguments.modes,
                    arguments.rounds,
                    arguments.round_seconds,
                )
            _release()
            rows += new
            table = pd.DataFrame(rows).reindex(columns=COLUMNS)
            table["machine"] = machine(arguments.device)
            table.to_csv(arguments.out, index=False, float_format="%.6g")
            print(f"batch {batch_size}, {precision}, {time.perf_counter() - started:.0f} s", flush=True)
            for row in new:
                what = row.get("error") or f"{row['ms']:9.3f} ms {row['memory_mb']:9.0f} MB"
                print(f"   {row['mode']:14s} {row['name']:40s} {what}", flush=True)


if __name__ == "__main__":
    main()
