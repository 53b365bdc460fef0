"""Sampler: logits in, one token id per row out, chosen as each row's SamplingParams say."""

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from engine.cpu import sampling_kernels
from engine.sample.masks import GrammarBitmasks
from engine.sampling_params import MIN_TEMPERATURE, SampledToken, uniform
from engine.sequence import Sequence

CANDIDATES = 1024  # best logits of a row that are sorted first; a row whose top_p needs more is sorted whole
KEPT = 8192  # logits of a row that a kernel collects at most
SAMPLE, SAMPLED_BEST = 2048, 32  # of 2,048 logits of a row the 32nd best estimates where the best 1/64 begins


@dataclass(frozen=True)
class SamplerOutput:
    """A step's chosen tokens, which the device may still be computing."""

    token_ids: torch.Tensor  # (rows,)
    best: torch.Tensor  # (rows,), each one's largest logit
    raw: torch.Tensor  # (rows, vocab)
    sequences: Rows[Sequence]

    def read(self) -> list[SampledToken | None]:
        """Waits for the device. Returns a token for each row, None where its largest logit is not finite."""
        chosen_ids = self.token_ids.tolist()
        reports = _logprobs(self.raw, chosen_ids, self.sequences)
        finite = torch.isfinite(self.best).tolist()
        return [
            reports.get(row, SampledToken(token_id)) if is_finite else None
            for row, (token_id, is_finite) in enumerate(zip(chosen_ids, finite, strict=True))
        ]


class Sampler:
    """Chooses the next token of every row in one pass; no row's result depends on another row."""

    def __init__(self, eos_token_ids: Iterable[int] = ()) -> None:
        self._eos_token_ids = sorted(eos_token_ids)

    # NOTE: `choose` in short. A row's logits are changed first: penalties, bias and min_tokens, grammar. Then:
    #
    #   temperature 0                   take the largest logit
    #   no top_k, no top_p              on a CPU with kernels `_draw`, else `_draw_from_all`:
    #                                   weights = exp(logits / temperature), without those below min_p
    #   top_k or top_p, CPU kernels     `_draw_few`: one pass collects the best 1/64 of the logits; sort these and draw
    #                                   from them. A row whose top_k or top_p may reach beyond them goes on to the next
    #   top_k or top_p otherwise        `_draw_from_sorted`: sort the 1,024 best logits (on a GPU all of them) and draw;
    #                                   a row that may need more is sorted whole
    #
    # All of them draw at the random number uniform(seed, position): but for rounding they choose the same token, and no
    # row depends on its neighbours.

    def choose(
        self, logits: torch.Tensor, sequences: Rows[Sequence], masks: GrammarBitmasks | None = None
    ) -> SamplerOutput:
        """Chooses without waiting for the device. logits: (rows, vocab), one row per sequence; masks: the grammars'
        bitmasks of these rows, if they are being computed already."""
        raw = logits.float()
        reports_raw = any(sequence.params.num_logprobs is not None for sequence in sequences)
        logits = raw.clone() if reports_raw else raw
        self._penalize(logits, sequences)
        self._bias(logits, sequences)
        (masks or GrammarBitmasks(sequences)).apply(logits)
        best, token_ids = sampling_kernels.argmax(logits) if sampling_kernels.can_argmax(logits) else logits.max(dim=-1)
        pending = [row for row, sequence in enumerate(sequences) if not sequence.params.is_greedy]
        if sampling_kernels.can_argmax(logits):
            plain = [row for row in pending if not sequences[row].params.needs_sorting]
            pending = [row for row in pending if sequences[row].params.needs_sorting]
            if plain:
                token_ids[plain] = _draw(logits, plain, best[plain], [sequences[row] for row in plain])
            if pending:
                drawn, done = _draw_few(logits, pending, best[pending], [sequences[row] for row in pending])
                token_ids[pending] = drawn
                pending = [row for row, is_done in zip(pending, done.tolist(), strict=True) if not is_done]
        if pending:
            rows = torch.tensor(pending, device=logits.device)
            owners = [sequences[row] for row in pending]
            token_ids[rows] = self._sample(logits if len(pending) == len(sequences) else logits[rows], owners)
        return SamplerOutput(token_ids=token_ids, best=best, raw=raw, sequences=sequences)

    def _penalize(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
        """Applies penalties in place: repetition over prompt and answer (as transformers), then presence and frequency
        over the answer."""
        vocab = logits.shape[-1]
        flat = logits.view(-1)
        rows = [i for i, s in enumerate(sequences) if s.params.repetition_penalty != 1.0]
        if rows:
            keys, _ = _count_tokens([(row, sequences[row].token_ids) for row in rows], vocab, logits.device)
            penalty = _column(sequences, "repetition_penalty", logits)[keys // vocab]
            seen = flat[keys]
            flat[keys] = torch.where(seen > 0, seen / penalty, seen * penalty)
        rows = [i for i, s in enumerate(sequences) if s.params.presence_penalty or s.params.frequency_penalty]
        if rows:
            keys, counts = _count_tokens([(row, sequences[row].output_ids) for row in rows], vocab, logits.device)
            presence = _column(sequences, "presence_penalty", logits)[keys // vocab]
            frequency = _column(sequences, "frequency_penalty", logits)[keys // vocab]
            flat[keys] -= presence + frequency * counts

    def _bias(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
        """Adds logit_bias in place, and forbids tokens that end the answer before min_tokens."""
        for row, sequence in enumerate(sequences):
            if bias := sequence.params.logit_bias:
                values = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
                logits[row, list(bias)] += values
            can_end = sequence.matcher is not None and sequence.matcher.decides_end
            if sequence.num_output_tokens < sequence.params.min_tokens and not can_end:
                logits[row, [*self._eos_token_ids, *sequence.params.stop_token_ids]] = -torch.inf

    def _sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
        """Draws a token for each row, (rows, vocab) -> (rows,): the inverse of the row's cumulative distribution at its
        random number."""
        logits = logits / _column(sequences, "temperature", logits).clamp(min=MIN_TEMPERATURE)[:, None]
        numbers = [uniform(s.seed, s.num_output_tokens) for s in sequences]
        at = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
        token_ids = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
        plain = [row for row, s in enumerate(sequences) if not s.params.needs_sorting]
        if plain:
            token_ids[plain] = self._draw_from_all(logits[plain], [sequences[row] for row in plain], at[plain])
        pending = [row for row, s in enumerate(sequences) if s.params.needs_sorting]
        vocab = logits.shape[-1]  # on a GPU sorting costs less than waiting for whether it has to be repeated
        for width in (vocab,) if logits.is_cuda else (min(CANDIDATES, vocab), vocab):
            if pending:
                chosen = [sequences[row] for row in pending]
                drawn, complete = self._draw_from_sorted(logits[pending], chosen, at[pending], width)
                token_ids[pending] = drawn
                done = [True] * len(pending) if width == vocab else complete.tolist()
                pending = [row for row, ok in zip(pending, done, strict=True) if not ok]
        return token_ids

    def _draw_from_all(self, logits: torch.Tensor, sequences: list[Sequence], at: torch.Tensor) -> torch.Tensor:
        """Draws without sorting, for rows without top_k and top_p."""
        weights = (logits - logits.amax(-1, keepdim=True)).exp_()  # 1 for the best token
        if any(s.params.min_p for s in sequences):
            weights[weights < _column(sequences, "min_p", logits)[:, None]] = 0
        return _invert(weights, at)

    def _draw_from_sorted(
        self, logits: torch.Tensor, sequences: list[Sequence], at: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws from the `width` best logits. Returns False for rows whose top_k or top_p may reach beyond them."""
        vocab = logits.shape[-1]
        values, candidates = logits.topk(width, dim=-1) if width < vocab else logits.sort(-1, descending=True)
        total = (logits - values[:, :1]).exp().sum(-1)
        reach = torch.full((len(sequences),), width, device=logits.device, dtype=torch.int64)
        drawn, complete = _draw_from_best(values, total.double(), sequences, at, reach)
        return candidates.gather(-1, drawn[:, None])[:, 0], complete


def _draw_few(
    logits: torch.Tensor, rows: list[int], best: torch.Tensor, sequences: list[Sequence]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does what `Sampler._draw_from_sorted` does, with the logits that a kernel collects in one pass."""
    temperatures = _column(sequences, "temperature", logits).clamp(min=MIN_TEMPERATURE)
    at = torch.tensor([uniform(s.seed, s.num_output_tokens) for s in sequences], dtype=torch.float64)
    threshold = _threshold(logits, rows)
    values, columns, counts, total = sampling_kernels.collect(
        logits, torch.tensor(rows), best, temperatures, threshold, KEPT
    )
    num_kept = max(1, min(int(counts.max()), KEPT))
    values, order = (values[:, :num_kept] / temperatures[:, None]).topk(min(CANDIDATES, num_kept), dim=-1)
    drawn, complete = _draw_from_best(values, total, sequences, at, counts.clamp(max=values.shape[-1]))
    chosen = columns.gather(-1, order.gather(-1, drawn[:, None]))[:, 0]
    return chosen.long(), complete & (counts <= KEPT)


def _threshold(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Estimates for each row the value that its best 1/64 of the logits reach, from a sample of them: (rows,)."""
    vocab = logits.shape[-1]
    if vocab <= KEPT:
        return torch.full((len(rows),), -torch.inf, dtype=torch.float32)
    return logits[:, :: vocab // SAMPLE][rows].topk(SAMPLED_BEST, dim=-1).values[:, -1]


def _draw_from_best(
    values: torch.Tensor, total: torch.Tensor, sequences: list[Sequence], at: torch.Tensor, reach: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a column of `values` for each row, and returns False for rows whose top_k or top_p may reach beyond them.

    values: (rows, width), the largest logits over temperature, in descending order; total: (rows,) float64, the sum of
    the weights of all logits; reach: (rows,), how many of the row's values are its best ones without a gap.
    """
    width = values.shape[-1]
    weights = (values - values[:, :1]).exp()
    top_k = _column(sequences, "top_k", values)
    top_k = torch.where(top_k > 0, top_k, torch.inf)[:, None]
    rank = torch.arange(width, device=values.device)
    weights[rank >= top_k] = 0
    has_all = top_k[:, 0] <= reach
    total = torch.where(has_all, weights.sum(-1).double(), total)
    mass = weights.double().cumsum(-1) / total[:, None]
    top_p = _column(sequences, "top_p", values)[:, None]
    complete = has_all | (mass[:, -1] >= top_p[:, 0])
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
    weights[(before >= top_p) & (rank > 0)] = 0  # the token that crosses top_p is kept
    weights[weights < _column(sequences, "min_p", values)[:, None]] = 0
    return _invert(weights, at), complete


def _draw(logits: torch.Tensor, rows: list[int], best: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Does what `Sampler._draw_from_all` does, in a kernel: (rows,)."""
    numbers = torch.tensor([uniform(s.seed, s.num_output_tokens) for s in sequences], dtype=torch.float64)
    temperatures = _column(sequences, "temperature", logits).clamp(min=MIN_TEMPERATURE)
    min_p = _column(sequences, "min_p", logits)
    return sampling_kernels.draw(logits, torch.tensor(rows), best, temperatures, min_p, numbers)


def _invert(weights: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Finds in each row the first column whose cumulated weight exceeds `at` times the total, never one of weight 0."""
    cumulated = weights.double().cumsum(-1)
    return torch.searchsorted(cumulated, (at * cumulated[:, -1])[:, None], right=True)[:, 0].clamp(
        max=weights.shape[-1] - 1
    )


def _logprobs(raw: torch.Tensor, token_ids: list[int], sequences: Rows[Sequence]) -> dict[int, SampledToken]:
    """Reports log-probabilities for the rows that asked for them: raw (rows, vocab) -> {row: its token}."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.num_logprobs is not None]
    if not rows:
        return {}
    counts = [sequences[row].params.num_logprobs or 0 for row in rows]
    return dict(zip(rows, score(raw[rows], [token_ids[row] for row in rows], counts), strict=True))


def score(logits: torch.Tensor, token_ids: list[int], counts: list[int]) -> list[SampledToken]:
    """Returns the log-probabilities of one token in each row of logits (rows, vocab), and of the row's best ones.

    counts: how many of the best ones, for each row.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(max(counts), logprobs.shape[-1]), dim=-1)
    return [
        SampledToken(token_id, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for token_id, logprob, ids, values, count in zip(
            token_ids, chosen, top.indices.tolist(), top.values.tolist(), counts, strict=True
        )
    ]


def _column(sequences: Rows[Sequence], name: str, like: torch.Tensor) -> torch.Tensor:
    """Returns one sampling parameter of all rows: (rows,)."""
    values = [getattr(s.params, name) for s in sequences]
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _count_tokens(
    rows: list[tuple[int, list[int]]], vocab: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distinct (row, token) pairs as row * vocab + token, and how often each occurs."""
    keys = [torch.tensor(token_ids, dtype=torch.long) + row * vocab for row, token_ids in rows]
    distinct, counts = torch.unique(torch.cat(keys), return_counts=True)
    return distinct.to(device), counts.to(device)
