"""An embedding model on the GPU gives the vectors that it gives on a CPU."""

import asyncio
from pathlib import Path

import numpy as np
import torch
from tiny_encoders import TEXTS, encoder

from engine.embedding.loader import load_embedder


def test_vectors_are_those_of_a_cpu(tiny_encoder: Path, device: torch.device) -> None:
    async def run() -> None:
        embedder = load_embedder(tiny_encoder, "tiny", device.type, may_shorten=True)
        try:
            for prompt_name in (None, "query"):
                found = (await embedder.embed(TEXTS, prompt_name)).vectors
                expected = encoder(tiny_encoder).encode(TEXTS, prompt_name=prompt_name, normalize_embeddings=True)
                similarity = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
                assert similarity.min() > (0.98 if device.type == "cuda" else 0.9999), "a GPU computes in 16 bits"
        finally:
            await embedder.close()

    asyncio.run(run())
