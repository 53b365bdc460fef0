"""Compiles Triton's kernels for GPUs that are not there: launches compile the kernel by ptxas, and run nothing.

It needs a process of its own, without Triton's interpreter:
    python tests/triton_compiler.py CAPABILITY MODULE    # such as 90 compiled_products
calls the module's `launch`, and prints a line of JSON for each kernel: its name, its shared memory in bytes, the
registers of a thread, and the bytes that a thread keeps in memory instead of registers.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

LARGEST_GRID = (2**31 - 1, 65_535, 65_535)  # programs
SHARED_MEMORY = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}  # bytes of a program
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class CompilingDriver:
    """Stands for the driver of one GPU."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        properties = {"max_shared_mem": SHARED_MEMORY[capability], "multiprocessor_count": 108}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties, load_binary=self._load)

    def launcher_cls(self, source: object, metadata: object) -> Any:
        """Returns what launches a kernel: here it only checks the grid."""

        def launch(*arguments: Any) -> None:
            assert all(0 < size <= most for size, most in zip(arguments[:3], LARGEST_GRID, strict=True)), arguments[:3]

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Prints what a compiled kernel needs."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        registers, stack = (int(re.findall(rf"{kind}:(\d+)", usage)[-1]) for kind in ("REG", "STACK"))
        print(json.dumps({"name": name, "shared": shared, "registers": registers, "stack": stack}), flush=True)
        return 1, 1, registers, stack, 1024


def main() -> None:
    capability, module = sys.argv[1:]
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    driver.set_active(CompilingDriver(int(capability)))  # type: ignore[arg-type]
    importlib.import_module(module).launch(int(capability))


if __name__ == "__main__":
    main()
