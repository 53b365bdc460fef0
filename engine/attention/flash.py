"""Attention over the paged cache on GPUs, by one kernel for sequences of different lengths: torch's own, or Triton's.

Which cache layouts and windows a kernel accepts depends on the GPU and on the versions of torch and Triton. So each
kernel is tried, its result compared, and the fastest correct one is used.
Source: https://docs.pytorch.org/docs/stable/nn.attention.varlen.html.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch

from engine.gpu import timing
from engine.layer_cache import quantized
from engine.layer_spec import SCALES, AttentionSpec
from errors import first_line

log = logging.getLogger(__name__)

Kernel = Callable[..., torch.Tensor]  # with the signature of `reference`
Scales = tuple[torch.Tensor, torch.Tensor] | None  # of an int8 cache's keys and values, (blocks, block_size, kv_heads)
TOLERANCES = {2: 0.02, 4: 1e-3}  # bytes of a number -> allowed difference, as a part of the result's norm
TIMED_TOKENS = 4096  # tokens of each sequence
TIMED_DECODES, TIMED_QUERIES = 8, 2048


@dataclass(frozen=True)
class FlashBatch:
    """What the layers of one group share in a step: its sequences, each with one or more neighbouring queries."""

    cu_seqlens_q: torch.Tensor  # (sequences + 1,) int32, where each sequence's queries begin among the step's tokens
    block_tables: torch.Tensor  # (sequences, width) int32, the blocks from the first one that the first query sees
    seq_lens: torch.Tensor  # (sequences,) int32, tokens in these blocks, including the queries
    max_query_len: int
    max_seq_len: int  # tokens that a row of `block_tables` can hold
    num_tokens: int  # of the step, from its first token on
    window: int | None
    # (tokens, 2) int32: where images' tokens see later ones, the first position in its table's blocks that a query
    # sees, and the end
    visible: torch.Tensor | None = None

    def to(self, device: torch.device) -> "FlashBatch":
        starts, tables, lengths = (t.to(device) for t in (self.cu_seqlens_q, self.block_tables, self.seq_lens))
        visible = None if self.visible is None else self.visible.to(device)
        return replace(self, cu_seqlens_q=starts, block_tables=tables, seq_lens=lengths, visible=visible)


@dataclass(frozen=True)
class Candidate:
    """A kernel that may be used, if it computes the right result."""

    name: str
    kernel: Kernel
    can_attend: Callable[[AttentionSpec], bool]  # False: known not to support the layer, so it is not tried


def attend(
    kernel: Kernel,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: FlashBatch,
    scaling: float,
    softcap: float | None = None,
    *,
    scales: Scales = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Calls a kernel for one layer.

    query: (tokens, heads, dim); keys, values: (blocks, block_size, kv_heads, dim) -> (tokens, heads, value dim).
    scales, sinks: as in `reference`.
    """
    special = {"softcap": softcap, "scales": scales, "visible": batch.visible, "sinks": sinks}
    return kernel(
        query,
        keys,
        values,
        batch.cu_seqlens_q,
        None,
        batch.max_query_len,
        batch.max_seq_len,
        scale=scaling,
        window_size=(-1 if batch.window is None else batch.window - 1, 0),
        enable_gqa=True,
        seqused_k=batch.seq_lens,
        block_table=batch.block_tables,
        **{name: value for name, value in special.items() if value is not None},  # not every kernel has these arguments
    )


def sees_ahead(kernel: Kernel) -> bool:
    """Returns whether a kernel can let queries see what follows them, as the tokens of some images do."""
    return "visible" in inspect.signature(kernel).parameters


def find(
    specs: Iterable[AttentionSpec],
    block_size: int,
    candidates: Iterable[Candidate] | None = None,
    measure: Callable[[Kernel, AttentionSpec, int], float] | None = None,
) -> Kernel | None:
    """Returns the fastest kernel that computes all these layers on their device as `reference` does; None if none does.

    measure: gives the seconds that a kernel takes for a layer with blocks of so many tokens; tests without a GPU pass
    their own.
    """
    layers = {spec.without_factors for spec in specs}
    able = [
        candidate
        for candidate in (known_kernels(layers) if candidates is None else candidates)
        if all(candidate.can_attend(spec) for spec in layers)
        and all(agrees(candidate.kernel, spec, block_size) for spec in layers)
    ]
    if len(able) > 1:
        able.sort(key=lambda candidate: _logged_time(candidate, layers, block_size, measure or seconds))
    if able:
        log.info("attention over blocks of %d tokens uses %s", block_size, able[0].name)
    return able[0].kernel if able else None


def _logged_time(
    candidate: Candidate,
    specs: set[AttentionSpec],
    block_size: int,
    measure: Callable[[Kernel, AttentionSpec, int], float],
) -> float:
    total = sum(measure(candidate.kernel, spec, block_size) for spec in specs)
    log.info("one decode and one chunk of a prompt take %.0f us with %s", 1e6 * total, candidate.name)
    return total


def known_kernels(specs: set[AttentionSpec]) -> Iterator[Candidate]:
    """Yields torch's kernel and the one in Triton, if they are installed and the layers are on GPUs."""
    if any(spec.device.type != "cuda" for spec in specs):
        return
    try:
        from torch.nn.attention.varlen import varlen_attn

        yield Candidate("torch's varlen_attn", cast(Kernel, varlen_attn), is_plain)
    except ImportError:
        pass
    try:
        from engine.attention import paged_triton

        yield Candidate("Triton", paged_triton.paged_attention, paged_triton.can_attend)
    except ImportError:
        pass


def is_plain(spec: AttentionSpec) -> bool:
    """Returns whether a layer computes plain attention in 16 bits, on a GPU."""
    is_simple = spec.softcap is None and not spec.has_sinks and not spec.is_int8 and spec.key_dim == spec.value_dim
    return is_simple and spec.device.type == "cuda" and spec.dtype.itemsize == 2


@dataclass(frozen=True)
class Trial:
    """Random inputs for one call of a kernel; the blocks are out of order."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    batch: FlashBatch
    softcap: float | None
    scales: Scales = None
    sinks: torch.Tensor | None = None

    @classmethod
    def of(cls, spec: AttentionSpec, block_size: int, counts: list[int], lengths: list[int]) -> "Trial":
        """Makes inputs for one layer. counts: queries of each sequence; lengths: tokens of each sequence."""
        generator = torch.Generator(spec.device).manual_seed(0)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=spec.device, dtype=spec.dtype)

        width = -(-max(lengths) // block_size)
        num_blocks = len(lengths) * width
        tables = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).view(len(lengths), width).int()
        starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        batch = FlashBatch(
            cu_seqlens_q=starts,
            block_tables=tables,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            max_query_len=max(counts),
            max_seq_len=width * block_size,
            num_tokens=sum(counts),
            window=spec.window,
        )
        num_heads, shape = spec.group * spec.num_kv_heads, (num_blocks, block_size, spec.num_kv_heads)
        query = numbers(sum(counts), num_heads, spec.key_dim)
        keys, values = numbers(*shape, spec.key_dim), numbers(*shape, spec.value_dim)
        scales = None
        if spec.is_int8:
            (keys, key_scales), (values, value_scales) = (quantized(part, None, SCALES) for part in (keys, values))
            scales = key_scales, value_scales
        return cls(
            query=query,
            keys=keys,
            values=values,
            batch=batch.to(spec.device),
            softcap=spec.softcap,
            scales=scales,
            sinks=numbers(num_heads) if spec.has_sinks else None,
        )

    def with_image(self, sequence: int, start: int, end: int, reaches_back: bool = True) -> "Trial":
        """Returns the same with an image among a sequence's queries, at its positions start .. end."""
        visible = self.ranges if self.batch.visible is None else self.batch.visible.clone()
        row_of_0 = int(self.batch.cu_seqlens_q[sequence + 1] - self.batch.seq_lens[sequence])
        rows = visible[row_of_0 + start : row_of_0 + end]
        rows[:, 1] = end
        if reaches_back:
            rows[:, 0].clamp_(max=start)
        return replace(self, batch=replace(self.batch, visible=visible))

    @property
    def ranges(self) -> torch.Tensor:
        """The positions that each query sees, as `FlashBatch.visible` has them, without images."""
        starts, lengths = self.batch.cu_seqlens_q.tolist(), self.batch.seq_lens.tolist()
        ends = [torch.arange(n - (e - s), n) + 1 for s, e, n in zip(starts, starts[1:], lengths, strict=False)]
        high = torch.cat(ends)
        low = torch.zeros_like(high) if self.batch.window is None else (high - self.batch.window).clamp(min=0)
        return torch.stack([low, high], dim=1).int().to(self.query.device)

    def run(self, kernel: Kernel) -> torch.Tensor:
        scaling = self.query.shape[2] ** -0.5
        return attend(
            kernel,
            self.query,
            self.keys,
            self.values,
            self.batch,
            scaling,
            self.softcap,
            scales=self.scales,
            sinks=self.sinks,
        )


def agrees(kernel: Kernel, spec: AttentionSpec, block_size: int) -> bool:
    """Returns whether a kernel gives what `reference` gives, for chunks of prompts and for decodes of short and long
    contexts.

    Versions of a kernel differ in what they support, and a wrong one does not always raise. So it is tried:
        trial = random queries, keys and values, in blocks out of order
        it agrees if |kernel(trial) - reference(trial)| <= TOLERANCES * |reference(trial)|
    The chunks have a window that begins inside a block, where kernels that support only whole blocks go wrong.
    """
    window = None if spec.window is None else min(spec.window, block_size + 2)
    chunks = Trial.of(
        replace(spec, window=window), block_size, [1, block_size, 2], [2 * block_size + 3, block_size, 3 * block_size]
    )
    trials = [chunks, Trial.of(spec, block_size, [1, 1], [5, 1030])]
    if spec.sees_ahead and sees_ahead(kernel):
        trials.append(chunks.with_image(1, block_size // 2, block_size - 1))
    return all(_agrees(kernel, trial) for trial in trials)


def _agrees(kernel: Kernel, trial: Trial) -> bool:
    expected = trial.run(reference).float()
    try:
        actual = trial.run(kernel).float()
    except Exception as error:  # any kind: from the compiler, the driver, or for an argument that the kernel lacks
        name = getattr(kernel, "__name__", "a kernel")
        log.info("%s does not compute the attention: %s", name, first_line(error))
        return False
    return bool((actual - expected).norm() <= TOLERANCES[trial.query.element_size()] * expected.norm())


def seconds(kernel: Kernel, spec: AttentionSpec, block_size: int) -> float:
    """Measures a step of decodes and a chunk of a prompt on a GPU, in seconds; infinite if its memory is too small."""
    seen = TIMED_TOKENS if spec.window is None else min(TIMED_TOKENS, spec.window + block_size)
    try:
        decodes = Trial.of(spec, block_size, [1] * TIMED_DECODES, [seen] * TIMED_DECODES)
        chunk = Trial.of(spec, block_size, [TIMED_QUERIES], [TIMED_QUERIES])
        with torch.cuda.device(spec.device):
            return sum(timing.seconds(partial(trial.run, kernel)) for trial in (decodes, chunk))
    except Exception:  # the memory is full, the call cannot be recorded, or the compiler fails
        return math.inf
    finally:
        torch.cuda.empty_cache()


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    _: None,
    longest_query: int,
    longest: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softcap: float | None = None,
    scales: Scales = None,
    visible: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes what a kernel should compute, one sequence after the other, in float32.

    Beyond torch's `varlen_attn`: scales: of an int8 cache. visible: see FlashBatch; the window is in it. sinks:
    (heads,), logits that join the softmax and have no value.
    """
    output = query.new_empty(*query.shape[:2], values.shape[3])
    group = query.shape[1] // keys.shape[2]
    for number, (start, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        length = int(seqused_k[number])
        key, value = (
            _read(cache, own, block_table[number].long(), length).repeat_interleave(group, dim=1)
            for cache, own in zip((keys, values), scales or (None, None), strict=True)
        )
        high = torch.arange(length - (end - start), length, device=query.device) + 1
        low = high - 1 - window_size[0] if window_size[0] >= 0 else torch.zeros_like(high)
        if visible is not None:
            low, high = visible[start:end].unbind(1)
        positions = torch.arange(length, device=query.device)
        hidden = (positions < low[:, None]) | (positions >= high[:, None])
        scores = torch.einsum("qhd,khd->hqk", query[start:end].float(), key) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = softmax(scores.masked_fill(hidden, -torch.inf), None if sinks is None else sinks[:, None, None])
        output[start:end] = torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
    return output


def softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Computes the softmax of float32 scores, (..., queries, keys). sinks: (..., 1 or queries, 1), logits that are part
    of its sum alone."""
    if sinks is None:
        return scores.softmax(-1)
    return torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1).softmax(-1)[..., :-1]


def _read(cache: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the keys or values of one sequence: (tokens, kv_heads, dim) float32."""
    numbers = cache[blocks].flatten(0, 1)[:length].float()
    return numbers if scales is None else numbers * scales[blocks].flatten(0, 1)[:length, :, None].float()
