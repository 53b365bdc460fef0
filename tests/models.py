"""Tiny random models of each family, with the same weights in every test."""

import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from engine.attention import paged
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.sequence import TokenOutput

VOCAB = 199
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough for logits that differ
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,  # tied random weights repeat one token
}
FAMILIES = {
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **_COMMON,
            head_dim=16,
            num_hidden_layers=7,
            sliding_window=24,
            layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
            query_pre_attn_scalar=16,
        ),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_COMMON, head_dim=16, num_hidden_layers=3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_COMMON, num_hidden_layers=3)),
    "llama": (LlamaForCausalLM, LlamaConfig(**_COMMON, num_hidden_layers=3)),
}

_DELTA_NET = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
RECURRENT = {  # families with layers whose state has a fixed size
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig(**_COMMON, **_DELTA_NET)),
    "qwen3_5_moe": (  # with heads that the CPU's kernels do not take
        Qwen3_5MoeForCausalLM,
        Qwen3_5MoeTextConfig(**_COMMON, **_DELTA_NET | {"linear_value_head_dim": 16}, **_EXPERTS),
    ),
    "qwen3_next": (Qwen3NextForCausalLM, Qwen3NextConfig(**_COMMON, **_DELTA_NET, **_EXPERTS)),
    "lfm2": (
        Lfm2ForCausalLM,
        Lfm2Config(**_COMMON, num_hidden_layers=4, layer_types=["conv", "conv", "full_attention", "conv"]),
    ),
    "granite_hybrid": (
        GraniteMoeHybridForCausalLM,
        GraniteMoeHybridConfig(
            **_COMMON,
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            mamba_n_heads=8,
            mamba_d_head=12,
            mamba_d_state=16,
            mamba_n_groups=2,
            mamba_chunk_size=16,
            num_local_experts=0,
            shared_intermediate_size=64,
        ),
    ),
}
SHARING = {  # families with layers that read the keys and values of earlier ones
    "gemma4": (  # as E2B, which also has embeddings for each layer
        Gemma4ForCausalLM,
        Gemma4TextConfig(
            **_COMMON,
            head_dim=16,
            global_head_dim=32,
            num_hidden_layers=6,
            sliding_window=24,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=3,
            vocab_size_per_layer_input=VOCAB,
        ),
    ),
}
MIXTURES = {  # families of experts
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**_COMMON, head_dim=16, num_hidden_layers=3, num_experts=6, num_experts_per_tok=2),
    ),
    "gemma4_moe": (
        Gemma4ForCausalLM,
        Gemma4TextConfig(
            **_COMMON,
            head_dim=16,
            global_head_dim=32,
            num_hidden_layers=4,
            sliding_window=24,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
            enable_moe_block=True,
            num_experts=6,
            top_k_experts=2,
            moe_intermediate_size=32,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            vocab_size_per_layer_input=VOCAB,
        ),
    ),
}
SINKS = {  # families whose attention has sinks; their experts have a formula of their own
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig(
            **_COMMON,
            head_dim=16,
            num_hidden_layers=4,
            sliding_window=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        ),
    ),
}
SEEDS = {"gemma3": 53}  # with these, or 0, the two best tokens are never nearly tied


def tiny_model(family: str, implementation: str = paged.NAME, **changes: object) -> PreTrainedModel:
    """Returns a float32 model with the same weights for every `implementation` of attention."""
    model_class, config = (FAMILIES | RECURRENT | MIXTURES | SHARING | SINKS)[family]
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(SEEDS.get(family, 0))
    model = model_class(config)
    model.set_attn_implementation(implementation)
    return model.eval()


async def generate(
    engine: Engine, prompt_ids: list[int], params: SamplingParams, client: str = ""
) -> AsyncGenerator[TokenOutput]:
    """The outputs of `Engine.stream`, one by one."""
    async with aclosing(engine.stream(prompt_ids, params, client=client)) as lists:
        async for outputs in lists:
            for output in outputs:
                yield output


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING_CHATML = (
    CHATML + "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def byte_tokenizer(has_marks: bool = False) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token per byte, so that random tokens are often parts of characters, and ChatML's.

    has_marks: with Qwen 3's tokens for reasoning and calls, and a template that can turn reasoning off."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if has_marks:
        tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    template = THINKING_CHATML if has_marks else CHATML
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )


def save_tiny_checkpoint(directory: Path, has_marks: bool = False) -> Path:
    """Saves a Qwen 3 with a token per byte; returns the directory, for `MODEL_PATH`."""
    tokenizer = byte_tokenizer(has_marks)
    _, config = FAMILIES["qwen3"]
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    own |= {"max_position_embeddings": 16384} if has_marks else {}
    config = Qwen3Config(**{**config.to_dict(), **own})
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


CODE = 128  # numbers that encode a position: random signs, different for each


def save_repeating_checkpoint(directory: Path, tokenizer: PreTrainedTokenizerFast, lag: int) -> Path:
    """Saves a GPT-2 whose next token is always the one `lag` tokens before it, so that a prompt determines the answer.

    Its one layer attends to the position `lag` - 1 tokens back, and predicts the token that it sees there."""
    vocab, length = len(tokenizer), 4096
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=length,
        n_embd=vocab + 2 * CODE,
        n_layer=1,
        n_head=1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    codes = torch.randint(0, 2, (length, CODE), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    token, own, sought = slice(vocab), slice(vocab, vocab + CODE), slice(vocab + CODE, None)
    with torch.no_grad():
        for weight in model.transformer.parameters():
            weight.zero_()
        block, width = model.transformer.h[0], config.n_embd
        for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
            norm.weight.fill_(1)
        model.transformer.wte.weight[:, token] = torch.eye(vocab)
        model.transformer.wpe.weight[:, own] = codes
        model.transformer.wpe.weight[lag - 1 :, sought] = codes[: length - lag + 1]
        queries, keys, values = block.attn.c_attn.weight.split(width, dim=1)
        queries[sought, own] = keys[own, own] = torch.eye(CODE) * width**0.5
        values[token, token] = block.attn.c_proj.weight[token, token] = torch.eye(vocab) * 100
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# --- a model that takes images

TOKENS, SIDE = 16, 112  # of an image: tokens, pixels
GEMMA_SPECIAL = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_IMAGE = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
GEMMA_CHAT = (
    "{{ bos_token }}{% set prefix, turns = '', messages %}"
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set first = messages[0].content %}"
    "{% set prefix = (first if first is string else first[0].text) + '\n\n' %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (prefix if loop.first else '') }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def tiny_gemma_that_sees(
    image_token: int, implementation: str = paged.NAME, vocab_size: int = VOCAB, eos_token_id: int | None = None
) -> Gemma3ForConditionalGeneration:
    """Returns a Gemma 3 with a vision tower of two layers and random weights; image_token: the placeholder's id."""
    text = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=20,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=False,  # tied random weights repeat one token
        eos_token_id=eos_token_id,
        bos_token_id=None,
        pad_token_id=0,
    )
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=TOKENS,
        image_token_index=image_token,
        tie_word_embeddings=False,
        eos_token_id=eos_token_id,
    )
    torch.manual_seed(0)
    parts = {"text_config": implementation, "vision_config": "eager", "": "eager"}
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=parts)
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_()
    return model.eval()


def gemma_processor() -> Gemma3Processor:
    """Returns transformers' own processor with a tokenizer of bytes."""
    plain = byte_tokenizer()
    plain.backend_tokenizer.add_special_tokens(GEMMA_SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<|endoftext|>",
        extra_special_tokens=GEMMA_IMAGE,
    )
    pictures = Gemma3ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_pan_and_scan=False
    )
    return Gemma3Processor(pictures, tokenizer, chat_template=GEMMA_CHAT, image_seq_length=TOKENS)


def save_checkpoint_that_sees(directory: Path) -> Path:
    processor = gemma_processor()
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model = tiny_gemma_that_sees(processor.tokenizer.image_token_id, "eager", len(tokenizer), end)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
