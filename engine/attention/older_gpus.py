"""Whether an older GPU runs the kernel in Triton: a process of its own tries it, since on a GPU that it does not
support the compiler may end the process instead of raising."""

import functools
import pickle
import subprocess
import sys
from pathlib import Path

from engine.layer_spec import AttentionSpec

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds; importing torch and compiling take some ten


def trial_of(spec: AttentionSpec) -> tuple[str, ...]:
    """Returns the command that tries the kernel for a layer."""
    return sys.executable, "-m", "engine.attention.kernel_trial", pickle.dumps(spec).hex()


@functools.cache
def ends_well(command: tuple[str, ...]) -> bool:
    """Runs a command, at most once. Returns whether it ends in time, with the exit status 0."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=TIMEOUT, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
