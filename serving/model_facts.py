"""ModelFacts: what a model's files say of it, for clients that show models: its size, its shape, its format."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.checked_model import CheckedModel

SHAPE = {  # a field of the config -> its name in GGUF files, below the architecture
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "vocab_size": "vocab_size",
}
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class ModelFacts:
    architecture: str
    num_parameters: int
    num_bytes: int  # of the files that its weights are read from
    is_gguf: bool
    is_on_gpu: bool
    quantization: str
    shape: Mapping[str, int]  # by the names of GGUF files


def facts_of(checked: "CheckedModel", quantization: str) -> ModelFacts:
    """Reads the facts of a checked model. quantization: the setting QUANTIZATION."""
    from engine import weight_files
    from engine.cpu import packed_checkpoint
    from engine.model_loader import choose_quantization
    from engine.quantization import FROM_FILE, NONE

    own = (checked.dtype_setting, checked.is_on_cuda, checked.directory, checked.config)
    weights = choose_quantization(quantization, *own)
    name = weight_files.method_of(weight_files.scheme_of(checked.config)) if weights.keeps_codes else weights.name
    text, dtype = checked.config.get_text_config(), str(checked.dtype).removeprefix("torch.")
    sizes = {name: getattr(text, field, None) for field, name in SHAPE.items()}
    is_gguf, files = weights is FROM_FILE, checked.directory.glob("*.safetensors")
    return ModelFacts(
        architecture=str(checked.config.model_type),
        num_parameters=checked.num_elements,
        num_bytes=packed_checkpoint.size(checked.directory) if is_gguf else sum(path.stat().st_size for path in files),
        is_gguf=is_gguf,
        is_on_gpu=checked.is_on_cuda,
        quantization=TYPES.get(dtype, dtype) if weights is NONE else "GGUF" if is_gguf else name.upper(),
        shape={name: size for name, size in sizes.items() if isinstance(size, int)},
    )
