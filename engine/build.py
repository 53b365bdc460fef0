"""build_engine: a loaded model in, its engine out, with a KV cache that fits the memory."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers import GenerationConfig, PreTrainedModel

from engine import start_check
from engine.async_runner import AsyncRunner
from engine.attention import flash
from engine.attention.flash import Kernel
from engine.cache_size import (
    BLOCK_SIZES,
    DEFAULT_CONTEXT,
    INT8,
    CacheSize,
    StepSizes,
    fit_context,
    gpu_room,
    model_context,
)
from engine.checked_model import CheckedModel
from engine.disk_prefix_cache import DiskPrefixCache
from engine.engine import Engine, EngineOptions
from engine.kv_cache import KVCache
from engine.layer_probe import input_device, measure_key_factors, probe_layers
from engine.layer_spec import LayerSpecs
from engine.memory_plan import check_devices
from engine.model_loader import load_model
from engine.model_runner import ModelRunner
from engine.recurrent.state_cache import StateCache
from engine.report import Report
from engine.sampling_params import SamplingParams
from engine.scheduler import Limits, Scheduler
from engine.sequence import Sequence
from engine.spec_decode.draft_model import CATCH_UP, DraftModel
from engine.step_cost import choose_num_seqs
from engine.threads import set_threads
from errors import ModelLoadError, first_line

log = logging.getLogger(__name__)
CPU_CACHE_MEMORY = 4 * 2**30  # bytes that the cache takes at most, unless set
CPU_CACHE_SHARE = 0.4  # of the memory that is free after loading


@dataclass(frozen=True)
class ModelDefaults:
    """Facts about a model that its own files may lack."""

    stop_token_ids: tuple[int, ...] = ()  # end an answer, as those of the generation config do
    context_length: int = DEFAULT_CONTEXT  # tokens, where the config has no length
    num_tokens: int | None = None  # in the vocabulary: higher ids stand for no text, and are never chosen


def load_engine(
    checked: CheckedModel,
    options: EngineOptions,
    facts: Callable[[], ModelDefaults],
    report: Report,
    draft: CheckedModel | None = None,
) -> tuple[Engine, GenerationConfig | None]:
    """Returns the engine for a checked model, not started, and what the model's authors recommend.

    Raises ModelLoadError. Blocks for seconds or minutes.

    `facts` are asked for once the weights are there. `draft`: a smaller model of the same vocabulary, which
    guesses.
    """
    set_threads()
    check_devices(checked, options)
    model = load_model(checked, report, options.quantization, options.cache_dir)
    small = None if draft is None else load_model(draft, report, options.quantization, options.cache_dir)
    known, text = facts(), model.config.get_text_config()
    if not getattr(text, "max_position_embeddings", None):
        text.max_position_embeddings = known.context_length
    eos_ids = frozenset([*known.stop_token_ids, *_eos_of(model)])
    try:
        if options.max_num_seqs is None and input_device(model).type == "cpu":
            specs = probe_layers(model)
            specs = specs.in_int8({}) if options.kv_cache_dtype == INT8 else specs
            memory = options.kv_cache_memory or sum(_rooms(specs).values())
            options = replace(options, max_num_seqs=choose_num_seqs(model, specs, memory))
        engine = build_engine(model, options, eos_ids, small)
        model_runner_of(engine).num_known = known.num_tokens
        check_start(engine, checked.directory, options, report)
        open_disk(engine, start_check.key_of(checked.directory, model_runner_of(engine), _how(options)), options)
    except ModelLoadError:
        raise
    except Exception as error:  # a model's own code can raise anything
        raise ModelLoadError(
            f"The model in {checked.directory} was loaded, but computing with it fails: "
            f"try another DTYPE or QUANTIZATION ({type(error).__name__}: {first_line(error).rstrip('.')})."
        ) from error
    return engine, model.generation_config


def _eos_of(model: PreTrainedModel) -> list[int]:
    """Returns the end-of-sequence tokens of the generation config, else of the model's config, else of its text part.
    Raises ModelLoadError where they are no token ids."""
    sources = (model.generation_config, model.config, model.config.get_text_config())
    values = (getattr(source, "eos_token_id", None) for source in sources)
    eos: Any = next((value for value in values if value is not None), [])
    ids = [token for token in eos if token is not None] if isinstance(eos, list | tuple) else [eos]
    if not all(isinstance(token, int) for token in ids):
        raise ModelLoadError(f"The model's eos_token_id is {eos!r}; it must be a token id or a list of token ids.")
    return [token for token in ids if token >= 0]


def check_start(engine: Engine, directory: Path, options: EngineOptions, report: Report) -> None:
    """Raises ModelLoadError for a model that cannot compute, or whose logits differ from transformers'. A model that
    passed is remembered in `options.cache_dir` and not compared again."""
    warm_up(engine)
    runner = model_runner_of(engine)
    passed = start_check.PassedChecks(options.cache_dir)
    key = start_check.key_of(directory, runner, _how(options))
    if not passed.contains(key) and start_check.check(runner, engine.max_model_len, report):
        passed.add(key)


def _how(options: EngineOptions) -> dict[str, object]:
    names = ("quantization", "dtype", "device_map", "kv_cache_dtype")
    return {name: getattr(options, name) for name in names}


def open_disk(engine: Engine, model: str, options: EngineOptions) -> None:
    """Lets the engine keep its prefix cache on disk, if the options say so. model: a hash of what decides the numbers
    that it computes."""
    if options.prefix_cache_dir is None:
        return
    disk = DiskPrefixCache.open(engine.scheduler.cache, options.prefix_cache_dir, options.prefix_cache_size, model)
    if not engine.scheduler.cache.can_reuse:
        log.warning("nothing is kept in PREFIX_CACHE_DIR: the model needs snapshots; raise SNAPSHOT_MEMORY")
        return
    engine.scheduler.disk = disk
    folder = disk.folder
    log.info("%s has %.2f GiB, and %d files of this model", folder.root, folder.num_bytes / 2**30, folder.num_files)


def model_runner_of(engine: Engine) -> ModelRunner:
    runner = engine.runner.runner if isinstance(engine.runner, AsyncRunner) else engine.runner
    assert isinstance(runner, ModelRunner)
    return runner


def warm_up(engine: Engine) -> None:
    """Computes a few prompts and decodes, so that whatever is compiled at first use does not delay the first requests.
    Raises what the model raises, and ModelLoadError where its logits are NaN."""
    scheduler = engine.scheduler
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    for params in (greedy, replace(greedy, temperature=1.0), replace(greedy, temperature=1.0, top_k=2)):
        scheduler.add(Sequence([0, 0, 0], params, on_output=lambda output: None))
    while scheduler.has_work:
        batch = scheduler.schedule()
        if any(output is None for _, output in scheduler.update(batch, engine.runner.run(batch))):
            raise ModelLoadError(
                "The model computes values that are not numbers (NaN): set DTYPE=bfloat16 or DTYPE=float32."
            )


def build_engine(
    model: PreTrainedModel,
    options: EngineOptions,
    eos_token_ids: frozenset[int],
    draft: PreTrainedModel | None = None,
) -> Engine:
    """Builds the engine for a loaded model, with a cache sized from free memory. Raises ModelLoadError."""
    specs = _specs_of(model, options)
    steps = StepSizes.choose(model.config, options, _device_type(specs))
    context = model_context(model.config, options.max_model_len)
    proposer = None if draft is None else _draft_model(draft, model, options, steps, context, eos_token_ids)
    block_size, kernel = _choose_attention(specs, options)
    _fuse_layers(model, kernel)
    _measure_products(model)
    size = CacheSize.fit(specs, options, steps=steps, block_size=block_size, context=context, rooms=_rooms(specs))
    states, plan, max_num_seqs = _state_cache(size, specs, steps), size.keys, size.max_num_seqs
    limits = Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=steps.max_num_batched_tokens,
        max_num_mixed_tokens=steps.max_num_mixed_tokens,
        max_model_len=fit_context(context, size, options),
        num_speculative_tokens=options.num_speculative_tokens,
    )
    if limits.max_model_len < context:
        log.warning("the KV cache holds %d tokens: the context is shortened from %d", limits.max_model_len, context)
    cache = KVCache(plan, specs.attention, states, specs.shared)
    log.info(
        "the context is %d tokens, %d sequences run at once, the KV cache takes %.2f GiB in %s blocks of %d tokens, "
        "%.1f KiB for a token in %s",
        limits.max_model_len,
        max_num_seqs,
        size.memory / 2**30,
        "+".join(str(g.num_blocks) for g in plan.groups),
        block_size,
        specs.bytes_per_token / 2**10,
        _format_of(specs),
    )
    runner = ModelRunner(model, cache, eos_token_ids, kernel)
    has_one_device = len({spec.device for spec in specs.attention.values()}) == 1
    if kernel is not None and has_one_device and states is None:
        runner.record_graphs(max_num_seqs, limits.max_model_len)
    engine = Engine(runner, Scheduler(cache, limits, eos_token_ids, proposer), options)
    if runner.device.type == "cuda" and states is None:  # whose steps cannot be taken back
        engine.runner = AsyncRunner(runner, engine.is_quiet)
    return engine


def _specs_of(model: PreTrainedModel, options: EngineOptions) -> LayerSpecs:
    """Returns what the model's layers store, in the format that KV_CACHE_DTYPE asks for."""
    specs = probe_layers(model)
    if options.kv_cache_dtype != INT8:
        return specs
    # of the whole context, whatever MAX_MODEL_LEN is: the same model always stores the same
    return specs.in_int8(measure_key_factors(model, model_context(model.config, None)))


def _format_of(specs: LayerSpecs) -> str:
    """Names the format of the KV cache, for the log."""
    names = {INT8 if s.key_factors is not None else str(s.dtype).split(".")[1] for s in specs.attention.values()}
    return "+".join(sorted(names))


def _device_type(specs: LayerSpecs) -> str:
    return "cuda" if any(spec.device.type == "cuda" for spec in specs.attention.values()) else "cpu"


def _choose_attention(specs: LayerSpecs, options: EngineOptions) -> tuple[int, Kernel | None]:
    """Chooses the tokens in a block, and the kernel that attends to such blocks on a GPU: some take only large ones."""
    sizes = BLOCK_SIZES if options.kv_block_size is None else (options.kv_block_size,)
    kernels = ((size, flash.find(specs.attention.values(), size)) for size in sizes)
    return next(((size, kernel) for size, kernel in kernels if kernel is not None), (sizes[0], None))


def _fuse_layers(model: PreTrainedModel, kernel: Kernel | None) -> None:
    """Replaces layers by fused ones, on a GPU that runs Triton's kernels."""
    if kernel is None or input_device(model).type != "cuda":
        return
    try:
        from engine.gpu import triton_layers
    except ImportError:
        return
    try:
        log.info("%d layers use fused kernels", triton_layers.fuse_gpu_layers(model))
    except RuntimeError as error:  # memory is short, or the compiler fails: the stock layers compute the same
        log.info("no more layers use fused kernels: %s", first_line(error))
    torch.cuda.empty_cache()


def _measure_products(model: PreTrainedModel) -> None:
    """Chooses how packed layers multiply on a GPU, if the model has some."""
    if input_device(model).type != "cuda":
        return
    try:
        from engine.gpu.packed_layers import measure_products
    except ImportError:
        return
    try:
        measure_products(model)
    except RuntimeError as error:  # memory is short, or the compiler fails: what is usual will do
        log.info("products with packed weights were not measured: %s", first_line(error))
    torch.cuda.empty_cache()


def _state_cache(size: CacheSize, specs: LayerSpecs, steps: StepSizes) -> StateCache | None:
    """Makes the part of the cache that recurrent layers need; None for a model without any."""
    plan, num_bytes = size.states, specs.bytes_per_sequence / 2**20
    if plan is None:
        return None
    if plan.num_slots < steps.max_num_seqs:
        log.warning(
            "%d sequences run at once, not %d: the recurrent state of each takes %.1f MiB; raise KV_CACHE_MEMORY",
            plan.num_slots,
            steps.max_num_seqs,
            num_bytes,
        )
    log.info(
        "recurrent state takes %.2f GiB: %d slots and %d snapshots of %.1f MiB",
        plan.num_bytes(specs) / 2**30,
        plan.num_slots,
        plan.num_snapshots,
        num_bytes,
    )
    return StateCache(plan, specs.recurrent, size.keys.block_size)


def _draft_model(
    draft: PreTrainedModel,
    model: PreTrainedModel,
    options: EngineOptions,
    steps: StepSizes,
    context: int,
    eos_token_ids: frozenset[int],
) -> DraftModel:
    specs = _specs_of(draft, options)
    context = min(context, model_context(draft.config, None))
    block_size, kernel = _choose_attention(specs, options)
    _fuse_layers(draft, kernel)
    _measure_products(draft)
    if specs.recurrent:
        raise ModelLoadError(
            f"Models of type {draft.config.model_type!r} cannot guess for another one: "
            "the state of their recurrent layers cannot go back where a guess was wrong."
        )
    steps = replace(steps, max_num_batched_tokens=CATCH_UP, max_num_mixed_tokens=CATCH_UP)
    size = CacheSize.fit(specs, options, steps=steps, block_size=block_size, context=context, rooms=_rooms(specs))
    cache = KVCache(size.keys, specs.attention, shared=specs.shared)
    log.info("a draft model guesses tokens; its KV cache takes %.2f GiB", size.memory / 2**30)
    runner = ModelRunner(draft, cache, eos_token_ids, kernel)
    num_embeddings = cast(int, model.get_input_embeddings().num_embeddings)
    return DraftModel(runner, cache, num_embeddings, min(context, size.keys.max_tokens))


def _rooms(specs: LayerSpecs) -> dict[torch.device, int]:
    """Returns the bytes for the cache on each device with layers: what a GPU has left, or a share of a CPU's free
    memory."""
    devices = {spec.device for spec in specs.attention.values()} | {spec.device for spec in specs.recurrent.values()}
    return {device: _room(device) for device in devices}


def _room(device: torch.device) -> int:
    if device.type == "cuda":
        return gpu_room(*torch.cuda.mem_get_info(device))
    return int(min(CPU_CACHE_MEMORY, CPU_CACHE_SHARE * psutil.virtual_memory().available))
