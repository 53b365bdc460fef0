"""What the benchmarks count, compare and write, on a tiny model; not how fast it is."""

import json

import pytest
import torch
from devices import DEVICE

from bench import gpu, packed_model, paged_attention, run
from config import Settings
from engine.layer_spec import AttentionSpec

CPU = torch.device("cpu")


def test_the_engines_tokens_are_what_the_stock_model_prefers() -> None:
    model = gpu.build("tiny", CPU)
    rate, answers = gpu.engine_rate(gpu.engine_of(model), model, CPU, 3)
    assert rate > 0 and [len(answer) for answer in answers] == [gpu.NEW_TOKENS] * 3
    model.set_attn_implementation("sdpa")
    same, largest = gpu.compare(model, CPU, answers)
    assert same > 0.95 and largest < 0.05
    answers[0][3] = (answers[0][3] + 7) % 512
    same, largest = gpu.compare(model, CPU, answers)
    assert same < 1 and largest > 0.05


def test_a_token_reads_every_weight_but_an_embedding_that_is_no_output_layer() -> None:
    with torch.device("meta"):
        small, large = (gpu.build(name, torch.device("meta")) for name in ("qwen3-0.6b", "qwen3-8b"))
    assert round(gpu.num_bytes_read(small) / 2e9, 2) == 0.60  # parameters, in billions
    assert round(gpu.num_bytes_read(large) / 2e9, 2) == 7.57  # 8.19 less the embedding


@pytest.mark.parametrize("quantization", packed_model.FORMATS)
def test_random_codes_stand_for_weights_as_models_are_initialised(quantization: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")
    from engine.gpu import products

    config = gpu.SHAPES["tiny"]()
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    model = packed_model.build(config, quantization, DEVICE)
    layers = [module for module in model.modules() if hasattr(module, "packed")]
    assert len(layers) == 2 * 7 + 1
    for layer in layers:
        weight = products.dequantised(layer.packed, torch.float32)
        assert abs(float(weight.mean())) < 1e-3 and 0.015 < float(weight.std()) < 0.025
    plain = sum(parameter.nbytes for parameter in model.parameters()) - model.get_input_embeddings().weight.nbytes
    assert gpu.num_bytes_read(model) == plain + sum(layer.packed.num_bytes for layer in layers)
    bits = 8 * packed_model.num_bytes_of(model) / sum(layer.in_features * layer.out_features for layer in layers)
    assert {"int8": 8, "int4": 5, "q4_k": 4.6}[quantization] < bits < {"int8": 9, "int4": 6, "q4_k": 5}[quantization]


def test_products_are_measured_in_every_way() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")
    from bench import gpu_products

    found = list(gpu_products.measure("tiny", (64, 256), "q4_k", [1, 64], DEVICE, 1e9))
    assert [(result.way, result.tokens) for result in found] == [
        *(("numbers", 1), ("tiles", 1), ("dequantised", 1), ("bfloat16", 1)),
        *(("tiles", 64), ("dequantised", 64), ("bfloat16", 64)),
    ]
    assert all(result.note == "" and result.gb_per_s for result in found)


def test_attentions_work_is_counted_as_its_queries_see_it() -> None:
    chunk = paged_attention.Workload(2, 3, 10)  # whose queries see 8, 9 and 10 keys
    assert (chunk.num_seen(None), chunk.num_read(None)) == (2 * 27, 2 * 10)
    assert (chunk.num_seen(4), chunk.num_read(4)) == (2 * 12, 2 * 6)
    spec = AttentionSpec(2, 16, 16, None, torch.float32, CPU)
    for work in (paged_attention.Workload(3, 1, 32), paged_attention.Workload(1, 32, 32)):
        [result] = paged_attention.measure(work, spec, 16, [], [])
        assert result.note == "" and result.microseconds == 0


def test_the_settings_of_a_run_are_written_without_this_machines_places() -> None:
    options = run.options_of(Settings(_cli_parse_args=False))
    assert json.loads(json.dumps(options)) == options
    assert "cache_dir" not in options and options["max_queued_requests"] > 0
