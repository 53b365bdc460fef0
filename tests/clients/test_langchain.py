"""LangChain of today: its standard tests for chat models, and its model for completions."""

from typing import Any

import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from process import Server
from pydantic import BaseModel, Field

MODEL = "qwen2.5-coder-0.5b"


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(description="the city's name")


class TestChatModel(ChatModelIntegrationTests):
    """All of LangChain's own tests; what the server cannot do yet is said in the properties."""

    base_url = ""

    @pytest.fixture(autouse=True)
    def _served_at(self, server: Server) -> None:
        self.base_url = server.url + "/v1"

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "base_url": self.base_url,
            "api_key": "unused",
            "model": MODEL,
            "temperature": 0,
            "max_tokens": 200,
            "frequency_penalty": 0.5,  # greedy, so small a model repeats itself for ever
            "max_retries": 0,
            "stream_usage": True,  # LangChain asks for it by default only at OpenAI's own address
        }

    @property
    def model_override_value(self) -> str:
        return MODEL  # there is only this one

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}

    @pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
    def test_structured_output_in_every_method(self, model: ChatOpenAI, method: Any) -> None:
        question = "Tell a joke about cats as JSON with the keys setup and punchline."
        structured = model.with_structured_output(Joke, method=method)
        joke = structured.invoke(question)
        assert isinstance(joke, Joke)
        assert [*structured.stream(question)][-1] == joke

    def test_bound_tools_are_called_and_streamed_alike(self, model: ChatOpenAI) -> None:
        bound = model.bind_tools([Joke, Weather], tool_choice="any", parallel_tool_calls=False)
        (call,) = bound.invoke("What is the weather in Oslo?").tool_calls
        assert call["name"] == "Weather" and call["args"]["city"] == "Oslo"
        chunks = [*bound.stream("What is the weather in Oslo?")]
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        assert [(c["name"], c["args"]) for c in whole.tool_calls] == [(call["name"], call["args"])]
        strict = model.bind_tools([Weather], strict=True, tool_choice="Weather").invoke("And in Rome?")
        assert [c["name"] for c in strict.tool_calls] == ["Weather"]

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return False  # this model does not see; tests/clients/test_images.py has one that does

    def test_a_prompt_that_is_too_long_is_langchains_own_error(self) -> None:
        model = ChatOpenAI(**self.chat_model_params)
        with pytest.raises(ContextOverflowError):
            model.invoke("hello " * 5000)


class TestCompletions:
    PROMPT = "def add(a, b):"

    @pytest.fixture
    def llm(self, server: Server) -> OpenAI:
        return OpenAI(
            base_url=server.url + "/v1", api_key="unused", model=MODEL, temperature=0, max_tokens=16, max_retries=0
        )

    def test_invoke_continues_the_prompt(self, llm: OpenAI) -> None:
        assert "return a + b" in llm.invoke(self.PROMPT)

    def test_a_stream_is_the_answer_in_pieces(self, llm: OpenAI) -> None:
        pieces = list(llm.stream(self.PROMPT))
        assert len(pieces) > 1 and "".join(pieces) == llm.invoke(self.PROMPT)

    def test_a_batch_answers_every_prompt_in_order(self, llm: OpenAI) -> None:
        add, count = llm.batch([self.PROMPT, "1, 2, 3,"])
        assert "return a + b" in add and count.startswith(" 4, 5")

    def test_generate_gives_n_choices_for_every_prompt(self, llm: OpenAI) -> None:
        result = llm.generate([self.PROMPT, "1, 2, 3,"], n=3)
        assert [len(choices) for choices in result.generations] == [3, 3]
        assert all("return" in choice.text for choice in result.generations[0])
        assert result.llm_output is not None and result.llm_output["token_usage"]["completion_tokens"] <= 6 * 16

    def test_a_stop_string_ends_the_text(self, llm: OpenAI) -> None:
        assert llm.invoke("1, 2, 3,", stop=[" 5"]) == " 4,"

    async def test_invoke_stream_and_batch_work_asynchronously(self, llm: OpenAI) -> None:
        whole = await llm.ainvoke(self.PROMPT)
        assert "return a + b" in whole
        assert "".join([piece async for piece in llm.astream(self.PROMPT)]) == whole
        add, count = await llm.abatch([self.PROMPT, "1, 2, 3,"])
        assert "return a + b" in add and count.startswith(" 4, 5")
