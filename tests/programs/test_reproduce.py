import os
import subprocess
import sys

import reproduce


def test_a_folder_that_cannot_be_written_to_is_found_before_any_notebook_runs(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, reproduce.__file__, "--fast"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VIEWDIFF_NB_RUNS": str(tmp_path / "file/runs")},
    )
    assert done.returncode == 1 and ".ipynb" not in done.stdout
    assert "error: cannot write to" in done.stderr and "VIEWDIFF_NB_RUNS" in done.stderr
    assert "Traceback" not in done.stderr
