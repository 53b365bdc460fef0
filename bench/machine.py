"""Machine: a description of the computer that figures were measured on."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

NOTED_FLAGS = (
    *("avx2", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "i8mm", "sve"),  # Arm's
)
NOTED_PACKAGES = ("torch", "transformers", "fastapi", "uvicorn")


def describe() -> dict[str, Any]:
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "flags": [flag for flag in NOTED_FLAGS if flag in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": round(psutil.getloadavg()[0], 2),  # of the minute before: shows other work on the machine
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in NOTED_PACKAGES},
    }


def slug(cpu: str) -> str:
    """`"AMD EPYC 9B14 (TM)"` -> `"amd-epyc-9b14-tm"`."""
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")


def _cpuinfo() -> dict[str, str]:
    """Returns the first processor's lines of /proc/cpuinfo; empty where the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
