#!/usr/bin/env bash
# What is worth knowing on a machine with a GPU, the most important first, in under ten minutes; safe to stop at any time.
#
#   scripts/gpu_check.sh [--device cpu] [--only tests|bench|soak] [--models qwen3-0.6b,qwen3-8b:int4] [--seconds 570]
#
# gpu-check.log has all that is said, gpu-steps.jsonl how each step ended; figures lie beside them, in $OUT, else
# bench/results. A model may have a QUANTIZATION. --device cpu tries all of it with a tiny model. $PYTHON: which Python.
# TEST_OPTIONS: of pytest; by default as many processes as have room on a large GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda only=all budget=570 models=qwen3-0.6b,qwen3-8b,qwen3-8b:int4,qwen3-8b:q4_k,qwen3-8b:int8,gemma-3-27b:int4
while [[ $# -gt 0 ]]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --only) only=$2; shift 2 ;;
        --models) models=$2; shift 2 ;;
        --seconds) budget=$2; shift 2 ;;
        *) echo "unknown: $1" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
out=${OUT:-bench/results}
mkdir -p "$out"
: >"$out/gpu-check.log" >"$out/gpu-steps.jsonl"
export PYTHONUNBUFFERED=1 GPU_TESTS=$device
options=(-vv -W default --maxfail 20 --durations 8 -rfE ${TEST_OPTIONS:--n 12})
chosen=() small=()
if [[ $device == cpu ]]; then  # a sample, since the interpreter is slow
    models=tiny
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    options=(-vv -W default --maxfail 20 --durations 8 -rfE ${TEST_OPTIONS:-})
    chosen=(-k "every_number or rows_are_looked_up or norm or start_accepts or multiplied or qwen3-int8 or adapters")
    small=(--tiny --formats int4,q4_k --tokens 1,16)
fi
failed=0

run() {  # name, most seconds, command...: it gets what is left if that is less, and nothing if little is left
    local name=$1 seconds=$2 left=$((budget - SECONDS)) began=$SECONDS
    shift 2
    [[ $left -ge 10 ]] || { echo "{\"step\": \"$name\", \"status\": null}" >>"$out/gpu-steps.jsonl"; return; }
    echo "== $name" | tee -a "$out/gpu-check.log"
    timeout -s INT -k 10 "$((left < seconds ? left : seconds))" "$@" 2>&1 | tee -a "$out/gpu-check.log" | tail -n "${LINES_SHOWN:-40}"
    local status=${PIPESTATUS[0]}
    echo "{\"step\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - began))}" | tee -a "$out/gpu-steps.jsonl"
    [[ $status -eq 0 ]] || failed=1
}

wanted() { [[ $only == all || $only == "$1" ]]; }

bench() {  # model[:quantization]
    local quantization=none
    [[ $1 == *:* ]] && quantization=${1#*:}
    run "bench $1" 150 "$python" -m bench.gpu --device "$device" --models "${1%%:*}" --quantization "$quantization" --out "$out"
}

run facts 60 "$python" -c '
import torch, transformers
print("torch", torch.__version__, "transformers", transformers.__version__)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
try:
    import triton
    print("triton", triton.__version__)
except ImportError as error:
    print(error)'
if wanted tests; then
    run server 90 "$python" -m pytest tests/gpu/test_gpu_server.py -W default -s
    run kernels 150 "$python" -m pytest tests/test_gpu_products.py tests/test_gpu_packed_models.py tests/test_triton_layers.py \
        tests/test_paged_triton.py "${options[@]}" "${chosen[@]}"
    [[ $device == cpu ]] && chosen=(-k "(chunks or alone or device or faults or choices) and not bfloat16 and not gemma")
    run parity 170 "$python" -m pytest tests/gpu "${options[@]}" "${chosen[@]}" \
        --deselect tests/gpu/test_gpu_server.py --deselect tests/gpu/test_gpu_soak.py
fi
if wanted bench; then
    bench "${models%%,*}"
    run products 60 "$python" -m bench.gpu_products --device "$device" --layers qwen3-8b --out "$out" "${small[@]}"
    [[ $models == *,* ]] && for model in $(echo "${models#*,}" | tr , ' '); do bench "$model"; done
fi
if wanted soak; then
    left=$((budget - SECONDS - 60))  # beside the soak itself: the start, and each request alone
    [[ $device == cpu ]] && left=5
    export SOAK_SECONDS=$((left > 120 ? 120 : left > 10 ? left : 10))
    run soak 240 "$python" -m pytest tests/gpu/test_gpu_soak.py -W default -s
fi
exit $failed
