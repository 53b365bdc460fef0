"""Conversion of a GGUF file into a directory of safetensors that loads in seconds. As a program, it is the child."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import errors
import gguf_header
from atomic_files import Report, locked, require_room, temporary


def convert_gguf(gguf: Path, target: Path, report: Report) -> Path:
    """Writes a GGUF file's weights, in bfloat16 and packed, and its tokenizer to the directory `target`, once.

    transformers would dequantise a GGUF at every start, for tens of seconds. A child process does it here, so that
    the server does not keep the memory that it takes.
    """
    with locked(target, report):
        if not target.exists():
            _check_header(gguf)
            require_room(target.parent, gguf.stat().st_size, gguf.name)  # at least; the child knows exactly
            with temporary(target) as directory:
                _run_conversion(gguf, directory, report)
                if not target.exists():  # without locks, another process may have been faster
                    os.replace(directory, target)
    return target


def _check_header(gguf: Path) -> None:
    try:
        gguf_header.check(gguf)
    except ValueError as error:
        raise _refusal(gguf, str(error)) from error


def _refusal(gguf: Path, reason: str) -> errors.ModelLoadError:
    return errors.ModelLoadError(f"{gguf.name} could not be converted (is it whole, and a text model?): {reason}")


def _run_conversion(gguf: Path, directory: Path, report: Report) -> None:
    """`_convert` in a child, which prints its progress; what transformers has to say is kept for the error."""
    what = f"converting {gguf.name}"
    report(what, 0.0)
    # The child needs neither GPU nor network, and transformers' look-ups for a local file would only wait.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, __file__, str(gguf.absolute()), str(directory)]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment, text=True) as child:
            for line in child.stdout or ():
                with contextlib.suppress(ValueError):
                    report(what, float(line))
            child.wait()  # before its stdin is closed, which would end it
        log.seek(0)
        reason = last_line(log.read()).removeprefix("errors.ModelLoadError: ")
    if child.returncode:
        raise _refusal(gguf, reason or f"exit status {child.returncode}")
    report(what, 1.0)


def _convert(gguf: Path, directory: Path) -> None:
    """What the child does; prints the fraction done."""
    # The parent holds the other end of stdin: when it dies, however it does, so does this.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine import packed_checkpoint

    print(0.1, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    print(0.4, flush=True)
    load: Any = AutoModelForCausalLM.from_pretrained
    model, loaded = load(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, output_loading_info=True)
    if loaded["missing_keys"]:  # they would be random numbers: one file of several, say
        raise errors.ModelLoadError(f"it lacks the weights {', '.join(sorted(loaded['missing_keys'])[:3])}")
    print(0.7, flush=True)
    model.hf_quantizer = None  # else it saves a GGUF's settings beside weights that are none any more
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    require_room(directory.parent, model.num_parameters() * 2 + gguf.stat().st_size, gguf.name)
    model.save_pretrained(directory)
    print(0.8, flush=True)
    packed_checkpoint.write(model, gguf, directory)
    tokenizer.save_pretrained(directory)


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
