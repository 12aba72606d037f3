#!/usr/bin/env bash
# What a GPU is asked, step by step; results go to the folder OUT.
#   OUT=folder bash benchmarks/gpu/run.sh [tests] [one_pass] [loop] [grid]      by default all, about 20 minutes on an H200
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?a folder for the results}"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 VIEWDIFF_NB_RUNS=${VIEWDIFF_NB_RUNS:-$OUT/runs}
PYTHON=${PYTHON:-python3}
for step in "${@:-tests one_pass loop grid}"; do
    for part in $step; do
        echo "== $part"
        case $part in
        tests)
            $PYTHON -m pytest -q -p no:cacheprovider -k "cuda or float16" tests/test_behaviour.py tests/test_stacked.py \
                tests/test_together.py tests/test_resume.py 2>&1 | tee "$OUT/tests.txt" | tail -5
            ;;
        one_pass)
            for precision in fp32 bf16; do
                flag=$([ $precision = bf16 ] && echo --use_amp)
                timeout 240 $PYTHON benchmarks/one_pass.py --adapters 8 32 128 --alone 2 --rounds 2 $flag \
                    --out "$OUT/one_pass_$precision.csv"
            done
            ;;
        loop) timeout 240 $PYTHON benchmarks/loop_profile.py --epochs 1 --batch_size 32 | tee "$OUT/loop.txt" ;;
        grid) $PYTHON -m viewdiff_nb.studies.ablation --backend sequential --out "$OUT" ;;
        *) echo "unknown step $part"; exit 2 ;;
        esac
    done
done
