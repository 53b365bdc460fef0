"""Processes that start with the slow imports done: forks of one process that has imported torch and transformers.

A fork runs the command's own script or module from its first line, with its own arguments and environment.
Source: https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods, `forkserver`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = [
    "main",
    "torch",
    "accelerate",
    "transformers.generation",
    "transformers.models.gemma3",
    "transformers.models.qwen3",
    "engine.engine",
    "serving.loading",
]
READ_AT_IMPORT = ("HF_", "HOME", "LD_", "MALLOC_", "PYTHON", "TRANSFORMERS_", "XDG_")  # prefixes of variables
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(IMPORTED)
START = dict(os.environ)  # the fork server's environment


def can_run(command: list[str], environment: Mapping[str, str]) -> bool:
    """Returns whether a fork does what a new process would: same Python, and same variables that imports read."""
    return command[0] == sys.executable and command[1] != "-c" and _early(environment) == _early(START)


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


class ForkedProcess:
    """A running fork, with the part of `subprocess.Popen`'s interface that the tests use."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        reader, writer = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(target=_run, args=(command[1:], dict(environment), writer))
        with chdir(ROOT):  # the fork server imports the modules of the folder that it is started in
            self._process.start()
        writer.close()
        self.stdout = open(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
        reader.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("a fork", timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(words: list[str], environment: dict[str, str], log: Connection) -> None:
    """Turns this fork into `python WORDS...`, with standard output and error in `log`."""
    multiprocessing.set_start_method(None, force=True)  # the default, as in a new process
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the fork server's torch has read its own variable
    tests = str(ROOT / "tests")
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path not in ("", str(ROOT), tests))]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
