"""Conversion of a GGUF file into a directory of safetensors that loads in seconds.

A child process converts: `python -m checkpoints.conversion DIRECTORY FILE...`.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import errors
from checkpoints import gguf_ends, gguf_header, gguf_metadata, gguf_parts, gguf_rope, gguf_tokenizer
from checkpoints.atomic_files import locked, require_room, temporary
from engine.report import Report

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (  # the files that decide what is in a converted directory
    "checkpoints/conversion.py",
    *sorted(f"checkpoints/{path.name}" for path in Path(__file__).parent.glob("gguf_*.py")),
    *("engine/cpu/gguf_blocks.py", "engine/cpu/jit.py", "engine/cpu/packed_checkpoint.py"),
    "engine/cpu/packed_weight.py",
)
LIBRARIES = ("transformers", "gguf", "tokenizers")


_one_at_a_time = threading.Lock()  # a conversion takes the memory of the whole model


@functools.cache
def converter_version() -> str:
    """Returns a hash of all code that converts: what an older converter made has another one, and is not used."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((ROOT / name).read_bytes().replace(b"\r\n", b"\n"))
    for name in LIBRARIES:
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    return f"v{digest.hexdigest()[:8]}"


def convert_gguf(paths: list[Path], target: Path, report: Report) -> Path:
    """Writes a GGUF file's weights, in bfloat16 and packed, and its tokenizer to the directory `target`, once.

    paths: the file, or all its parts. Raises ModelLoadError. transformers alone would dequantise the file at every
    start, for tens of seconds. A child process does it here, so that its memory is freed when it ends.
    """
    with locked(target, report):
        if not target.exists():
            check_header(paths)
            require_room(target.parent, _total_size(paths), paths[0].name)  # at least; the child checks exactly
            with temporary(target) as directory:
                with _one_at_a_time:
                    _convert_in_child(paths, directory, report)
                if not target.exists():  # without locks, another process may have been faster
                    os.replace(directory, target)
    return target


def _total_size(paths: list[Path]) -> int:
    """Returns bytes."""
    return sum(path.stat().st_size for path in paths)


def check_header(paths: list[Path]) -> None:
    """Raises ModelLoadError for a key that is not supported; logs a warning where a key is missing."""
    try:
        header = gguf_parts.read(paths, gguf_ends.LISTS)
        gguf_metadata.check_kind(header)
        gguf_metadata.attributes(header, gguf_rope.neutral_factors(header))
        gguf_tokenizer.check(header)
    except (ValueError, ArithmeticError) as error:
        raise _refusal(paths[0], str(error)) from error
    for warning in gguf_tokenizer.warnings(header):
        log.warning("%s: %s", paths[0].name, warning)


def _refusal(gguf: Path, reason: str) -> errors.ModelLoadError:
    return errors.ModelLoadError(f"{gguf.name} could not be converted: {reason}")


def _convert_in_child(paths: list[Path], directory: Path, report: Report) -> None:
    """Runs this module, which prints its progress. The last line of its standard error becomes the error's reason."""
    phase = f"converting {paths[0].name}"
    report(phase, 0.0)
    # The child needs neither GPU nor network; without a network, transformers' look-ups would only time out.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "checkpoints.conversion", *(str(path.absolute()) for path in (directory, *paths))]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=output, env=environment, text=True, cwd=ROOT
        ) as child:
            for line in child.stdout or ():
                with contextlib.suppress(ValueError):
                    report(phase, float(line))
            child.wait()  # before its stdin is closed, which would end it
        output.seek(0)
        reason = last_line(output.read()).removeprefix("errors.ModelLoadError: ").removeprefix("ValueError: ")
    if child.returncode:
        raise _refusal(
            paths[0],
            reason or f"the conversion ended with exit status {child.returncode}: check that the file is complete",
        )
    report(phase, 1.0)


def convert(paths: list[Path], directory: Path, report: Callable[[float], None]) -> None:
    """Converts a file, or all its parts, in this process; report: called with the fraction done, from 0 to 1.

    Raises ValueError, ModelLoadError or any error of transformers'."""
    if len(paths) == 1:
        return _convert_file(paths[0], directory, report)
    directory.mkdir()
    require_room(directory, _total_size(paths), paths[0].name)
    whole = directory / "whole.gguf"
    gguf_parts.merge(paths, whole)
    _convert_file(whole, directory, report)
    whole.unlink()


def _convert_file(gguf: Path, directory: Path, report: Callable[[float], None]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    from engine.cpu import packed_checkpoint

    report(0.1)
    header = gguf_header.read(gguf, gguf_ends.LISTS)
    _check_types(header)
    tokenizer = gguf_tokenizer.load(gguf, header)
    config = AutoConfig.for_model(**gguf_metadata.attributes(header, _rope_factors(gguf, header)))
    report(0.4)
    load: Any = AutoModelForCausalLM.from_pretrained
    is_new = header.values["general.architecture"] in GGUF_CONFIG_ARCHS  # read by transformers' newer loader
    dtype = torch.float32 if is_new else torch.bfloat16  # the newer loader computes in it, and the blocks must be found
    options = {"gguf_file": gguf.name, "config": config, "dtype": dtype, "output_loading_info": True}
    with _cached_name_map():
        if not is_new:
            _check_tensors(header, config)
        model, loaded = load(gguf.parent, **options)
    if is_new and loaded["unexpected_keys"]:
        raise _no_place(sorted(name.replace("model.layers.", "blk.") for name in loaded["unexpected_keys"]))
    model.to(torch.bfloat16)
    if loaded["missing_keys"]:  # these weights would be random numbers, as in one file of several
        raise errors.ModelLoadError(f"it lacks the weights {', '.join(sorted(loaded['missing_keys'])[:3])}")
    report(0.7)
    model.hf_quantizer = None  # else it saves the file's quantisation beside dequantised weights
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    recommended = gguf_metadata.sampling(header)
    model.generation_config.update(**recommended, **({"do_sample": True} if recommended else {}))
    require_room(directory.parent, model.num_parameters() * 2 + gguf.stat().st_size, gguf.name)
    model.save_pretrained(directory)
    report(0.8)
    packed_checkpoint.write(model, gguf, directory)
    tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def _cached_name_map() -> Iterator[None]:
    """Caches gguf's table of tensor names, which transformers makes for each module: a minute for 60 layers."""
    import gguf

    module: Any = gguf
    make = module.get_tensor_name_map
    module.get_tensor_name_map = functools.cache(make)
    try:
        yield
    finally:
        module.get_tensor_name_map = make


def _rope_factors(gguf: Path, header: gguf_header.Header) -> dict[str, list[float]]:
    """Returns the values of the tensors that scale the rotary embeddings, by name."""
    if not header.tensors.keys() & set(gguf_rope.FACTORS):
        return {}  # gguf's reader takes seconds for a large vocabulary
    from gguf import GGUFReader, dequantize

    tensors = (t for t in GGUFReader(gguf).tensors if t.name in gguf_rope.FACTORS)
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type).flatten().tolist() for tensor in tensors}


def _check_types(header: gguf_header.Header) -> None:
    """Raises ValueError for a tensor of a type that gguf cannot dequantise."""
    from gguf import GGMLQuantizationType

    names = {kind.value: kind.name for kind in GGMLQuantizationType}
    unreadable = {kind for kind in {tensor.kind for tensor in header.tensors.values()} if not _can_dequantize(kind)}
    for tensor in header.tensors.values():
        if tensor.kind in unreadable:
            kind = names.get(tensor.kind, f"number {tensor.kind}")
            raise ValueError(f"its tensor {tensor.name} has the type {kind}, which is not supported")


def _can_dequantize(kind: int) -> bool:
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        _, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        dequantize(numpy.zeros((1, num_bytes), dtype=numpy.uint8), GGMLQuantizationType(kind))
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


def _check_tensors(header: gguf_header.Header, config: Any) -> None:
    """Raises ModelLoadError for a tensor of the file that the model does not have."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    make: Any = TENSOR_PROCESSORS.get(str(header.values["general.architecture"]), TensorProcessor)
    processor = make(config=config.to_dict())
    names = {*get_gguf_hf_weights_map(model, processor), *gguf_rope.FACTORS}
    unread = [name for name in header.tensors if not {name, name.removesuffix(".weight")} & names]
    if unread:
        raise _no_place(unread)


def _no_place(names: list[str]) -> errors.ModelLoadError:
    return errors.ModelLoadError(f"the model has no place for its tensors {', '.join(names[:3])}")


def _end_with_parent() -> None:
    """Ends this process when the parent ends in any way: the parent holds the other end of standard input."""
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()


def last_line(text: str) -> str:
    """Returns the last line that is not blank, or an empty text."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


if __name__ == "__main__":
    _end_with_parent()
    convert([Path(part) for part in sys.argv[2:]], Path(sys.argv[1]), lambda fraction: print(fraction, flush=True))
