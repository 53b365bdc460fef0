"""The models of this server as Ollama lists and shows them."""

import hashlib
import math
import time
from datetime import UTC, datetime

from api.ollama.schemas import (
    FAR_AWAY,
    OllamaDetails,
    OllamaModel,
    OllamaModels,
    OllamaRunningModel,
    OllamaRunningModels,
    OllamaShown,
)
from api.services import Services
from errors import ModelNotFound
from schemas import Model
from serving.loading import LoadedModel
from serving.local import LocalModel

# The version of Ollama whose fields are known here; clients ask for one that has what they need
VERSION = "0.12.11"
LATEST = ":latest"
NOT_FOUND = "model '{}' not found"  # Ollama's own sentence, which clients look for
UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


async def chat_model(services: Services, name: str) -> str:
    """Returns the name of a chat model without Ollama's tag, which clients add. Raises ModelNotFound."""
    router = services.router
    await services.chat.refresh()
    for known in map(router.alias, _spellings(name)):
        if services.chat.serves(known) or router.provider_of(known) is not None:
            return known
    raise _not_found(name)


async def embedding_model(services: Services, name: str) -> str:
    """Returns the name of an embedding model without Ollama's tag. Raises ModelNotFound."""
    await services.embeddings.refresh()
    for known in map(services.router.alias, _spellings(name)):
        if services.embeddings.serves(known):
            return known
    raise _not_found(name)


def _spellings(name: str) -> tuple[str, ...]:
    """Returns a name without `:latest`, and then without any tag: there is one version of each model here."""
    untagged = name.removesuffix(LATEST)
    return untagged, untagged.rpartition(":")[0] or untagged


def _not_found(name: str) -> ModelNotFound:
    return ModelNotFound(NOT_FOUND.format(name), param="model")


def tagged(name: str) -> str:
    """Returns a name as Ollama lists it: always with a tag, which Open WebUI relies on."""
    return name if ":" in name else name + LATEST


async def listed(services: Services) -> OllamaModels:
    """Lists what /v1/models lists."""
    await services.chat.refresh()
    models = [_listed(entry, model.loaded) for model in services.chat.all for entry in model.entries]
    models += [_listed(model) for model in services.embeddings.models()]
    models += [_listed(Model.of_provider(provider, name)) for provider, name in await services.router.listed()]
    return OllamaModels(models=models)


def _listed(model: Model, loaded: LoadedModel | None = None) -> OllamaModel:
    return OllamaModel(
        name=tagged(model.id),
        model=tagged(model.id),
        modified_at=_time(model.created),
        size=model.size or 0,
        digest=_digest(model.id),
        details=_details(loaded),
    )


def running(services: Services) -> OllamaRunningModels:
    """Lists the models that are loaded."""
    found = [
        _running(model.name, model.loaded, model.expires_in) for model in services.chat.all if model.loaded is not None
    ]
    for model, about in services.embeddings.loaded.items():
        found.append(_running(model, None, services.embeddings.expires_in(model), about.num_bytes))
    return OllamaRunningModels(models=found)


def _running(name: str, loaded: LoadedModel | None, expires_in: float, num_bytes: int = 0) -> OllamaRunningModel:
    facts = loaded.facts if loaded else None
    size = facts.num_bytes if facts else num_bytes
    return OllamaRunningModel(
        name=tagged(name),
        model=tagged(name),
        size=size,
        digest=_digest(name),
        details=_details(loaded),
        expires_at=FAR_AWAY if math.isinf(expires_in) else _time(int(time.time() + expires_in)),
        size_vram=size if facts and facts.is_on_gpu else 0,
        context_length=loaded.engine.max_model_len if loaded else 0,
    )


async def shown(services: Services, name: str) -> OllamaShown:
    """Describes one model; one that is not loaded stays so, and is described by its name alone. Raises APIError."""
    await services.embeddings.refresh()
    is_embedder = any(services.embeddings.lists(spelling) for spelling in _spellings(name))
    known = await embedding_model(services, name) if is_embedder else await chat_model(services, name)
    if is_embedder or services.router.provider_of(known) is not None:
        return _shown_by_name(known, ["embedding"] if is_embedder else ["completion", "tools"])
    model = await services.text_model(known)
    if model.loaded is None:
        return _shown_by_name(known, ["completion", "tools"])
    return _shown(model, model.loaded)


def _shown_by_name(name: str, capabilities: list[str]) -> OllamaShown:
    """Describes a model of which the name alone is known here."""
    return OllamaShown(
        modelfile=f"FROM {name}\n",
        parameters="",
        template="",
        details=_details(None),
        model_info={"general.basename": name},
        capabilities=capabilities,
        modified_at=_time(0),
    )


def _shown(model: LocalModel, loaded: LoadedModel) -> OllamaShown:
    facts, template = loaded.facts, loaded.template
    architecture = facts.architecture if facts else template.family.name
    info = {"general.architecture": architecture, "general.basename": model.name}
    shape = {f"{architecture}.{name}": size for name, size in facts.shape.items()} if facts else {}
    count = {"general.parameter_count": facts.num_parameters} if facts else {}
    return OllamaShown(
        modelfile=f"FROM {model.name}\n",
        parameters="\n".join(f"{name:<30} {value}" for name, value in loaded.defaults.items()),
        template=template.chat_template,
        details=_details(loaded),
        model_info={**info, **count, **shape, f"{architecture}.context_length": loaded.engine.max_model_len},
        capabilities=_capabilities(loaded),
        modified_at=_time(model.created),
    )


def _capabilities(loaded: LoadedModel) -> list[str]:
    """Returns what the model can do, in Ollama's words; tools are described in the prompt if its template has no
    place for them."""
    more = {
        "vision": loaded.image_inputs is not None,
        "insert": loaded.template.fills_gaps,
        "thinking": loaded.template.think is not None,
    }
    return ["completion", "tools", *(name for name, is_there in more.items() if is_there)]


def _details(loaded: LoadedModel | None) -> OllamaDetails:
    facts = loaded.facts if loaded else None
    if facts is None:
        return OllamaDetails()
    return OllamaDetails(
        format="gguf" if facts.is_gguf else "safetensors",
        family=facts.architecture,
        families=[facts.architecture],
        parameter_size=_in_units(facts.num_parameters),
        quantization_level=facts.quantization,
    )


def _in_units(number: int) -> str:
    return next((f"{number / size:.2f}{unit}" for size, unit in UNITS if number >= size), str(number))


def _digest(name: str) -> str:
    """Returns the digest of the name: the files' own would take seconds for each gigabyte."""
    return hashlib.sha256(name.encode()).hexdigest()


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
