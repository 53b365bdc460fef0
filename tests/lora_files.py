"""Adapters with random weights, in PEFT's files, and the same changes made to a model's own weights."""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TinyAdapter:
    """An adapter of the layers of a model whose names end as `targets` do."""

    model: PreTrainedModel
    targets: tuple[str, ...]
    rank: int = 4
    alpha: float = 8
    seed: int = 0
    fields: dict[str, Any] = field(default_factory=dict)  # more of its configuration
    ranks: dict[str, int] = field(default_factory=dict)  # ends of names -> another rank
    alphas: dict[str, float] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, nn.Linear]:
        return {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear) and name.endswith(self.targets)
        }

    def matrices(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each layer, large enough to change answers."""
        random = torch.Generator().manual_seed(self.seed)
        result = {}
        for name, layer in self.layers.items():
            rank = self._of(name, self.ranks, self.rank)
            a = torch.randn(rank, layer.in_features, generator=random) * 0.3
            result[name] = (a, torch.randn(layer.out_features, rank, generator=random) * 0.1)
        return result

    def _of(self, name: str, others: dict[str, Any], default: Any) -> Any:
        return next((value for end, value in others.items() if name.endswith(end)), default)

    def merged(self) -> PreTrainedModel:
        """A copy of the model with the adapter in its weights: W + scale * B A."""
        model = copy.deepcopy(self.model)
        for name, (a, b) in self.matrices().items():
            alpha = self._of(name, self.alphas, self.alpha)
            scale = alpha / (len(a) ** 0.5 if self.fields.get("use_rslora") else len(a))
            weight = model.get_submodule(name).weight
            weight.data += (scale * b @ a).to(weight)
        return model

    def save(self, directory: Path, prefix: str = "base_model.model.") -> Path:
        tensors = {}
        for name, (a, b) in self.matrices().items():
            tensors[f"{prefix}{name}.lora_A.weight"], tensors[f"{prefix}{name}.lora_B.weight"] = a, b
        return save(directory, tensors, self.config())

    def config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": "tiny/base",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "rank_pattern": self.ranks,
            "alpha_pattern": self.alphas,
            "bias": "none",
            **self.fields,
        }


def save(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def greedy_tokens(model: PreTrainedModel, prompt: Iterable[int], count: int) -> list[int]:
    """transformers' own answer."""
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(ids, max_new_tokens=count, do_sample=False)
    return output[0, ids.shape[1] :].tolist()
