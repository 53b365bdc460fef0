#!/usr/bin/env bash
# requirements.txt -> requirements.lock: everything that it needs, on every platform, with hashes.
#
# Not torch: its CPU and its CUDA build are one version with different hashes, so `make setup` takes it by its version.
# Nor what its CUDA build alone needs, which it pins itself. $UV: the uv to use.
set -euo pipefail
cd "$(dirname "$0")/.."

compile() {
    "${UV:-uv}" pip compile requirements.txt --quiet --universal --python-version 3.11 --no-config \
        --default-index https://pypi.org/simple --custom-compile-command "make lock" "$@"
}

mapfile -t left_out < <(compile --no-header --no-annotate | grep -oE '^(torch|triton|nvidia|cuda)\b[^=[]*')
[[ ${#left_out[@]} -gt 0 ]] || { echo "torch is not among what requirements.txt needs" >&2; exit 1; }
locked=$(mktemp)
trap 'rm -f "$locked"' EXIT
[[ -f requirements.lock ]] && cp requirements.lock "$locked"  # versions stay as they are where nothing else asks
compile --generate-hashes "${left_out[@]/#/--no-emit-package=}" --output-file "$locked" > /dev/null
{
    echo '# Made by `make lock` from requirements.txt; `make setup` installs it. Delete it first to take newer versions.'
    echo '# Everything but torch, which comes by its version alone: its CPU and CUDA builds have different hashes.'
    grep -vE '^#' "$locked"
} > requirements.lock
