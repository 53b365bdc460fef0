"""GGUF files of tiny transformers models, written as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel

from engine.cpu.gguf_blocks import BLOCK_BYTES

DELTA_NET = {"A_log": "ssm_a", "dt_bias": "ssm_dt.bias"}  # parameters that are no weights of a layer
Numbers = numpy.ndarray[Any, Any]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*sorted(ByteLevel.alphabet()), "ab", "cd", *SPECIAL]
VOCAB = len(TOKENS)
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * (VOCAB - 3) + [3] * 3,
    "tokenizer.ggml.merges": ["a b", "c d"],
    "tokenizer.ggml.eos_token_id": VOCAB - 1,
}


def write(
    path: Path,
    architecture: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, Numbers],
    tokenizer: Mapping[str, Any] = TOKENIZER,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    parts: int = 0,
) -> None:
    """Writes a GGUF file.

    values: by the whole key, or by its end without the architecture's name; kind: the type of matrices whose rows are
    whole blocks of it; parts: the number of tensors in each part of a split file, 0 for one file."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts)
    for key, value in {**values, **tokenizer}.items():
        if value is None:
            continue
        name = key if key.startswith(("general.", "tokenizer.", "split.", "adapter.")) else f"{architecture}.{key}"
        write_value(writer, name, value)
    for name, tensor in tensors.items():
        size, _ = gguf.GGML_QUANT_SIZES[kind]
        fits = tensor.ndim > 1 and tensor.shape[-1] % size == 0
        data = quantized(tensor, kind) if fits else tensor
        writer.add_tensor(name, data, raw_dtype=kind if fits else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(tensor: Numbers, kind: gguf.GGMLQuantizationType) -> Numbers:
    """Returns a tensor's blocks; any ones of the types that gguf does not write."""
    try:
        return gguf.quants.quantize(tensor, kind)
    except NotImplementedError:
        rows, num_blocks = tensor.size // tensor.shape[-1], tensor.shape[-1] // gguf.GGML_QUANT_SIZES[kind][0]
        return random_blocks(kind.name, rows, num_blocks).reshape(*tensor.shape[:-1], -1)


def random_blocks(name: str, rows: int, num_blocks: int) -> Numbers:
    """Any bytes are codes, but the float16 numbers among them must be finite."""
    rng = numpy.random.default_rng([rows, num_blocks])
    data = rng.integers(0, 256, (rows, num_blocks, BLOCK_BYTES[name]), dtype=numpy.uint8)
    offsets = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0,))
    if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        offsets = (0, 2)
    for offset in offsets:
        halfs = rng.uniform(0.001, 0.1, (rows, num_blocks)).astype(numpy.float16)
        data[:, :, offset : offset + 2] = halfs[..., None].view(numpy.uint8)
    return data.reshape(rows, -1)


def write_value(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """Rounds the weights to bfloat16, so that a conversion changes none."""
    with torch.no_grad():
        for value in (*model.parameters(), *(b for name, b in model.named_buffers() if "bias" in name)):
            value.copy_(value.bfloat16())
    return model.eval()


def tensors_of(model: PreTrainedModel, architecture: str) -> dict[str, Numbers]:
    """Returns the model's weights under llama.cpp's names and in its form, which readers of the file undo."""
    config = model.config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors: dict[str, Numbers] = {}
    for name, value in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if name.rpartition(".")[2] in DELTA_NET:
            renamed = f"blk.{name.split('.')[2]}.{DELTA_NET[name.rpartition('.')[2]]}"
            tensors[renamed] = changed(value.float(), renamed, architecture, config).contiguous().numpy()
            continue
        base, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            base, suffix = name, "weight"
        if base.endswith("experts.gate_up_proj"):
            layer = base.split(".")[2]
            gate, up = value.float().chunk(2, dim=1)
            tensors |= {
                f"blk.{layer}.ffn_gate_exps.weight": gate.numpy(),
                f"blk.{layer}.ffn_up_exps.weight": up.numpy(),
            }
            continue
        if base.endswith("e_score_correction_bias"):
            tensors[f"blk.{base.split('.')[2]}.exp_probs_b.bias"] = value.float().numpy()
            continue
        renamed = f"{names.get_name(base)}.{suffix}"
        assert names.get_name(base) is not None, name
        tensors[renamed] = changed(value.float(), renamed, architecture, config).contiguous().numpy()
    return tensors


def changed(value: torch.Tensor, name: str, architecture: str, config: Any) -> torch.Tensor:
    """Changes a tensor as llama.cpp's converter does."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return value + 1
    if architecture == "gpt2" and value.ndim == 2 and name.startswith("blk."):
        return value.T
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return value.flatten()
    if name.endswith("conv1d.weight") or name.endswith("shortconv.conv.weight"):
        value = value.squeeze(1)
    if architecture.startswith("qwen35"):
        return changed_delta_net(value, name, config)
    return value


def changed_delta_net(value: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """Heads of values that share a key are apart: first the first one of every key, then the second ones."""
    if name.endswith("norm.weight") and not name.endswith("ssm_norm.weight"):
        return value + 1
    if name.endswith("ssm_a"):
        value = -value.exp()
    keys, size = config.linear_num_key_heads, config.linear_value_head_dim
    if name.endswith(("ssm_a", "ssm_dt.bias", "ssm_alpha.weight", "ssm_beta.weight")):
        return value.unflatten(0, (keys, -1)).transpose(0, 1).flatten(0, 1)
    if name.endswith("ssm_out.weight"):
        return value.unflatten(1, (keys, -1, size)).transpose(1, 2).flatten(1)
    num_before = 2 * keys * config.linear_key_head_dim if name.endswith(("attn_qkv.weight", "conv1d.weight")) else 0
    if num_before or name.endswith("attn_gate.weight"):
        others, values = value[:num_before], value[num_before:]
        return torch.cat([others, values.unflatten(0, (keys, -1, size)).transpose(0, 1).flatten(0, 2)])
    return value


def write_tiny_gguf(path: Path) -> dict[str, object]:
    """Writes a Qwen 2 of two layers with a token per byte; returns its weights by GGUF name."""
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "cd", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    hidden, heads, inner, layers = 32, 4, 64, 2
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 258 + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(258)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}_norm.weight": (hidden,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.attn_{name}.weight": (hidden, hidden) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.attn_{name}.bias": (hidden,) for name in ("q", "k", "v")}
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down.weight": (hidden, inner)}
    random = numpy.random.default_rng(0)
    weights = {name: random.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(weights)
