"""The model in one picture:  python benchmarks/draw_architecture.py [FOLDER]       by default figures/

Boxes of the base in grey, what each of the five modules adds in a colour of its own.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from viewdiff_nb.files import FIGURES
from viewdiff_nb.plots import COLOURS

BASE, LORA, PROJECTION, CROSS, PRIOR = "0.93", *(COLOURS[i] for i in (0, 1, 2, 4))
BOXES = {  # name: (x, y, width, height, text, colour)
    "embedding": (0.1, 3.1, 1.9, 0.9, "side-view embedding x\n(B, D)", "white"),
    "pose": (0.1, 1.6, 1.9, 0.9, "head pose\npitch, yaw, roll (B, 3)", "white"),
    "keypoints": (0.1, 0.1, 1.9, 0.9, "five 3-D keypoints\n(B, 5, 3)", "white"),
    "feature": (2.7, 3.1, 1.7, 0.9, "feature token h\nlinear, (B, d)", BASE),
    "memory": (2.7, 1.0, 1.7, 1.2, "memory: 6 tokens\npose, each keypoint\n(B, 6, d)", BASE),
    "projection": (
        2.5,
        4.7,
        4.4,
        1.0,
        "3-D face projection: h at the keypoints → voxels n³\n→ 3-D CNN → turned to frontal → rendered → + h",
        PROJECTION,
    ),
    "cross": (5.2, 3.1, 1.7, 0.9, "cross-view attention\nn views of a person", CROSS),
    "attention": (
        7.6,
        3.1,
        2.4,
        0.9,
        "attention over h and memory\nLoRA of query, key, value,\nconditioned on the pose",
        LORA,
    ),
    "mlp": (7.6, 1.6, 2.4, 0.9, "MLP (LoRA on request):\nLoRA linear layers", LORA),
    "blocks": (7.45, 1.25, 2.7, 3.1, "", "none"),
    "output": (10.8, 3.1, 1.6, 0.9, "output: residual r\nx + r ≈ frontal", BASE),
    "prior": (
        10.6,
        1.2,
        2.0,
        1.2,
        "prior preservation:\nstay near the frozen\nbase's own r\non near-frontal views",
        PRIOR,
    ),
}
ARROWS = (  # from a side of a box to a side of another
    ("embedding", "right", "feature", "left"),
    ("pose", "right", "memory", "left"),
    ("keypoints", "right", "memory", "left"),
    ("feature", "right", "cross", "left"),
    ("feature", "top", "projection", "bottom at 3.55"),
    ("projection", "bottom at 6.05", "cross", "top"),
    ("cross", "right", "attention", "left"),
    ("memory", "right", "blocks", "left at 1.6"),
    ("attention", "bottom", "mlp", "top"),
    ("blocks", "right at 3.55", "output", "left"),
    ("output", "bottom", "prior", "top"),
)


def point(name: str, side: str) -> tuple[float, float]:
    x, y, width, height, *_ = BOXES[name]
    side, _, at = side.partition(" at ")
    across, up = (float(at) if at else middle for middle in (x + width / 2, y + height / 2))
    return {"left": (x, up), "right": (x + width, up), "top": (across, y + height), "bottom": (across, y)}[side]


def draw(ax: Axes) -> None:
    for name, (x, y, width, height, text, colour) in BOXES.items():
        edge = "0.4" if colour in ("white", BASE) else colour if colour != "none" else "0.6"
        fill = colour if isinstance(colour, str) else (*colour, 0.22)
        style = "--" if name == "blocks" else "-"
        shape = f"round,pad=0,rounding_size={0.08 if name != 'blocks' else 0.02}"
        ax.add_patch(
            FancyBboxPatch((x, y), width, height, shape, facecolor=fill, edgecolor=edge, linestyle=style, linewidth=1.3)
        )
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)
    x, y, width, *_ = BOXES["blocks"]
    ax.text(
        x + width / 2, y - 0.08, "× num_layers, pre-norm, residual", ha="center", va="top", fontsize=8.5, color="0.3"
    )
    for start, side, end, other in ARROWS:
        arrow = {"arrowstyle": "-|>", "color": "0.35", "linewidth": 1.1, "shrinkA": 1, "shrinkB": 1}
        ax.annotate("", point(end, other), point(start, side), arrowprops=arrow)
    ax.set(xlim=(0, 12.7), ylim=(-0.1, 5.9), aspect="equal")
    ax.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FIGURES)
    arguments = parser.parse_args()
    fig, ax = plt.subplots(figsize=(11.4, 5.4), layout="constrained")
    draw(ax)
    fig.savefig(arguments.folder / "architecture.png", dpi=140)


if __name__ == "__main__":
    main()
