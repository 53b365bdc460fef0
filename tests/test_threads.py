"""One thread for each physical core, and no more than a container is given."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engine.threads import num_threads


@pytest.mark.parametrize(("text", "most"), [("50000 100000", 1), ("100000 100000", 1), ("150000 100000", 2)])
def test_a_containers_quota_bounds_the_threads(tmp_path: Path, text: str, most: int) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert num_threads(tmp_path / "cpu.max") == min(most, num_threads(tmp_path / "none"))


@pytest.mark.parametrize("text", ["max 100000", "", "nonsense"])
def test_without_a_quota_the_cores_count(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.max").write_text(text)
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    assert num_threads(tmp_path / "cpu.max") == num_threads(tmp_path / "none") <= cores


@pytest.mark.parametrize("wanted", [None, "1"])
def test_what_the_environment_says_wins(wanted: str | None) -> None:
    code = "import torch; from engine import threads; threads.set_threads(); print(torch.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])} | ({"OMP_NUM_THREADS": wanted} if wanted else {})
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(told.stdout) == int(wanted or num_threads(Path("/sys/fs/cgroup/cpu.max")))
