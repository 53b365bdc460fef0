"""The GPU's benchmark, on a tiny model: what it counts and compares, not how fast it is."""

import torch

from bench import gpu

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
