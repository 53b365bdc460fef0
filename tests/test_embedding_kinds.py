"""Every kind of embedding model and reranker, beside sentence-transformers itself."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import byte_tokenizer, save_tiny_checkpoint
from safetensors.torch import load_file, save_file
from tiny_encoders import BERT, TEXTS, close, encoder, save_tiny_cross_encoder, save_tiny_encoder
from transformers import (
    BertConfig,
    BertModel,
)

from engine.embedding.argument_errors import ArgumentError
from engine.embedding.loader import load_embedder, loaded_size
from errors import (
    ModelLoadError,
)


def save_modules(directory: Path, *modules: Any, seed: int = 0, name: str = "first", **changes: Any) -> Path:
    """A model of those modules behind a tiny Transformer."""
    from sentence_transformers import SentenceTransformer

    first = [tiny_transformer(directory.parent / name, seed)] if modules[0].__class__.__name__ != "Router" else []
    SentenceTransformer(modules=[*first, *modules], device="cpu", **changes).save(
        str(directory), create_model_card=False
    )
    return directory


def tiny_transformer(directory: Path, seed: int = 0) -> Any:
    from sentence_transformers.sentence_transformer.modules import Transformer

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    BertModel(BertConfig(vocab_size=len(tokenizer), **BERT)).save_pretrained(directory)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(directory)
    return Transformer(str(directory))


def edit(path: Path, **changes: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **changes}))


def embedded(directory: Path, **request: Any) -> Any:
    async def run() -> Any:
        embedder = load_embedder(directory, "tiny", "cpu", may_shorten=True)
        try:
            return (await embedder.embed(TEXTS[:8], **request)).vectors
        finally:
            await embedder.close()

    return asyncio.run(run())


def scored(directory: Path, query: str, documents: list[str]) -> list[float]:
    async def run() -> list[float]:
        embedder = load_embedder(directory, "tiny", "cpu")
        try:
            return (await embedder.score(query, documents)).values
        finally:
            await embedder.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "modes", [("cls",), ("max",), ("lasttoken",), ("weightedmean",), ("mean_sqrt_len_tokens",), ("cls", "mean", "max")]
)
def test_every_pooling_is_that_of_encode(tmp_path: Path, modes: tuple[str, ...]) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    directory = save_modules(tmp_path / "model", Pooling(32, modes if len(modes) > 1 else modes[0]))
    assert close(embedded(directory), encoder(directory).encode(TEXTS[:8]))


def test_dense_layers_normalisation_and_prompts_outside_of_the_pooling_are_those_of_encode(tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = (Pooling(32, "mean", include_prompt=False), Dense(32, 16), Normalize())
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    directory = save_modules(tmp_path / "model", *modules, **prompts)
    assert close(embedded(directory), encoder(directory).encode(TEXTS[:8]))
    short = encoder(directory).encode(TEXTS[:8], truncate_dim=4, normalize_embeddings=True)
    assert close(embedded(directory, dimensions=4), short)


def test_files_of_older_versions_and_none_at_all_are_read_as_encode_reads_them(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    directory = save_modules(tmp_path / "model", Pooling(32, "mean"))
    modules = json.loads((directory / "modules.json").read_text())
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rsplit(".", 1)[1]
    (directory / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    for path in (directory, tmp_path / "first"):  # the second is a Transformer alone
        assert close(embedded(path), encoder(path).encode(TEXTS[:8]))


def test_queries_and_documents_take_their_own_way_through_a_model_that_has_two(tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import Pooling

    ways = [[tiny_transformer(tmp_path / str(seed), seed), Pooling(32, "mean")] for seed in (1, 2)]
    directory = save_modules(tmp_path / "model", Router.for_query_document(*ways))
    model = encoder(directory)
    assert close(embedded(directory, prompt_name="query"), model.encode_query(TEXTS[:8]))
    assert close(embedded(directory, prompt_name="document"), model.encode_document(TEXTS[:8]))
    likeness = model.similarity(model.encode_query("hello"), model.encode_document(TEXTS[:8]))[0]
    assert close(scored(directory, "hello", TEXTS[:8]), likeness)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("document", ["document", "passage"])
def test_documents_are_ranked_by_the_likeness_and_the_prompts_that_the_models_files_name(
    tmp_path: Path, similarity: str, document: str
) -> None:
    prompts = {"query": "query: ", document: "text: "}
    directory = save_tiny_encoder(tmp_path / "model", similarity_fn_name=similarity, prompts=prompts)
    model = encoder(directory)
    expected = model.similarity(model.encode_query("hello"), model.encode_document(TEXTS[:8]))[0]
    assert close(scored(directory, "hello", TEXTS[:8]), expected)


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"architectures": ["HF_ColBERT"]}, "a vector for each token"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "sparse vectors"),
        ("config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"}, "a vector for each token"),
    ],
)
def test_models_of_other_vectors_are_refused_in_one_sentence(
    tmp_path: Path, file: str, changes: dict[str, Any], reason: str
) -> None:
    directory = save_tiny_encoder(tmp_path / "model")
    edit(directory / file, **changes)
    with pytest.raises(ModelLoadError, match=reason):
        load_embedder(directory, "model", "cpu")


def test_a_language_model_alone_makes_no_vectors(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"language model without modules\.json"):
        load_embedder(save_tiny_checkpoint(tmp_path / "qwen"), "qwen", "cpu")


def test_a_table_of_vectors_is_refused_by_its_name(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    module = StaticEmbedding(byte_tokenizer().backend_tokenizer, embedding_dim=16)
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path / "model"), create_model_card=False)
    with pytest.raises(ModelLoadError, match="its first module is StaticEmbedding"):
        load_embedder(tmp_path / "model", "model", "cpu")


def predicted(directory: Path, **options: Any) -> Any:
    from sentence_transformers import CrossEncoder

    pairs = [("a query", text) for text in TEXTS[:8]]
    return CrossEncoder(str(directory), device="cpu", local_files_only=True).predict(pairs, **options)


@pytest.mark.parametrize(
    ("names", "positive"),
    [
        (["LABEL_0", "LABEL_1"], 1),
        (["relevant", "irrelevant"], 0),
        (["not_relevant", "relevant"], 1),
        (["yes", "no"], 0),
        (["negative", "positive"], 1),
    ],
)
def test_of_two_labels_the_probability_of_the_one_that_says_yes_is_the_score(
    tmp_path: Path, names: list[str], positive: int
) -> None:
    directory = save_tiny_cross_encoder(tmp_path / "two", num_labels=2)
    own = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    edit(directory / "config.json", **own)
    expected = predicted(directory, apply_softmax=True)[:, positive]
    assert close(scored(directory, "a query", TEXTS[:8]), expected)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_scores_of_which_a_model_is_sure_are_still_told_apart(tmp_path: Path, num_labels: int) -> None:
    directory = save_tiny_cross_encoder(tmp_path / "model", num_labels)
    tensors = load_file(directory / "model.safetensors")
    tensors["classifier.bias"] += torch.tensor([25.0] if num_labels == 1 else [0.0, 25.0])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    logits = predicted(directory, activation_fn=torch.nn.Identity()).reshape(8, -1)
    margin = logits[:, 0] if num_labels == 1 else logits[:, 1] - logits[:, 0]
    scores = scored(directory, "a query", TEXTS[:8])
    assert np.argsort(scores).tolist() == np.argsort(margin).tolist() and len(set(scores)) == 8


LINEAR, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"sentence_transformers": {"activation_fn": LINEAR}},
        {"sentence_transformers": {"activation_fn": SIGMOID}},
        {"sbert_ce_default_activation_function": LINEAR},
    ],
)
def test_scores_are_those_of_the_activation_that_the_models_files_name(
    tmp_path: Path, changes: dict[str, Any], num_labels: int
) -> None:
    directory = save_tiny_cross_encoder(tmp_path / "model", num_labels)
    edit(directory / "config.json", **changes)
    expected = predicted(directory, apply_softmax=LINEAR in str(changes))
    assert close(scored(directory, "a query", TEXTS[:8]), expected if num_labels == 1 else expected[:, 1])


def test_an_activation_that_is_code_of_a_models_own_is_refused_by_name(tmp_path: Path) -> None:
    directory = save_tiny_cross_encoder(tmp_path / "model")
    edit(directory / "config.json", sentence_transformers={"activation_fn": "custom.Activation"})
    with pytest.raises(ModelLoadError, match=r"custom\.Activation.*never run"):
        load_embedder(directory, "model", "cpu")


def test_a_reranker_that_is_a_language_model_scores_as_predict_does(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    first = Transformer(str(save_tiny_checkpoint(tmp_path / "qwen")), transformer_task="text-generation")
    CrossEncoder(modules=[first, LogitScore(5, 6)], device="cpu").save(str(tmp_path / "model"))
    assert close(scored(tmp_path / "model", "a query", TEXTS[:8]), predicted(tmp_path / "model"))


def test_classifiers_are_no_rerankers(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="3 classes"):
        load_embedder(save_tiny_cross_encoder(tmp_path / "nli", num_labels=3), "nli", "cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config_sentence_transformers.json", "[]"),
        ("modules.json", "[1]"),
        ("modules.json", "{"),
        ("config.json", '{"architectures": [null]}'),
        ("1_Pooling/config.json", "[]"),
        ("tokenizer.json", "{}"),
        ("model.safetensors", "no tensors"),
    ],
)
def test_files_that_are_not_as_they_should_be_are_one_sentence(tmp_path: Path, name: str, content: str) -> None:
    directory = save_tiny_encoder(tmp_path / "model")
    (directory / name).write_text(content)
    with pytest.raises(ModelLoadError) as refusal:
        load_embedder(directory, "model", "cpu")
    assert "\n" not in str(refusal.value)


def test_what_a_model_takes_is_counted_in_memory_and_given_back_when_it_is_closed(tmp_path: Path) -> None:
    directory = save_tiny_encoder(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / "model.safetensors")

    async def run() -> None:
        embedder = load_embedder(directory, "model", "cpu")
        assert 0 <= loaded_size(directory, "cpu") - embedder.about.num_bytes < 1000
        await embedder.close()
        assert {tensor.device.type for tensor in embedder.model.model.parameters()} == {"meta"}

    asyncio.run(run())


def test_own_token_ids_are_read_by_the_models_tokenizer(tiny_encoder: Path) -> None:
    async def run() -> None:
        embedder = load_embedder(tiny_encoder, "tiny", "cpu")
        try:
            token_ids = embedder.model.tokenizer("hello").input_ids
            found = await embedder.embed([token_ids, "hello"])
            assert close(found.vectors[0], found.vectors[1])
            with pytest.raises(ArgumentError):
                await embedder.embed([[10_000]])
        finally:
            await embedder.close()

    asyncio.run(run())
