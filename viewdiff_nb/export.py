"""A model as ONNX:  python -m viewdiff_nb.export MODEL OUT.onnx

MODEL as for viewdiff-predict. The graph reads `embedding` (N, D), `angles` (N, 3) pitch, yaw, roll in radians and
`keypoints_3d` (N, 5, 3), and gives `frontal` (N, D), for any N. It is compared with the model before it is left there.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from viewdiff_nb.files import install_hint, write_atomically
from viewdiff_nb.predict import load_any, width_of

TOLERANCE = 1e-4  # of a prediction's entries, for embeddings of length 1
ROWS = (1, 5, 16)  # samples of the comparison; the last is what the graph is traced with


class Frontal(nn.Module):
    """What is exported: predictions, not residuals."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedding: Tensor, angles: Tensor, keypoints_3d: Tensor) -> Tensor:
        return self.model(embedding, angles, keypoints_3d, return_residual=False)


def examples(rows: int, width: int) -> dict[str, Tensor]:
    """Random inputs with every |yaw| among them."""
    generator = torch.Generator().manual_seed(rows)
    angles = torch.rand(rows, 3, generator=generator) - 0.5
    angles[:, 1] = torch.linspace(-1.57, 1.57, rows)
    embedding = nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)
    return {"embedding": embedding, "angles": angles, "keypoints_3d": torch.randn(rows, 5, 3, generator=generator)}


def export_onnx(model: nn.Module, path: str | Path) -> float:
    """Write a model that reads views singly; returns the largest difference between ONNX Runtime and torch.

    Raises:
        ImportError: without ONNX.
        ValueError: if it cannot be exported, or gives other numbers; nothing is left.
        OSError: if the file cannot be written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx.export needs it)
    except ImportError as error:
        raise ImportError(f"the export needs ONNX: {install_hint('onnx')} ({error})") from error
    width, frontal = width_of(model), Frontal(model).eval()
    batch = torch.export.Dim("batch", min=1, max=2**20)
    given = examples(ROWS[-1], width)
    try:
        program = torch.onnx.export(
            frontal,
            (),
            kwargs=given,
            dynamo=True,
            verbose=False,
            dynamic_shapes={name: {0: batch} for name in given},
            output_names=["frontal"],
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"torch cannot export this model: {str(error).splitlines()[0]}") from error
    assert program is not None
    content = program.model_proto.SerializeToString()
    session, worst = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]), 0.0
    for rows in ROWS:
        inputs = examples(rows, width)
        (found,) = session.run(["frontal"], {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            worst = max(worst, (torch.from_numpy(found) - frontal(**inputs)).abs().max().item())
    if not worst <= TOLERANCE:
        raise ValueError(f"ONNX Runtime is off by {worst:.2g}, more than {TOLERANCE:g}; nothing was written")
    write_atomically(path, lambda file: file.write(content))
    return worst


def export_file(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    drop_in: bool = True,
) -> str:
    """Write OUT; returns what to say of it.

    Args:
        model: as for viewdiff-predict.
        out: the .onnx file.
        drop_in: keep a recogniser's gallery and threshold, or give the network's whole answer.
    """
    if out.suffix != ".onnx":
        raise ValueError(f"OUT must be an .onnx file, got {out}")
    network, _ = load_any(model, drop_in)
    worst = export_onnx(network, out)
    return f"{out}: {out.stat().st_size / 1e6:.1f} MB, at most {worst:.1e} from torch"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    read = partial(tyro.cli, prog="python -m viewdiff_nb.export", description=__doc__, use_underscores=True)
    try:
        print(read(export_file, args=arguments))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
