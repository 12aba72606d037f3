"""What was measured here, beside what was measured on a GPU (data/results/gpu)."""

from pathlib import Path

import pandas as pd

from ..paths import GPU_RESULTS

MODES = ("eager", "graph")  # a CUDA graph replays a whole step


def recognition_on_both(
    here: Path, rate: str, where: tuple[str, ...] = ("all", "75-90"), folder: Path = GPU_RESULTS
) -> pd.DataFrame:
    """A rate of every model on both machines: "mean ± interval" here, and on the GPU with its own seeds.

    Args:
        here: folder with the table4_RATE.csv that notebook 04 wrote.
        where: yaw bins.
    """
    ours, theirs = (pd.read_csv(path / f"table4_{rate}.csv", index_col="model", dtype=str) for path in (here, folder))
    both = {}
    for name in where:
        both[f"{name}, here"], both[f"{name}, GPU"] = ours[name], theirs[name]
    return pd.DataFrame(both).reindex(ours.index).fillna("–")


def speed_on_both(measured: pd.DataFrame, batch_size: int, folder: Path = GPU_RESULTS) -> pd.DataFrame:
    """Milliseconds of a mixed-precision step on both machines, and the speed against the first configuration.

    Args:
        measured: of `benchmark.speed_and_memory`.

    Returns:
        one row per configuration of measured that was measured on the GPU, too.
    """
    here = measured[(measured["batch_size"] == batch_size) & measured["amp"]].set_index("name")["ms"]
    stored = pd.read_csv(folder / "speed.csv")
    stored = stored[(stored["batch_size"] == batch_size) & (stored["precision"] == "bf16") & stored["mode"].isin(MODES)]
    there = stored.pivot(index="name", columns="mode", values="ms").reindex(here.index).dropna(how="all")
    columns = {"here": here[there.index]} | {f"GPU, {mode}": there[mode] for mode in MODES}
    table = {}
    for name, ms in columns.items():
        table[f"{name}, ms"] = [f"{value:.3g}" for value in ms]
        table[f"{name}, speed"] = [f"{ms.iloc[0] / value:.2f}x" for value in ms]
    return pd.DataFrame(table, index=there.index.rename("configuration"))


def gpu_note(folder: Path = GPU_RESULTS) -> str:
    """Seeds, interval and machine of the rates that a GPU gave, and the machine of the steps, in words."""
    steps = pd.read_csv(folder / "speed.csv", usecols=["machine"])["machine"].iloc[0]
    return f"{(folder / 'claims.md').read_text().strip().splitlines()[-1]}; training steps: {steps}"
