"""Which vision family a model is of."""

from typing import Any

from vision.family import VisionFamily
from vision.gemma3 import Gemma3Vision

FAMILIES: dict[str, type[VisionFamily]] = {"gemma3": Gemma3Vision}  # by config.model_type


def vision_family_of(config: Any) -> VisionFamily | None:
    """Returns the family of a model with that configuration; None for a model that reads text alone, or sees in another
    way."""
    family = FAMILIES.get(getattr(config, "model_type", ""))
    return None if family is None or getattr(config, "vision_config", None) is None else family(config)
