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
    num_bytes: int  # of its files
    is_gguf: bool
    is_on_gpu: bool
    quantization: str
    shape: Mapping[str, int]  # by the names of GGUF files


def facts_of(checked: "CheckedModel", quantization: str) -> ModelFacts:
    """Reads the facts of a checked model. quantization: the setting QUANTIZATION."""
    from engine.model_loader import choose_quantization
    from engine.quantization import FROM_FILE, NONE

    weights = choose_quantization(quantization, checked.dtype_setting, checked.is_on_cuda, checked.directory)
    text, dtype = checked.config.get_text_config(), str(checked.dtype).removeprefix("torch.")
    sizes = {name: getattr(text, field, None) for field, name in SHAPE.items()}
    return ModelFacts(
        architecture=str(checked.config.model_type),
        num_parameters=checked.num_elements,
        num_bytes=sum(path.stat().st_size for path in checked.directory.iterdir() if path.is_file()),
        is_gguf=weights is FROM_FILE,
        is_on_gpu=checked.is_on_cuda,
        quantization=TYPES.get(dtype, dtype) if weights is NONE else weights.name.upper(),
        shape={name: size for name, size in sizes.items() if isinstance(size, int)},
    )
