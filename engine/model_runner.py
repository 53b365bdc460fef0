"""ModelRunner: a Batch in, the next token ids out. It does not decide what runs."""

import logging
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedModel

from engine.attention.flash import FlashBatch, Kernel, sees_ahead
from engine.attention.paged import (
    DecodeGroup,
    GroupAttention,
    PrefillChunk,
    StepAttention,
    visible_of,
)
from engine.batch import Batch, Span
from engine.cuda_graphs import DecodeGraphs, GraphRecorder, record_graph
from engine.kv_cache import FREED, KVCache, LayerGroup, first_visible
from engine.layer_probe import forward_of, input_device
from engine.layer_spec import AttentionSpec
from engine.lora.adapter import Adapter
from engine.lora.runner import ModelAdapters
from engine.recurrent.state_cache import StateStep
from engine.sample.masks import GrammarBitmasks
from engine.sample.sampler import Sampler, SamplerOutput, score
from engine.sampling_params import SampledToken
from engine.sequence import Sequence
from engine.vision import Image, VisionEncoder
from errors import first_line
from vision.families import vision_family_of

log = logging.getLogger(__name__)

Features = Items[tuple[int, torch.Tensor]]  # of images, each with the row of its first token
SCORED_ROWS = 64  # rows of a prompt's logits that are in memory in float32 at a time


@dataclass(frozen=True)
class _Layout:
    """The order in which a step's tokens go through the model: decodes first, then prompts."""

    whole: tuple[Span, ...]  # one for each sequence
    decodes: list[Span]  # of one token each, shortest sequence first; each guessed token is one more
    prefills: list[Span]  # those with images whose tokens see each other last

    @classmethod
    def of(cls, batch: Batch) -> "_Layout":
        parts = [
            Span(sequence=span.sequence, start=position, num_tokens=1, draft=span.draft)
            for span in batch.spans
            if span.is_decode
            for position in range(span.start, span.end)
        ]
        prefills = sorted((s for s in batch.spans if not s.is_decode), key=lambda s: bool(_whole_images_in(s)))
        return cls(batch.spans, sorted(parts, key=lambda s: s.start), prefills)

    @property
    def spans(self) -> list[Span]:
        return self.decodes + self.prefills

    def rows(self) -> dict[tuple[int, int], int]:
        """Maps (number of the sequence, position) to the row of this token in the forward."""
        tokens = ((span.sequence.number, p) for span in self.spans for p in range(span.start, span.end))
        return {token: row for row, token in enumerate(tokens)}


@dataclass(frozen=True)
class RunnerOutput:
    """A step that was started; its tokens may not be computed yet."""

    batch: Batch
    complete: list[Span]
    chosen: SamplerOutput | None  # None: no span is complete

    @torch.inference_mode()
    def tokens(self) -> list[list[SampledToken | None]]:
        """Waits for the device. Returns the tokens of each complete span: one, and one for each right guess."""
        tokens = iter([] if self.chosen is None else self.chosen.read())
        return [_confirmed([next(tokens) for _ in range(len(span.draft) + 1)], span.draft) for span in self.complete]


def picked(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Copies these rows without waiting for the device, which indexing with a list would do."""
    if rows == list(range(len(rows))):
        return tensor[: len(rows)].clone()
    index = torch.tensor(rows, pin_memory=tensor.is_cuda)
    return tensor.index_select(0, index.to(tensor.device, non_blocking=True))


def _tokens_after(started: RunnerOutput, rows: list[int], batch: Batch, layout: _Layout) -> torch.Tensor:
    """Takes a batch of decodes' tokens from the step before, in the order of the forward, on its device.

    rows: for each span of the batch, its row in that step.
    """
    assert started.chosen is not None
    row_of = {span.sequence.number: row for span, row in zip(batch.spans, rows, strict=True)}
    order = [row_of[span.sequence.number] for span in layout.spans]
    return picked(started.chosen.token_ids, order)


class ModelRunner:
    """Owns the model and its cache; all calls come from one thread."""

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, eos_token_ids: Iterable[int] = (), flash: Kernel | None = None
    ) -> None:
        """flash: a kernel that attends to all tokens of a step in one call."""
        self.model = model
        self.flash = flash
        self._sees_ahead = flash is not None and sees_ahead(flash)
        self.num_known: int | None = None  # tokens of the vocabulary; the output layer may be padded beyond it
        self._graphs: DecodeGraphs | None = None
        self._forward = forward_of(model)
        self._vision_family = vision_family_of(model.config)
        self.vision: VisionEncoder | None = None
        self.cache = cache
        self.sampler = Sampler(eos_token_ids)
        self.device = input_device(model)
        self.dtype = cast(AttentionSpec, next(iter(cache.specs.values()))).dtype
        self.adapters = ModelAdapters(model, self.device, self.dtype)

    def encode(self, images: list[Image], limit: int) -> None:
        """Gives features to all images that were encoded before, and to `limit` of the others. Raises what the model
        raises."""
        if self.vision is None:
            self.vision = VisionEncoder(self.model)
        for image in images:
            self.vision.recall(image)
        missing = [image for image in images if image.features is None]
        chosen = list(dict.fromkeys(image.digest for image in missing))[:limit]
        if chosen:
            self.vision.encode([image for image in missing if image.digest in chosen])

    @property
    def num_embeddings(self) -> int:
        return cast(int, self.model.get_input_embeddings().num_embeddings)

    def run(self, batch: Batch) -> list[list[SampledToken | None]]:
        """Computes a step. Returns the next tokens of each complete span, in the batch's order: one, and one for each
        guess that was right. Raises what the model raises.
        """
        return self.start(batch).tokens()

    @torch.inference_mode()
    def start(self, batch: Batch, after: "tuple[RunnerOutput, list[int]] | None" = None) -> "RunnerOutput":
        """Starts a step and returns without waiting for its tokens. Raises what the model raises.

        after: a step of decodes whose tokens the CPU has not read yet, and for each span of the batch the row of that
        step that chooses its token.
        """
        layout = _Layout.of(batch)
        # which tokens sample: the last known one of each complete span, and each guess after it
        complete = [span for span in batch.spans if span.is_complete or after is not None]
        sampling = [
            (span.sequence.number, p) for span in complete for p in range(span.end - len(span.draft) - 1, span.end)
        ]
        # which tokens of prompts have their logits scored
        positions = {span.sequence.number: _scored_positions(span) for span in layout.spans}
        scored = [(number, p) for number, ps in positions.items() for p in ps]
        # what the sampler sees: a sequence for each sampling token, as it is if the guesses up to there are right
        sequences = _sequences_to_sample(complete, is_unread=after is not None)
        masks = GrammarBitmasks(sequences)
        if self.device.type != "cpu":
            masks.start()
        # the forward, for the logits of both kinds of tokens
        row_of = layout.rows()
        token_ids = None if after is None else _tokens_after(*after, batch, layout)
        try:
            logits = self.forward(layout, [row_of[token] for token in sampling + scored], token_ids)
        except BaseException:
            masks.wait()  # the same step may be tried again
            raise
        if scored:
            self._score_prompts(logits[len(sampling) :], layout.spans, positions)
        if not complete:
            return RunnerOutput(batch, [], None)
        logits = logits[: len(sampling)]
        if self.num_known is not None:
            logits[:, self.num_known :] = -torch.inf
        return RunnerOutput(batch, complete, self.sampler.choose(logits, sequences, masks))

    @torch.inference_mode()
    def logits(self, batch: Batch, num_kept: int | None = None) -> torch.Tensor:
        """Returns the logits of the batch's last `num_kept` tokens, in its order: (tokens, vocab). None: of all."""
        layout = _Layout.of(batch)
        row_of = layout.rows()
        tokens = [(span.sequence.number, p) for span in batch.spans for p in range(span.start, span.end)]
        return self.forward(layout, [row_of[token] for token in tokens[-(num_kept or 0) :]])

    def forward(self, layout: _Layout, rows: list[int], known: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the logits of some of the step's rows: (rows, vocab). known: the token ids, if only the device has
        them yet."""
        has_adapters = any(span.sequence.params.adapter is not None for span in layout.whole)
        if self._graphs is not None and not layout.prefills and not has_adapters:
            recorded = self._graphs.run(layout.decodes, known)
            if recorded is not None:
                return picked(recorded, rows)
        token_ids: list[int] = []
        for span in layout.spans:
            token_ids += [span.token_at(position) for position in range(span.start, span.end)]
        groups = [self._group_attention(index, group, layout) for index, group in enumerate(self.cache.groups)]
        states = None if self.cache.states is None else self.cache.states.plan_step(layout.whole, layout.rows())
        owners = _owners(layout, states) if has_adapters else []
        with self.adapters.during(owners, len(token_ids)):
            return self._compute(
                torch.tensor([token_ids], device=self.device) if known is None else known[None],
                self._positions(layout),
                StepAttention(self.cache, groups, self.flash, states),
                torch.tensor(rows, dtype=torch.long, device=self.device),
                _features(layout),
            )

    def _compute(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        step: StepAttention,
        rows: torch.Tensor | int = 0,
        features: Features = (),
    ) -> torch.Tensor:
        """Runs the model.

        token_ids: (1, tokens); positions: (1, tokens), or (axes, 1, tokens); rows: the tokens to give logits for, 0 for
        all of them; features: for each image the row of its first token, and (tokens, features).
        """
        family = self._vision_family
        inputs = {"input_ids": token_ids} if family is None else family.inputs(self.model, token_ids, features)
        output = self._forward(**inputs, position_ids=positions, use_cache=False, logits_to_keep=rows, step=step)
        return cast(torch.Tensor, output.logits[0])

    def _positions(self, layout: _Layout) -> torch.Tensor:
        """Returns the step's positions: (1, tokens), or (axes, 1, tokens) where they have several coordinates."""
        axes: list[list[int]] = [[] for _ in range(self._num_axes)]
        for span in layout.spans:
            for axis, positions in zip(axes, self._positions_of(span), strict=True):
                axis += positions
        tensor = torch.tensor(axes, device=self.device)
        return tensor if len(axes) == 1 else tensor[:, None]

    def _positions_of(self, span: Span) -> list[list[int]]:
        """Returns the positions of the span's tokens for each axis."""
        family = self._vision_family
        if family is None or not span.sequence.images:
            return [list(range(span.start, span.end))] * self._num_axes
        return family.positions(span.start, span.end, span.sequence.images)

    @property
    def _num_axes(self) -> int:
        return 1 if self._vision_family is None else self._vision_family.position_axes

    @torch.inference_mode()
    def record_graphs(self, max_rows: int, max_model_len: int, record_graph: GraphRecorder = record_graph) -> None:
        """Records steps of up to `max_rows` decodes, if the model can be recorded. Needs `flash`."""
        assert self.flash is not None
        try:
            self._graphs = DecodeGraphs(
                compute=self._compute,
                positions=self._positions_of,
                num_axes=self._num_axes,
                cache=self.cache,
                kernel=self.flash,
                max_num_seqs=max_rows,
                max_model_len=max_model_len,
                device=self.device,
                record_graph=record_graph,
            )
        except Exception as error:  # the model moves something to the CPU, memory is short, or a kernel is not compiled
            log.info("CUDA graphs are off: %s", first_line(error))

    def _score_prompts(self, logits: torch.Tensor, spans: list[Span], positions: dict[int, range]) -> None:
        """Appends the log-probabilities of prompts' tokens to their sequences. logits: (positions, vocab)."""
        owners = [span.sequence for span in spans for _ in positions[span.sequence.number]]
        targets = [s.sequence.prompt_ids[p + 1] for s in spans for p in positions[s.sequence.number]]
        for i in range(0, len(owners), SCORED_ROWS):
            group = owners[i : i + SCORED_ROWS]
            counts = [sequence.params.num_prompt_logprobs or 0 for sequence in group]
            tokens = score(logits[i : i + SCORED_ROWS], targets[i : i + SCORED_ROWS], counts)
            for sequence, token in zip(group, tokens, strict=True):
                sequence.prompt_logprobs.append(token)

    def _group_attention(self, index: int, group: LayerGroup, layout: _Layout) -> GroupAttention:
        block_size = self.cache.block_size
        slots: list[int] = []
        for span in layout.spans:
            table = span.sequence.block_tables[index]
            slots += [table[p // block_size] * block_size + p % block_size for p in range(span.start, span.end)]
        decodes, prefills, start, flash = [], [], 0, None
        rest = layout
        if self.flash is not None:
            apart = [] if self._sees_ahead else [span for span in layout.prefills if _whole_images_in(span)]
            plain = layout.spans[: len(layout.spans) - len(apart)]
            flash = self._flash_batch(index, group.window, plain) if plain else None
            start = sum(span.num_tokens for span in plain)
            rest = replace(layout, decodes=[], prefills=apart)
        for spans in _similar_lengths(rest.decodes, group.window, block_size):
            decodes.append(self._decode_group(index, group.window, spans, start))
            start += len(spans)
        for span in rest.prefills:
            prefills.append(self._prefill_chunk(index, group.window, span, start))
            start += span.num_tokens
        return GroupAttention(slots=torch.tensor(slots), decodes=tuple(decodes), prefills=tuple(prefills), flash=flash)

    def _flash_batch(self, index: int, window: int | None, spans: list[Span]) -> FlashBatch:
        block_size = self.cache.block_size
        firsts = [first_visible(span.start, window) // block_size for span in spans]
        tables = [
            span.sequence.block_tables[index][first : -(-span.end // block_size)]
            for span, first in zip(spans, firsts, strict=True)
        ]
        width = max(len(table) for table in tables)
        padded = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
        lengths = [span.end - first * block_size for span, first in zip(spans, firsts, strict=True)]
        counts = [span.num_tokens for span in spans]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        return FlashBatch(
            cu_seqlens_q=starts,
            block_tables=padded,
            seq_lens=torch.tensor(lengths).int(),
            max_query_len=max(counts),
            max_seq_len=width * block_size,
            num_tokens=sum(counts),
            window=window,
            visible=self._visible(window, spans, firsts),
        )

    def _visible(self, window: int | None, spans: list[Span], firsts: list[int]) -> torch.Tensor | None:
        """Returns the positions in its table's blocks that each token sees, (tokens, 2) int32; None where the kernel
        knows them, as there are no images. firsts: the first block of each span's table."""
        if not any(self._images_ahead(window, span) for span in spans):
            return None
        ranges = zip(spans, firsts, strict=True)
        size = self.cache.block_size
        return torch.cat([self._visible_of(window, span) - first * size for span, first in ranges]).int()

    def _visible_of(self, window: int | None, span: Span) -> torch.Tensor:
        family = self._vision_family
        reach = family is not None and family.sees_beyond_window
        return visible_of(span.start, span.num_tokens, window, self._images_ahead(window, span), reach)

    def _images_ahead(self, window: int | None, span: Span) -> list[tuple[int, int]]:
        """Returns the span's images whose tokens see later ones, as start and end."""
        if self._vision_family is not None and not self._vision_family.looks_ahead(window):
            return []
        return [(image.start, image.end) for image in _whole_images_in(span)]

    def _decode_group(self, index: int, window: int | None, spans: list[Span], start: int) -> DecodeGroup:
        block_size = self.cache.block_size
        firsts = [first_visible(span.start, window) // block_size for span in spans]
        tables = [
            span.sequence.block_tables[index][first : span.start // block_size + 1]
            for span, first in zip(spans, firsts, strict=True)
        ]
        width = max(len(table) for table in tables)
        padded = torch.tensor([table + [table[-1]] * (width - len(table)) for table in tables])
        visible = [
            (first_visible(span.start, window) - first * block_size, span.end - first * block_size)
            for span, first in zip(spans, firsts, strict=True)
        ]
        return DecodeGroup(
            start=start,
            end=start + len(spans),
            tables=padded,
            visible=torch.tensor(visible),
            block_size=block_size,
            dtype=self.dtype,
        )

    def _prefill_chunk(self, index: int, window: int | None, span: Span, start: int) -> PrefillChunk:
        block_size = self.cache.block_size
        first = first_visible(span.start, window) // block_size
        table = span.sequence.block_tables[index][first : -(-span.end // block_size)]
        assert FREED not in table
        is_plain = not self._images_ahead(window, span)
        is_alone = span.start == 0 and is_plain and (window is None or span.num_tokens <= window)
        return PrefillChunk(
            start=start,
            end=start + span.num_tokens,
            table=torch.tensor(table),
            visible=self._visible_of(window, span) - first * block_size,
            sees_only_itself=is_alone,
            block_size=block_size,
            dtype=self.dtype,
        )


def _whole_images_in(span: Span) -> tuple[Image, ...]:
    return span.sequence.whole_images_in(span.start, span.end)


def _owners(layout: _Layout, states: StateStep | None) -> list[Adapter | None]:
    """Returns the adapter of each of the step's tokens, and of each guess that recurrent layers recall."""
    owners = [span.sequence.params.adapter for span in layout.spans for _ in range(span.num_tokens)]
    for span in layout.whole if states is not None else ():
        state = span.sequence.state
        assert state is not None, "every running sequence has a slot"
        owners += [span.sequence.params.adapter] * (span.start - state.num_tokens)
    return owners


def _features(layout: _Layout) -> list[tuple[int, torch.Tensor]]:
    """Returns the features of the step's images, each with the row of its first token."""
    features, row = [], 0
    for span in layout.spans:
        for image in span.sequence.images_in(span.start, span.end):
            assert image.features is not None, "the scheduler waits for the features"
            start, end = max(span.start, image.start), min(span.end, image.end)
            features.append((row + start - span.start, image.features[start - image.start : end - image.start]))
        row += span.num_tokens
    return features


def _scored_positions(span: Span) -> range:
    """Returns the positions of the prompt that the span computes and whose logits are to be scored."""
    scores = span.sequence.next_scores
    return range(max(span.start, scores.start), min(span.end, scores.stop))


def _sequences_to_sample(complete: list[Span], is_unread: bool) -> list[Sequence]:
    """Returns for each sampling token its sequence, as it is up to that token; is_unread: plus a token that the CPU has
    not read yet, which stands there as 0."""
    if is_unread:
        return [span.sequence.continued((0,)) for span in complete]
    return [span.sequence.continued(span.draft[:n]) for span in complete for n in range(len(span.draft) + 1)]


def _confirmed(tokens: list[SampledToken | None], draft: tuple[int, ...]) -> list[SampledToken | None]:
    """Returns the tokens up to the first wrong guess: those after it were computed for another text."""
    for index, guess in enumerate(draft):
        token = tokens[index]
        if token is None or token.token_id != guess:
            return tokens[: index + 1]
    return tokens


def _similar_lengths(decodes: list[Span], window: int | None, block_size: int) -> Iterator[list[Span]]:
    """Groups decodes, shortest first, so that padding a group to its longest at most doubles what is read."""
    group: list[Span] = []
    for span in decodes:
        if group and _num_visible_blocks(span, window, block_size) > 2 * _num_visible_blocks(
            group[0], window, block_size
        ):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _num_visible_blocks(span: Span, window: int | None, block_size: int) -> int:
    return span.start // block_size - first_visible(span.start, window) // block_size + 1
