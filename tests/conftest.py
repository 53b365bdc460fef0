"""What all tests share."""

import os
import random
import shutil

# One thread for each process: two would wait for each other while another worker's process has their core.
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, which reads it

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from process import MAIN, Server, serve

if TYPE_CHECKING:  # importing torch takes seconds, which the process that hands tests to workers need not spend
    from hostile import Target
    from openai import OpenAI
    from running_gateway import Gateway

with suppress(ImportError):  # the tests for GPUs also run in a Python without hypothesis
    import profiles

    profiles.register()

CLOCKS = (  # prefixes of files whose tests measure time or memory: they run in one worker
    *("test_hostile", "test_raw_sockets", "test_deadline", "test_memory", "test_gateway", "test_wire"),
    *("test_embed", "test_fuzz"),
)
SPREAD = ("test_gpu", "test_paged_triton", "test_triton_layers")  # files whose cases go to any worker: compilers wait
collect_ignore = ["clients", "ray"]  # `make test-clients` and `make test-ray` run them, in other environments


def pytest_sessionstart(session: pytest.Session) -> None:
    """Says where kernels for GPUs run before anything imports Triton; not in the process that only hands out tests."""
    if not session.config.getoption("numprocesses", None) or hasattr(session.config, "workerinput"):
        import devices

        print(f"kernels for GPUs: on {devices.DEVICE}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives whole files to the workers, as their tests share servers, but for SPREAD; all files with clocks go to one
    worker."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            if Path(file).stem.startswith(SPREAD):
                return nodeid
            return "clock" if Path(file).stem.startswith(CLOCKS) else file

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases that `make test` leaves to `make test-all`: of each `thinned(number)`, all but one."""
    num_cases: Counter[object] = Counter()
    for item in items:
        if thinned := item.get_closest_marker("thinned"):
            function = (item.path, item.parent, getattr(item, "originalname", item.name))
            number, every = num_cases[function], thinned.args[0]
            if (number + number // every) % every:  # shifts in each round, so that no parameter is always left out
                item.add_marker("slow")
            num_cases[function] += 1


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same random numbers in every run, whatever ran before it in the same worker."""
    import torch

    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=[1, 3], ids=["one-thread", "three-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test runs with one thread, and with several that share the work."""
    import torch

    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for MODEL_PATH; its random model answers in milliseconds."""
    from models import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "Tiny-Qwen3")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Four models."""
    directory = tmp_path_factory.mktemp("models")
    for name in "abcd":
        shutil.copytree(tiny_checkpoint, directory / name)
    return directory


@pytest.fixture(scope="session")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    """A server with the tiny model, for all tests that leave it unchanged."""
    with serve(
        MAIN, MODEL_PATH=str(tiny_checkpoint), MAX_NUM_SEQS="16", MAX_MODEL_LEN="480", DTYPE="float32"
    ) as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="session")
def thinking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model can reason, and has tokens that mark calls."""
    from models import save_tiny_checkpoint

    directory = save_tiny_checkpoint(tmp_path_factory.mktemp("thinking") / "Tiny-Qwen3", has_marks=True)
    with serve(MAIN, MODEL_PATH=str(directory), MAX_NUM_SEQS="16", DTYPE="float32") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="module")
def started_gateway(tiny_checkpoint: Path) -> "Iterator[Gateway]":
    """A server whose providers are fake ones."""
    from running_gateway import running_gateway

    with running_gateway(tiny_checkpoint) as gateway:
        yield gateway


@pytest.fixture
def gateway(started_gateway: "Gateway") -> "Gateway":
    started_gateway.reset()
    return started_gateway


@pytest.fixture
def client(server: Server) -> "Iterator[OpenAI]":
    from openai import OpenAI

    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def seeing_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import save_checkpoint_that_sees

    return save_checkpoint_that_sees(tmp_path_factory.mktemp("models") / "Tiny-Gemma3")


@pytest.fixture(scope="session")
def seeing_server(seeing_checkpoint: Path) -> Iterator[Server]:
    """A server with a tiny Gemma 3 that takes images, also from addresses of this machine."""
    settings = {"MODEL_PATH": str(seeing_checkpoint), "ALLOW_PRIVATE_IMAGE_URLS": "true", "MAX_IMAGES": "6"}
    with serve(MAIN, **settings, DTYPE="float32") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="session")
def targets(tiny_checkpoint: Path, seeing_checkpoint: Path) -> "Iterator[dict[bool, Target]]":
    """The servers that get hostile requests, by whether they take images."""
    import hostile

    with hostile.started(tiny_checkpoint, seeing_checkpoint) as targets:
        yield targets


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Server]:
    """The default demo model, as `make serve` starts it but with a shorter context and one thread."""
    with serve(MAIN, MAX_MODEL_LEN="2048") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture
def demo_client(demo_server: Server) -> "Iterator[OpenAI]":
    from openai import OpenAI

    with OpenAI(base_url=demo_server.url + "/v1", api_key="none") as client:
        yield client


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_encoders import save_tiny_encoder

    prompts = {"query": "query: ", "document": "text: "}
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "Tiny-Encoder", prompts=prompts)


@pytest.fixture(scope="session")
def bounded(tiny_checkpoint: Path) -> Iterator[Server]:
    """A server with small bounds, for bytes over raw sockets."""
    from raw_sockets import bounded_server

    with bounded_server(tiny_checkpoint) as server:
        yield server


@pytest.fixture
def served_before_and_after(bounded: Server) -> Iterator[None]:
    """Checks that a client after the test gets the same answer as one before it."""
    from raw_sockets import served_as_before

    with served_as_before(bounded):
        yield
