"""report: what of a model would go where on GPUs, as a table, from its configuration alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from config import Settings
from engine import memory_plan, weight_files
from engine.cpu import packed_checkpoint
from engine.memory_plan import Device, DeviceShare, PaperModel
from engine.quantization import AUTO, GPU, choose
from engine.quantized import files
from errors import ModelLoadError, first_line
from serving.loading import engine_options

HEAD = ("GPU", "LAYERS", "WEIGHTS", "KV CACHE", "ACTIVATIONS", "UNUSED")


def report(directory: Path, gpus: Sequence[float], settings: Settings) -> Iterator[str]:
    """Yields the lines of a table, and then what it comes to. Raises ModelLoadError for a model that does not fit.

    gpus: their memory, each in GB as cards are sold.
    """
    devices = [Device.of_card(number, size) for number, size in enumerate(gpus)]
    options = replace(engine_options(settings), device_map="auto")
    paper = _paper_of(directory, settings.quantization)
    plan = paper.plan(devices, options)
    rows = [HEAD, *(_row(share) for share in plan.shares)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if not plan.fits:
        explained = memory_plan.explain(plan, paper)
        raise ModelLoadError(f"It does not fit: {explained} {memory_plan.advice(paper, devices, options)}")
    yield f"It fits: the context is {plan.context:,} tokens, and {plan.max_num_seqs} sequences run at once."


def _paper_of(directory: Path, setting: str) -> PaperModel:
    """Returns the model on paper, in bfloat16 or the format that QUANTIZATION asks for. Raises ModelLoadError."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        weights = choose(
            setting,
            AUTO,
            kernels=GPU,
            has_packed_file=packed_checkpoint.exists(directory),
            has_own_codes=files.can_read(weight_files.scheme_of(config)),
        )
        memory_plan.check_can_plan(config, weights)
        return PaperModel.of(config, torch.bfloat16, weights, directory)
    except ModelLoadError:
        raise
    except Exception as error:  # a malformed configuration can raise anything
        reason = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        raise ModelLoadError(f"The model in {directory} cannot be planned ({reason}).") from error


def _row(share: DeviceShare) -> tuple[str, ...]:
    sizes = (share.weights, share.cache, share.reserve, share.unused)
    return share.device.name, str(len(share.layers)), *(f"{size / 2**30:.1f} GiB" for size in sizes)
