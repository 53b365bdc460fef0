"""The probe of layers: a first forward of one token, which shows what each layer of a model stores."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from engine.attention.paged import AttentionRecorder
from engine.layer_spec import LayerSpecs
from engine.recurrent.delta_net import wrap_recurrent_layers
from errors import ModelLoadError
from vision.families import vision_family_of

MEASURED_TOKENS = 64  # whose keys show how large each channel becomes
FARTHEST = 8192  # position of such a token: rotation mixes the channels of a key in all ways up to there
SMALLEST_FACTOR = 2.0**-4  # of the mean: what is small in a few tokens need not be so in all


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device that token ids are put on; the model may be spread over several."""
    weight = getattr(model.get_input_embeddings(), "weight", None)  # those packed for CPUs have none
    return torch.device("cpu") if weight is None else cast(torch.Tensor, weight).device


def forward_of(model: PreTrainedModel) -> Callable[..., Any]:
    """Returns what computes a step of text: the model's own forward, or that of its vision family."""
    family = vision_family_of(model.config)
    return model if family is None else partial(family.forward, model)


def probe_layers(model: PreTrainedModel) -> LayerSpecs:
    """Runs one token through the model and notes what each layer stores. Recurrent layers are wrapped before, so that
    they take the tokens of many sequences. Raises ModelLoadError for a model with a layer that neither calls the
    attention interface nor keeps its state in transformers' cache."""
    wrap_recurrent_layers(model)
    recorder = AttentionRecorder()
    device = input_device(model)
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.long, device=device)
            forward_of(model)(input_ids=ids, use_cache=False, step=recorder)
    except AssertionError as error:
        raise ModelLoadError(f"Models of type {model.config.model_type!r} are not supported: {error}.") from error
    num_layers = model.config.get_text_config().num_hidden_layers
    if not recorder.calls:
        raise ModelLoadError(
            f"Models of type {model.config.model_type!r} are not supported: none of their layers is seen to attend."
        )
    if {*recorder.calls, *recorder.recurrent} != {*range(num_layers)}:
        raise ModelLoadError(
            f"Models of type {model.config.model_type!r} are not supported: "
            "not all of their layers use transformers' attention interface."
        )
    shared = recorder.shared
    family = vision_family_of(model.config)
    stored = {
        layer: replace(call.spec, sees_ahead=family is not None and family.looks_ahead(call.window))
        for layer, call in recorder.calls.items()
        if layer not in shared
    }
    return LayerSpecs(stored, recorder.recurrent, shared)


def placeholders(model: PreTrainedModel) -> set[int]:
    """Returns the token ids that a model replaces by something else, such as features of images."""
    config = model.config.to_dict()
    names = [name for name in config if name.endswith(("_token_id", "_token_index"))]
    return {config[name] for name in names if isinstance(config[name], int)}


def measure_key_factors(model: PreTrainedModel, context: int) -> dict[int, tuple[float, ...]]:
    """Returns for each layer what an int8 cache divides its keys by: how large each channel of a head becomes, against
    the mean of the head. They are powers of two.

    Tokens from the whole vocabulary are computed, at places all over the context. Where a value is no number, the
    factor is 1.
    """
    device, recorder = input_device(model), AttentionRecorder(computes=True)
    num_ids = cast(int, model.get_input_embeddings().num_embeddings)
    ids = [
        i
        for i in torch.linspace(0, num_ids - 1, MEASURED_TOKENS, dtype=torch.float32).long().tolist()
        if i not in placeholders(model)
    ]
    positions = torch.linspace(0, min(context, FARTHEST) - 1, len(ids), device=device, dtype=torch.float32).long()[None]
    family = vision_family_of(model.config)
    if family is not None and family.position_axes > 1:
        positions = positions.expand(family.position_axes, 1, -1)
    with torch.inference_mode():
        inputs = torch.tensor([ids], device=device)
        forward_of(model)(input_ids=inputs, position_ids=positions, use_cache=False, step=recorder)
    return {layer: tuple(_factors(call.key[0]).flatten().tolist()) for layer, call in recorder.calls.items()}


def _factors(key: torch.Tensor) -> torch.Tensor:
    """key: (kv_heads, tokens, dim) -> (kv_heads, dim)."""
    largest = key.float().abs().amax(1)
    relative = (largest / largest.mean(-1, keepdim=True)).clamp(min=SMALLEST_FACTOR)
    return relative.log2().round().exp2().nan_to_num(1.0, posinf=1.0)
