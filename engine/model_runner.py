"""load_model, and ModelRunner: a Batch in, the next token ids out. It does not decide what runs."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel

from engine.attention.flash import FlashBatch, Kernel
from engine.attention.paged import DecodeGroup, GroupAttention, PrefillChunk, Probe, StepAttention, visible_of
from engine.batch import Batch, Span
from engine.cuda_graphs import DecodeGraphs, GraphRecorder, record_graph
from engine.kv_cache import FREED, KVCache, LayerGroup, first_visible
from engine.layer_spec import AttentionSpec
from engine.sample.masks import GrammarBitmasks
from engine.sample.sampler import Sampler, SamplerOutput, score
from engine.sampling_params import SampledToken
from engine.vision import Image, VisionEncoder
from errors import ModelLoadError, first_line
from vision.families import vision_family_of

log = logging.getLogger(__name__)


SCORED_ROWS = 64  # of a prompt's logits


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go, with the model spread over devices."""
    parameter = next(model.get_input_embeddings().parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device  # packed weights are for CPUs


def probe_layers(model: PreTrainedModel) -> dict[int, AttentionSpec]:
    """What each layer stores, noted in a forward of one token; raises ModelLoadError if a layer goes another way."""
    probe = Probe()
    device = input_device(model)
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False, step=probe)
    except AssertionError as error:
        raise ModelLoadError(f"Models of type {model.config.model_type!r} are not supported: {error}.") from error
    num_layers = model.config.get_text_config().num_hidden_layers
    if set(probe.calls) != set(range(num_layers)):
        raise ModelLoadError(
            f"Models of type {model.config.model_type!r} are not supported: "
            "not all of their layers use transformers' attention interface."
        )
    return {layer: call.spec for layer, call in probe.calls.items()}


@dataclass(frozen=True)
class _Layout:
    """A step's tokens in the order of the forward."""

    decodes: list[Span]  # of one token each, by number of blocks; a guessed token is one more decode
    prefills: list[Span]  # those with images whose tokens see each other last

    @classmethod
    def of(cls, batch: Batch) -> "_Layout":
        parts = [
            Span(span.sequence, position, 1, span.draft)
            for span in batch.spans
            if span.is_decode
            for position in range(span.start, span.end)
        ]
        prefills = sorted((s for s in batch.spans if not s.is_decode), key=lambda s: bool(_whole_images_in(s)))
        return cls(sorted(parts, key=lambda s: s.start), prefills)

    @property
    def spans(self) -> list[Span]:
        return self.decodes + self.prefills

    def rows(self) -> dict[tuple[int, int], int]:
        """(sequence's number, position) -> its row in the forward."""
        places = ((span.sequence.number, p) for span in self.spans for p in range(span.start, span.end))
        return {place: row for row, place in enumerate(places)}


@dataclass(frozen=True)
class RunnerOutput:
    """A step under way."""

    batch: Batch
    complete: list[Span]
    chosen: SamplerOutput | None  # None: no span is complete

    @torch.inference_mode()
    def tokens(self) -> list[list[SampledToken | None]]:
        """Those of each complete span; waits for the device."""
        tokens = iter([] if self.chosen is None else self.chosen.read())
        return [_confirmed([next(tokens) for _ in range(len(span.draft) + 1)], span.draft) for span in self.complete]


def picked(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """A copy of these rows, without waiting for its device, as an index from a list would."""
    if rows == list(range(len(rows))):
        return tensor[: len(rows)].clone()
    index = torch.tensor(rows, pin_memory=tensor.is_cuda)
    return tensor.index_select(0, index.to(tensor.device, non_blocking=True))


def _tokens_after(started: RunnerOutput, rows: list[int], batch: Batch, layout: _Layout) -> torch.Tensor:
    """The tokens of a batch of decodes, in the forward's order: those that `rows` of the step before choose."""
    assert started.chosen is not None
    row_of = {span.sequence.number: row for span, row in zip(batch.spans, rows, strict=True)}
    order = [row_of[span.sequence.number] for span in layout.spans]
    return picked(started.chosen.token_ids, order)


class ModelRunner:
    """Owns the model and its cache; all calls come from one thread."""

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, eos_token_ids: Iterable[int] = (), flash: Kernel | None = None
    ) -> None:
        """flash: attends to all of a step's tokens in one."""
        self.model = model
        self.flash = flash
        self.num_known: int | None = None  # tokens of the vocabulary, where the output layer is padded beyond it
        self._graphs: DecodeGraphs | None = None
        self._vision_family = vision_family_of(model.config)
        self.vision: VisionEncoder | None = None
        self.cache = cache
        self.sampler = Sampler(eos_token_ids)
        self.device = input_device(model)
        self.dtype = next(iter(cache.tensors.values()))[0].dtype

    def encode(self, images: list[Image], most: int) -> None:
        """Gives features to those that are known, and to the first others, `most` of them; raises what the model
        raises."""
        if self.vision is None:
            self.vision = VisionEncoder(self.model)
        for image in images:
            self.vision.recall(image)
        missing = [image for image in images if image.features is None]
        chosen = list(dict.fromkeys(image.digest for image in missing))[:most]
        if chosen:
            self.vision.encode([image for image in missing if image.digest in chosen])

    @property
    def num_embeddings(self) -> int:
        return cast(int, self.model.get_input_embeddings().num_embeddings)

    def run(self, batch: Batch) -> list[list[SampledToken | None]]:
        """The next tokens of each complete span, in the batch's order: one, and one for each guess that was right.

        Raises what the model raises.
        """
        return self.start(batch).tokens()

    @torch.inference_mode()
    def start(self, batch: Batch, after: "tuple[RunnerOutput, list[int]] | None" = None) -> "RunnerOutput":
        """As `run`, without waiting for the tokens. `after`: a step that is not read yet, and which of its rows
        choose the token of each of the batch's sequences."""
        layout = _Layout.of(batch)
        row_of = layout.rows()
        complete = [span for span in batch.spans if span.is_complete or after is not None]
        places = [
            (span.sequence.number, p) for span in complete for p in range(span.end - len(span.draft) - 1, span.end)
        ]
        prompts = {span.sequence.number: _scored_positions(span) for span in layout.spans}
        scored = [(number, p) for number, positions in prompts.items() for p in positions]
        known = None if after is None else _tokens_after(*after, batch, layout)
        heirs = [
            span.sequence.continued(span.draft[:length] or (0,) * (after is not None))
            for span in complete
            for length in range(len(span.draft) + 1)
        ]
        masks = GrammarBitmasks(heirs)
        if self.device.type != "cpu":
            masks.start()
        try:
            logits = self.forward(layout, [row_of[place] for place in places + scored], known)
        except BaseException:
            masks.wait()  # the same step may be tried again
            raise
        if scored:
            self._score_prompts(logits[len(places) :], layout.spans, prompts)
        if not complete:
            return RunnerOutput(batch, [], None)
        if self.num_known is not None:
            logits[: len(places), self.num_known :] = -torch.inf
        return RunnerOutput(batch, complete, self.sampler.choose(logits[: len(places)], heirs, masks))

    @torch.inference_mode()
    def logits(self, batch: Batch, num_kept: int | None = None) -> torch.Tensor:
        """Of the batch's tokens, or its last `num_kept` ones, in its order: (tokens, vocab)."""
        layout = _Layout.of(batch)
        row_of = layout.rows()
        places = [(span.sequence.number, p) for span in batch.spans for p in range(span.start, span.end)]
        return self.forward(layout, [row_of[place] for place in places[-(num_kept or 0) :]])

    def forward(self, layout: _Layout, rows: list[int], known: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of the step's tokens number `rows`: (rows, vocab). known: the tokens, where the CPU lacks them."""
        if self._graphs is not None and not layout.prefills:
            recorded = self._graphs.run(layout.decodes, known)
            if recorded is not None:
                return picked(recorded, rows)
        token_ids: list[int] = []
        for span in layout.spans:
            token_ids += [span.token_at(position) for position in range(span.start, span.end)]
        groups = [self._group_attention(index, group, layout) for index, group in enumerate(self.cache.groups)]
        return self._compute(
            torch.tensor([token_ids], device=self.device) if known is None else known[None],
            self._positions(layout),
            StepAttention(self.cache, groups, self.flash),
            torch.tensor(rows, dtype=torch.long, device=self.device),
            _features(layout),
        )

    def _compute(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        step: StepAttention,
        rows: torch.Tensor | int = 0,
        features: Iterable[tuple[int, torch.Tensor]] = (),
    ) -> torch.Tensor:
        """token_ids: (1, tokens); positions: (1, tokens), or (axes, 1, tokens); rows: whose logits are wanted, 0 for
        all of them; features: of images, and the row of the first token of each."""
        inputs: dict[str, torch.Tensor] = {"input_ids": token_ids}
        if features:
            assert self._vision_family is not None
            embeddings = cast(torch.Tensor, self.model.get_input_embeddings()(token_ids))
            inputs = self._vision_family.inputs(embeddings, features)
        output = self.model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=rows, step=step)
        return cast(torch.Tensor, output.logits[0])

    def _positions(self, layout: _Layout) -> torch.Tensor:
        """(1, tokens), or (axes, 1, tokens) for a model whose images have positions of more coordinates than one."""
        family = self._vision_family
        axes: list[list[int]] = [[] for _ in range(1 if family is None else family.position_axes)]
        for span in layout.spans:
            rows: Iterable[Iterable[int]] = [range(span.start, span.end)] * len(axes)
            if family is not None and span.sequence.images:
                rows = family.positions(span.start, span.end, span.sequence.images)
            for axis, positions in zip(axes, rows, strict=True):
                axis += positions
        tensor = torch.tensor(axes, device=self.device)
        return tensor if len(axes) == 1 else tensor[:, None]

    @torch.inference_mode()
    def record_graphs(self, most: int, max_model_len: int, record_graph: GraphRecorder = record_graph) -> None:
        """Steps of up to `most` decodes, where the model can be recorded; it needs `flash`."""
        assert self.flash is not None
        try:
            self._graphs = DecodeGraphs(
                self._compute, self.cache, self.flash, most, max_model_len, self.device, record_graph
            )
        except RuntimeError as error:  # it moves something to the CPU, or memory is short
            log.info("CUDA graphs are off: %s", first_line(error))

    def _score_prompts(self, logits: torch.Tensor, spans: list[Span], positions: dict[int, range]) -> None:
        """logits: (positions of all spans, vocab); SCORED_ROWS of them at a time in float32."""
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
        apart = layout
        if self.flash is not None:  # whose kernel knows no tokens that see later ones
            plain = [span for span in layout.spans if not _whole_images_in(span)]
            flash = self._flash_batch(index, group.window, plain) if plain else None
            start = sum(span.num_tokens for span in plain)
            apart = _Layout([], [span for span in layout.prefills if _whole_images_in(span)])
        for spans in _similar_lengths(apart.decodes, group.window, block_size):
            decodes.append(self._decode_group(index, group.window, spans, start))
            start += len(spans)
        for span in apart.prefills:
            prefills.append(self._prefill_chunk(index, group.window, span, start))
            start += span.num_tokens
        return GroupAttention(torch.tensor(slots), tuple(decodes), tuple(prefills), flash)

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
        limits = (max(counts), width * block_size, sum(counts))
        return FlashBatch(starts, padded, torch.tensor(lengths).int(), *limits, window)

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
        return DecodeGroup(start, start + len(spans), padded, torch.tensor(visible), block_size, self.dtype)

    def _prefill_chunk(self, index: int, window: int | None, span: Span, start: int) -> PrefillChunk:
        block_size = self.cache.block_size
        first = first_visible(span.start, window) // block_size
        table = span.sequence.block_tables[index][first : -(-span.end // block_size)]
        assert FREED not in table
        images = [(image.start, image.end) for image in _whole_images_in(span)]
        visible = visible_of(span.start, span.num_tokens, window, images) - first * block_size
        is_alone = span.start == 0 and not images and (window is None or span.num_tokens <= window)
        place = (start, start + span.num_tokens)
        return PrefillChunk(*place, torch.tensor(table), visible, is_alone, block_size, self.dtype)


def _whole_images_in(span: Span) -> tuple[Image, ...]:
    return span.sequence.whole_images_in(span.start, span.end)


def _features(layout: _Layout) -> list[tuple[int, torch.Tensor]]:
    """Those of the step's images, and the row of each one's first token."""
    found, row = [], 0
    for span in layout.spans:
        for image in span.sequence.images_in(span.start, span.end):
            assert image.features is not None, "the scheduler waits for the features"
            start, end = max(span.start, image.start), min(span.end, image.end)
            found.append((row + start - span.start, image.features[start - image.start : end - image.start]))
        row += span.num_tokens
    return found


def _scored_positions(span: Span) -> range:
    """Those of its sequence's `next_scores` that the span computes."""
    wanted = span.sequence.next_scores
    return range(max(span.start, wanted.start), min(span.end, wanted.stop))


def _confirmed(tokens: list[SampledToken | None], draft: tuple[int, ...]) -> list[SampledToken | None]:
    """The tokens up to the first that was guessed wrongly: what comes after it was computed for another text."""
    for index, guess in enumerate(draft):
        token = tokens[index]
        if token is None or token.token_id != guess:
            return tokens[: index + 1]
    return tokens


def _similar_lengths(decodes: list[Span], window: int | None, block_size: int) -> Iterator[list[Span]]:
    """Runs of decodes, shortest first, whose padding to the longest at most doubles what is read."""
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
