"""Whatever a client of Ollama's or Cohere's sends is taken or refused by name."""

from typing import Any

from fuzz_inputs import JSON, TEXT, allows, object_of
from hypothesis import example, given
from hypothesis import strategies as st
from profiles import examples
from test_fuzz_requests import WORDS, nested, tried

from api.answers import ignored_fields_header
from api.cohere import schemas as cohere_schemas
from api.cohere import view as cohere
from api.ollama import schemas as ollama_schemas
from api.ollama import view as ollama
from errors import APIError

HELLO: dict[Any, dict[str, Any]] = {
    ollama_schemas.OllamaChatRequest: {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    ollama_schemas.OllamaGenerateRequest: {"model": "m", "prompt": "Hi"},
}
OPTION = st.sampled_from([0, 1, -1, 0.5, 7.0, "7", True, 10**30, 1e300]) | JSON
OPTIONS = st.dictionaries(st.sampled_from([*ollama_schemas.OllamaOptions.model_fields, "other"]), OPTION, max_size=4)
OLLAMA = st.fixed_dictionaries(
    {},
    optional={
        "options": OPTIONS | JSON,
        "format": st.sampled_from(["", "json", "yaml"]) | JSON,
        "think": st.sampled_from([True, False, "low", "max"]),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(-1, 21),
        "tools": st.lists(object_of(WORDS), max_size=2),
        "messages": st.lists(object_of(f"{WORDS} images thinking tool_name tool_call_id"), max_size=3),
        **dict.fromkeys(("model", "prompt", "suffix", "system", "template", "keep_alive"), TEXT),
        "images": st.lists(TEXT, max_size=2),
        "raw": st.booleans(),
    },
)


@examples(150)
@given(OLLAMA)
@example({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": {"a": 1}, "arguments": "\ud800"}}]}]})
@example({"options": {"num_predict": 10**400, "seed": 1.5}})
def test_a_request_of_ollamas_is_a_chat_or_a_text_or_refused(fields: dict[str, Any]) -> None:
    for kind in (ollama_schemas.OllamaChatRequest, ollama_schemas.OllamaGenerateRequest):
        request = tried(kind, {**HELLO[kind], **fields})
        if request is None or not getattr(request, "messages", True):
            continue  # without messages, no chat is asked for
        assert ignored_fields_header(request.ignored_fields) is not None
        chat = request.model and allows(lambda request=request: ollama.as_chat(request, "m"), APIError)
        assert not chat or chat.model == "m"
        if isinstance(request, ollama_schemas.OllamaGenerateRequest):
            allows(lambda request=request: ollama.as_completion(request, "m"), APIError)


def test_calls_of_any_depth_in_ollamas_form_are_taken_or_refused() -> None:
    for depth in range(1, 1000, 50):
        call = {"function": {"name": "f", "arguments": nested(depth)}}
        request = tried(
            ollama_schemas.OllamaChatRequest, {"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]}
        )
        assert request is None or allows(lambda request=request: ollama.as_chat(request, "m"), APIError) is not False


@examples(80)
@given(st.data())
def test_a_request_of_coheres_is_for_vectors_or_refused(data: st.DataObject) -> None:
    names = "texts inputs input_type embedding_types truncate images output_dimension max_tokens"
    fields = data.draw(object_of(f"{names} {WORDS} float base64 int8 NONE START END search_query"))
    fields = {name: value for name, value in fields.items() if name in names.split()}
    for kind in (cohere_schemas.CohereEmbedRequest, cohere_schemas.CohereV1EmbedRequest):
        request = tried(kind, {"model": "m", "texts": ["a"], **fields})
        if request is not None:
            allows(lambda request=request: cohere.as_embedding(request), APIError)
            allows(lambda request=request: cohere.prompts_for(request), APIError)
