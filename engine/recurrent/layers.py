"""RecurrentLayer: a stock module with recurrent state, computed for the many sequences of a step.

Stock modules take one state and the tokens of one sequence, or one token for each of a batch of states. So the step's
tokens are cut into runs, and the stock module is called once for all runs of one length: once for all decodes, and once
for a chunk of a prompt. It finds its state in an object with the methods of transformers' cache.
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from engine.attention.paged import AttentionRecorder, StepAttention
from engine.layer_spec import RecurrentSpec, StateShape
from engine.lora.updates import ActiveAdapters
from engine.recurrent.state_cache import Phase, StateCache, StateRun, StateStep

StateKey = tuple[str, int]  # "conv" or "recurrent", and the number among several states of a layer


class LayerStates:
    """The states of one layer, a row for each sequence of a call, with the methods of transformers' `Cache` that
    recurrent modules call."""

    def __init__(self, states: dict[StateKey, torch.Tensor] | None = None) -> None:
        """states: (rows, *shape) each. Without them, those that a module makes for new sequences are recorded."""
        self.states: dict[StateKey, torch.Tensor] = {} if states is None else states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.states.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.states.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """Appends new columns, (rows, channels, tokens), and returns them with those before; the last ones are kept."""
        width = conv_kernel_size or conv_states.shape[-1]
        before = self.states.get(("conv", state_idx))
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:-1], width)
        columns = torch.cat([before, conv_states], dim=-1)
        self.states["conv", state_idx] = columns[..., -width:]
        return columns

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **others: Any
    ) -> torch.Tensor:
        self.states["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.states)

    def is_recording_past(self, layer_idx: int | None = None) -> bool:
        return False


class RecurrentLayer(nn.Module):
    """Stands in the place of a stock recurrent module."""

    def __init__(self, stock: nn.Module, layer: int) -> None:
        super().__init__()
        self.stock, self._layer = stock, layer
        self._cache_name = _cache_name(stock)
        self.step_adapters = ActiveAdapters()  # replaced by the model's own, once it has adapters

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        """hidden_states: (1, tokens, columns)."""
        step = others.pop("step", None)
        if isinstance(step, AttentionRecorder):
            step.recurrent[self._layer], output = self.record(hidden_states)
            return output
        if not isinstance(step, StepAttention):  # transformers' own forward
            return cast(torch.Tensor, self.stock(hidden_states=hidden_states, **others))
        assert step.cache.states is not None and step.states is not None
        return self.compute(hidden_states[0], step.states, step.cache.states)[None]

    def compute(self, tokens: torch.Tensor, step: StateStep, cache: StateCache) -> torch.Tensor:
        """Computes a step's tokens, (tokens, columns)."""
        inputs = cache.inputs[self._layer]
        rows = torch.cat([tokens, inputs[list(step.recalled)]]) if step.recalled else tokens
        output = torch.empty_like(rows)
        for phase in step.phases:
            self._compute_phase(phase, cache, rows, output)
        for row, place in step.kept:
            inputs[place] = tokens[row]
        return output[: len(tokens)]

    def record(self, hidden_states: torch.Tensor) -> tuple[RecurrentSpec, torch.Tensor]:
        """Returns the spec of the layer's state, and its output for a new sequence."""
        recorded = LayerStates()
        output = self.stock(hidden_states=hidden_states, **{self._cache_name: recorded})
        shapes = tuple(
            StateShape(kind=kind, index=index, shape=tuple(state.shape[1:]), dtype=state.dtype)
            for (kind, index), state in recorded.states.items()
        )
        width, dtype = hidden_states.shape[-1], hidden_states.dtype
        return RecurrentSpec(shapes, input_width=width, input_dtype=dtype, device=hidden_states.device), output

    def _compute_phase(self, phase: Phase, cache: StateCache, rows: torch.Tensor, output: torch.Tensor) -> None:
        groups: dict[tuple[int, bool], list[StateRun]] = {}
        for run in phase.runs:
            groups.setdefault((len(run.rows), run.writes), []).append(run)
        tensors, keys = cache.tensors[self._layer], [(s.kind, s.index) for s in cache.specs[self._layer].states]
        for (length, writes), runs in groups.items():
            slots = torch.tensor([run.slot for run in runs], device=rows.device)
            index = torch.tensor([run.rows for run in runs], device=rows.device).flatten()
            before = {key: tensor.index_select(0, slots) for key, tensor in zip(keys, tensors, strict=True)}
            states = LayerStates(before)
            tokens = rows.index_select(0, index).view(len(runs), length, -1)
            with self.step_adapters.in_order(index):
                result = self.stock(hidden_states=tokens, **{self._cache_name: states})
            output.index_copy_(0, index, result.flatten(0, 1))
            if writes:
                for key, tensor in zip(keys, tensors, strict=True):
                    tensor.index_copy_(0, slots, states.states[key].to(tensor.dtype))
        phase.save(tensors)


def asks_for_state(module: nn.Module) -> bool:
    """Returns whether a stock module keeps a recurrent state in its cache."""
    return bool(_cache_name(module))


def _cache_name(module: nn.Module) -> str:
    """Returns the name under which the module's forward takes its cache; empty for a module without recurrent state."""
    forward: Callable[..., Any] = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "get_conv_state" not in code.co_names:
        return ""
    parameters = inspect.signature(forward).parameters
    return next((name for name in ("cache_params", "past_key_values") if name in parameters), "")
