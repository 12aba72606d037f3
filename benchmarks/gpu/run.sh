#!/usr/bin/env bash
# What a GPU is asked, step by step; results go to the folder OUT. Without steps all of them.
#   OUT=folder bash benchmarks/gpu/run.sh [tests] [speed] [compiled] [training] [controls] [one_pass] [loop] [grid]
#   OUT=folder bash benchmarks/gpu/run.sh several        (two GPUs against one)
# Time limits in seconds: SPEED_SECONDS, COMPILED_SECONDS, CONTROLS_SECONDS. What was not reached is said so in the tables;
# controls go on where they were when they are started again. Trainings side by side: WORKERS.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?a folder for the results}"
mkdir -p "$OUT"
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1 VIEWDIFF_NB_RUNS=${VIEWDIFF_NB_RUNS:-$OUT/runs}
PYTHON=${PYTHON:-python3}
for step in "${@:-tests speed compiled training controls one_pass loop grid}"; do
    for part in $step; do
        echo "== $part"
        case $part in
        tests)
            timeout 400 $PYTHON -m pytest -q -p no:cacheprovider tests/test_devices.py tests/test_behaviour.py \
                tests/test_stacked.py tests/test_one_pass.py tests/test_resume.py tests/test_benchmark.py \
                tests/test_transformer.py tests/test_attention.py -k "devices or cuda or float16" 2>&1 | tee "$OUT/tests.txt" | tail -25
            ;;
        speed)
            timeout $((${SPEED_SECONDS:-900} + 60)) $PYTHON benchmarks/gpu/speed.py "$OUT/speed.csv" \
                --seconds "${SPEED_SECONDS:-900}"
            ;;
        compiled)
            timeout $((${COMPILED_SECONDS:-300} + 60)) $PYTHON benchmarks/gpu/speed.py "$OUT/compiled.csv" \
                --seconds "${COMPILED_SECONDS:-300}" --batches 32 2048 128 --precisions bf16 \
                --modes eager graph compiled "compiled graph" \
                --names "full fine-tuning" "LoRA r=8" "LoRA r=8 + 3-D projection"
            ;;
        training) timeout 240 $PYTHON benchmarks/gpu/training.py "$OUT/training.csv" --rounds 2 ;;
        controls) timeout $((${CONTROLS_SECONDS:-3600})) $PYTHON benchmarks/controls.py "$OUT/controls" --workers "${WORKERS:-15}" ;;
        one_pass)
            for precision in fp32 bf16; do
                flag=$([ $precision = bf16 ] && echo --use_amp)
                timeout 240 $PYTHON benchmarks/one_pass.py --adapters 8 32 128 --alone 2 --rounds 2 $flag \
                    --out "$OUT/one_pass_$precision.csv"
                timeout 240 $PYTHON benchmarks/one_pass.py --adapters 8 32 --alone 2 --rounds 2 --batches 100 $flag \
                    --use_cuda_graph --out "$OUT/one_pass_${precision}_graph.csv"
            done
            ;;
        loop) timeout 240 $PYTHON benchmarks/loop_profile.py --epochs 1 --batch_size 32 | tee "$OUT/loop.txt" ;;
        several) timeout 400 $PYTHON benchmarks/gpu/several.py "$OUT/several" | tee "$OUT/several.txt" ;;
        grid) $PYTHON benchmarks/gpu/grid.py "$OUT/grid" | tee "$OUT/grid.txt" ;;
        *) echo "unknown step $part"; exit 2 ;;
        esac
    done
done
