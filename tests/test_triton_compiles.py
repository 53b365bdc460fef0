"""Triton's compiler takes all kernels for GPUs that are not there, and their state fits into registers and shared
memory. Triton's interpreter takes some programs that the compiler refuses, and knows neither."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from process import ROOT

pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")

# Compute capability -> bytes of shared memory that a program has on all GPUs of that kind
SHARED_MEMORY = {75: 65_536, 80: 101_376, 90: 101_376, 120: 101_376}
# Bytes of a thread's state that may be in memory, as they do not fit into 255 registers; of other kernels none
KEPT_IN_MEMORY = {"attend_kernel": 256, "tiles_kernel": 16}


@pytest.mark.parametrize(
    "capability", [*(pytest.param(number, marks=pytest.mark.slow) for number in (75, 80, 120)), 90]
)
def test_the_kernels_are_compiled_for_a_gpu(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "tests/triton_compiler.py", str(capability), "triton_launches"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    names = {kernel["name"] for kernel in kernels}
    assert names >= {"attend_kernel", "join_kernel", "numbers_kernel", "tiles_kernel", "dequantise_kernel"}
    assert names >= {"total_kernel", "_norm", "_activate", "_place"}
    assert max(kernel["shared"] for kernel in kernels) <= SHARED_MEMORY[capability]
    if capability >= 80:  # on older GPUs, without products of this kind, the state is larger
        stacks = {name: max(kernel["stack"] for kernel in kernels if kernel["name"] == name) for name in names}
        assert all(stack <= KEPT_IN_MEMORY.get(name, 0) for name, stack in stacks.items()), stacks
