"""The faults program in small: nothing finished is lost or wrong, and the program finds a job that loses something."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_jobs_survive_kills_full_disks_and_flipped_bits():
    command = [
        sys.executable,
        ROOT / "benchmarks/faults.py",
        "train",
        "grid",
        "predict",
        "--faults",
        "6",
        "--seed",
        "1",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" 0 failed") == 3


BELIEVES = """
import sys
sys.argv = ["faults.py", "counting", "--faults", "15"]
sys.path.insert(0, {folder!r})
import faults
def counting(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "count"
    count = int(path.read_text(encoding="utf-8")) if path.is_file() else 0
    for count in range(count, 40):
        faults.time.sleep(0.005)
        path.write_text(f"{{count + 1:05d}}")
    return faults.digest(path.read_text(encoding="utf-8"))
faults.JOBS["counting"] = counting
faults.main()
"""


def test_a_job_that_believes_a_damaged_file_is_found():
    program = BELIEVES.format(folder=str(ROOT / "benchmarks"))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1 and "counting, fault" in run.stdout, run.stdout + run.stderr
