"""The probe of layers: a first forward of one token, which shows what each layer of a model stores."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.attention.paged import AttentionRecorder
from engine.layer_spec import LayerSpecs
from engine.recurrent.delta_net import wrap_recurrent_layers
from errors import ModelLoadError
from vision.families import vision_family_of


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device that token ids are put on; the model may be spread over several."""
    parameter = next(model.get_input_embeddings().parameters(), None)
    # packed weights, which are no parameters, are for CPUs
    return torch.device("cpu") if parameter is None else parameter.device


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
    stored = {layer: call.spec for layer, call in recorder.calls.items() if layer not in shared}
    return LayerSpecs(stored, recorder.recurrent, shared)
