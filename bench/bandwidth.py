"""Tokens per second of large models with random weights, beside what memory bandwidth allows.

The weights are made packed, so that a model of 30 billion parameters needs neither a file nor 60 GB of memory.

    python -m bench.bandwidth --shape Qwen3-30B-A3B --quantization int4
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.machine import describe
from engine.attention import fused, paged
from engine.build import build_engine
from engine.cpu.packed_experts import PackedExperts
from engine.cpu.packed_layers import PackedEmbedding
from engine.cpu.packed_weight import Format, PackedWeight, pack, quantize_weight
from engine.cpu.packing import Packer
from engine.engine import Engine, EngineOptions
from engine.layer_probe import probe_layers
from engine.quantization import QUANTIZATIONS
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.threads import set_threads

QWEN: dict[str, Any] = {"max_position_embeddings": 32768, "vocab_size": 248320}
SMALL: dict[str, Any] = {**QWEN, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2}
MIXTURE: dict[str, Any] = {**QWEN, "hidden_size": 2048, "num_experts_per_tok": 8, "norm_topk_prob": True}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model type and the sizes that are not its defaults
    "Qwen3.5-0.8B": (
        "qwen3_5_text",
        {**SMALL, "hidden_size": 1024, "intermediate_size": 3584, "linear_num_value_heads": 16}
        | {"tie_word_embeddings": True},
    ),
    "Qwen3.5-9B": ("qwen3_5_text", QWEN),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {**MIXTURE, "vocab_size": 151936, "num_hidden_layers": 48, "num_experts": 128, "moe_intermediate_size": 768}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
    ),
    "Qwen3.5-35B-A3B": (
        "qwen3_5_moe_text",
        {**MIXTURE, "num_hidden_layers": 40, "num_experts": 256, "moe_intermediate_size": 512}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "shared_expert_intermediate_size": 512},
    ),
}
SEQUENCES = (1, 4, 16)
PROMPT, ANSWER = 64, 64  # tokens of each sequence
LONG_PROMPT = 1000


def random_weight(fmt: Format, num_rows: int, columns: int) -> PackedWeight:
    """Random codes with the scales of a small random weight."""
    small = pack(quantize_weight(torch.randn(16, columns) * 0.02, fmt))
    tiles = -(-num_rows // 16)
    parts = {name: part.expand(tiles, *part.shape[1:]).contiguous() for name, part in small.parts.items()}
    parts["quants"].random_(0, 256)
    return PackedWeight(fmt, num_rows, **parts)


def random_model(config: Any, quantization: str) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=paged.NAME)
    packer = Packer(model, QUANTIZATIONS[quantization])
    for name, parameter in model.named_parameters():
        if fmt := packer.format_of(name):
            packer.put(name, random_weight(fmt, parameter.numel() // parameter.shape[-1], parameter.shape[-1]))
        else:
            parent, _, last = name.rpartition(".")
            value = torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02
            setattr(model.get_submodule(parent), last, nn.Parameter(value + ("norm" in name and last == "weight")))
    model.eval()
    with torch.inference_mode():
        packer.finish(model)
    fused.fuse_attention(model)
    return cast(PreTrainedModel, model)


def bytes_per_token(model: PreTrainedModel) -> int:
    """Returns the bytes of packed weights that one token reads, without the experts that it was not sent to, and of the
    recurrent states that it reads and writes."""
    total, seen = 2 * probe_layers(model).bytes_per_sequence, set()
    for module in model.modules():
        if isinstance(module, PackedExperts):
            size = sum(part.nbytes for weight in module.packed.values() for part in weight.parts.values())
            total += size * model.config.num_experts_per_tok // module.num_experts
        layers = () if isinstance(module, PackedEmbedding) else (module, *vars(module).values())
        for weight in (getattr(layer, "packed", None) for layer in layers):
            if isinstance(weight, PackedWeight) and weight.quants.data_ptr() not in seen:
                seen.add(weight.quants.data_ptr())
                total += sum(part.nbytes for part in weight.parts.values())
    return total


def bandwidth() -> float:
    """Returns the bytes per second that all threads read."""
    memory = torch.ones(2**28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        seconds.append(time.perf_counter() - start)
    return memory.nbytes / min(seconds)


def step_seconds(engine: Engine, count: int) -> float:
    """Returns the median seconds of a step of `count` decodes."""
    greedy = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        prompt = torch.randint(0, 100_000, (PROMPT,), generator=generator).tolist()
        engine.scheduler.add(Sequence(prompt, greedy, on_output=lambda output: None))
    seconds = []
    while engine.scheduler.has_work:
        is_decode = engine.scheduler.num_decoding == count
        start = time.perf_counter()
        engine.step()
        if is_decode:
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def prompt_seconds(engine: Engine) -> float:
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    engine.scheduler.add(Sequence(torch.randint(0, 100_000, (LONG_PROMPT,)).tolist(), one, lambda output: None))
    start = time.perf_counter()
    while engine.scheduler.has_work:
        engine.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen3-30B-A3B")
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    set_threads()
    torch.manual_seed(0)
    model_type, sizes = SHAPES[arguments.shape]
    model = random_model(AutoConfig.for_model(model_type, **sizes), arguments.quantization)
    options = EngineOptions(max_num_seqs=16, kv_cache_memory=2**31, max_model_len=2048, num_speculative_tokens=0)
    with torch.inference_mode():
        engine = build_engine(model, options, frozenset())
        read, limit = bytes_per_token(model), bandwidth()
        results: dict[str, Any] = {
            "machine": describe(),
            "model": f"{arguments.shape}, random weights, {arguments.quantization}",
            "bytes_per_token": read,
            "bandwidth_bytes_per_second": limit,
            "tokens_per_second_at_full_bandwidth": limit / read,
            "tokens_per_second": {str(n): n / step_seconds(engine, n) for n in SEQUENCES},
            "prompt_tokens_per_second": LONG_PROMPT / prompt_seconds(engine),
            "resident_gib": psutil.Process().memory_info().rss / 2**30,
        }
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
