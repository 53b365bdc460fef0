"""Loading of the local model: its files, tokenizer and engine. It blocks for seconds to minutes."""

import gc
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import checkpoint
from checkpoints.progress import Progress
from config import Settings
from errors import (
    APIError,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    NotOnHub,
    SourceUnreachable,
    UpstreamUnreachable,
    first_line,
)
from prompt_templates import PromptTemplate
from schemas import Message
from serving.image_inputs import ImageInputs
from serving.memory_budget import Footprint
from serving.model_facts import ModelFacts, facts_of
from text.logprobs import TokenTexts
from vision.families import vision_family_of
from vision.family import VisionFamily

if TYPE_CHECKING:
    from engine.build import ModelDefaults
    from engine.engine import Engine, EngineOptions
    from engine.lora.adapter import Adapter
    from engine.sample.grammar import GrammarCompiler

log = logging.getLogger(__name__)

IMPORTING = threading.Lock()  # two threads that import torch and transformers at once meet half-made modules
SAMPLING_DEFAULTS = {"temperature": 0.7, "top_p": 1.0}  # this server's, where neither request nor model say
RANGES = {  # within which a model's recommendation is followed
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 2**31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
}
NOT_FOLLOWED = (  # other settings of a generation config that would change answers
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "num_beams",
    "no_repeat_ngram_size",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "penalty_alpha",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
FOREIGN_VOCABULARIES = ("tokenizer.model", "tekken.json", "spiece.model", "tiktoken.model", "qwen.tiktoken")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready: its engine, and what turns requests into tokens and tokens into answers."""

    engine: "Engine"
    template: PromptTemplate
    texts: TokenTexts
    defaults: dict[str, Any]  # sampling parameters of the model's generation config
    image_inputs: ImageInputs | None = None  # None: the model takes text alone
    grammars: "GrammarCompiler | None" = None  # None: grammars cannot be compiled for its tokenizer
    facts: ModelFacts | None = None
    footprint: Footprint = field(default_factory=dict)  # the memory that it takes
    adapter: "Adapter | None" = None  # which requests are answered with


PROCESSOR_FILES = ("chat_template.json", "processor_config.json")  # they may have a chat template
_REFUSED = "conversations that need them are refused"
HIDDEN = {  # what a chat template may leave out; calls and tools are not here: they are written as text instead
    "system": "has no place for a system message, which is put before the user's text instead",
    "user": f"drops parts of user messages: {_REFUSED}",
    "assistant": f"drops messages of the assistant: {_REFUSED}",
    "messages": "rejects conversations of several turns: they are written in another form, or refused",
}

LoadModel = Callable[[str, Settings, Progress], LoadedModel]


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector away while a model loads, and from its objects later.

    Loading makes a million objects, most of which stay: searching them again and again takes a second of the start, and
    later stalls streams.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@uncollected()
def load(path: str, settings: Settings, progress: Progress) -> LoadedModel:
    """Finds, fetches and loads the model, which takes seconds to minutes. Raises ModelLoadError."""
    directory = checkpoint.fetch(path, settings.cache_dir, progress.report).directory
    draft = settings.draft_model_path if settings.num_speculative_tokens else None
    draft_directory = draft and checkpoint.fetch(draft, settings.cache_dir, progress.report).directory
    progress.report("loading libraries", 0.0)
    with IMPORTING:
        from engine.cpu import kernels

        threading.Thread(target=kernels.warm_up, name="compiler", daemon=True).start()
        from engine.build import load_engine
        from engine.checked_model import check_model

    options = engine_options(settings)
    checked = check_model(directory, options.dtype, options.device_map)
    checked_draft = check_model(draft_directory, options.dtype, options.device_map) if draft_directory else None
    config = checked.config
    with ThreadPoolExecutor(1, "tokenizer") as pool:
        image_inputs = open_image_inputs(directory, config)
        vision = None if image_inputs is None else image_inputs.family
        name = settings.served_model_name or checkpoint.served_name(path)
        template = pool.submit(load_template, directory, config.model_type, vision, name)
        if draft_directory:
            check_vocabulary(template.result(), load_template(draft_directory, config.model_type))
        engine, generation_config = load_engine(
            checked, options, lambda: defaults_of(template.result()), progress.report, checked_draft
        )
    progress.report("ready", 1.0)
    texts = TokenTexts(template.result().tokenizer)
    grammars = open_grammars(template.result(), engine)
    return LoadedModel(
        engine=engine,
        template=template.result(),
        texts=texts,
        defaults=sampling_defaults(generation_config),
        image_inputs=image_inputs,
        grammars=grammars,
        facts=facts_of(checked, options.quantization),
    )


def engine_options(settings: Settings) -> "EngineOptions":
    """Returns the settings that the engine needs. Each client, told apart by its API key's name, has its part of the
    queue."""
    from engine.engine import EngineOptions

    return EngineOptions(
        dtype=settings.dtype,
        device_map=settings.device_map,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_mixed_tokens=settings.max_num_mixed_tokens,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        num_clients=max(1, len({key.name for key in settings.api_keys})),
        kv_cache_memory=settings.kv_cache_memory,
        snapshot_memory=settings.snapshot_memory,
        kv_block_size=settings.kv_block_size,
        num_speculative_tokens=settings.num_speculative_tokens,
        cache_dir=settings.cache_dir,
        prefix_cache_dir=settings.prefix_cache_dir,
        prefix_cache_size=settings.prefix_cache_size,
    )


def defaults_of(template: PromptTemplate) -> "ModelDefaults":
    from engine.build import ModelDefaults

    num_tokens = 1 + max(template.tokenizer.get_vocab().values())
    return ModelDefaults(tuple(template.stop_token_ids), template.family.context_length, num_tokens)


def open_grammars(template: PromptTemplate, engine: "Engine") -> "GrammarCompiler | None":
    from engine.sample.grammar import GrammarCompiler

    backend = getattr(template.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return GrammarCompiler(backend.to_str, engine.num_embeddings, engine.scheduler.eos_token_ids)


def open_image_inputs(directory: Path, config: Any) -> ImageInputs | None:
    """Returns the image inputs of a model of a vision family; None for others, and where the image processor is
    missing."""
    family = vision_family_of(config)
    if family is None:
        return None
    try:
        return ImageInputs.open(directory, family)
    except (OSError, ValueError, KeyError, ImportError) as error:
        log.warning("images are refused, because %s has no image processor: %s", directory, first_line(error))
        return None


def to_api_error(error: Exception, name: str, param: str = "model") -> APIError:
    """Turns an error of loading a model into the one that the client gets, about the field `param`."""
    if isinstance(error, SourceUnreachable):
        return UpstreamUnreachable(str(error), param=param)
    if isinstance(error, NotOnHub):
        return ModelNotFound(str(error), param=param)
    reason = str(error) if isinstance(error, ModelLoadError) else f"{name} cannot be loaded: {type(error).__name__}"
    return InvalidRequest(reason, param=param, code="model_not_supported")


def load_template(
    directory: Path, model_type: str, vision: VisionFamily | None = None, name: str = ""
) -> PromptTemplate:
    from transformers import AutoTokenizer

    from text.tokenizer_file import by_its_file

    _check_vocabulary_file(directory)
    try:
        tokenizer = by_its_file(AutoTokenizer.from_pretrained(directory, trust_remote_code=False), directory)
        tokenizer.chat_template = with_templates_beside(tokenizer.chat_template, directory)
        template = PromptTemplate(tokenizer, model_type, vision, name)
        log_hidden(template, directory)
        log_moved(template, directory)
    except Exception as error:  # malformed files can raise anything
        raise ModelLoadError(f"The tokenizer in {directory} cannot be loaded: {first_line(error)}") from error
    return template


def with_templates_beside(template: Any, directory: Path) -> Any:
    """Returns the tokenizer's chat template, or the one in a file where transformers does not look.

    That is a processor's file or, if a folder has other templates, the tokenizer's config with the default one.
    """
    if not template:
        beside = [_json_object(directory / name).get("chat_template") for name in PROCESSOR_FILES]
        return next((text for text in beside if text), template)
    if isinstance(template, dict) and not template.keys() & {"default", "chat"}:
        default = _json_object(directory / "tokenizer_config.json").get("chat_template")
        return {**template, "default": default} if isinstance(default, str) else template
    return template


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _check_vocabulary_file(directory: Path) -> None:
    """Raises ModelLoadError if no file has a vocabulary that transformers reads as it is.

    It would make an empty vocabulary, or convert another file and lose spaces and added tokens of some models.
    """
    if any((directory / name).exists() for name in VOCABULARIES):
        return
    others = [name for name in FOREIGN_VOCABULARIES if (directory / name).exists()]
    reason = f"has only {others[0]}" if others else "has no vocabulary"
    raise ModelLoadError(
        f"{directory} {reason}, and this server needs tokenizer.json: take that file from the model's "
        "page, or from another model with the same vocabulary."
    )


def log_hidden(template: PromptTemplate, directory: Path) -> None:
    """Logs what the chat template leaves out, and what the server does instead."""
    hidden = template.hidden if template.is_own else ()
    if "messages" in hidden:
        try:
            template.render_chat([Message(role="user", content="Hello")])
        except InvalidRequest as error:
            log.warning("chats are refused: %s (%s)", error, directory)
            return
    for what in hidden:
        if what in HIDDEN:
            log.warning("the chat template in %s %s", directory, HIDDEN[what])
    if template.hides_images:
        log.warning("images are refused: the chat template in %s does not show them beside the text", directory)


def log_moved(template: PromptTemplate, directory: Path) -> None:
    """Logs the added tokens whose ids differ from those in the tokenizer's files: the model was trained with these."""
    added = _json_object(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    expected = {str(token.get("content")): int(number) for number, token in added.items()}
    expected |= _json_object(directory / "added_tokens.json")
    ids = {text: template.token_id(text) for text in expected}
    moved = [f"{text} has id {ids[text]}, not {number}" for text, number in expected.items() if ids[text] != number]
    if moved:
        log.warning("the tokenizer in %s gives tokens other ids than its files do: %s", directory, "; ".join(moved[:5]))


def check_vocabulary(template: PromptTemplate, draft: PromptTemplate) -> None:
    """Raises ModelLoadError unless both models have the same tokens with the same ids."""
    if template.tokenizer.get_vocab() != draft.tokenizer.get_vocab():
        raise ModelLoadError(
            "The model at DRAFT_MODEL_PATH has a different vocabulary: use one with the vocabulary of "
            "the model at MODEL_PATH."
        )


def sampling_defaults(generation_config: Any) -> dict[str, Any]:
    """Takes the recommendations of a model's authors, else this server's defaults; bad values are ignored."""
    recommended = {name: getattr(generation_config, name, None) for name in RANGES}
    if getattr(generation_config, "do_sample", None) is False:
        recommended["temperature"] = None  # without sampling it has no meaning
    if recommended["top_k"] == -1:
        recommended["top_k"] = 0  # both stand for all tokens
    values = {name: value for name, value in recommended.items() if value is not None}
    bad = {name: value for name, value in values.items() if not _is_in_range(name, value)}
    if bad:
        log.warning("generation_config.json: values out of range are ignored: %s", bad)
    unread = [name for name in NOT_FOLLOWED if getattr(generation_config, name, None) not in (None, False, 0, 1, [])]
    if unread:
        log.warning(
            "generation_config.json: settings that this server does not support are ignored: %s", ", ".join(unread)
        )
    return {**SAMPLING_DEFAULTS, **{name: value for name, value in values.items() if name not in bad}}


def _is_in_range(name: str, value: Any) -> bool:
    low, high = RANGES[name]
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
