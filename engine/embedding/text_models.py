"""TextModel: a model of sentence-transformers. Encoder makes vectors of texts, PairScorer scores of pairs of texts."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from errors import ModelLoadError

Vectors = npt.NDArray[np.float32]
TASKS = {"query": ("query",), "document": ("document", "passage", "corpus")}  # task -> usual names of its prompt
POSITIVE = re.compile(
    r"(is[_ ])?(relevant|positive|yes|true|match|matches|entailment|duplicate|related)", re.IGNORECASE
)


@dataclass(frozen=True)
class TaskPrompt:
    """What a text is for, as models that distinguish queries and documents need to know."""

    text: str = ""  # is put before each text
    task: str | None = None  # query or document; some models have a module for each


class TextModel(Protocol):
    """What computes: an Encoder, a PairScorer, or a stand-in for tests."""

    max_length: int  # tokens of a text
    tokenizer: Any  # transformers'

    def lengths(self, texts: Sequence[Any], prompt: TaskPrompt) -> list[int]:
        """Counts the tokens of each text, uncut, special tokens included."""
        ...

    def compute(self, texts: Sequence[Any], prompt: TaskPrompt) -> tuple[Vectors, list[int]]:
        """Computes a row for each text. Also returns the tokens that each took."""
        ...

    def release(self) -> None:
        """Frees its memory."""
        ...


class _Modules:
    """The base of both kinds of sentence-transformers' models."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.tokenizer = model.tokenizer
        limit = model.max_seq_length
        self.max_length = int(limit) if limit and math.isfinite(limit) else 2**31

    def release(self) -> None:
        """Frees the weights at once: these models refer to themselves, so that only a garbage collection frees them."""
        self.model.to("meta")

    def lengths(self, texts: Sequence[Any], prompt: TaskPrompt) -> list[int]:
        """Counts tokens. For a model with a chat template, those that the template adds are missing."""
        lead = prompt.text
        prompted = [(lead + text[0], text[1]) if isinstance(text, tuple) else lead + text for text in texts]
        encoded = self.tokenizer(prompted, truncation=False, padding=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def _forward(self, texts: Sequence[Any], prompt: TaskPrompt, name: str) -> tuple[torch.Tensor, list[int]]:
        """Computes one batch in the steps of sentence-transformers' own `encode` and `predict`."""
        task = {} if prompt.task is None else {"task": prompt.task}
        features = self.model.preprocess(list(texts), prompt=prompt.text or None, **task)
        features = {
            key: getattr(value, "to", lambda _, same=value: same)(self.model.device) for key, value in features.items()
        }
        num_tokens = features["attention_mask"].sum(1).tolist()
        with torch.inference_mode():
            return self.model(features, **task)[name], num_tokens


class Encoder(_Modules):
    """A bi-encoder: computes a vector for each text."""

    def compute(self, texts: Sequence[Any], prompt: TaskPrompt) -> tuple[Vectors, list[int]]:
        vectors, num_tokens = self._forward(texts, prompt, "sentence_embedding")
        return vectors.float().cpu().numpy()[:, : self.model.truncate_dim], num_tokens


class PairScorer(_Modules):
    """A cross-encoder: computes a score for each pair of texts; of two labels, the probability of the positive one."""

    def __init__(self, model: Any, name: str) -> None:
        """Raises ModelLoadError for a model with more than two labels."""
        super().__init__(model)
        self._positive = _positive_label(model, name)

    def compute(self, texts: Sequence[Any], prompt: TaskPrompt) -> tuple[Vectors, list[int]]:
        scores, num_tokens = self._forward(texts, prompt, "scores")
        scores = self.model.activation_fn(scores.double()).reshape(len(texts), -1)  # float32 rounds high scores to 1.0
        if scores.shape[1] > 1 and isinstance(self.model.activation_fn, torch.nn.Identity):
            scores = scores.softmax(1)
        return scores[:, self._positive, None].cpu().numpy(), num_tokens


def _positive_label(model: Any, name: str) -> int:
    """Finds the label that stands for a good document: by its name, else the last one, as is usual."""
    count = int(model.num_labels)
    if count > 2:
        raise ModelLoadError(f"{name} is a classifier with {count} classes, not a reranker.")
    names = getattr(model.config, "id2label", None) or {}
    positive = [number for number in range(count) if POSITIVE.fullmatch(str(names.get(number, "")))]
    return positive[0] if len(positive) == 1 else count - 1
