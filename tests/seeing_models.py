"""Tiny random models that see, with transformers' own image processors, and what transformers' own `generate` says of
pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import genuine_templates
import torch
from models import VOCAB
from PIL import Image as Pillow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Gemma4Config,
    Gemma4UnifiedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from engine.attention import paged
from vision.families import vision_family_of
from vision.family import ImageCrop, VisionFamily
from vision.image_processors import Gemma4ImageProcessor, resizing

IMAGE, VIDEO, AUDIO = VOCAB - 1, VOCAB - 2, VOCAB - 3  # ids of placeholders
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False}
_GEMMA: dict[str, Any] = {
    **_TEXT,
    "num_hidden_layers": 6,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCAB,
}
_GEMMA_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 8,
    "position_embedding_size": 2048,
    "initializer_range": 0.3,
}
_QWEN: dict[str, Any] = {**_TEXT, "num_hidden_layers": 3, "head_dim": 16}
_TIMES = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
_QWEN_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": 48,
    "initializer_range": 0.3,
}
_QWEN3_TOWER = {**_QWEN_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
_DELTA_NET = {
    **_TEXT,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**_TIMES, "partial_rotary_factor": 1.0},
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def _gemma4(**text: Any) -> Any:
    return Gemma4Config(
        text_config={**_GEMMA, **text},
        vision_config=_GEMMA_TOWER,
        audio_config=None,
        audio_token_id=AUDIO,
        **_IDS,
    )


def _gemma_processor() -> Any:
    return Gemma4ImageProcessor(patch_size=8, max_soft_tokens=70)


def _unified_processor() -> Any:
    return Gemma4ImageProcessor(patch_size=24, pooling_kernel_size=1, max_soft_tokens=70)


def _qwen_processor() -> Any:
    return resizing(Qwen2VLImageProcessorPil)(
        patch_size=4, merge_size=2, size={"shortest_edge": 4 * 64, "longest_edge": 40 * 64}
    )


@dataclass(frozen=True)
class SeeingKind:
    """A tiny model that sees, and its processor."""

    config: Callable[[], Any]
    processor: Callable[[], Any]
    places: str  # the processor's name of where patches are
    details: dict[str, dict[str, Any]] = field(default_factory=dict)  # `detail` -> what the processor is to be told


_GEMMA_DETAILS: dict[str, dict[str, Any]] = {
    "auto": {},
    "low": {"max_soft_tokens": 70},
    "high": {"max_soft_tokens": 1120},
}
_QWEN_DETAILS: dict[str, dict[str, Any]] = {"auto": {}, "low": {}, "high": {}}
_seeing_gemma = {"processor": _gemma_processor, "places": "image_position_ids", "details": _GEMMA_DETAILS}
_seeing_qwen = {"processor": _qwen_processor, "places": "image_grid_thw", "details": _QWEN_DETAILS}

KINDS: dict[str, SeeingKind] = {
    "gemma4": SeeingKind(  # as 31B: pictures' tokens see each other
        config=lambda: _gemma4(hidden_size_per_layer_input=0, use_bidirectional_attention="vision"), **_seeing_gemma
    ),
    "gemma4_small": SeeingKind(  # as E2B: embeddings for each layer, and layers that share keys
        config=lambda: _gemma4(hidden_size_per_layer_input=8, num_kv_shared_layers=3), **_seeing_gemma
    ),
    "gemma4_wide": SeeingKind(  # with heads that the CPU's attention kernels do not take
        config=lambda: _gemma4(
            hidden_size_per_layer_input=0, use_bidirectional_attention="vision", head_dim=24, global_head_dim=40
        ),
        **_seeing_gemma,
    ),
    "gemma4_moe": SeeingKind(  # as 26B-A4B
        config=lambda: _gemma4(
            hidden_size_per_layer_input=0,
            use_bidirectional_attention="vision",
            attention_k_eq_v=True,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=32,
        ),
        **_seeing_gemma,
    ),
    "gemma4_unified": SeeingKind(
        config=lambda: Gemma4UnifiedConfig(
            text_config={**_GEMMA, "use_bidirectional_attention": "vision"},
            vision_config={
                "patch_size": 8,
                "mm_embed_dim": 32,
                "output_proj_dims": 32,
                "initializer_range": 0.3,
            },
            audio_config=None,
            audio_token_id=AUDIO,
            **_IDS,
        ),
        **{**_seeing_gemma, "processor": _unified_processor},
    ),
    "qwen2_5_vl": SeeingKind(
        config=lambda: Qwen2_5_VLConfig(
            text_config={**_TEXT, "num_hidden_layers": 3, "rope_parameters": {**_TIMES, "mrope_section": [1, 2, 3]}},
            vision_config={**_QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
            **_IDS,
        ),
        **_seeing_qwen,
    ),
    "qwen3_vl": SeeingKind(
        config=lambda: Qwen3VLConfig(
            text_config={**_QWEN, "rope_parameters": _TIMES}, vision_config=_QWEN3_TOWER, **_IDS
        ),
        **_seeing_qwen,
    ),
    "qwen3_vl_moe": SeeingKind(
        config=lambda: Qwen3VLMoeConfig(
            text_config={**_QWEN, "rope_parameters": _TIMES, **_EXPERTS}, vision_config=_QWEN3_TOWER, **_IDS
        ),
        **_seeing_qwen,
    ),
    "qwen3_5": SeeingKind(
        config=lambda: Qwen3_5Config(
            text_config=_DELTA_NET, vision_config={**_QWEN_TOWER, "num_position_embeddings": 64}, **_IDS
        ),
        **_seeing_qwen,
    ),
    "qwen3_5_moe": SeeingKind(
        config=lambda: Qwen3_5MoeConfig(
            text_config={**_DELTA_NET, **_EXPERTS},
            vision_config={**_QWEN_TOWER, "num_position_embeddings": 64},
            **_IDS,
        ),
        **_seeing_qwen,
    ),
}


@cache
def config_of(kind: str) -> Any:
    return KINDS[kind].config()


def family_of(kind: str) -> VisionFamily:
    family = vision_family_of(config_of(kind))
    assert family is not None
    return family


@cache
def seeing_model(kind: str, implementation: str = paged.NAME) -> PreTrainedModel:
    """Returns a float32 model with the same weights for every `implementation` of attention of its text layers."""
    torch.manual_seed(SEEDS.get(kind, 0))
    parts = {"text_config": implementation, "vision_config": "sdpa", "": "eager"}
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(KINDS[kind].config(), attn_implementation=parts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embedding" in name or "position_embedding_table" in name:
                parameter.normal_()
    return model.eval()


SEEDS: dict[str, int] = {}  # with these, or 0, the two best tokens are never nearly tied


@cache
def picture(number: int) -> Pillow.Image:
    """Returns a small picture; each has other colours, and its own proportions."""
    sizes = ((40, 24), (24, 48), (32, 32), (56, 16))
    noise = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Pillow.fromarray(noise.numpy(), "RGB").resize(sizes[number % len(sizes)])


@cache
def crop(kind: str, number: int, detail: str = "auto") -> ImageCrop:
    (found,) = family_of(kind).crops(KINDS[kind].processor(), picture(number), detail)
    return found


def expected_tokens(
    kind: str, token_ids: Sequence[int], pictures: Sequence[int], num_new: int, detail: str = "auto"
) -> list[int]:
    """Returns what `generate` adds to a prompt with pictures, whose tokens have the id IMAGE."""
    ids, chosen = torch.tensor([[*token_ids]]), KINDS[kind]
    found: dict[str, Any] = {}
    if pictures:
        seen = chosen.processor()([picture(n) for n in pictures], return_tensors="pt", **chosen.details[detail])
        found = {name: seen[name] for name in ("pixel_values", chosen.places)}
    output: Any = seeing_model(kind, "eager").generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).long(),
        max_new_tokens=num_new,
        do_sample=False,
        **found,
    )
    tokens: list[int] = output[0, len(token_ids) :].tolist()
    return tokens


# --- checkpoints, as a server loads them

QWEN_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
GEMMA_TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>", "<|channel>", "<channel|>"),
    *("<|image>", "<|image|>", "<image|>", "<|video|>", "<|audio|>"),
]


@dataclass(frozen=True)
class Dialect:
    """The tokens and the genuine chat template that a model's tokenizer has."""

    tokens: list[str]
    template: str  # its name among the genuine ones
    image: str
    end: str
    bos: str | None = None
    around: tuple[str, str] = ("", "")  # what the processor puts around a picture's tokens


DIALECTS = {
    "qwen": Dialect(QWEN_TOKENS, "Qwen3.5-4B", "<|image_pad|>", "<|im_end|>"),
    "gemma": Dialect(GEMMA_TOKENS, "google-gemma-4-31B-it", "<|image|>", "<turn|>", "<bos>", ("<|image>", "<image|>")),
}


def dialect_of(kind: str) -> Dialect:
    return DIALECTS["gemma" if kind.startswith("gemma") else "qwen"]


def seeing_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token per byte, and those of the model's dialect."""
    dialect = dialect_of(kind)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(dialect.tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=dialect.bos,
        eos_token=dialect.end,
        pad_token=dialect.tokens[0],
        chat_template=genuine_templates.source_of(dialect.template),
    )


def save_seeing_checkpoint(directory: Path, kind: str) -> Path:
    """Saves a tiny model that sees, with its processor; returns the directory, for `MODEL_PATH`."""
    tokenizer, dialect, config = seeing_tokenizer(kind), dialect_of(kind), KINDS[kind].config()
    config.image_token_id = tokenizer.convert_tokens_to_ids(dialect.image)
    config.video_token_id = tokenizer.convert_tokens_to_ids({"qwen": "<|video_pad|>"}.get(kind[:4], "<|video|>"))
    if dialect.bos:
        config.audio_token_id = tokenizer.convert_tokens_to_ids("<|audio|>")
    text = config.text_config
    text.vocab_size = len(tokenizer)
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = len(tokenizer)
    text.eos_token_id = config.eos_token_id = tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    KINDS[kind].processor().save_pretrained(directory)
    return directory


def processed(kind: str, messages: list[dict[str, Any]], detail: str = "auto") -> dict[str, torch.Tensor]:
    """Returns what transformers' own `generate` takes for a conversation, whose pictures are Pillow's."""
    tokenizer, dialect, chosen = seeing_tokenizer(kind), dialect_of(kind), KINDS[kind]
    contents = [m["content"] if isinstance(m["content"], list) else [] for m in messages]
    pictures = [part["image"] for content in contents for part in content if "image" in part]
    marked = [[{"type": "image"} if "image" in part else part for part in content] for content in contents]
    plain = [{**m, "content": parts or m["content"]} for m, parts in zip(messages, marked, strict=True)]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    found: dict[str, torch.Tensor] = {}
    if pictures:
        seen = chosen.processor()(pictures, return_tensors="pt", **chosen.details[detail])
        counts = seen.get("num_soft_tokens_per_image")
        if counts is None:
            counts = [int(grid.prod()) // 4 for grid in seen["image_grid_thw"]]
        first, *others = text.split(dialect.image)
        before, behind = dialect.around
        shown = (f"{before}{dialect.image * int(count)}{behind}" for count in counts)
        text = first + "".join(picture + rest for picture, rest in zip(shown, others, strict=True))
        found = {name: seen[name] for name in ("pixel_values", chosen.places)}
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    is_image = ids == tokenizer.convert_tokens_to_ids(dialect.image)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": is_image.long(), **found}


def generated(kind: str, directory: Path, inputs: dict[str, torch.Tensor], count: int) -> str:
    """Returns the text that `generate` adds to the prompt."""
    model = AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager").eval()
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    tokenizer = seeing_tokenizer(kind)
    shown = tokenizer.convert_tokens_to_ids(["<|channel>", "<channel|>"])  # where they enclose no thoughts
    hidden = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {*shown}
    text: str = tokenizer.decode([i for i in output[0, inputs["input_ids"].shape[1] :].tolist() if i not in hidden])
    return text
