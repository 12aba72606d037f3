"""Execute the notebooks:  python benchmarks/reproduce.py [--fast] [NOTEBOOK ...]

The full run rewrites the notebooks and figures/. With --fast, the smoke run, everything goes to runs/fast.
Finished training runs are reused from runs/; delete that folder to start afresh.
"""

import argparse
import os
import sys
import time
from pathlib import Path

WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar: nothing to see without its kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all in notebooks/")
    parser.add_argument("--fast", action="store_true", help="less work, the same story")
    arguments = parser.parse_args()
    if arguments.fast:
        os.environ["FAST"] = "1"  # read by viewdiff_nb.files, here and in the kernels
    os.environ["VIEWDIFF_NB_STATIC"] = "1"  # explorers leave pictures, since nobody can move them
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    from viewdiff_nb.files import FIGURES, PROJECT, RUNS, writable_folder

    paths = arguments.notebooks or sorted((PROJECT / "notebooks").glob("*.ipynb"))
    targets = {path: RUNS / "fast" / "notebooks" / path.name if arguments.fast else path for path in paths}
    if not arguments.notebooks and not arguments.fast and not (RUNS / "cfp" / "pairs_FP.csv").is_file():
        real = next(path for path in paths if path.name == "06_real_faces.ipynb")
        targets[real] = RUNS / "notebooks" / real.name  # on the stand-in; the shipped one shows CFP
    try:
        for folder in {RUNS, FIGURES, *(target.parent for target in targets.values())}:
            writable_folder(folder)
    except OSError as error:
        sys.exit(f"error: {error} (VIEWDIFF_NB_RUNS names the folder of results)")
    started = time.monotonic()
    for path, target in targets.items():
        notebook = nbformat.read(path, as_version=4)
        begun = time.monotonic()
        print(f"{path.name} ...", flush=True)
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            store_widget_state=False,
            resources={"metadata": {"path": str(path.parent)}},
        )
        try:
            client.execute()
        except CellExecutionError as error:
            sys.exit(f"{path.name} failed:\n{error}")
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # time stamps, new with every run
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        nbformat.write(notebook, target)
        print(f"{path.name} done in {time.monotonic() - begun:.0f} s: {target}", flush=True)
    print(f"all done in {(time.monotonic() - started) / 60:.1f} min")


if __name__ == "__main__":
    main()
