"""Which vision family a model is of."""

from typing import Any

from vision.family import VisionFamily
from vision.gemma3 import Gemma3Vision
from vision.gemma4 import Gemma4UnifiedVision, Gemma4Vision
from vision.qwen_vl import Qwen3_5Vision, Qwen3VLVision, QwenVision

FAMILIES: dict[str, type[VisionFamily]] = {  # by config.model_type
    "gemma3": Gemma3Vision,
    "gemma4": Gemma4Vision,
    "gemma4_unified": Gemma4UnifiedVision,
    "qwen2_5_vl": QwenVision,
    "qwen3_5": Qwen3_5Vision,
    "qwen3_5_moe": Qwen3_5Vision,
    "qwen3_vl": Qwen3VLVision,
    "qwen3_vl_moe": Qwen3VLVision,
}


def vision_family_of(config: Any) -> VisionFamily | None:
    """Returns the family of a model with that configuration; None for a model that reads text alone, or sees in another
    way."""
    family = FAMILIES.get(getattr(config, "model_type", ""))
    return None if family is None or getattr(config, "vision_config", None) is None else family(config)
