"""Whatever a model's files say, they are loaded or refused in a sentence."""

import json
import os
import shutil
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fuzz_inputs import shaped
from gguf_files import write_tiny_gguf
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from checkpoints import checkpoint, gguf_header
from errors import ModelLoadError


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


SIZES = [0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]
NUMBER_BYTES = st.sampled_from([size.to_bytes(8, "little") for size in SIZES])
CHANGE = st.tuples(st.floats(0, 1), NUMBER_BYTES | st.binary(max_size=8))


def changed(content: bytes, changes: list[tuple[float, bytes]], length: float, header: int) -> bytes:
    """Bytes written over others, in the first `header` ones, and then only a part of them all."""
    mutable = bytearray(content)
    for place, written in changes:
        at = int(place * header)
        mutable[at : at + len(written)] = written
    return bytes(mutable[: 4 + int(length * (len(mutable) - 4))])


@examples(200)
@given(st.lists(CHANGE, max_size=3), st.just(1.0) | st.floats(0, 1), st.sampled_from([64, 700, 9_000, 12_000]))
def test_a_gguf_file_is_read_or_refused_in_no_time(
    gguf_file: Path, tmp_path: Path, changes: list[Any], length: float, header: int
) -> None:
    from gguf import GGUFReader

    path, start = tmp_path / "x.gguf", time.process_time()
    path.write_bytes(changed(gguf_file.read_bytes(), changes, length, header))
    with suppress(ValueError):
        gguf_header.read(path)
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            GGUFReader(path)  # in a process of its own, which may fail as it likes but must not take for ever
    assert time.process_time() - start < 2.0


def spent() -> float:
    """Processor seconds of this process and of those that it waited for, such as a conversion."""
    return sum(os.times()[:4])


def with_value(content: bytes, key: bytes, value: bytes) -> bytes:
    """A number in the metadata; key: its end."""
    at = content.index(key) + len(key) + 4  # behind the type
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"qwen2.block_count", b"\xff\xff\xff\x7f"),
        (b"tokenizer.ggml.tokens", b"\x08\0\0\0" + b"\xff" * 8),
        (b"tokenizer.ggml.token_type", b"\x05\0\0\0" + b"\xff" * 7 + b"\0"),
        (b"tokenizer.ggml.merges", b"\x09\0\0\0\x02\0\0\0\0\0\0\0"),
        (b"general.architecture", b"\xff" * 8),
    ],
)
def test_a_gguf_file_that_lies_is_refused_at_once_in_a_sentence(
    gguf_file: Path, tmp_path: Path, key: bytes, value: bytes
) -> None:
    path, start = tmp_path / "lies.gguf", spent()
    path.write_bytes(with_value(gguf_file.read_bytes(), key, value))
    with pytest.raises(ModelLoadError, match="lies.gguf could not be converted") as refusal:
        checkpoint.fetch(str(path), tmp_path / "cache", lambda what, fraction: None)
    assert "\n" not in str(refusal.value) and spent() - start < 2.0


BROKEN = [
    *("", "null", "[]", "{}", '"x"', "{", "\x00", "[" * 100_000, '{"model_type": []}', '{"model_type": "qwen3"}'),
    *('{"model_type": "x"}', '{"model_type": "qwen3", "architectures": 1}', "\udc80"),
]
LIES = {  # of a configuration
    "num_hidden_layers": [10**9, -1, 0, "x", 4],
    "hidden_size": [10**9, 0, -1, "x"],
    "vocab_size": [10**12, 0, "x"],
    "num_attention_heads": [0, 10**9],
    "num_key_value_heads": [0, 3],
    "head_dim": [0, 10**9],
    "rope_parameters": [[], {"rope_type": "x"}, {"rope_theta": "x"}],
    "layer_types": [["x"], 1],
    "torch_dtype": ["x", 1],
    "model_type": ["t5", 1, None],
    "hidden_act": ["x", 1],
    "quantization_config": [{}, 1, {"quant_method": "x"}],
    "max_position_embeddings": [-1, "x"],
}


def files_of(directory: Path, into: Path, **written: str | bytes) -> Path:
    """The same model with other files."""
    shutil.copytree(directory, into)
    for name, content in written.items():
        path = into / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogateescape"))
    return into


def loaded(directory: Path) -> Any:
    """As the server does it, but for the cache and the engine. None where it is refused as it should be."""
    from engine.checked_model import check_model
    from engine.model_loader import load_model
    from serving.loading import load_template

    start = time.process_time()
    try:
        load_template(directory, "qwen3")
        return load_model(check_model(directory, "float32", "cpu"), lambda what, fraction: None)
    except ModelLoadError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    finally:
        assert time.process_time() - start < 20
    return None


@pytest.mark.parametrize("name", ["config", "tokenizer", "tokenizer_config", "generation_config"])
def test_files_that_are_broken_are_refused_in_a_sentence(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    for number, text in enumerate(BROKEN):
        directory = files_of(tiny_checkpoint, tmp_path / str(number), **{f"{name}__json": text})
        assert loaded(directory) is None or name != "config" or number > 8


@pytest.mark.parametrize("name", LIES)
def test_a_configuration_that_lies_is_refused_in_a_sentence(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    for number, value in enumerate(LIES[name]):
        text = json.dumps({**config, name: value})
        loaded(files_of(tiny_checkpoint, tmp_path / str(number), config__json=text))


@examples(60)
@given(st.data())
def test_weights_that_lie_are_refused_in_a_sentence(tiny_checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    from engine.checked_model import check_model

    content = (tiny_checkpoint / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensor = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    header[tensor] |= data.draw(
        shaped(
            shape=st.lists(st.sampled_from(SIZES), max_size=3),
            data_offsets=st.lists(st.sampled_from(SIZES), min_size=2, max_size=2),
            dtype=st.sampled_from(["F32", "F64", "BF16", "x"]),
        )
    )
    text = json.dumps(header).encode()
    said = data.draw(st.sampled_from([len(text), *SIZES]))
    path = tmp_path / "lying"
    shutil.rmtree(path, ignore_errors=True)
    whole = said.to_bytes(8, "little") + text + content[8 + length :]
    length = data.draw(st.just(len(whole)) | st.integers(0, 900))
    directory = files_of(tiny_checkpoint, path, model__safetensors=whole[:length])
    with suppress(ModelLoadError):
        check_model(directory, "float32", "cpu")
