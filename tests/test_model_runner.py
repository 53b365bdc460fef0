"""What can be loaded and how: types of numbers, kinds of layers, and families beside the four of the engine's tests."""

import asyncio
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from models import MIXTURES, RECURRENT, VOCAB, generate, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seeing_models import KINDS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4AudioConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    SiglipVisionConfig,
)

from engine.attention import paged
from engine.build import build_engine
from engine.checked_model import check_architecture, check_model, choose_dtype
from engine.engine import EngineOptions
from engine.layer_probe import probe_layers
from engine.model_loader import load_model
from engine.sampling_params import SamplingParams
from errors import ModelLoadError
from vision.families import FAMILIES

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}


def gemma3_with_vision() -> PreTrainedModel:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = Gemma3TextConfig(**GEMMA)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=False)
    )


GEMMA_3N: dict[str, Any] = {
    **{**SMALL, "num_hidden_layers": 5, "intermediate_size": [96] * 5, "tie_word_embeddings": True},
    **{
        "head_dim": 16,
        "sliding_window": 16,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5] + [0.0] * 4,
    },
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]
    + ["sliding_attention"]
    + ["full_attention"],
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "altup_num_inputs": 2, "laurel_rank": 8},
}
GEMMA_4: dict[str, Any] = {
    **{**SMALL, "num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32, "sliding_window": 16},
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2},
}
SHORT_CONVOLUTIONS: dict[str, Any] = {**SMALL, "num_hidden_layers": 4, "conv_L_cache": 3, "sliding_window": 16}
MAMBA: dict[str, Any] = {**SMALL, "num_hidden_layers": 4, "attn_layer_indices": [1], "mamba_chunk_size": 16}
OTHERS: dict[str, dict[str, Any]] = {  # with recurrent layers, by model type
    "lfm3": {**SHORT_CONVOLUTIONS, "layer_types": ["conv", "full_attention", "conv", "sliding_attention"]},
    "lfm2_moe": {
        **{**SHORT_CONVOLUTIONS, "layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    },
    "bamba": {**MAMBA, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 16, "mamba_n_groups": 2},
    "olmo_hybrid": {**SMALL, "num_hidden_layers": 4},
}


def other(model_type: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **OTHERS[model_type]))


MODELS = {
    **{model_type: partial(other, model_type) for model_type in OTHERS},
    "gemma3n": lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**GEMMA_3N)),
    "gemma4": lambda: Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA_4)),
    "gemma2-softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, attn_logit_softcapping=5.0)),
    "gemma3-vision": gemma3_with_vision,
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SMALL, head_dim=12, sliding_window=20)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    **{family: partial(tiny_model, family, "eager") for family in (*RECURRENT, *MIXTURES)},
}


@pytest.mark.parametrize("name", MODELS)
def test_saved_models_give_the_tokens_of_generate(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = MODELS[name]().eval()
    stock.set_attn_implementation("eager")
    stock.save_pretrained(tmp_path)
    prompts = [torch.randint(0, VOCAB - 20, (length,)).tolist() for length in (1, 7, 45, 90)]
    expected = [
        stock.generate(  # without a mask it would hide the prompt's tokens 0, as padding
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert len({token for tokens in expected for token in tokens}) > 8
    model = load_model(check_model(tmp_path, "float32", "cpu"), lambda phase, fraction: None)
    options = EngineOptions(max_num_batched_tokens=32, max_num_mixed_tokens=16, max_num_seqs=8, kv_block_size=4)
    assert asyncio.run(answers(model, options, prompts)) == expected


def test_a_checkpoint_without_some_of_its_tensors_is_refused(tmp_path: Path) -> None:
    MODELS["mistral-sliding"]().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=re.escape(lost)):
        load_model(check_model(tmp_path, "float32", "cpu"), lambda phase, fraction: None)


async def answers(model: PreTrainedModel, options: EngineOptions, prompts: list[list[int]]) -> list[list[int]]:
    engine = build_engine(model, options, frozenset())
    engine.start()

    async def one(prompt: list[int]) -> list[int]:
        params = SamplingParams(max_tokens=20, temperature=0)
        return [output.token_id async for output in generate(engine, prompt, params) if output.token_id is not None]

    try:
        return await asyncio.gather(*map(one, prompts))
    finally:
        await engine.close()


@pytest.mark.parametrize("model_type", ["vit", "bert_unknown", "mamba", "qwen4_exp", "llama4_text", "t5"])
def test_models_that_cannot_be_served_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(ModelLoadError, match=model_type):
        check_or_probe(tmp_path)


def check_or_probe(directory: Path) -> None:
    """Mamba, whose configuration tells nothing, is found out by its first forward."""
    checked = check_model(directory, "float32", "cpu")
    assert checked.config.model_type == "mamba"
    from transformers import MambaConfig, MambaForCausalLM

    tiny = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    build_engine(MambaForCausalLM(tiny), EngineOptions(), frozenset())


def test_a_model_of_images_and_text_is_loaded_if_it_has_a_vision_family(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = LlamaConfig(**SMALL, head_dim=12)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**tower, image_size=28, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB - 1)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="llava.*no causal language model"):
        load_model(check_model(tmp_path, "float32", "cpu"), lambda phase, fraction: None)
    monkeypatch.setitem(FAMILIES, "llava", cast(Any, lambda config: SimpleNamespace(needs_tower=True)))
    model = load_model(check_model(tmp_path, "float32", "cpu"), lambda phase, fraction: None)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.config.get_text_config()._attn_implementation == paged.NAME


def test_layers_that_read_another_ones_keys_store_nothing() -> None:
    specs = probe_layers(tiny_model("gemma4"))
    assert specs.shared == {3: 1, 4: 1, 5: 2} and [*specs.attention] == [0, 1, 2]
    alone = probe_layers(tiny_model("gemma4", num_kv_shared_layers=0))
    assert not alone.shared and alone.bytes_per_token == 2 * specs.bytes_per_token
    engine = build_engine(tiny_model("gemma4"), EngineOptions(), frozenset())
    tensors = engine.scheduler.cache.tensors
    assert all(tensors[layer] is tensors[owner] for layer, owner in specs.shared.items())


def test_a_model_is_loaded_without_the_parts_that_it_lacks_or_that_are_not_served(tmp_path: Path) -> None:
    """A text model of a type that sees, as fine-tuning leaves it; and a tower that hears."""
    config = KINDS["qwen3_5"].config()
    tiny = Qwen3_5ForCausalLM(config.text_config)
    tiny.save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": "float32"}))
    names = {name.replace("model.", "model.language_model.", 1): t for name, t in tiny.state_dict().items()}
    save_file({name: t.contiguous() for name, t in names.items()}, tmp_path / "text" / "model.safetensors")
    model = load_model(check_model(tmp_path / "text", "float32", "cpu"), lambda phase, fraction: None)
    assert isinstance(model, Qwen3_5ForCausalLM)
    hearing = KINDS["gemma4_small"].config()
    hearing.audio_config = Gemma4AudioConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForImageTextToText.from_config(hearing).save_pretrained(tmp_path / "audio")
    with safe_open(tmp_path / "audio" / "model.safetensors", "pt") as file:
        assert any("audio_tower" in name for name in file.keys())
    model = load_model(check_model(tmp_path / "audio", "float32", "cpu"), lambda phase, fraction: None)
    assert not any("audio" in name for name, _ in model.named_parameters())
    assert any("vision_tower" in name for name, _ in model.named_parameters())


def test_an_argument_that_is_not_computed_is_refused_rather_than_left_out() -> None:
    model = tiny_model("qwen3")
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_bias": torch.ones(4)}), with_kwargs=True
    )
    with pytest.raises(ModelLoadError, match="qwen3.*position_bias"):
        build_engine(model, EngineOptions(), frozenset())


def test_dynamic_rotary_embeddings_are_refused() -> None:
    config = AutoConfig.for_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ModelLoadError, match="dynamic"):
        check_architecture(config)


@pytest.mark.parametrize(
    ("wanted", "model_type", "expected"),
    [
        ("float32", "gemma3", torch.float32),
        ("bfloat16", "gemma3", torch.bfloat16),
        ("float16", "qwen3", torch.float16),
    ],
)
def test_a_wanted_type_is_taken(wanted: str, model_type: str, expected: torch.dtype) -> None:
    assert choose_dtype(wanted, model_type, on_cuda=False) == expected


def test_gemma_never_gets_float16() -> None:
    for model_type in ("gemma", "gemma2", "gemma3", "gemma3_text"):
        assert choose_dtype("float16", model_type, on_cuda=False) in (torch.bfloat16, torch.float32)


def test_a_context_beyond_the_models_or_the_caches_is_refused() -> None:
    model = MODELS["phi3"]()
    model.set_attn_implementation("paged_blocks")
    with pytest.raises(ModelLoadError, match="MAX_MODEL_LEN=600"):
        build_engine(model, EngineOptions(max_model_len=600), frozenset())
    with pytest.raises(ModelLoadError, match="KV_CACHE_MEMORY"):
        build_engine(model, EngineOptions(max_model_len=512, kv_cache_memory=100_000), frozenset())
    assert build_engine(model, EngineOptions(kv_cache_memory=100_000), frozenset()).max_model_len < 512


@pytest.mark.parametrize(("softcap", "has_sinks"), [(3.0, False), (None, True), (3.0, True)])
@pytest.mark.parametrize("is_decode", [False, True])
def test_long_prompts_whose_queries_take_turns_are_computed_as_at_once(
    softcap: float | None, has_sinks: bool, is_decode: bool
) -> None:
    """With more scores than may be in memory at a time."""
    heads, queries, seen = 4, 5 if is_decode else 70, paged.MAX_SCORES // 128
    query, key, value = (torch.randn(1, heads, count, 4) for count in (queries, seen, seen))
    shape = (1, 1, 1, seen) if is_decode else (queries, seen)
    mask = torch.zeros(shape).masked_fill(torch.rand(shape) < 0.5, -torch.inf)
    sinks = torch.randn((heads, queries, 1) if is_decode else (heads, 1, 1)) if has_sinks else None
    found = paged._attend(query, key, value, mask, 0.5, softcap, sinks)
    for row in (0, queries // 2, queries - 1):
        own = mask if is_decode else mask[row, None]
        sink = sinks if sinks is None or not is_decode else sinks[:, row, None]
        alone = paged._attend(query[:, :, row, None], key, value, own, 0.5, softcap, sink)
        torch.testing.assert_close(found[:, :, row, None], alone)
