"""Where the project keeps things, whatever the working directory is."""

import os
from pathlib import Path

FAST = os.environ.get("FAST", "") not in ("", "0")  # the smoke profile: less work, the same story

PROJECT = Path(os.environ.get("VIEWDIFF_NB_HOME", Path(__file__).resolve().parents[1]))
HEADS = PROJECT / "data" / "heads"  # the shipped set of synthetic people
RUNS = Path(os.environ.get("VIEWDIFF_NB_RUNS", PROJECT / "runs"))  # finished runs, reused; not in the repository
FIGURES = RUNS / "fast" / "figures" if FAST else PROJECT / "figures"  # what the notebooks write
