#!/usr/bin/env bash
# What needs a GPU and is new: the tests' cuda cases, one-pass training, the grid.  OUT=folder bash benchmarks/gpu/first.sh
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 VIEWDIFF_NB_RUNS=${VIEWDIFF_NB_RUNS:-/tmp/viewdiff_runs}
python3 -m pytest -q -p no:cacheprovider -k "cuda or float16" \
    tests/test_behaviour.py tests/test_stacked.py tests/test_together.py tests/test_resume.py 2>&1 | tee "$OUT/tests.txt" | tail -15
python3 benchmarks/one_pass.py --adapters 1 8 32 128 --alone 2 --rounds 2 --out "$OUT/one_pass_fp32.csv"
python3 benchmarks/one_pass.py --adapters 1 8 32 128 --alone 2 --rounds 2 --use_amp --out "$OUT/one_pass_bf16.csv"
timeout "${GRID_SECONDS:-300}" python3 -m viewdiff_nb.studies.ablation --backend sequential --out "$OUT"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
