"""Tiny embedding models and rerankers with random weights, and what a test asks of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import byte_tokenizer
from process import Server
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from serving.embeddings import DEMO

TEXTS = [
    "I like to walk in the sun.",
    "",
    "我喜歡在陽光明媚的日子裡散步。",
    "word " * 600,
    "def f(x):\n    return x ** 2",
    *(f"text number {number} " * (number % 9 + 1) for number in range(90)),
]
TEXTS[1] = " "


def ignore(what: str, fraction: float) -> None:
    pass


def close(ours: Any, theirs: Any) -> bool:
    return bool(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs)).max() < 1e-5)


BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}


def save_tiny_encoder(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A bi-encoder of sentence-transformers' layout, mean pooling, 32 dimensions, 64 tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    BertModel(BertConfig(vocab_size=len(tokenizer), **BERT)).save_pretrained(directory / "raw")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(directory / "raw")
    module = Transformer(str(directory / "raw"))
    model = SentenceTransformer(modules=[module, Pooling(32)], device="cpu", **changes)
    model.save(str(directory), create_model_card=False)
    for path in (directory / "raw").iterdir():
        path.unlink()
    (directory / "raw").rmdir()
    return directory


def save_tiny_cross_encoder(directory: Path, num_labels: int = 1) -> Path:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_labels=num_labels, pad_token_id=tokenizer.pad_token_id, **BERT)
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(directory)
    return directory


def encoder(directory: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory), device="cpu", local_files_only=True)


def embed(server: Server, input: Any, **body: Any) -> Any:
    return server.post("/v1/embeddings", **{"model": DEMO, "input": input, **body})


def vectors(server: Server, input: Any, **body: Any) -> list[list[float]]:
    return vectors_of(embed(server, input, **body))


def vectors_of(answer: Any) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return [item["embedding"] for item in data]
