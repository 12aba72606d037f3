"""Where the project keeps things, whatever the working directory is."""

import os
from pathlib import Path

FAST = os.environ.get("FAST", "") not in ("", "0")  # the smoke profile: less work, the same story

PROJECT = Path(os.environ.get("VIEWDIFF_NB_HOME", Path(__file__).resolve().parents[1]))
HEADS = PROJECT / "data" / "heads"  # the shipped set of synthetic people
TURNTABLE = PROJECT / "data" / "turntable"  # eight of its test people at every pose of a grid, with pictures
GPU_RESULTS = PROJECT / "data" / "results" / "gpu"  # measured elsewhere, shown beside what is measured here
RUNS = Path(os.environ.get("VIEWDIFF_NB_RUNS", PROJECT / "runs"))  # finished runs, reused; not in the repository
FIGURES = RUNS / "fast" / "figures" if FAST else PROJECT / "figures"  # what the notebooks write


def writable_folder(path: str | Path) -> Path:
    """Create the folder and make sure that files can be written there, before any work is lost."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error}; choose another folder") from error
    return folder


def install_hint(extra: str) -> str:
    """How to install an optional part; no package index has the kit."""
    return f'pip install ".[{extra}]" in the folder of the kit'
