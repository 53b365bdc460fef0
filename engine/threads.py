"""set_threads: as many threads compute as the process may use physical cores."""

import math
import os
from pathlib import Path

import psutil
import torch

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's limit: microseconds of processor time, or `max`, and a period


def set_threads() -> None:
    """Sets torch's threads, unless OMP_NUM_THREADS is set. torch's own choice may count hyperthreads, and cores that a
    container may not use."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads(QUOTA))


def num_threads(quota: Path) -> int:
    """Counts the physical cores that the process may use, at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical, _quota(quota)))


def _quota(path: Path) -> int:
    """Returns the limit in cores, rounded up. Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max."""
    try:
        time, period = path.read_text().split()
        return math.ceil(int(time) / int(period))
    except (OSError, ValueError):  # no such file, or no limit
        return os.cpu_count() or 1
