"""load_embedder: a directory in, the embedder of its model out. Models that it would compute wrongly are refused."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine.embedding.embedder import BATCH_TOKENS, Embedder, EmbedderInfo
from engine.embedding.text_models import Encoder, PairScorer, TaskPrompt, TextModel
from engine.threads import set_threads
from errors import ModelLoadError, first_line

TEXT_ALONE = {"text", "message"}  # kinds of input that only hold text
LIBRARY_MODULES = "sentence_transformers."  # modules.json may name only these: any other class is third-party code
CROSS_ENCODER = "ForSequenceClassification"
CAUSAL = ("ForCausalLM", "LMHeadModel")
OTHER_KINDS = {"SparseEncoder": "sparse vectors", "MultiVectorEncoder": "a vector for each token"}
OTHER_MODULES = re.compile(r"sentence_transformers\.(sparse|multi_vector)_encoder\.")
LATE_INTERACTION = re.compile("colbert", re.IGNORECASE)  # architectures that compare texts token by token
MATRYOSHKA = re.compile(  # models that were trained for shortened vectors too
    r"embeddinggemma|qwen3-embedding|nomic-embed-text-v(1\.5|2)|text-embedding|mxbai-embed-(large|2d)|matryoshka"
    r"|arctic-embed-(m-v1\.5|[ml]-v2)|jina-embeddings-v[345]",
    re.IGNORECASE,
)


def load_embedder(directory: Path, name: str, device: str = "auto", may_shorten: bool = False) -> Embedder:
    """Loads the model in a directory and tries it. Blocks for seconds. Raises ModelLoadError.

    device: auto (a GPU where there is one), cpu, cuda, cuda:0; may_shorten: lets vectors be cut even where nothing
    says that the model was trained for it.
    """
    set_threads()
    device = _device(device)
    try:
        text_model, about = _open(directory, name, device, may_shorten)
        sample: Any = ("a", "a") if about.kind == "cross-encoder" else "a"
        text_model.lengths([sample], TaskPrompt())
        text_model.compute([sample], TaskPrompt())
    except ModelLoadError:
        raise
    except Exception as error:  # malformed files can raise anything
        raise ModelLoadError(f"{name} cannot be loaded as an embedding model: {first_line(error)}") from error
    return Embedder(text_model, about, BATCH_TOKENS["cpu" if device == "cpu" else "cuda"])


def loaded_size(directory: Path, device: str) -> int:
    """Returns the bytes that the weights will take in memory: on a CPU all of them are float32, whatever the files
    have."""
    width = 4 if _device(device) == "cpu" or _gpu_dtype(directory) == "float32" else 2
    total = 0
    for path in directory.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            # safe_open gives no mapping that could be iterated
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total * width


def _device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _open(directory: Path, name: str, device: str, may_shorten: bool) -> tuple[TextModel, EmbedderInfo]:
    """Loads the files. Raises ModelLoadError for a kind of model that is not served."""
    import sentence_transformers  # takes seconds
    import transformers

    _check_modules(directory)
    _check_kind(directory)
    is_pair_scorer = _is_cross_encoder(directory)
    model_class = sentence_transformers.CrossEncoder if is_pair_scorer else sentence_transformers.SentenceTransformer
    model = model_class(
        str(directory),
        device=device,
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={"use_safetensors": True, "dtype": "float32" if device == "cpu" else _gpu_dtype(directory)},
    )
    if not isinstance(model.tokenizer, transformers.PreTrainedTokenizerBase):
        raise ModelLoadError(
            f"{name} is not supported: its first module is {type(model[0]).__name__}, and it must be a Transformer."
        )
    if not set(model.modalities) <= TEXT_ALONE:  # the library would load texts that are paths or URLs as images
        raise ModelLoadError(
            f"{name} is not supported: it takes {', '.join(map(str, model.modalities))}, and only text "
            "models are served."
        )
    text_model = PairScorer(model, name) if is_pair_scorer else Encoder(model)
    about = EmbedderInfo(
        kind="cross-encoder" if is_pair_scorer else "embeddings",
        dims=0 if is_pair_scorer else int(model.truncate_dim or model.get_embedding_dimension() or 0),
        may_shorten=may_shorten or _is_matryoshka(directory, name),
        prompts={key: text or "" for key, text in model.prompts.items()},
        default_prompt=model.prompts.get(model.default_prompt_name or "") or "",
        similarity="cosine" if is_pair_scorer else str(model.similarity_fn_name),
        num_bytes=sum(tensor.nbytes for tensor in model.parameters()),
    )
    return text_model, about


def _read(path: Path) -> Any:
    """Reads a JSON file; an empty object where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error


def _check_modules(directory: Path) -> None:
    """Raises ModelLoadError for a model with third-party code."""
    for module in _read(directory / "modules.json") or ():
        if not str(module.get("type", "")).startswith(LIBRARY_MODULES):
            raise ModelLoadError(
                f"{directory.name} needs its own code ({module.get('type')}), which this server never runs."
            )


def _check_kind(directory: Path) -> None:
    """Raises ModelLoadError for models that sentence-transformers would load, but compute wrongly."""
    library, config = _read(directory / "config_sentence_transformers.json"), _read(directory / "config.json")
    name, architecture = directory.name, str((config.get("architectures") or [""])[0])
    kind, modules = library.get("model_type"), _read(directory / "modules.json") or ()
    other = OTHER_KINDS.get(str(kind)) or next(
        (str(module["type"]) for module in modules if OTHER_MODULES.match(str(module.get("type")))), None
    )
    if other or LATE_INTERACTION.search(architecture):
        raise ModelLoadError(
            f"{name} is not supported: it gives {other or 'a vector for each token'}, and only models that give one "
            "dense vector for a text are served."
        )
    if architecture.endswith(CAUSAL) and not modules and kind != "CrossEncoder":
        raise ModelLoadError(
            f"{name} is a language model without modules.json, which would say how to make vectors or scores of texts."
        )
    old = config.get("sbert_ce_default_activation_function")
    activation = (config.get("sentence_transformers") or {}).get("activation_fn") or old or library.get("activation_fn")
    if activation and not str(activation).startswith("torch."):
        raise ModelLoadError(f"{name} needs its own code ({activation}) for its scores, which this server never runs.")


def _is_cross_encoder(directory: Path) -> bool:
    kind = _read(directory / "config_sentence_transformers.json").get("model_type")
    architectures = _read(directory / "config.json").get("architectures") or [""]
    is_classifier = architectures[0].endswith(CROSS_ENCODER) and not (directory / "modules.json").exists()
    return kind == "CrossEncoder" or (kind is None and is_classifier)


def _is_matryoshka(directory: Path, name: str) -> bool:
    library, config = _read(directory / "config_sentence_transformers.json"), _read(directory / "config.json")
    says_so = library.get("truncate_dim") or config.get("is_matryoshka") or config.get("matryoshka_dimensions")
    return bool(says_so) or MATRYOSHKA.search(f"{name} {config.get('_name_or_path', '')}") is not None


def _gpu_dtype(directory: Path) -> str:
    """Names bfloat16 for weights that are stored in it, else float32; never float16, in which some models overflow."""
    config = _read(directory / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if stored == "bfloat16" else "float32"
