#!/usr/bin/env bash
# What is worth knowing on a machine with a GPU, the most important first, in under ten minutes; safe to stop at any time.
#
#   scripts/gpu_check.sh [--device cpu] [--models qwen3-0.6b,qwen3-8b] [--skip-tests] [--skip-bench]
#
# Logs and figures go to $OUT, else bench/results. --device cpu tries all of it with a tiny model. $PYTHON: which Python.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda models=qwen3-0.6b,qwen3-8b tests=yes bench=yes
while [[ $# -gt 0 ]]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --models) models=$2; shift 2 ;;
        --skip-tests) tests=no; shift ;;
        --skip-bench) bench=no; shift ;;
        *) echo "unknown: $1" >&2; exit 2 ;;
    esac
done
[[ $device == cpu ]] && models=tiny
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
out=${OUT:-bench/results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 GPU_TESTS=$device
failed=0

run() {  # seconds, log, command...
    local seconds=$1 log=$out/$2 began=$SECONDS
    shift 2
    timeout "$seconds" "$@" 2>&1 | tee "$log" | tail -n "${LINES_SHOWN:-60}"
    local status=${PIPESTATUS[0]}
    echo "== $(basename "$log"): exit $status after $((SECONDS - began)) s"
    [[ $status -eq 0 ]] || failed=1
}

run 60 gpu-facts.log "$python" -c '
import torch, transformers
print("torch", torch.__version__, "transformers", transformers.__version__)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
    try:
        import triton
        print("triton", triton.__version__)
    except ImportError as error:
        print(error)'
if [[ $tests == yes ]]; then
    run 90 gpu-server.log "$python" -m pytest tests/gpu/test_gpu_server.py -W default -s
    run 270 gpu-tests.log "$python" -m pytest tests/gpu -W default --maxfail 10 --durations 8 -rs \
        --deselect tests/gpu/test_gpu_server.py ${TEST_OPTIONS:-}
fi
if [[ $bench == yes ]]; then
    for model in ${models//,/ }; do
        run 240 "gpu-bench-$model.log" "$python" -m bench.gpu --device "$device" --models "$model" --out "$out"
    done
fi
exit $failed
