"""A file of the prefix cache gives back what was written, or BadFile, whatever happened to its bytes."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from process import ROOT

from engine.prefix_files import BadFile, Kind, file_name, read_header, read_rows, write_rows
from engine.prefix_folder import PrefixFolder

KIND = Kind("ab" * 16, "kv0", "2 x float32[4, 2, 8]", 512)
FRESH_FOLDERS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def keys_of(count: int, first: int = 0) -> list[bytes]:
    return [(first + number).to_bytes(16, "big") for number in range(count)]


def rows_of(count: int, seed: int = 0, size: int = KIND.row_size) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (count, size), numpy.uint8)


@FRESH_FOLDERS
@given(count=st.integers(1, 64), data=st.data())
def test_rows_come_back_in_any_selection(count: int, data: st.DataObject, tmp_path: Path) -> None:
    keys, rows = keys_of(count), rows_of(count)
    path = write_rows(tmp_path, KIND, keys, rows)
    assert read_header(path, KIND).keys == tuple(keys)
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    assert (read_rows(path, KIND, [keys[number] for number in chosen]) == rows[chosen]).all()


@FRESH_FOLDERS
@given(data=st.data())
def test_any_change_of_any_byte_is_found(data: st.DataObject, tmp_path: Path) -> None:
    keys = keys_of(5)
    path = write_rows(tmp_path, KIND, keys, rows_of(5))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    path.write_bytes(content)
    with pytest.raises(BadFile):
        read_rows(path, KIND, keys)


@given(content=st.binary(max_size=300) | st.binary(max_size=300).map(lambda end: b"KVROWS1\n" + end))
def test_a_foreign_file_is_found(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / file_name("kv0", keys_of(1))
    path.write_bytes(content)
    with pytest.raises(BadFile):
        read_header(path, KIND)


HEADERS = [
    b"[]",
    b"null",
    b"[" * 100_000,
    b'{"keys": 1}',
    b"\xff",
    json.dumps({**vars(KIND), "keys": ["00"], "sums": [1]}).encode(),
    json.dumps({**vars(KIND), "keys": [], "sums": []}).encode(),
    json.dumps({**vars(KIND), "keys": ["zz" * 16], "sums": [1]}).encode(),
    json.dumps({**vars(KIND), "keys": ["00" * 16], "sums": [None]}).encode(),
    json.dumps({**vars(KIND), "keys": ["00" * 16] * 2, "sums": [1]}).encode(),
    json.dumps({**vars(KIND), "keys": ["00" * 16], "sums": [float("inf")]}).encode(),
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_with_a_right_sum_and_wrong_content_is_found(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / file_name("kv0", keys_of(1))
    path.write_bytes(struct.pack("<8sII", b"KVROWS1\n", len(header), zlib.crc32(header)) + header)
    with pytest.raises(BadFile):
        read_header(path, KIND)


@pytest.mark.parametrize("field", ["fingerprint", "part", "layout", "row_size"])
def test_a_file_of_another_kind_is_never_read(field: str, tmp_path: Path) -> None:
    other = Kind(**{**vars(KIND), field: 256 if field == "row_size" else "cd" * 16})
    path = write_rows(tmp_path, other, keys_of(2), rows_of(2, size=other.row_size))
    path = path.rename(tmp_path / file_name("kv0", keys_of(2)))
    with pytest.raises(BadFile):
        read_header(path, KIND)


def test_rows_and_files_that_changed_places_are_found(tmp_path: Path) -> None:
    keys = keys_of(2)
    path = write_rows(tmp_path, KIND, keys, rows_of(2))
    content = path.read_bytes()
    size = KIND.row_size
    path.write_bytes(content[: -2 * size] + content[-size:] + content[-2 * size : -size])
    with pytest.raises(BadFile):
        read_rows(path, KIND, keys)
    other = write_rows(tmp_path, KIND, keys_of(2, first=7), rows_of(2))
    with pytest.raises(BadFile):
        read_rows(other.rename(path), KIND, keys)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / file_name("kv0", keys_of(1))
    real = write_rows(tmp_path, KIND, keys_of(1), rows_of(1)).rename(tmp_path / "real")
    path.symlink_to(real)
    with pytest.raises((BadFile, OSError)):
        read_header(path, KIND)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises((BadFile, OSError)):
        read_header(path, KIND)


WRITER = """
import sys
from pathlib import Path
from engine.prefix_folder import PrefixFolder
from test_prefix_files import KIND, keys_of, rows_of
folder = PrefixFolder(Path(sys.argv[1]), {"kv0": KIND}, 10**8)
print("begins", flush=True)
for number in range(10**6):
    folder.write("kv0", keys_of(64, first=64 * number), rows_of(64, seed=number), 10**18)
"""


def test_a_process_killed_while_it_writes_leaves_whole_files(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        while not list(tmp_path.rglob("*.kv")):
            assert process.poll() is None
        process.kill()
    folder = PrefixFolder(tmp_path, {"kv0": KIND}, 10**8)
    folder.refresh()
    assert folder.num_files == len(list(tmp_path.rglob("*.kv"))) > 0
    for number in range(folder.num_files):
        [(_, rows)] = folder.read("kv0", keys_of(64, first=64 * number), 10**18)
        assert (rows == rows_of(64, seed=number)).all()


def test_files_that_were_never_finished_go_after_a_while(tmp_path: Path) -> None:
    folder = PrefixFolder(tmp_path, {"kv0": KIND}, 10**8)
    folder.write("kv0", keys_of(1), rows_of(1), 10**18)
    old, fresh = folder.folder / "tmpold.part", folder.folder / "tmpfresh.part"
    for path in (old, fresh):
        path.write_bytes(b"x" * 100)
    os.utime(old, (1, 1))
    folder.count()
    assert not old.exists() and fresh.exists()


@FRESH_FOLDERS
@given(writes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 8)), max_size=30))
def test_the_bytes_never_exceed_the_bound(
    writes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, limit = tmp_path_factory.mktemp("cache"), 20_000
    folders = [PrefixFolder(root, {"kv0": Kind(f"{n:032x}", "kv0", "", KIND.row_size)}, limit) for n in range(2)]
    for used, (number, count) in enumerate(writes):
        folder = folders[number % 2]
        folder.count()
        keys = keys_of(count, first=100 * number)
        assert folder.write("kv0", keys, rows_of(count), used)
        assert sum(path.stat().st_size for path in root.rglob("*.kv")) <= limit
        assert all(folder.has("kv0", key) for key in keys), "what was written last stays"


def output_of(code: str, folder: Path) -> str:
    """Runs Python code in a process of its own, with the folder as its argument."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )
    return result.stdout


def test_rows_beyond_the_bound_are_not_kept_and_no_others_go_for_them(tmp_path: Path) -> None:
    folder = PrefixFolder(tmp_path, {"kv0": KIND}, 3000)
    assert folder.write("kv0", keys_of(1), rows_of(1), 0)
    assert not folder.write("kv0", keys_of(8, first=5), rows_of(8), 1)
    assert folder.has("kv0", keys_of(1)[0]) and folder.num_files == 1


def test_a_file_that_cannot_be_opened_now_is_left_where_it_is(tmp_path: Path) -> None:
    """Too many open files are not the cache's fault."""
    code = (
        "import os, resource, sys; from pathlib import Path; from test_prefix_files import *\n"
        "folder = PrefixFolder(Path(sys.argv[1]), {'kv0': KIND}, 10**6)\n"
        "folder.write('kv0', keys_of(2), rows_of(2), 0)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), 4096))\n"
        "assert not list(folder.read('kv0', keys_of(2), 1)) and not folder.num_files\n"
        "print('left')"
    )
    assert output_of(code, tmp_path) == "left\n"
    assert len(list(tmp_path.rglob("*.kv"))) == 1


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: writing fails in the same way."""
    code = (
        "import resource, sys; from pathlib import Path; from test_prefix_files import *\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_rows(Path(sys.argv[1]), KIND, keys_of(9), rows_of(9))\n"
        "except OSError: print('refused')"
    )
    assert output_of(code, tmp_path) == "refused\n" and list(tmp_path.iterdir()) == []
