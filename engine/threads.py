"""How many threads compute: one for each physical core that the process may use."""

import math
import os
from pathlib import Path

import psutil
import torch

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time, or `max`, in a period


def set_threads() -> None:
    """Unless OMP_NUM_THREADS says it: torch's own choice may count hyperthreads, and cores that a container lacks."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads(QUOTA))


def num_threads(quota: Path) -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical, _quota(quota)))


def _quota(path: Path) -> int:
    """Cores' worth of time, rounded up. Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max."""
    try:
        time, period = path.read_text().split()
        return math.ceil(int(time) / int(period))
    except (OSError, ValueError):  # no such file, or no limit
        return os.cpu_count() or 1
