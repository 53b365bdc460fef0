"""What the benchmarks count, compare and write, on a tiny model; not how fast it is."""

import json

import torch

from bench import gpu, paged_attention, run
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
