"""At start a model is compared with transformers' own: those that are computed rightly pass, others are refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, SHARING, SINKS, tiny_gemma_that_sees, tiny_model
from test_model_runner import MODELS, SMALL
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from engine import start_check
from engine.attention import fused, paged
from engine.build import ModelDefaults, build_engine, load_engine
from engine.checked_model import check_model
from engine.cpu import kernels
from engine.cpu.packing import pack_model
from engine.engine import EngineOptions
from engine.model_runner import ModelRunner
from engine.quantization import QUANTIZATIONS
from errors import ModelLoadError

OPTIONS = EngineOptions(kv_cache_memory=2**24, kv_block_size=4, max_model_len=256)


def runner_of(model: PreTrainedModel) -> ModelRunner:
    runner = build_engine(model, OPTIONS, frozenset()).runner
    assert isinstance(runner, ModelRunner)
    return runner


def mixture() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, sliding_window=20))


TINY = {
    **{family: lambda family=family: tiny_model(family) for family in FAMILIES | SHARING | SINKS},
    **MODELS,
    "sees": lambda: tiny_gemma_that_sees(5),
    "mixture": mixture,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_what_is_computed_rightly_passes_in_milliseconds(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = TINY[name]().to(dtype).eval()
    model.set_attn_implementation({"text_config": paged.NAME, "": paged.NAME})
    assert start_check.check(runner_of(model), 256)


@pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES | SHARING | SINKS)
def test_packed_layers_compute_on_both_sides(family: str, quantization: str) -> None:
    model = tiny_model(family, hidden_size=64, intermediate_size=96, head_dim=32)
    with torch.inference_mode():
        pack_model(model, QUANTIZATIONS[quantization])
        fused.fuse_attention(model)
    assert start_check.check(runner_of(model), 256)


def test_a_context_of_a_few_tokens_is_no_reason_to_refuse(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    options = EngineOptions(kv_cache_memory=2**20, kv_block_size=4, max_model_len=10)
    checked = check_model(tmp_path, options.dtype, options.device_map)
    assert load_engine(checked, options, ModelDefaults, lambda phase, fraction: None)[0].max_model_len == 10


class WrongDecodesConfig(LlamaConfig):
    model_type = "wrong_decodes"


class WrongDecodes(LlamaForCausalLM):
    """Once its cache holds something, it computes something else: the engine, which has a cache of its own, cannot
    know."""

    config_class = WrongDecodesConfig

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **others: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            input_ids = (input_ids + 1) % self.config.vocab_size
        return super().forward(input_ids, past_key_values=past_key_values, **others)


class WrongPromptConfig(LlamaConfig):
    model_type = "wrong_prompt"


class WrongPrompt(LlamaForCausalLM):
    """It wants its positions in its own way, and does not look at those that it gets."""

    config_class = WrongPromptConfig

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, past_key_values: Any = None, **others: Any
    ) -> Any:
        if position_ids is None and past_key_values is None:
            position_ids = 3 * torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, position_ids=position_ids, past_key_values=past_key_values, **others)


for config_class, model_class in ((WrongDecodesConfig, WrongDecodes), (WrongPromptConfig, WrongPrompt)):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)


@pytest.mark.parametrize(
    ("config_class", "model_class", "place"),
    [
        (WrongDecodesConfig, WrongDecodes, "for the tokens after a prompt by"),
        (WrongPromptConfig, WrongPrompt, "for a prompt by"),
    ],
)
def test_a_model_that_computes_something_else_is_refused_with_the_place(
    config_class: type[LlamaConfig], model_class: type[LlamaForCausalLM], place: str
) -> None:
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL)).eval()
    model.set_attn_implementation(paged.NAME)
    with pytest.raises(ModelLoadError, match=f"{config_class.model_type}.*{place}"):
        start_check.check(runner_of(model), 256)


def test_layers_that_attend_twice_are_refused() -> None:
    """Their second call would overwrite the first one's values in the cache: https://arxiv.org/abs/2410.05258."""
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**SMALL)).eval()
    model.set_attn_implementation(paged.NAME)
    with pytest.raises(ModelLoadError, match="diffllama.*call the attention twice"):
        build_engine(model, OPTIONS, frozenset())


def compared(caplog: pytest.LogCaptureFixture, directory: Path, cache: Path, **changes: Any) -> bool:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        options = EngineOptions(cache_dir=cache, kv_cache_memory=2**24, **changes)
        checked = check_model(directory, options.dtype, options.device_map)
        load_engine(checked, options, ModelDefaults, lambda phase, fraction: None)
    return "compared with transformers" in caplog.text


def test_what_passed_is_compared_again_only_if_something_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, cache = LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path / "cache"
    model.save_pretrained(tmp_path / "model")
    assert compared(caplog, tmp_path / "model", cache)
    assert not compared(caplog, tmp_path / "model", cache)
    assert compared(caplog, tmp_path / "model", cache, dtype="float32")
    model.save_pretrained(tmp_path / "model")
    assert compared(caplog, tmp_path / "model", cache)
    assert not compared(caplog, tmp_path / "model", cache)


@pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")
def test_what_is_remembered_is_of_the_layers_that_the_machine_has_chosen(tmp_path: Path) -> None:
    """With the same settings: `auto` is another choice where there are no kernels for packed layers."""
    auto = {"quantization": "auto", "dtype": "auto"}
    plain, packed = (tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=32) for _ in range(2))
    with torch.inference_mode():
        pack_model(packed, QUANTIZATIONS["int8"])
    keys = [start_check.key_of(tmp_path, runner_of(model), auto) for model in (plain, plain, packed)]
    assert keys[0] == keys[1] != keys[2]


def test_the_comparison_is_reported_while_it_lasts_and_takes_four_forwards() -> None:
    model = tiny_model("llama")
    runner, reports, forwards = runner_of(model), list[tuple[str, float]](), list[int]()
    model.register_forward_hook(lambda model, inputs, output: forwards.append(len(reports)))
    assert start_check.check(runner, 256, lambda phase, fraction: reports.append((phase, fraction)))
    assert reports == [("comparing with transformers", fraction) for fraction in (0.0, 0.5, 1.0)]
    assert forwards == [1, 1, 2, 2]  # transformers' two, and the engine's


def test_a_start_reports_the_comparison(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    phases: list[str] = []
    options = EngineOptions(kv_cache_memory=2**24)
    checked = check_model(tmp_path, options.dtype, options.device_map)
    load_engine(checked, options, ModelDefaults, lambda phase, fraction: phases.append(phase))
    assert "comparing with transformers" in phases


def test_a_model_whose_numbers_are_none_is_refused_at_start(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="not numbers"):
        options = EngineOptions(kv_cache_memory=2**24)
        checked = check_model(tmp_path, options.dtype, options.device_map)
        load_engine(checked, options, ModelDefaults, lambda phase, fraction: None)
